"""A small made-up world whose every answer is known: passages to search and questions of one, two and three hops.

People, cities, countries, companies and novels are linked by seven relations. A question walks one to three of those
links; an ideal reader needs one search a link. Everything follows from a seed. Two properties make scores mean
something: names are drawn from two disjoint halves of all possible names, one for worlds that a model is pretrained on
and one for worlds it is trained and tested on; and a world is two regions that share no person, city, company or
novel, so a test question never touches a link that a training question used.

Its words and wordings are in toy_world.yaml. Left out on purpose: aliases, ambiguity and unanswerable questions.
"""

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain as concat
from pathlib import Path
from typing import Literal

import yaml

from searchr1_lite.types import Passage, Question

WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ONSETS, VOWELS, FIRMS = (WORDS[name].split() for name in ("onsets", "vowels", "firms"))
ADJECTIVES, NOUNS, JOBS, SIGHTS = (WORDS[name].split() for name in ("adjectives", "nouns", "jobs", "sights"))
PRONOUN = {"person": "They", "company": "It", "novel": "It", "city": "It"}

RELATIONS = {  # subject kind -> relations it has, and the kind each leads to
    "person": {"birthplace": "city", "job": "job"},
    "company": {"founder": "person", "seat": "city"},
    "novel": {"author": "person", "setting": "city"},
    "city": {"country": "country"},
}
MIX = {1: 0.40, 2: 0.44, 3: 0.16}  # share of questions by hops
TEST_SHARE = 0.4  # of all people, cities, companies and novels

Split = Literal["train", "test"]


@dataclass(frozen=True, slots=True)
class Entity:
    name: str
    kind: str
    region: Split


@dataclass(frozen=True, slots=True)
class Fact:
    """`relation` of `subject` is `value`, as in: the birthplace of Kela Dorvan is Torvel."""

    subject: Entity
    relation: str
    value: str


class ToyWorld:
    """One world. `size` is the number of people; all else is in proportion (about 3.6 passages a person).

    `names` says which half of all possible names it draws from: "world" to train and test on, "pretraining" to
    pretrain on. The two halves share no name.
    """

    def __init__(self, seed: int = 0, size: int = 150, names: Literal["world", "pretraining"] = "world"):
        if size < 5:
            raise ValueError(f"size is the number of people and must be at least 5, got {size}")
        self.seed = seed
        self._rng = random.Random(f"toy world {seed} {size} {names}")
        self._half = ["world", "pretraining"].index(names)
        self._taken: set[str] = set()
        self.entities = self._make_entities(size)
        self.facts = {(fact.subject.name, fact.relation): fact for fact in self._make_facts()}
        self._passages = self._make_passages(notes=size // 2)
        self._passage_of = {p.title: p for p in self._passages if not p.title.removeprefix("Note ").isdigit()}

    def passages(self) -> list[Passage]:
        """Every passage: one an entity, and notes that mention entities without telling a fact that is asked for."""
        return list(self._passages)

    def passage_of(self, name: str) -> Passage:
        """The passage about one entity."""
        return self._passage_of[name]

    def questions(self, split: Split) -> list[Question]:
        """All questions of a region in the proportions of `MIX`, in a fixed shuffled order.

        `metadata`: `hops` (1 to 3, searches an ideal reader needs), `kind` (the links walked, first to last),
        `chain` (names from the first entity to the answer), `supporting_ids` (passages that hold the links), `split`.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        rng = random.Random(f"questions {self.seed} {split}")
        by_hops: dict[int, list[list[Fact]]] = {1: [], 2: [], 3: []}
        for facts in self.chains(split):
            by_hops[len(facts)].append(facts)
        total = min(len(chains) / MIX[hops] for hops, chains in by_hops.items())
        kept = [rng.sample(chains, int(total * MIX[hops])) for hops, chains in by_hops.items()]
        mixed = rng.sample(flat := list(concat.from_iterable(kept)), len(flat))
        return [self._question(f"{split}-{n}", facts, split, rng) for n, facts in enumerate(mixed)]

    def chains(self, split: Split) -> Iterator[list[Fact]]:
        """Every walk of one to three links in a region."""
        for entity in self.entities:
            if entity.region == split and entity.kind in RELATIONS:
                yield from self._walks(entity)

    def _walks(self, entity: Entity) -> Iterator[list[Fact]]:
        for relation, kind in RELATIONS[entity.kind].items():
            fact = self.facts[entity.name, relation]
            yield [fact]
            if kind in RELATIONS:
                yield from ([fact, *rest] for rest in self._walks(self._by_name[fact.value]))

    def _question(self, id: str, facts: list[Fact], split: Split, rng: random.Random) -> Question:
        names = [fact.subject.name for fact in facts]
        metadata = {
            "hops": len(facts),
            "kind": "-".join(fact.relation for fact in facts),
            "chain": [*names, facts[-1].value],
            "supporting_ids": [self._passage_of[name].id for name in names],
            "split": split,
        }
        return Question(id, ask(facts, rng), (facts[-1].value,), metadata)

    def _make_entities(self, size: int) -> list[Entity]:
        counts = {"country": size // 10, "city": size * 2 // 5, "person": size, "company": size * 2 // 3}
        counts["novel"] = counts["company"]
        entities = []
        for kind, count in counts.items():
            count = max(count, 2)
            for n in range(count):
                region: Split = "test" if n < count * TEST_SHARE else "train"
                entities.append(Entity(self._new_name(kind), kind, region))
        self._by_name = {entity.name: entity for entity in entities}
        return entities

    def _new_name(self, kind: str) -> str:
        while True:
            name = invent_name(kind, self._rng)
            if name not in self._taken and zlib.crc32(name.encode()) % 2 == self._half:
                self._taken.add(name)
                return name

    def _make_facts(self) -> Iterator[Fact]:
        for entity in self.entities:
            for relation, kind in RELATIONS.get(entity.kind, {}).items():
                yield Fact(entity, relation, self._value(kind, entity.region))

    def _value(self, kind: str, region: Split) -> str:
        if kind == "job":
            return self._rng.choice(JOBS)
        shared = kind == "country"  # the one thing that both regions have in common
        return self._rng.choice([e.name for e in self.entities if e.kind == kind and (shared or e.region == region)])

    def _make_passages(self, notes: int) -> list[Passage]:
        texts = [(entity.name, self._tell(entity)) for entity in self.entities]
        texts += [(f"Note {n + 1}", self._note()) for n in range(notes)]
        self._rng.shuffle(texts)
        return [Passage(str(n), title, text) for n, (title, text) in enumerate(texts)]

    def _tell(self, entity: Entity) -> str:
        sight = f"known for its {self._rng.choice(SIGHTS)}."
        if entity.kind == "country":
            return f"{entity.name} has a long coast. It is {sight}"
        facts = [self.facts[entity.name, relation] for relation in RELATIONS[entity.kind]]
        self._rng.shuffle(facts)
        sentences = [tell(fact, self._rng) for fact in facts]
        if entity.kind == "city":
            return f"{sentences[0]} It is {sight}"
        if sentences[1].startswith(entity.name) and self._rng.random() < 0.25:
            sentences[1] = PRONOUN[entity.kind] + sentences[1].removeprefix(entity.name)
        return " ".join(sentences)

    def _note(self) -> str:
        pick = {kind: self._rng.choice([e.name for e in self.entities if e.kind == kind]) for kind in RELATIONS}
        return self._rng.choice(WORDS["notes"]).format(**pick)


def invent_name(kind: str, rng: random.Random) -> str:
    """A name of a kind, as in Torvel (a city), Kela Dorvan (a person), The Amber Lantern (a novel)."""

    def word(syllables: int) -> str:
        parts = (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(WORDS["codas"]) for _ in range(syllables))
        return "".join(parts).capitalize()

    if kind == "person":
        return f"{word(rng.choice([1, 2]))} {word(2)}"
    if kind == "company":
        return f"{word(2)} {rng.choice(FIRMS)}"
    if kind == "novel":
        return f"The {rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"
    return word(1) + rng.choice(WORDS["endings"][kind]) if rng.random() < 0.5 else word(2)


def tell(fact: Fact, rng: random.Random) -> str:
    """A fact as a sentence of a passage."""
    article = "an" if fact.value[0] in "aeiou" else "a"
    telling = rng.choice(WORDS["tellings"][fact.relation])
    return telling.format(e=fact.subject.name, v=fact.value, a=article, y=rng.randint(1850, 1990))


def ask(facts: list[Fact], rng: random.Random) -> str:
    """A chain of facts as one question about its first subject: the founder of X, where born, in which country."""
    phrase = facts[0].subject.name
    for fact in facts[:-1]:
        phrase = rng.choice(WORDS["descriptions"][fact.relation]).format(e=phrase)
    return rng.choice(WORDS["askings"][facts[-1].relation]).format(e=phrase)


def write_world(folder: Path, seed: int, size: int) -> None:
    """Write `corpus.jsonl` (Search-R1's `{"id","contents"}`) and `questions.jsonl`, the same bytes every time."""
    world = ToyWorld(seed, size)
    passages = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in world.passages()]
    questions = [
        {"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers), "metadata": q.metadata}
        for split in ("train", "test")
        for q in world.questions(split)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus.jsonl", passages), ("questions.jsonl", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_bytes(lines.encode())
