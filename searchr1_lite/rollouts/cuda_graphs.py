"""Steps of decoding as CUDA graphs: recorded once, repeated without Python in between. Off by default."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from searchr1_lite.rollouts.policy import Policy

Record = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


class Recorded:
    """Steps of fixed shape, each recorded once and then repeated without Python in between.

    Rows are rounded up to a multiple of 8 and entries to one of `entries`, so few recordings serve a rollout. A row too
    many reads padding into its slot's last entry, which nothing looks at. When the cache grows, recordings are made
    anew. `record` takes a step and gives what repeats it, returning the same tensor (n, vocabulary) filled again.
    """

    def __init__(
        self, policy: Policy, cache: Any, record: Record, entries: int, read: Callable[..., torch.Tensor]
    ) -> None:
        self.policy, self.cache, self.record, self.entries, self.read = policy, cache, record, entries, read
        self.inputs = torch.zeros((3, cache.slots, 1), dtype=torch.long, device=policy.device)
        self.steps: dict[tuple[int, int, int], Callable[[], torch.Tensor]] = {}

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        n, entries = len(tokens), self.cache.entries
        rows, width = (
            min(-(-n // 8) * 8, self.cache.slots),
            min(-(-(int(lengths.max()) + 1) // self.entries) * self.entries, entries),
        )
        inputs = np.zeros((3, rows, 1), dtype=np.int64)  # ids, positions, places
        inputs[2] = entries - 1
        inputs[:, :n, 0] = tokens, lengths, lengths
        self.inputs[:, :rows] = torch.from_numpy(inputs).to(self.inputs.device)
        key = rows, width, entries
        if key not in self.steps:
            self.steps = {known: step for known, step in self.steps.items() if known[2] == entries}
            ids, positions, places = self.inputs[:, :rows]
            slots, model = slice(0, rows), self.policy.model
            self.steps[key] = self.record(lambda: self.read(model, self.cache, slots, ids, positions, places, width))
        return self.steps[key]()[:n].clone()


def cuda_graph(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Record a step as a CUDA graph, after a run on a stream of its own for what kernels set up once."""
    autocast = partial(
        torch.autocast,
        "cuda",
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_enabled("cuda"),
        cache_enabled=False,  # a cached cast would be recorded as if it were made once
    )
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside), autocast():
        step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_graph_pool()), autocast():
        logits = step()

    def repeat() -> torch.Tensor:
        graph.replay()
        return logits

    return repeat


@cache
def _graph_pool():
    """Memory for all graphs: no two run at once, and what one returns is copied at once."""
    return torch.cuda.graph_pool_handle()
