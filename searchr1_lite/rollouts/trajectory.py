"""What one rollout leaves behind: the exact token ids, who wrote each, and the turns as people read them.

Ids are the ids that were sampled or fed. Text is decoded from ids, for people and for rewards; ids are never made
from decoded text. How one is written as a JSON line is in rows.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from searchr1_lite.types import Hit, Question


@dataclass(frozen=True, slots=True)
class Turn:
    """One stretch of model text, the action found in it, and what the environment put after it.

    `action` is "search", "answer" or "invalid". `query` is the searched text of a search that was executed,
    else None. `observation` is the text fed back, "" where nothing was (an answer, or the last turn).
    """

    text: str
    action: str
    query: str | None = None
    hits: tuple[Hit, ...] = ()
    observation: str = ""


class HasTurns:
    """What `turns` and `stop_reason` say: of a trajectory, and of an attempt in several texts (strategies.py)."""

    __slots__ = ()
    turns: Sequence[Turn]
    stop_reason: str

    @property
    def policy_text(self) -> str:
        """What the model itself wrote. Rewards read this, so that a passage holding `<answer>` cannot be scored."""
        return "".join(turn.text for turn in self.turns)

    @property
    def searches(self) -> int:
        """Number of searches that were executed."""
        return sum(turn.query is not None for turn in self.turns)

    @property
    def search_failed(self) -> bool:
        """Its last search failed for good: what it would have come to is not known, and nobody learns from it."""
        return self.stop_reason in ("search failed", "search refused")

    @property
    def invalid_actions(self) -> int:
        """Number of turns without a well-formed action."""
        return sum(turn.action == "invalid" for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Trajectory(HasTurns):
    """One question worked through.

    `prompt_ids`: (prompt tokens,). `completion_ids`, `loss_mask`, `logprobs`: (completion tokens,), equally long.
    `loss_mask` is 1 where the policy wrote the token and 0 where the environment did; TRL calls it `env_mask`,
    Search-R1 `info_mask`. `logprobs` are of the sampled tokens at the sampling temperature, 0.0 where the mask is 0.
    `finished` is True when the model gave an answer; `stop_reason` is "answer", "turns" (its last turn held no
    answer), "context" (the next turn would not have fitted the context), "search failed" or "search refused".
    """

    question: Question
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    turns: tuple[Turn, ...]
    finished: bool
    stop_reason: str

    def __post_init__(self) -> None:
        lengths = {len(self.completion_ids), len(self.loss_mask), len(self.logprobs)}
        if len(lengths) != 1:
            raise ValueError(
                f"question {self.question.id}: completion_ids, loss_mask and logprobs must be equally long, "
                f"got {len(self.completion_ids)}, {len(self.loss_mask)} and {len(self.logprobs)}"
            )

    @property
    def response(self) -> str:
        """The whole completion as text, retrieved passages included."""
        return "".join(turn.text + turn.observation for turn in self.turns)

    @property
    def response_length(self) -> int:
        """Tokens that the model wrote (retrieved ones are not counted)."""
        return sum(self.loss_mask)

    @property
    def retrieved_tokens(self) -> int:
        """Tokens that the environment put there: passages, and what it says of an invalid action."""
        return len(self.loss_mask) - self.response_length

    @property
    def calls(self) -> list["Trajectory"]:
        """The texts that were written: this one. Other strategies need several (evaluation/strategies.py)."""
        return [self]
