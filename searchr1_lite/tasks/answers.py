"""Whether an answer is right: the last `<answer>` of a text, normalised, against the golden answers.

Exact match is the paper's measure and its reward (Search-R1 verl/utils/reward_score/qa_em.py); F1 and substring match
stand beside it. Leaves out rewards that read more than the answer (training/rewards.py).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_answer(response: str) -> str | None:
    """The text of the last `<answer>...</answer>` of a response, or None."""
    found = ANSWER.findall(response)
    return found[-1].strip() if found else None


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra space: the SQuAD rules, in their order."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def comparable(text: str) -> str:
    """The text normalised or, where nothing of it would be left ("The The", "?"), itself in lower case."""
    return normalize_answer(text) or text.strip().lower()


def comparable_golden(golden_answers: str | Sequence[str]) -> list[str]:
    """The golden answers to compare with; a single string is one of them, none at all is a ValueError."""
    golden_answers = (golden_answers,) if isinstance(golden_answers, str) else tuple(golden_answers)
    if not golden_answers:
        raise ValueError("a score needs at least one golden answer, got none")
    return [comparable(golden) for golden in golden_answers]


def exact_match(response: str, golden_answers: str | Sequence[str]) -> float:
    """1.0 if the last answer of `response` equals a golden answer after normalisation, else 0.0."""
    answer = comparable(last_answer(response) or "")
    return float(answer in comparable_golden(golden_answers) and answer != "")


def substring_match(response: str, golden_answers: str | Sequence[str]) -> float:
    """1.0 if a golden answer stands, normalised, within the last answer (Search-R1 qa_em.py, subem_check)."""
    answer = comparable(last_answer(response) or "")
    return float(any(golden and golden in answer for golden in comparable_golden(golden_answers)))


def f1(response: str, golden_answers: str | Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the last answer's words against the best golden answer (0 to 1).

    "yes", "no" and "noanswer" get no credit for a shared word: they are right or wrong (HotpotQA's official script).
    """
    answer = comparable(last_answer(response) or "")
    return max(_word_f1(answer, golden) for golden in comparable_golden(golden_answers))


def _word_f1(answer: str, golden: str) -> float:
    if answer != golden and {answer, golden} & {"yes", "no", "noanswer"}:
        return 0.0
    said, wanted = answer.split(), golden.split()
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / max(1, len(said) + len(wanted))


def stands_in(texts: Sequence[str], golden_answers: str | Sequence[str]) -> bool:
    """Whether a golden answer stands, normalised, in one of the texts; one that normalises to nothing does not."""
    golden_answers = (golden_answers,) if isinstance(golden_answers, str) else golden_answers
    words = filter(None, map(normalize_answer, golden_answers))
    return any(golden in text for golden in words for text in map(normalize_answer, texts))
