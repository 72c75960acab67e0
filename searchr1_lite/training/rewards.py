"""What a response earns: exact match of its last answer, and the format-aware variant of Search-R1's v0.3.

Rewards read the response only. The original scores prompt and response together and therefore needs two `<answer>`
spans, the first being the prompt's example (Search-R1 verl/utils/reward_score/qa_em.py); here the prompt never
takes part. No learned rewards, no partial credit for words.
"""

import re
import string
from collections.abc import Sequence

from searchr1_lite.rollout.trajectory import Trajectory

TAG = re.compile(r"(</?(?:think|search|information|answer)>)")

# Where each tag may stand and where it leads: think, then search, information and think again as often as wanted,
# then the answer (Search-R1 qa_em_format.py, is_valid_sequence). Text is allowed inside a tag's span only.
NEXT_STATE = {
    ("start", "<think>"): "in think",
    ("in think", "</think>"): "after think",
    ("after think", "<search>"): "in search",
    ("in search", "</search>"): "after search",
    ("after search", "<information>"): "in information",
    ("in information", "</information>"): "start",
    ("after think", "<answer>"): "in answer",
    ("in answer", "</answer>"): "end",
}


def last_answer(response: str) -> str | None:
    """The text of the last `<answer>...</answer>` of a response, or None."""
    found = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    return found[-1].strip() if found else None


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra space: the SQuAD rules, in their order."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(response: str, golden_answers: str | Sequence[str]) -> float:
    """1.0 if the last answer of `response` equals a golden answer after normalisation, else 0.0.

    A single string is one golden answer; none at all is a ValueError. Where normalisation leaves nothing of a
    text ("The The", "?"), the text itself is compared, so that an empty answer never counts as right.
    """
    golden_answers = (golden_answers,) if isinstance(golden_answers, str) else tuple(golden_answers)
    if not golden_answers:
        raise ValueError("exact_match needs at least one golden answer, got none")
    answer = last_answer(response)
    if not answer:
        return 0.0
    answer = normalize_answer(answer) or answer.lower()
    return float(any(answer == (normalize_answer(golden) or golden.strip().lower()) for golden in golden_answers))


def has_valid_format(response: str) -> bool:
    """Whether the tags of a response follow one another as Search-R1's v0.3 wants them, with no text between."""
    state = "start"
    for piece in TAG.split(response):
        if TAG.fullmatch(piece):
            state = NEXT_STATE.get((state, piece), "invalid")
        elif piece.strip() and not state.startswith("in "):
            state = "invalid"
        if state == "invalid":
            return False
    return state == "end"


def format_reward(
    response: str,
    golden_answers: str | Sequence[str],
    structure: float = 0.2,
    final: float = 0.1,
    retrieval: float = 0.0,
) -> float:
    """Exact match graded by format, with the six outcomes and the weights of Search-R1's v0.3 (qa_em_format.py).

    Right: 1, or 1 - structure where the format is broken. Wrong in good format: structure, plus `retrieval` if a
    golden answer stands in retrieved text. Wrong in bad format: `final` if there is an answer at all, else 0.
    `response` holds the retrieved blocks too.
    """
    valid = has_valid_format(response)
    if exact_match(response, golden_answers):
        return 1.0 if valid else 1.0 - structure
    if valid:
        return structure + (retrieval if answer_was_retrieved(response, golden_answers) else 0.0)
    return final if last_answer(response) is not None else 0.0


def answer_was_retrieved(response: str, golden_answers: str | Sequence[str]) -> bool:
    """Whether a golden answer stands, normalised, inside an `<information>` block of the response."""
    golden_answers = (golden_answers,) if isinstance(golden_answers, str) else golden_answers
    blocks = [normalize_answer(block) for block in re.findall(r"<information>(.*?)</information>", response, re.DOTALL)]
    return any(normalize_answer(golden) in block for golden in golden_answers for block in blocks)


def trajectory_reward(trajectory: Trajectory, kind: str) -> float:
    """The reward of one trajectory; `kind` is the profile's `reward`, "exact_match" or "format".

    A passage may hold `<answer>` or other tags as ordinary text. Exact match therefore reads only what the model
    wrote, and the format is judged with the tags inside observations taken out.
    """
    golden = trajectory.question.golden_answers
    if kind == "exact_match":
        return exact_match(trajectory.policy_text, golden)
    return format_reward("".join(turn.text + _quoted(turn.observation) for turn in trajectory.turns), golden)


def _quoted(observation: str) -> str:
    """An observation whose only tags are the pair that wraps it; the invalid-action text stays text."""
    if not observation.strip().startswith("<information>"):
        return TAG.sub("", observation)
    return f"<information>{TAG.sub('', observation)}</information>"
