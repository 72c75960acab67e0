"""Trajectories as JSON rows, for people, for the analysis, and back again. What is computed from them is not here."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from searchr1_lite.rollouts.trajectory import Trajectory, Turn
from searchr1_lite.types import Hit, Passage, Question

TOKENS = ("prompt_ids", "completion_ids", "loss_mask", "logprobs")  # what a row of demonstrations has beside the others


def trajectory_to_row(trajectory: Trajectory, tokenizer: Any = None, **extra: Any) -> dict[str, Any]:
    """A trajectory as a JSON object for people and for the analysis: texts and counts, `extra` first, no token ids.

    With a tokenizer there is "calls" as well: of each text its prompt, its tokens as pieces of text, and the
    log-probabilities of those that the model wrote (None for the others).
    """
    question = trajectory.question
    calls = {"calls": [_call(call, tokenizer) for call in trajectory.calls]} if tokenizer else {}
    return {
        **extra,
        "question": {
            "id": question.id,
            "question": question.question,
            "golden_answers": list(question.golden_answers),
            "metadata": question.metadata,
        },
        "searches": trajectory.searches,
        "finished": trajectory.finished,
        "stop_reason": trajectory.stop_reason,
        "response_length": trajectory.response_length,
        "retrieved_tokens": trajectory.retrieved_tokens,
        "turns": [
            {
                "text": turn.text,
                "action": turn.action,
                "query": turn.query,
                "observation": turn.observation,
                "hit_ids": [hit.passage.id for hit in turn.hits],
            }
            for turn in trajectory.turns
        ],
        **calls,
    }


def _call(call: Trajectory, tokenizer: Any) -> dict[str, Any]:
    written = zip(call.logprobs, call.loss_mask, strict=True)
    return {
        "prompt": tokenizer.decode(call.prompt_ids),
        "pieces": token_pieces(tokenizer, call.completion_ids),
        "logprobs": [round(logprob, 3) if own else None for logprob, own in written],
    }


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, joined the text itself.

    Bytes of a character that tokens share are all given to the last of these; a rest that is no character stands at
    the end as U+FFFD.
    """
    pieces, start = [], 0  # `start`: the first token whose bytes are not shown yet
    for end in range(1, len(ids) + 1):
        text = _decoded(tokenizer, tuple(ids[start:end]))
        whole = not text.endswith("\ufffd") or end == len(ids)
        pieces.append(text if whole else "")
        start = end if whole else start
    return pieces


@lru_cache(maxsize=200_000)
def _decoded(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def row_to_trajectory(row: dict[str, Any]) -> Trajectory:
    """Back from a row that has TOKENS as well. Of passages the ids are left; their text is in the observation."""
    turns = []
    for turn in row["turns"]:
        hits = tuple(Hit(Passage(key, "", ""), 0.0) for key in turn["hit_ids"])
        turns.append(Turn(turn["text"], turn["action"], turn["query"], hits, turn["observation"]))
    asked = Question(**row["question"] | {"golden_answers": tuple(row["question"]["golden_answers"])})
    return Trajectory(asked, *(tuple(row[name]) for name in TOKENS), tuple(turns), row["finished"], row["stop_reason"])
