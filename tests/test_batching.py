"""Queries of many threads and one retriever: who gets what, in which calls."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import OverlapRetriever

from searchr1_lite.retrieval.batching import Batcher
from searchr1_lite.types import Hit, Passage, QueryRefusedError, Question, RetrievalError

PASSAGES = [Passage(str(n), f"T{n}", f"word{n} shared") for n in range(50)]


class Gated(OverlapRetriever):
    """Answers when the gate is open; remembers threads and calls."""

    def __init__(self) -> None:
        super().__init__(PASSAGES)
        self.gate, self.begun, self.threads = threading.Event(), threading.Event(), set()

    def search(self, queries, k):
        self.begun.set()
        self.threads.add(threading.get_ident())
        assert self.gate.wait(10)
        if "broken" in queries:
            raise ConnectionError("index is gone")
        if "refused" in queries:
            raise QueryRefusedError("'refused' is not taken")
        return super().search(queries, k)


def answered(retriever: Gated, *asked: tuple[list[str], int], most: int = 256) -> list:
    """The futures of `asked`, which all came while a first call was under way."""
    with Batcher(retriever, most) as batcher:
        first = batcher.ask(["word1"], 1)
        assert retriever.begun.wait(10)
        later = [future for queries, k in asked for future in batcher.ask(queries, k)]
        retriever.gate.set()
        done = [one.exception(10) or one.result() for one in [*first, *later]]
    assert done[0] == OverlapRetriever(PASSAGES).search(["word1"], 1)[0]
    return done[1:]


def test_queries_that_come_during_a_search_go_together():
    retriever = Gated()
    found = answered(retriever, (["word2", "word3"], 3), (["word4"], 3), ([], 3))
    assert retriever.calls == [["word1"], ["word2", "word3", "word4"]]
    assert found == OverlapRetriever(PASSAGES).search(["word2", "word3", "word4"], 3)


def test_calls_are_of_one_k_and_not_too_large():
    retriever = Gated()
    asked = (["word2", "word3"], 1), (["shared"], 5), (["word4", "word5"], 1)
    found = answered(retriever, *asked, most=3)
    assert retriever.calls == [["word1"], ["word2", "word3", "word4"], ["shared"], ["word5"]]
    assert [len(hits) for hits in found] == [1, 1, 5, 1, 1]


def test_a_failing_call_fails_for_those_in_it():
    retriever = Gated()
    found = answered(retriever, (["word2", "broken"], 1), (["word4"], 2))
    assert all(
        isinstance(one, RetrievalError) and "2 queries ('word2', 'broken'): index is" in str(one) for one in found[:2]
    )
    assert found[2] == OverlapRetriever(PASSAGES).search(["word4"], 2)[0]


def test_a_refused_query_fails_alone():
    found = answered(Gated(), (["word2", "refused", "word3"], 1))
    assert isinstance(found[1], QueryRefusedError)
    assert [found[0], found[2]] == OverlapRetriever(PASSAGES).search(["word2", "word3"], 1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [([[]], "1 lists of hits for 2"), ([[], [Hit(PASSAGES[0], 1.0)] * 3], "3 hits for 'b' where 2")],
)
def test_an_answer_of_another_shape_is_an_error(answer, message):
    class Wrong:
        def search(self, queries, k):
            return answer

    with Batcher(Wrong()) as batcher, pytest.raises(RetrievalError, match=message):
        batcher.ask(["a", "b"], 2)[0].result(10)


def test_a_retriever_that_must_know_is_told_the_questions():
    class Knows(OverlapRetriever):
        def search_for(self, queries, questions, k):
            return [[Hit(PASSAGES[int(question.id)], 1.0)] for question in questions]

    who = [Question("7", "?", ("x",)), Question("3", "?", ("x",))]
    with Batcher(Knows(PASSAGES)) as batcher:
        found = [future.result(10) for future in batcher.ask(["word1", "word2"], 2, who)]
        assert [hits[0].passage.id for hits in found] == ["7", "3"]
        assert [hit.passage.id for hit in batcher.ask(["word1"], 1)[0].result(10)] == ["1"]


def test_no_answer_is_lost_or_crossed():
    class Slow(OverlapRetriever):
        busy = 0

        def search(self, queries, k):
            self.busy += 1
            assert self.busy == 1, "two calls at once"
            time.sleep(0.0005)
            found = super().search(queries, k)
            self.busy -= 1
            return found

    retriever = Slow(PASSAGES)
    with Batcher(retriever, most=16) as batcher, ThreadPoolExecutor(32) as clients:

        def client(n: int) -> bool:
            queries, k = [f"word{(n + i) % 50}" for i in range(n % 4 + 1)], n % 2 + 1
            found = [future.result(10) for future in batcher.ask(queries, k)]
            return [[hit.passage.id for hit in hits] for hits in found] == [[query[4:]] for query in queries]

        assert all(clients.map(client, range(400)))
    assert len(retriever.calls) < 400 and max(map(len, retriever.calls)) <= 16


def test_closing_cancels_what_has_not_begun():
    retriever = Gated()
    batcher = Batcher(retriever)
    (under_way,) = batcher.ask(["word1"], 1)
    assert retriever.begun.wait(10)
    (queued,) = batcher.ask(["word2"], 1)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while not queued.cancelled():
        time.sleep(0.001)
    retriever.gate.set()
    closing.join(10)
    assert under_way.result(1) and retriever.calls == [["word1"]]
