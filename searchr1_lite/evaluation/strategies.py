"""Ways to answer a question with the same model and the same search: what Search-R1 is compared with.

Three are no more than a prompt (rollouts/protocol.py): "direct", "cot" and "r1", which is also how a model answers that
was trained without search. "search_r1" is the engine's own rollout. The others are the functions here. Each is written
for one question: it yields what it wants next, a search or a text to be written, is sent what came of it, and returns
the text that holds the answer. `answer` works through many questions at once.

Tags are Search-R1's in all of them, so that one parser reads them and no model is asked for tokens that it lacks.
Left out: few-shot examples, which the papers give and which do not fit a small context; streaming.
"""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from searchr1_lite.config import Profile
from searchr1_lite.retrieval.batching import Batcher
from searchr1_lite.rollouts.dequantize import dequantized_weights
from searchr1_lite.rollouts.engine import context_limit, rollout
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import (
    encode_message,
    parse_action,
    question_text,
    render_observation,
    render_passages,
)
from searchr1_lite.rollouts.trajectory import HasTurns, Trajectory, Turn
from searchr1_lite.tasks.answers import last_answer
from searchr1_lite.types import Hit, QueryRefusedError, Question, Retriever

RAG_PROMPT = (  # Search-R1, scripts/data_process/nq_rag.py
    "Answer the given question with some potentially useful context. "
    "You should analyze the question carefully, evaluate the given context (which may or may not be useful), and then "
    "generate an accurate and well-reasoned response. "
    "You should first have a reasoning process in mind and then provides the answer. "
    "Show your reasoning in <think> </think> tags and return the final answer in <answer> </answer> tags, for example "
    "<answer> Beijing </answer>. Question: {question} Context: {passages} \n"
)
IRCOT_PROMPT = (
    "Reason about the question step by step, one short sentence for each fact, from these documents. As soon as the "
    "last fact is there, write: So the answer is:\n{passages}\nQuestion: {question}\n"
)
SEARCH_O1_PROMPT = (
    "Answer the given question, reasoning step by step. When you are not sure of a fact, write "
    "<search> query </search>: the documents that are found will be read for you, and what helps will stand between "
    "<information> and </information>. You can search {searches} times. At the end return the answer in "
    "<answer> </answer> tags, for example <answer> Beijing </answer>. Question: {question}\n"
)
ANALYSIS_PROMPT = (
    "Read the documents for the sake of the reasoning below, and write what helps it with its query after the words "
    "**Final Information**, or else: No helpful information found.\n"
    "Reasoning: {reasoning}\nQuery: {query}\nDocuments: {passages}\n"
)
INTER_PROMPT = (
    "Write down what you know about the question, with the help of these documents.\n{passages}\nQuestion: {question}\n"
)
NOTHING = "No helpful information found"
IRCOT_PASSAGES = 15  # at most, of all steps together (arXiv 2212.10509)
INTER_ROUNDS = 2


class Search(NamedTuple):
    """Look this up; comes back as a tuple of hits."""

    query: str


class Write(NamedTuple):
    """Let the model answer this message, going on after `begun`; comes back as its text, up to a closing tag or end."""

    message: str
    begun: str = ""


Strategy = Callable[[str, Profile], Generator[Search | Write, Any, str]]


def rag(question: str, profile: Profile) -> Generator[Search | Write, Any, str]:
    """One search with the question's words, then the answer from what it found (Lewis et al., arXiv 2005.11401)."""
    found = yield Search(question)
    return (yield Write(RAG_PROMPT.format(question=question_text(question), passages=render_passages(found))))


def ircot(question: str, profile: Profile) -> Generator[Search | Write, Any, str]:
    """Every sentence of the reasoning is the next query (IRCoT, arXiv 2212.10509).

    Only the first sentence that is written is kept; what is found is added to what was. It ends with "answer is" or
    after `max_turns` searches, and a reader then answers from all passages, as in `rag`.
    """
    found = yield Search(question)
    thoughts = ""
    for _ in range(profile.max_turns - 1):
        message = IRCOT_PROMPT.format(question=question_text(question), passages=render_passages(found))
        thought = first_sentence((yield Write(message, begun=thoughts)))
        if not thought or "answer is" in thought.lower():
            break
        thoughts = f"{thoughts} {thought}".strip()
        new = yield Search(thought)
        found = (*found, *(hit for hit in new if hit.passage not in {old.passage for old in found}))[:IRCOT_PASSAGES]
    return (yield Write(RAG_PROMPT.format(question=question_text(question), passages=render_passages(found))))


def search_o1(question: str, profile: Profile) -> Generator[Search | Write, Any, str]:
    """The model searches as it reasons, and sees its own reading of what was found, not the documents themselves.

    That reading is a text of its own, made from the reasoning so far, the query and the documents (Search-o1, arXiv
    2501.05366, its "Reason-in-Documents").
    """
    message = SEARCH_O1_PROMPT.format(question=question_text(question), searches=profile.max_turns)
    reasoning = ""
    for searches in range(profile.max_turns + 1):
        said = yield Write(message, begun=reasoning)
        action = parse_action(said)
        if action.kind != "search" or searches == profile.max_turns:
            break
        found = render_passages((yield Search(action.content)))
        reasoning += said
        analysis = yield Write(ANALYSIS_PROMPT.format(reasoning=reasoning, query=action.content, passages=found))
        helpful = analysis.rpartition("**Final Information**")[2].strip() or f"{NOTHING}."
        reasoning += f"\n\n<information>{helpful}</information>\n\n"
    return said


def inter(question: str, profile: Profile) -> Generator[Search | Write, Any, str]:
    """The query grows by what the model writes about what was found, in rounds; then as `rag` (arXiv 2305.07402)."""
    found = yield Search(question)
    for _ in range(INTER_ROUNDS):
        knowledge = yield Write(INTER_PROMPT.format(question=question_text(question), passages=render_passages(found)))
        found = yield Search(f"{question} {knowledge.strip()}")
    return (yield Write(RAG_PROMPT.format(question=question_text(question), passages=render_passages(found))))


STRATEGIES: dict[str, Strategy] = {"rag": rag, "ircot": ircot, "search_o1": search_o1, "inter": inter}


def first_sentence(text: str) -> str:
    """Up to the first full stop after a word of three letters or more ("Dr." and "J." end nothing), or a line's end."""
    return re.split(r"(?<=\w\w\w\.)\s|\n", text.strip(), maxsplit=1)[0].strip()


@dataclass(slots=True)
class Attempt(HasTurns):
    """A question worked through in several texts: what `Trajectory` is for one. A turn is a search or a text.

    `calls` are the texts with their tokens.
    """

    question: Question
    turns: list[Turn] = field(default_factory=list)
    calls: list[Trajectory] = field(default_factory=list)
    retrieved_tokens: int = 0  # of what was found, each time that it was
    stop_reason: str = ""  # as of a trajectory

    @property
    def finished(self) -> bool:
        return self.stop_reason == "answer"

    @property
    def response_length(self) -> int:
        return sum(call.response_length for call in self.calls)


def answer(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    *,
    greedy: bool = True,
    seed: int = 0,
    done: Callable[[Attempt], None] = lambda attempt: None,
) -> list[Attempt]:
    """Work through the questions by one of STRATEGIES, the profile's; at most `rollout_rows` of them at a time.

    What the questions under way want next is asked together. Sampling, lengths and failing searches are as in
    `engine.rollout`: a search that fails for good ends its question, and a prompt that does not fit ends it too
    (`stop_reason` "context"). `done` gets each attempt, in order, as soon as it and all before it are ready.
    Raises RetrievalError where all searches of a step fail.
    """
    attempts = [Attempt(question) for question in questions]
    waiting, ready = iter(attempts), 0
    # once for all texts, where each would do it for itself
    weights = dequantized_weights(policy.model) if profile.sampling_weights == "dequantized" else nullcontext()
    with weights, Batcher(retriever) as searches:
        work = _Work(policy, profile, searches, greedy, seed)
        wanted: list[_Wanted] = []
        while ready < len(attempts):
            wanted += map(work.begin, islice(waiting, profile.rollout_rows - len(wanted)))
            wanted = work.one_step(wanted)
            while ready < len(attempts) and attempts[ready].stop_reason:
                done(attempts[ready])
                ready += 1
    return attempts


class _Wanted(NamedTuple):
    """A question under way, and what it waits for."""

    attempt: Attempt
    steps: Generator[Search | Write, Any, str]
    next: Search | Write


@dataclass(slots=True)
class _Work:
    policy: Policy
    profile: Profile
    searches: Batcher
    greedy: bool
    seed: int

    def begin(self, attempt: Attempt) -> _Wanted:
        steps = STRATEGIES[self.profile.strategy](attempt.question.question, self.profile)
        return _Wanted(attempt, steps, next(steps))

    def one_step(self, wanted: list[_Wanted]) -> list[_Wanted]:
        """Give each what it waits for; returns those that go on, with what they want then."""
        texts = self._write([one for one in wanted if isinstance(one.next, Write)])
        came = texts | self._search([one for one in wanted if isinstance(one.next, Search)])
        going = []
        for one in wanted:
            following = None if one.attempt.stop_reason else self._next(one.attempt, one.steps, came[id(one.attempt)])
            if following is not None:
                going.append(one._replace(next=following))
        return going

    def _next(self, attempt: Attempt, steps: Generator, came: Any) -> Search | Write | None:
        try:
            return steps.send(came)
        except StopIteration as end:
            answered = last_answer(end.value) is not None
            attempt.stop_reason = "answer" if answered else "turns"
            attempt.turns[-1] = Turn(attempt.turns[-1].text, "answer" if answered else "invalid")
            return None

    def _write(self, wanted: list[_Wanted]) -> dict[int, str]:
        tokenizer = self.policy.tokenizer
        limit = context_limit(self.policy, self.profile) - self.profile.max_response_tokens
        prompts, fit = [], []
        for attempt, _, want in wanted:
            ids = encode_message(tokenizer, want.message, self.profile.chat_template)
            ids += tokenizer.encode(want.begun, add_special_tokens=False)
            if len(ids) > limit:
                attempt.stop_reason = "context"
            else:
                prompts.append(ids)
                fit.append(attempt)
        # a stream of random numbers for each text, whichever others are written beside it
        named = [Question(f"{one.question.id}#{len(one.calls)}", "", one.question.golden_answers) for one in fit]
        calls = rollout(
            self.policy,
            named,
            self.searches.retriever,
            self.profile,
            greedy=self.greedy,
            seed=self.seed,
            prompts=prompts,
        )
        for attempt, call in zip(fit, calls, strict=True):
            attempt.calls.append(call)
            attempt.turns.append(Turn(call.policy_text, "write"))
        return {id(attempt): call.policy_text for attempt, call in zip(fit, calls, strict=True)}

    def _search(self, wanted: list[_Wanted]) -> dict[int, tuple[Hit, ...]]:
        queries, of = [one.next.query for one in wanted], [one.attempt.question for one in wanted]
        found, futures = {}, self.searches.ask(queries, self.profile.topk, of)
        errors = [one.exception() for one in futures]
        if errors and all(error and not isinstance(error, QueryRefusedError) for error in errors):
            raise errors[0]  # the retriever is gone
        for (attempt, _, want), asked_for, error in zip(wanted, futures, errors, strict=True):
            if error:
                attempt.stop_reason = "search refused" if isinstance(error, QueryRefusedError) else "search failed"
                continue
            found[id(attempt)] = hits = tuple(asked_for.result())
            seen = render_observation(hits)
            attempt.turns.append(Turn("", "search", want.query, hits, seen))
            attempt.retrieved_tokens += len(self.policy.tokenizer.encode(seen, add_special_tokens=False, verbose=False))
        return found
