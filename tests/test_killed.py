"""A run whose process is killed (SIGKILL), again and again at random moments, ends as if nothing had happened."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import result, run

KILLS = {"grpo": 4, "ppo": 1, "sft": 1, "rejection_sampling": 2}
SETTINGS = {"steps": 10, "save_every": 2, "updates_per_rollout": 1}


def work(folder: Path, retriever, algorithm: str) -> None:
    """The whole run, in a process of its own."""
    from conftest import make_tokenizer

    from searchr1_lite.training import demonstrations, rewards

    torch.set_num_threads(1)
    rewards.trajectory_reward = lambda trajectory, *kind: sum(trajectory.completion_ids) % 7 / 7
    if algorithm == "rejection_sampling":  # some noise is right
        demonstrations.exact_match = lambda text, golden: len(text) % 2
    run(folder, make_tokenizer(), retriever, algorithm=algorithm, **SETTINGS)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes copied from one that has imported everything, so that the kills fall into the work."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot copy a process")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["searchr1_lite.training.loop", "test_checkpoints", "conftest"])
    return context


@pytest.mark.parametrize("algorithm", list(KILLS))
def test_killed_at_random_moments_it_ends_the_same(tmp_path, retriever, processes, algorithm):
    def start(name: str) -> multiprocessing.Process:
        process = processes.Process(target=work, args=(tmp_path / name, retriever, algorithm))
        process.start()
        return process

    start("warm").join()  # the server has imported what it will copy
    began = time.monotonic()
    start("straight").join()
    seconds = time.monotonic() - began
    chance, killed, folders = random.Random(0), 0, []
    while killed < KILLS[algorithm]:
        folders.append(tmp_path / f"killed-{len(folders)}")
        ended = False
        while not ended:
            process = start(folders[-1].name)
            process.join(chance.uniform(0.2, 1.0) * seconds)
            ended = not process.is_alive()
            if not ended:
                process.kill()
                process.join()
                killed += 1
                seconds *= 1.1  # on a machine that has become slow it must come to an end, too
        assert process.exitcode == 0
    for folder in folders:
        assert result(folder) == result(tmp_path / "straight")
        assert [row["step"] for row in result(folder)[0]] == list(range(1, 11))
        saved = (one / "adapter/adapter_model.safetensors" for one in (tmp_path / "straight", folder))
        weights, others = map(load_file, saved)
        assert all(torch.equal(weights[name], others[name]) for name in weights)
