"""Demonstrations: trajectories that were chosen, to be made likely. For SFT and rejection sampling.

Both are baselines of the paper (arXiv 2503.09516, section Baselines). SFT learns golden answers. Rejection sampling
lets the untrained model answer with the search engine, a few times a question, and learns what came out right: whole
trajectories of several turns, what was retrieved masked. Leaves out demonstrations from elsewhere, and a second round
of sampling from the model that was trained.
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from searchr1_lite.config import ConfigError, Profile
from searchr1_lite.files import read_rows, write_whole
from searchr1_lite.retrieval.batching import cached
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import encode_prompt
from searchr1_lite.rollouts.rows import TOKENS, row_to_trajectory, trajectory_to_row
from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.rollouts.vllm import VLLMSampler
from searchr1_lite.runfolder import RunFolderError
from searchr1_lite.tasks.answers import exact_match
from searchr1_lite.tasks.questions import QuestionError
from searchr1_lite.types import Question, Retriever


def make_demonstrations(
    policy: Policy,
    questions: Sequence[Question],
    order: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    run_folder: Path,
    progress: Callable[[str], Any],
) -> list[Trajectory]:
    """Those of all steps, one after another; for GRPO none. `order` holds the questions that GRPO would ask.

    SFT goes through all questions, rejection sampling through what came out right of those in `order`.
    """
    if profile.algorithm == "sft":
        return golden_answers(policy, in_passes(questions, profile), profile)
    if profile.algorithm == "rejection_sampling":
        distinct = list(dict.fromkeys(order))
        return in_passes(right_answers(policy, distinct, retriever, profile, run_folder, progress), profile)
    return []


def in_passes(items: Sequence[Any], profile: Profile) -> list[Any]:
    """Items for all steps, as many in each as GRPO has rollouts: a new shuffle for each pass, made from the seed."""
    shuffle, order = random.Random(profile.seed), []
    needed = profile.steps * profile.rollouts_per_step
    while len(order) < needed:
        order += shuffle.sample(list(items), len(items))
    return order[:needed]


def golden_answers(policy: Policy, questions: Sequence[Question], profile: Profile) -> list[Trajectory]:
    """The first golden answer to each question, as the model would write it at once, with every token learned.

    No end token follows: as in a rollout, the turn ends with its closing tag, and nobody reads on.
    Raises QuestionError for an answer that would not be read as one, or does not fit.
    """
    made = []
    for question in questions:
        text = f"<answer> {question.golden_answers[0]} </answer>"
        prompt = encode_prompt(policy.tokenizer, question.question, profile.chat_template, profile.strategy)
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        fits = len(prompt) <= profile.max_prompt_tokens and len(ids) <= profile.max_response_tokens
        if not fits or not exact_match(text, question.golden_answers):
            what = f"is not read as its answer, or {len(prompt)} + {len(ids)} tokens do not fit"
            limits = f"{profile.max_prompt_tokens}, max_response_tokens = {profile.max_response_tokens}"
            raise QuestionError(f"question {question.id}: {text!r} {what} (max_prompt_tokens = {limits})")
        own, unsampled, turn = (1,) * len(ids), (0.0,) * len(ids), Turn(text, "answer")
        made.append(Trajectory(question, tuple(prompt), tuple(ids), own, unsampled, (turn,), True, "answer"))
    return made


def right_answers(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    run_folder: Path,
    progress: Callable[[str], Any],
) -> list[Trajectory]:
    """What the untrained policy gets right in `group_size` tries at each question, sampled once a run.

    demonstrations.jsonl.gz keeps them, ids and masks as they were sampled; it is there whole, with gzip's checksum, or
    not at all. A run that is cut off before goes on with the part, `save_every` steps' questions, that it was at.
    Raises ConfigError where none is right, and RunFolderError for a damaged file.
    """
    path, process = run_folder / "demonstrations.jsonl.gz", PartialState()
    missing = not path.is_file()
    process.wait_for_everyone()  # all have looked
    if missing:
        size = profile.save_every * profile.questions_per_step
        parts = {n: run_folder / f"checkpoints/right-{n}.jsonl.gz" for n in range(0, len(questions), size)}
        sampler = VLLMSampler(policy, profile) if profile.sampler == "vllm" else None
        sampling = {"group_size": profile.group_size, "seed": profile.seed * 1_000_003}  # as at a run's first step
        sample = partial(rollout, policy, retriever=cached(retriever), profile=profile, sampler=sampler, **sampling)
        for first, part in parts.items():
            if not part.is_file():
                asked = questions[first : first + size]
                _sample(sample, asked, part)
                progress(f"{run_folder.name}: candidates for {first + len(asked)} of {len(questions)} questions")
        whole = b"".join(part.read_bytes() for part in parts.values())
        if not gzip.decompress(whole):
            tried = f"group_size = {profile.group_size} answers to each of {len(questions)} questions was right"
            raise ConfigError(f"none of {tried}: nothing to learn from. Raise group_size or steps, or change model")
        if process.is_main_process:
            write_whole(path, whole)
        process.wait_for_everyone()
    right = [row_to_trajectory(row) for _, row in read_rows(path, RunFolderError, "demonstrations")]
    searches = ", ".join(f"{n} with {count}" for count, n in sorted(Counter(one.searches for one in right).items()))
    tried = len(questions) * profile.group_size
    progress(f"{run_folder.name}: {len(right)} of {tried} candidates are right ({searches} searches)")
    return right


def _sample(sample: Callable[..., list[Trajectory]], questions: Sequence[Question], part: Path) -> None:
    """Write the right ones of the answers sampled to each question, in the order of the questions."""
    process = PartialState()
    tried = sample(questions=questions[process.process_index :: process.num_processes])
    right = [t for t in tried if exact_match(t.policy_text, t.question.golden_answers) and not t.search_failed]
    place = {question.id: number for number, question in enumerate(questions)}
    right = sorted(gather_object(right), key=lambda one: place[one.question.id])
    if process.is_main_process:
        rows = [trajectory_to_row(one) | {name: getattr(one, name) for name in TOKENS} for one in right]
        write_whole(part, gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))
    process.wait_for_everyone()
