"""2,250 real trajectories of the released checkpoints, replayed: the recorded turns written again by a scripted model,
the recorded passages found again by a scripted retriever, and all else done by our engine.

What differs is counted and explained: the recorder cuts observations at 500 Qwen tokens, and it ends a trajectory at a
turn without an action, where Search-R1's training loop (search_r1/llm_agent/generation.py, run_llm_loop) goes on.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, original

from searchr1_lite.config import ROOT, load_profile
from searchr1_lite.retrieval.corpus import join_contents, split_contents
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import parse_action
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.types import Hit, Passage, Question

WIKI18 = Path(ROOT).parent / "shared/data/wiki18"
pytestmark = pytest.mark.skipif(not WIKI18.is_dir(), reason="no recorded trajectories beside the project")
NO_ACTION = (  # written out, so that the text itself is tested
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. If I "
    "want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
OBSERVATION = re.compile(r"\n\n<information>.*?</information>\n\n|" + re.escape(NO_ACTION), re.DOTALL)
WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
BATCH = 125
NO_MODEL = SimpleNamespace(
    training=False, eval=lambda: None, train=lambda mode: None, config=SimpleNamespace(max_position_embeddings=None)
)


class ScriptedSampler:
    """Writes given turns, row by row, in place of a model."""

    search_delay_steps = 1

    def __init__(self, scripts: list[list[list[int]]], end: int) -> None:
        self.turns = [iter(script) for script in scripts]
        self.capacity, self.end = len(scripts), end
        self.next: list[int] = []

    @property
    def active(self) -> int:
        return len(self.next)

    def open(self, rows, prompt, streams) -> None:
        self.next += rows

    def read(self, row, ids) -> None:
        self.next.append(row)

    def advance(self):
        rows, self.next = self.next, []
        written = [(row, next(self.turns[row], [self.end])) for row in rows]
        return [(row, ids, [-1.0] * len(ids)) for row, ids in written]

    def close(self, row) -> None: ...


class RecordedRetriever:
    """What was found for each query, in the order in which a trajectory's searches come."""

    def __init__(self, found: dict[str, list[Passage]]) -> None:
        self.found = found

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        return [[Hit(passage, 0.0) for passage in self.found[query]] for query in queries]


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    with gzip.open(WIKI18 / "trajectories.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def corpus() -> dict[tuple[str, str], list[str]]:
    """Whole passage texts by their title and first 60 characters."""
    texts = defaultdict(list)
    with gzip.open(WIKI18 / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            title, text, _ = split_contents(json.loads(line)["contents"])
            texts[title, text[:60]].append(text)
    return texts


def turns_of(response: str) -> list[tuple[str, str]]:
    """(what the model wrote, what the environment put after it, "" for nothing) of a recorded response."""
    turns, start = [], 0
    for found in OBSERVATION.finditer(response):
        turns.append((response[start : found.start()], found.group()))
        start = found.end()
    return [*turns, (response[start:], "")] if response[start:] else turns


def passages_of(observation: str, corpus: dict) -> list[Passage]:
    """The passages of a recorded block, whole where the corpus has them; quotes around titles as recorded."""
    block = observation.removeprefix("\n\n<information>").removesuffix("</information>\n\n")
    passages = []
    for document in re.split(r"\n?Doc [123]\(Title: ", block)[1:]:
        title_line, _, text = document.partition(") ")
        while (parts := text.partition(") "))[1] and title_line.count("(") > title_line.count(")"):
            title_line, text = f"{title_line}) {parts[0]}", parts[2]
        title, _, quoted = split_contents(title_line)
        start = uncut(text)
        whole = [known for known in corpus[title, text[:60]] if known.startswith(start)]
        passages.append(Passage("", title, whole[0] if whole else text, quoted))
    return passages


def uncut(text: str) -> str:
    """Without what a cut in the middle of a character or after a space leaves at the end."""
    return text.rstrip("\N{REPLACEMENT CHARACTER} ")


def replay(rows: list[dict], corpus: dict, tokenizer, chat_template: bool) -> list[Trajectory]:
    """The recorded rows of one run through the engine, all searches answered by what was recorded for the query."""
    scripts, found = [], {}
    for row in rows:
        turns = turns_of(row["response"])
        closed = ("</search>", "</answer>")
        texts = [text if text.endswith(closed) else text + tokenizer.eos_token for text, _ in turns]
        scripts.append([tokenizer.encode(text) for text in texts])
        for text, observation in turns:
            if observation.startswith("\n\n<information>"):
                found[parse_action(text).content] = passages_of(observation, corpus)
    policy = Policy(NO_MODEL, tokenizer, torch.device("cpu"))
    sampler = ScriptedSampler(scripts, tokenizer.eos_token_id)
    profile = load_profile(
        "tiny",
        chat_template=chat_template,
        max_turns=4,
        max_response_tokens=5000,
        max_observation_tokens=20000,
        max_prompt_tokens=5000,
        max_context_tokens=10**6,
    )
    questions = [Question(row["id"], row["question"], tuple(row["golden_answers"])) for row in rows]
    return rollout(policy, questions, RecordedRetriever(found), profile, sampler=sampler)


def difference(ours: Trajectory, row: dict) -> str:
    """How a replayed trajectory differs from the recorded one: "equal", or why not; anything else fails."""
    turns = turns_of(row["response"])
    cut = False
    for (text, observation), turn in zip(turns, ours.turns, strict=False):
        assert turn.text == text
        if observation and turn.observation != observation:
            assert observation.endswith("</information>\n\n")
            assert turn.observation.startswith(uncut(observation.removesuffix("</information>\n\n")))
            assert len(WORD_OR_MARK.findall(observation)) > 250  # never more of these than tokens
            cut = True
    searched = [parse_action(text).content for text, seen in turns if seen.startswith("\n\n<information>")]
    assert [turn.query for turn in ours.turns if turn.query is not None] == searched
    if ours.stop_reason == "answer":
        assert len(ours.turns) == len(turns)
        assert cut or ours.response == row["response"]
        return "observation cut" if cut else "equal"
    assert not any(tag in turns[-1][0] for tag in ("</search>", "</answer>"))
    assert ours.response.startswith(row["response"] + NO_ACTION)
    return "recorder stopped at a turn without an action"


@pytest.fixture(scope="module")
def replayed(recorded, corpus) -> list[tuple[dict, Trajectory]]:
    """Every recorded row with our engine's trajectory of it; runs named v1 were recorded with the chat template."""
    tokenizer = make_tokenizer([row["response"] for row in recorded[::9]], vocab_size=3000)
    pairs = []
    for run in sorted({row["run"] for row in recorded}):
        rows = sorted((row for row in recorded if row["run"] == run), key=lambda row: len(row["response"]))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ours = replay(batch, corpus, tokenizer, chat_template=run.startswith("v1"))
            assert [tokenizer.decode(one.prompt_ids) for one in ours] == [row["prompt"] for row in batch]
            pairs += zip(batch, ours, strict=True)
    return pairs


def test_every_recorded_trajectory(replayed):
    assert Counter(difference(ours, row) for row, ours in replayed) == {
        "equal": 2049,
        "observation cut": 60,
        "recorder stopped at a turn without an action": 141,
    }


def test_every_turn_is_answered_as_by_the_original_itself(replayed, corpus):
    """The environment of a Search-R1 checkout, its own code running, beside ours: no exception among 2,250."""
    generation = original("search_r1/llm_agent/generation.py")
    manager = object.__new__(generation.LLMGenerationManager)
    for row, ours in replayed:
        for number, turn in enumerate(ours.turns):
            last = number == 4  # after four turns the original generates once more, without search (run_llm_loop)
            hits = [{"document": {"contents": join_contents(hit.passage)}} for hit in turn.hits]
            manager.batch_search = lambda queries, hits=hits: [manager._passages2string(hits) for _ in queries]
            (observation,), (done,), (valid,), (searched,) = manager.execute_predictions(
                [turn.text], "", [True], do_search=not last
            )
            if not last:
                assert turn.observation == observation, (row["run"], row["id"], number)
            _, (content,) = manager.postprocess_predictions([turn.text])
            assert turn.query in (content, None)
            assert bool(done) == (turn.action == "answer")
            assert bool(valid) == (turn.action != "invalid")
            assert bool(searched) == (turn.action == "search")
