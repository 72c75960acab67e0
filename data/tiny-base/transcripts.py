"""What the tiny base model is pretrained on: reading drills, and transcripts of which only a part search well.

A transcript is a list of segments, each written by the policy or by the environment. Segments are turned into ids one
by one, just as a rollout appends them, so that the model meets the same ids at the same places later. Every transcript
follows one of five habits; their shares are the whole of what the base knows about searching, and reinforcement can
only amplify what is there. Names come from worlds that are never trained or tested on.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

from searchr1_lite.rollouts.protocol import INVALID_ACTION, render_observation
from searchr1_lite.tasks.toy_world import JOBS, RELATIONS, Fact, ToyWorld, ask, invent_name
from searchr1_lite.types import Hit, Retriever

HABITS = {  # what the last call of the pretraining leaves the base with
    "guess": 0.60,  # answers at once, with a made-up name of the right kind
    "one search": 0.12,  # searches the first link and answers with what it found: right for one hop only
    "hop by hop": 0.10,  # searches link after link and answers right
    "useless query": 0.10,  # searches something beside the point, then guesses
    "malformed": 0.08,  # writes a broken tag, is told so, then guesses or searches once
}
PRACTICE_HABITS = {  # of the calls before it: each habit often enough to be learned
    "guess": 0.40,
    "one search": 0.18,
    "hop by hop": 0.18,
    "useless query": 0.14,
    "malformed": 0.10,
}
USELESS_QUERIES = ["the question", "what is it", "more information", "the answer", "a person", "a city", "facts"]


@dataclass(frozen=True, slots=True)
class Segment:
    text: str
    by_policy: bool
    ends: bool = False  # an end-of-sequence token follows, written by the policy


class Writer:
    """Writes transcripts and drills about one world."""

    def __init__(self, world: ToyWorld, retriever: Retriever, topk: int, rng: random.Random):
        self.world, self.retriever, self.topk, self.rng = world, retriever, topk, rng
        self.chains = {
            hops: [c for s in ("train", "test") for c in world.chains(s) if len(c) == hops] for hops in (1, 2, 3)
        }

    def transcript(self, habits: dict[str, float] = HABITS) -> tuple[str, list[Segment]]:
        """A question and what follows it, of a habit drawn by its share; long chains come more often for practice."""
        facts = self.rng.choice(self.chains[self.rng.choice([1, 2, 2, 3])])
        return self.transcript_about(facts, self.rng.choices(list(habits), list(habits.values()))[0])

    def transcript_about(self, facts: list[Fact], habit: str) -> tuple[str, list[Segment]]:
        return ask(facts, self.rng), self.follow(facts, habit)

    def follow(self, facts: list[Fact], habit: str) -> list[Segment]:
        """What stands after the prompt, where the question is about these facts."""
        write = {
            "guess": self._guess,
            "one search": self._one_search,
            "hop by hop": self._hop_by_hop,
            "useless query": self._useless_query,
            "malformed": self._malformed,
        }[habit]
        return write(facts)

    def drill(self) -> list[Segment]:
        """Some passages, then every fact in them: reading practised many times in one short text."""
        start = self.rng.choice(list(self.world.facts.values()))
        hits = self.search(query_for(start))
        if self.rng.random() < 0.5:  # passages that have nothing in common, too
            hits = [Hit(p, 1.0) for p in self.rng.sample(self.world.passages(), self.rng.randint(2, 5))]
        self.rng.shuffle(hits)
        titles = {hit.passage.title for hit in hits}
        facts = [fact for fact in self.world.facts.values() if fact.subject.name in titles]
        self.rng.shuffle(facts)
        text = " ".join(state(fact) for fact in facts)
        return [Segment(render_observation(hits), False), Segment(f"<think> {text} </think>\n", True)]

    def search(self, query: str) -> list[Hit]:
        return self.retriever.search([query], self.topk)[0]

    def _ask_engine(self, thought: str, query: str) -> list[Segment]:
        overhang = "\n" if self.rng.random() < 0.2 else ""  # a merge past the tag, as happens with large vocabularies
        text = f"<think> {thought} </think>\n<search> {query} </search>{overhang}"
        return [Segment(text, True), Segment(render_observation(self.search(query)), False)]

    def _answer(self, thought: str, answer: str) -> Segment:
        return Segment(f"<think> {thought} </think>\n<answer> {answer} </answer>", True, ends=True)

    def made_up(self, facts: list[Fact]) -> str:
        kind = RELATIONS[facts[-1].subject.kind][facts[-1].relation]
        return self.rng.choice(JOBS) if kind == "job" else invent_name(kind, self.rng)

    def _guess(self, facts: list[Fact]) -> list[Segment]:
        return [self._answer("I know this.", self.made_up(facts))]

    def _one_search(self, facts: list[Fact]) -> list[Segment]:
        searched = self._ask_engine(need(facts[0]), query_for(facts[0]))
        return [*searched, self._answer(state(facts[0]), facts[0].value)]

    def _hop_by_hop(self, facts: list[Fact]) -> list[Segment]:
        segments = self._ask_engine(need(facts[0]), query_for(facts[0]))
        for read, wanted in pairwise(facts):
            segments += self._ask_engine(f"{state(read)} {need(wanted)}", query_for(wanted))
        return [*segments, self._answer(state(facts[-1]), facts[-1].value)]

    def _useless_query(self, facts: list[Fact]) -> list[Segment]:
        searched = self._ask_engine("I will look it up.", self.rng.choice(USELESS_QUERIES))
        return [*searched, self._answer("This does not help.", self.made_up(facts))]

    def _malformed(self, facts: list[Fact]) -> list[Segment]:
        query = query_for(facts[0])
        broken = self.rng.choice(
            [
                f"<think> {need(facts[0])} </think>\n<search> {query} </query>",
                f"<think> {need(facts[0])} </think>\n[search] {query} [/search]",
                f"<think> I know this. </think>\n<answer> {self.made_up(facts)}",
                "<think> I know this. </think>",
            ]
        )
        told = [Segment(broken, True, ends=True), Segment(INVALID_ACTION, False)]
        return told + (self._guess(facts) if self.rng.random() < 0.5 else self._one_search(facts))


def query_for(fact: Fact) -> str:
    return f"{fact.relation} of {fact.subject.name}"


def need(fact: Fact) -> str:
    return f"I need the {query_for(fact)}."


def state(fact: Fact) -> str:
    return f"The {query_for(fact)} is {fact.value}."
