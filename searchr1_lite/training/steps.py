"""The trajectories of each training step: which questions, sampled by what, with which random numbers.

Every process of a training rolls out its share of the questions. Leaves out how one rollout goes (engine.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed

from searchr1_lite.config import REINFORCED, Profile
from searchr1_lite.preflight import memory_for
from searchr1_lite.retrieval.controls import Noisy, noise_share
from searchr1_lite.retrieval.corpus import load_corpus
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, autocast
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.rollouts.vllm import VLLMSampler
from searchr1_lite.types import Question, Retriever


@dataclass
class Rollouts:
    """The trajectories of each step, this process's share: `group_size` for each of its questions.

    An algorithm that makes no rollouts gets the step's `demonstrations` instead.
    """

    profile: Profile
    policy: Policy
    order: Sequence[Question]  # of all steps
    retriever: Retriever
    demonstrations: Sequence[Trajectory]
    run_folder: Path
    cache_hits: int | None = None  # searches of the latest step that had been asked before

    def __post_init__(self) -> None:
        self.noise = load_corpus(self.profile.corpus) if self.profile.noise_start or self.profile.noise_end else None
        served = self.profile.sampler == "vllm" and self.profile.algorithm in REINFORCED
        self.server = VLLMSampler(self.policy, self.profile) if served else None

    def __call__(self, step: int, model: Any) -> list[Trajectory]:
        """Sampled by `model`, with random numbers of this step alone: a run that goes on samples the same."""
        profile, process = self.profile, PartialState()
        share = profile.questions_per_step // process.num_processes
        first = step * profile.questions_per_step + process.process_index * share
        set_seed((profile.seed * 1_000_003 + step) % 2**32)  # so does all that follows: order of rows, dropout
        if profile.algorithm not in REINFORCED:
            return list(self.demonstrations[first * profile.group_size :][: share * profile.group_size])
        if self.server:
            self.server.load_adapter(model, self.run_folder / "checkpoints/served", step)
        retriever, before = self.retriever, getattr(self.retriever, "hits", 0)
        if self.noise:
            noise = noise_share(step, profile.steps, profile.noise_start, profile.noise_end)
            retriever = Noisy(retriever, self.noise, noise, profile.seed * 1_000_003 + step)
        memory = memory_for("rollout", profile, "rollout_rows", "max_context_tokens")
        with memory, torch.no_grad(), autocast(profile, self.policy.device):
            trajectories = rollout(
                replace(self.policy, model=model),
                self.order[first : first + share],
                retriever,
                profile,
                group_size=profile.group_size,
                seed=profile.seed * 1_000_003 + step,
                sampler=self.server,
            )
        self.cache_hits = getattr(self.retriever, "hits", 0) - before
        return trajectories
