"""Put a question of one's own to any model over any index, and see the trajectory as it is written.

`searchr1 ask` in a shell, `ask` in a notebook. Nothing is judged, since nobody said what is right. Left out: writing
through vLLM, and more than one question at a time.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from io import TextIOWrapper
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import TextIO

from searchr1_lite.config import Profile
from searchr1_lite.errors import UserError
from searchr1_lite.evaluation.evaluate import Answered, load_adapted
from searchr1_lite.evaluation.strategies import STRATEGIES, answer
from searchr1_lite.printable import printable
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.cuda_graphs import cuda_graph
from searchr1_lite.rollouts.decoding import LocalSampler, decode
from searchr1_lite.rollouts.decoding import greedy as likeliest
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import MARKS
from searchr1_lite.tasks.answers import last_answer
from searchr1_lite.tasks.questions import QuestionError
from searchr1_lite.types import Question, Retriever

MODEL, ENVIRONMENT, END = "model", "environment", "end"
Show = Callable[[str, str], None]  # gets a piece of text and who wrote it, and at the end one line of what came of it
DRAWN = 0.1  # seconds between two drawings of a notebook's cell
STYLES = {
    MODEL: "font-weight:bold",
    ENVIRONMENT: "color:#666;border-left:3px solid #bbb;padding-left:.6em;margin:.3em 0",
    END: "font-style:italic",
}


def ask(
    question: str,
    policy: Policy,
    retriever: Retriever,
    profile: Profile,
    *,
    sampled: bool = False,
    seed: int = 0,
    show: Show | None = None,
) -> Answered:
    """Answer one question by the profile's strategy; what is written goes to `show` as soon as it is.

    Without `show` that is the notebook's cell, or the terminal. What a strategy writes in several texts is shown when
    all is done; of any other the pieces, joined, are the trajectory's `response`. Tags of the protocol in the question
    lose their brackets, as in a passage, and characters that a terminal obeys are replaced by signs.
    Raises QuestionError for a question without words, PromptTooLongError, and RetrievalError where the search fails.
    """
    if not question.strip():
        raise QuestionError("the question is empty; ask something")
    if show is None:
        show = Notebook() if _in_notebook() else Terminal()
    asked = Question("asked", MARKS.sub(r"[\1]", printable(question.strip())), ())
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"1 of 1 trajectories ended")  # the last line says so
        if profile.strategy in STRATEGIES:
            (made,) = answer(policy, [asked], retriever, profile, greedy=not sampled, seed=seed)
            for turn in made.turns:
                show(f"{turn.text.strip()}\n" if turn.text else turn.observation, MODEL if turn.text else ENVIRONMENT)
        else:
            sampler = ShowingSampler(policy, profile, not sampled, show)
            (made,) = rollout(policy, [asked], retriever, profile, greedy=not sampled, seed=seed, sampler=sampler)
    show(_last_line(made, time.monotonic() - began), END)
    return made


class ShowingSampler(LocalSampler):
    """Writes one trajectory and shows each piece: what it has written of a turn, and what it reads after it.

    A character whose bytes are not all there yet waits for the rest, or for the end of the turn.
    """

    def __init__(self, policy: Policy, profile: Profile, greedy: bool, show: Show) -> None:
        pick, record = (likeliest if greedy else None), None
        if profile.cuda_graphs and policy.device.type == "cuda":
            record = cuda_graph
        super().__init__(policy, 1, profile.max_response_tokens, pick, profile.temperature, record)
        self.show, self.shown = show, 0  # characters of the turn

    def read(self, row: int, ids: Sequence[int]) -> None:
        super().read(row, ids)
        self.show(decode(self.policy.tokenizer, ids), ENVIRONMENT)
        self.shown = 0

    def advance(self) -> list[tuple[int, list[int], list[float]]]:
        ended = super().advance()
        text = decode(self.policy.tokenizer, self.written.get(0, ([], []))[0])  # a failed search closed the row
        text = text if ended else text.rstrip("\ufffd")
        if len(text) > self.shown:
            self.show(text[self.shown :], MODEL)
            self.shown = len(text)
        return ended


class Terminal:
    """The model's words as they come; what it reads is set in with a bar, and wrapped where there is a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.at_start, self.last = stream or sys.stdout, True, ""

    def __call__(self, text: str, who: str) -> None:
        text = printable(text)
        if who != MODEL:
            lines = text.strip().splitlines()
            if who == ENVIRONMENT:
                lines = [f"  | {part}" for line in lines for part in self._wrapped(line)]
            text = "\n" * (not self.at_start) + "\n".join(lines) + "\n"
        elif self.last != MODEL:
            text = text.lstrip("\n")
        if text:
            print(text, end="", file=self.stream, flush=True)
            self.at_start, self.last = text.endswith("\n"), who

    def _wrapped(self, line: str) -> list[str]:
        if not self.stream.isatty():
            return [line]
        return wrap(line, max(get_terminal_size().columns - 5, 20)) or [""]


class Notebook:
    """The same in a cell's output, drawn anew as it grows: all text escaped, none of it read as HTML or mathematics."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self.html, self.drawn = HTML, 0.0
        self.blocks: list[tuple[str, str]] = []
        self.handle = display(HTML(""), display_id=True)

    def __call__(self, text: str, who: str) -> None:
        if who == MODEL and self.blocks and self.blocks[-1][0] == MODEL:
            text = self.blocks.pop()[1] + text
        self.blocks.append((who, text))
        tag = text.rstrip().endswith(">")  # what comes next may take its time
        if who != MODEL or tag or time.monotonic() - self.drawn > DRAWN:
            self.handle.update(self.html("".join(block_html(*block) for block in self.blocks)))
            self.drawn = time.monotonic()


def block_html(who: str, text: str) -> str:
    """One piece of a trajectory, in a <pre>, which Jupyter does not typeset."""
    style = f"white-space:pre-wrap;font-family:inherit;{STYLES[who]}"
    return f'<pre style="{style}">{escape(printable(text.strip()))}</pre>'


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return hasattr(shell and shell.get_ipython(), "kernel")


def _last_line(made: Answered, seconds: float) -> str:
    said = f"answer: {last_answer(made.policy_text)}" if made.finished else f"no answer (stopped: {made.stop_reason})"
    searches = f"{made.searches} search" + ("" if made.searches == 1 else "es")
    return f"[{said}; {searches}, {made.response_length} tokens written, {seconds:.1f} s]"


def _typed() -> Iterator[str]:
    """What a person types, a line each; blank ones are no questions."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  (arrow keys and history for `input`)
    with suppress(EOFError):
        while True:
            if line := input("\nquestion> ").strip():
                yield line
    print()


def answer_words(questions: list[str], profile: Profile, adapter: Path | None, sampled: bool = False) -> None:
    """Answer the question, or without one those of standard input, a line each; Ctrl-D ends, Ctrl-C ends an answer.

    What is wrong with one line ends none of the others. Raises UserError, and SystemExit with 1 after a bad line.
    """
    if len(questions) > 1:
        raise QuestionError(f"one question at a time, in quotes; got {questions}")
    for stream in (sys.stdin, sys.stdout):  # whatever bytes come, and whatever the terminal can show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    policy, retriever = load_adapted(profile, adapter), load_retriever(profile)
    answered = partial(ask, policy=policy, retriever=retriever, profile=profile, sampled=sampled, seed=profile.seed)
    if questions:
        answered(questions[0])
    elif not _answer_lines(answered):
        sys.exit(1)


def _answer_lines(answered: Callable[[str], Answered]) -> bool:
    """Whether all were answered."""
    person, well = sys.stdin.isatty(), True
    for line in _typed() if person else sys.stdin:
        try:
            if not person:
                print(f"\nQ: {printable(line.strip())}", flush=True)
            answered(line)
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            well = person
        except KeyboardInterrupt:
            if not person:
                raise
            print("\n[interrupted]")
    return well
