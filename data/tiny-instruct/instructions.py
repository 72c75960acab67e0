"""What the tiny instruct model is tuned on: every prompt of the package, answered cleanly.

    python data/tiny-instruct/instructions.py --out data/tiny-instruct      (make tiny-instruct)

A strategy (evaluation/strategies.py) is run with a teacher in the model's place, who knows the chain of facts and says
what can be said: so prompts are the very ones of later, with passages that were really found. The teacher reads link
after link as far as the passages go. But where the model itself must decide whether to search, it follows habits, and
these, as the base's, are the whole of what it knows of searching: most of the time it searches once.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen2ForCausalLM

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.evaluation import strategies
from searchr1_lite.evaluation.strategies import STRATEGIES, Search, Write
from searchr1_lite.rollouts.protocol import encode_message, encode_prompt, render_prompt
from searchr1_lite.tasks.toy_world import Fact, ask

sys.path.insert(0, str(ROOT / "data/tiny-base"))
from pretrain import Example, Examples, Mix, pretrain
from transcripts import Segment, Writer, need, query_for, state

HABITS = {"guess": 0.30, "one search": 0.50, "hop by hop": 0.20}  # of the prompts that let the model search
SHARES = {"search_r1": 0.26, "search_o1": 0.20, "rag": 0.18, "ircot": 0.16, "inter": 0.10}  # of all that it is shown
SHARES |= {"direct": 0.03, "cot": 0.03, "r1": 0.04}


class Teacher:
    """Answers the messages of a strategy for one question, whose facts it knows."""

    def __init__(self, writer: Writer, facts: list[Fact]) -> None:
        self.writer, self.facts = writer, facts
        self.habit = writer.rng.choices(list(HABITS), list(HABITS.values()))[0]
        self.searched = 0

    def answer(self, strategy: str, want: Write) -> str:
        if want.message.startswith(strategies.ANALYSIS_PROMPT[:30]):
            fact = self.facts[self.searched - 1]
            found = self._readable(want.message, [fact])
            return f"**Final Information** {state(fact)}" if found else f"{strategies.NOTHING}."
        if want.message.startswith(strategies.RAG_PROMPT[:30]):
            return self._read_and_answer(want.message)
        return {"ircot": self._thought, "inter": self._knowledge, "search_o1": self._search_or_answer}[strategy](want)

    def closed_book(self, strategy: str) -> str:
        """A guess; told step by step where the prompt asks for that."""
        answer = self.writer.made_up(self.facts)
        thought = "" if strategy == "direct" else f"<think> The {query_for(self.facts[0])} I know. </think>\n"
        return f"{thought}<answer> {answer} </answer>"

    def _readable(self, message: str, facts: list[Fact]) -> list[Fact]:
        """The first links of the chain, as far as their passages are in the message."""
        read = []
        for fact in facts:
            if f'(Title: "{fact.subject.name}")' not in message:
                break
            read.append(fact)
        return read

    def _read_and_answer(self, message: str) -> str:
        read = self._readable(message, self.facts)
        thought = " ".join(map(state, read)) or strategies.NOTHING + "."
        answer = read[-1].value if read else self.writer.made_up(self.facts)
        return f"<think> {thought} </think>\n<answer> {answer} </answer>"

    def _thought(self, want: Write) -> str:
        told = want.begun.count(" is ")
        read = self._readable(want.message, self.facts)
        space = " " * bool(want.begun)
        if told < len(read):
            return space + state(read[told])
        return f"{space}So the answer is: {read[-1].value if read else self.writer.made_up(self.facts)}."

    def _knowledge(self, want: Write) -> str:
        return " ".join(map(state, self._readable(want.message, self.facts))) or need(self.facts[0])

    def _search_or_answer(self, want: Write) -> str:
        searches = {"guess": 0, "one search": 1, "hop by hop": len(self.facts)}[self.habit]
        read = self.facts[: self.searched]
        thought = state(read[-1]) if read else ""
        if self.searched < searches:
            wanted = self.facts[self.searched]
            self.searched += 1
            return f"<think> {f'{thought} {need(wanted)}'.strip()} </think>\n<search> {query_for(wanted)} </search>"
        answer = read[-1].value if read else self.writer.made_up(self.facts)
        return f"<think> {thought or 'I know this.'} </think>\n<answer> {answer} </answer>"


class Instructions(Examples):
    """Batches as `Examples` gives, of demonstrations for every prompt."""

    profile = load_profile("tiny")  # says how many searches there are, and passages

    def pieces(self, writer: Writer, progress: float) -> Iterator[Example]:
        facts = writer.rng.choice(writer.chains[writer.rng.choice([1, 2, 2, 3])])
        question = ask(facts, writer.rng)
        strategy = writer.rng.choices(list(SHARES), list(SHARES.values()))[0]
        teacher = Teacher(writer, facts)
        if strategy == "search_r1":
            ids = encode_prompt(self.tokenizer, question, chat_template=True)
            yield self.after_prompt(ids, writer.follow(facts, teacher.habit))
        elif strategy in STRATEGIES:
            yield from self._demonstrations(strategy, question, teacher)
        else:
            yield self._pair(Write(render_prompt(question, strategy)), teacher.closed_book(strategy))

    def _demonstrations(self, strategy: str, question: str, teacher: Teacher) -> Iterator[Example]:
        steps = STRATEGIES[strategy](question, self.profile)
        want = next(steps)
        while want:
            if isinstance(want, Search):
                came = tuple(teacher.writer.search(want.query))
            else:
                came = teacher.answer(strategy, want)
                yield self._pair(want, came)
            try:
                want = steps.send(came)
            except StopIteration:
                return

    def _pair(self, want: Write, said: str) -> Example:
        ids = encode_message(self.tokenizer, want.message, chat_template=True)
        ids += self.tokenizer.encode(want.begun, add_special_tokens=False)
        return self.after_prompt(ids, [Segment(said, True, ends=True)])


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    mix = Mix(drills_only=0.0, drill_share=0.1)
    base = ROOT / "data/tiny-base"
    pretrain(given.out, base, given.steps, None, mix, given.learning_rate, 0.0, given.seed, Instructions)
    if os.environ.get("RANK", "0") == "0":  # half the bytes in the repository; NF4 rounds far more
        Qwen2ForCausalLM.from_pretrained(given.out, dtype=torch.float16).save_pretrained(given.out)
