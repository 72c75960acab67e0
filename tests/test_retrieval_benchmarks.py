"""The benchmarks of indexes as dry runs on the toy corpus, and their arithmetic against values worked out by hand.

Never a time: a machine that is busy with other work would fail it.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from tiny_e5 import make_tiny_e5

from searchr1_lite.config import ROOT
from searchr1_lite.retrieval.dense import blas_from

sys.path.insert(0, str(ROOT / "benchmarks"))
import footprint
import million
import projection
import retrieval as benchmark

KINDS = ["bm25", "flat", "ivf-sq8", "bm25+flat"]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("million") / "million.json"
    million.main(["--vectors", "6000", "--dimension", "16", "--kinds", "ivf-sq8", "--out", str(out)])
    return json.loads(out.read_text()) | {"file": out}


@pytest.fixture(scope="module")
def real(tmp_path_factory, synthetic) -> dict:
    folder = tmp_path_factory.mktemp("retrieval")
    given = ["--corpus", "toy", "--questions", str(ROOT / "data/toy/questions.jsonl"), "--quick"]
    given += ["--encoder", str(make_tiny_e5(folder / "tiny-e5")), "--million", str(synthetic["file"])]
    benchmark.main([*given, "--kinds", *KINDS, "--out", str(folder / "retrieval.json")])
    return json.loads((folder / "retrieval.json").read_text()) | {"folder": folder}


# End to end


def test_every_part_is_written_and_drawn(real):
    assert real["corpus"]["passages"] == 500 and real["questions"] == 40
    assert set(real["flat_search"]["sizes"]) == {"1", "4", "16"}
    assert set(real["bm25"]["ratio"]) == {"ours, one by one", "rank_bm25", "bm25s.retrieve"}
    assert all(len(ratio["each"]) == 2 for ratio in real["bm25"]["ratio"].values())
    assert set(real["kinds"]) == {*KINDS, "reranker"} and "not_measured" in real["kinds"]["reranker"]
    assert (real["folder"] / "retrieval.png").stat().st_size > 10_000
    kept = json.dumps({key: real[key] for key in real if key != "folder"})
    assert "In which country" not in kept and "Volbi" not in kept  # nothing of the corpus


def test_bm25_and_its_peers_find_the_same(real):
    assert real["bm25"]["same_of_our_first_three"]["bm25s.retrieve"] > 0.8  # equal scores come in another order
    assert real["bm25"]["same_of_our_first_three"]["rank_bm25"] > 0.7  # and another idf


def test_each_kind_has_size_memory_speed_and_recall_with_intervals(real):
    for kind in KINDS:
        its = real["kinds"][kind]
        assert its["memory"]["bytes"]["resident"] > 0 and its["indexing_seconds"] > 0
        assert all(rate["median"] > 0 for rate in its["queries_a_second"].values())
        for name in ("recall@3", "recall@10", "recall@3_against_flat"):
            assert 0 <= its[name]["low"] <= its[name]["mean"] <= its[name]["high"] <= 1
        assert its["recall@3"]["mean"] <= its["recall@10"]["mean"]
    assert real["kinds"]["flat"]["recall@3_against_flat"] == {"mean": 1, "low": 1, "high": 1}
    both = [real["kinds"][kind]["disk_bytes"]["index"] for kind in ("bm25", "flat", "bm25+flat")]
    assert both[0] + both[1] == both[2]


def test_the_formulas_give_the_bytes_of_the_files_that_were_made(real):
    checked = {(row["kind"], row["on"]): row["ratio"] for row in real["projection"]["sizes_checked"]}
    assert set(checked) == {
        ("flat", "real passages"),
        ("ivf-sq8", "real passages"),
        ("ivf-sq8", "synthetic vectors"),
    }
    assert all(ratio == pytest.approx(1, abs=0.05) for ratio in checked.values())  # files this small are part header


def test_what_is_projected_says_so_and_from_what(real):
    projected = real["projection"]
    assert projected["what"] == "projected, not measured"
    assert projected["kinds"]["ivf-sq8"]["measured_on"]["search"] == "synthetic vectors"
    assert projected["kinds"]["flat"]["disk_bytes"]["result"] == 64_559_075_328  # 21,015,324 x 768 x 4
    assert projected["kinds"]["bm25"]["indexing_seconds"]["result"] == pytest.approx(
        real["kinds"]["bm25"]["indexing_seconds"] * 21_015_324 * 100 / (500 * real["corpus"]["words_a_passage"])
    )
    for its in projected["kinds"].values():
        disk = its["disk_bytes"]
        assert projection.evaluate(disk["formula"], disk["inputs"]) == disk["result"]


def test_synthetic_vectors_are_built_and_searched_by_the_real_path(synthetic):
    its = synthetic["kinds"]["ivf-sq8"]
    assert its["factory"] == "IVF153,SQ8"
    assert its["recall@10_against_exact"] > 0.8
    assert its["within_limit"] and its["disk_bytes"]["index"] > 6000 * (16 + 8)
    assert 0 < its["build"]["most_bytes"]["anonymous"] <= its["peak_bytes"]["building"]


# Vectors that are not of these passages, and searches that differ


def test_vectors_of_other_passages_are_refused(tmp_path):
    file = tmp_path / "vectors.npy"
    encoder = ["--encoder", str(make_tiny_e5(tmp_path / "e5"))]
    given = ["--corpus", "toy", "--questions", str(ROOT / "data/toy/questions.jsonl"), "--vectors", str(file), *encoder]
    given += ["--quick", "--out", str(tmp_path / "out.json")]
    np.save(file, np.zeros((499, 16), np.float32))
    with pytest.raises(SystemExit, match="float32 rows for 500 passages are needed"):
        benchmark.main(given)
    np.save(file, np.zeros((500, 16), np.float32))
    with pytest.raises(SystemExit, match=r"is not what .* makes of these passages"):
        benchmark.main(given)


def test_other_ids_by_matrix_product_end_the_benchmark(monkeypatch):
    class Odd(benchmark.DenseRetriever):
        def nearest(self, vectors, k):
            scores, ids = super().nearest(vectors, k)
            return scores + 1, ids + 1

    monkeypatch.setattr(benchmark, "DenseRetriever", Odd)
    vectors = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    with pytest.raises(RuntimeError, match="8 of 8 find other ids"):
        benchmark.flat_batches(vectors, vectors[:8], [4], 1)


# Arithmetic


def test_a_ratio_is_taken_within_each_round():
    assert benchmark.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == {
        "each": [2, 3, 1],
        "median": 2,
        "least": 1,
        "most": 3,
    }


def test_all_take_turns_and_the_first_round_does_not_count():
    ran = []
    seconds = benchmark.interleaved({name: lambda name=name: ran.append(name) for name in "abc"}, 2, "test")
    assert "".join(ran) == "cba" + "abc" + "cba"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_an_interval_is_about_the_mean_over_questions():
    assert benchmark.interval([1.0] * 20) == {"mean": 1, "low": 1, "high": 1}
    half = benchmark.interval([0.0, 1.0] * 50)
    assert half["mean"] == 0.5 and half["low"] == pytest.approx(0.4, abs=0.02)  # 0.5 - 1.96 x 0.05
    assert half["high"] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        ("Flat", 1000 * 8 * 4),
        ("SQ8", 1000 * 8 + 2 * 8 * 4),
        ("HNSW32,Flat", 1000 * (32 + 64 * 4 + 4 * 32 / 31 + 4 + 8)),
        ("IVF10,SQ8", 1000 * (8 + 8) + 2 * 8 * 4 + 10 * 8 * 4),
        ("IVF10,PQ4np", 1000 * (4 + 8) + 256 * 8 * 4 + 10 * 8 * 4),
        ("IVF10_HNSW32,PQ4", 1000 * (4 + 8) + 256 * 8 * 4 + 10 * (8 * 4 + 64 * 4 + 4 * 32 / 31 + 12)),
    ],
)
def test_bytes_by_hand(factory, size):
    assert projection.index_bytes(factory, 1000, 8)["result"] == pytest.approx(size)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16,SQ8", "HNSW32,Flat", "IVF20,SQ8", "IVF20_HNSW32,PQ8np"])
def test_bytes_by_faiss(factory):
    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    index = faiss.index_factory(32, factory, faiss.METRIC_INNER_PRODUCT)
    with blas_from(4, 1):  # learns faster
        index.train(vectors)
    index.add(vectors)
    formula = projection.index_bytes(factory, 4000, 32)["result"]
    assert formula == pytest.approx(faiss.serialize_index(index).size, rel=0.01)


def test_a_factory_without_a_formula_is_not_guessed():
    with pytest.raises(ValueError, match="no formula for the factory 'OPQ16,IVF10,PQ16'"):
        projection.index_bytes("OPQ16,IVF10,PQ16", 1000, 64)


def test_times_grow_with_the_work():
    def seconds(factory, work, measured, to):
        of, to = (projection.parts_of(factory, *sizes) for sizes in (measured, to))
        return projection.scaled(work(of), 2.0, of, to)["result"]

    build, search = projection.build_work, projection.search_work
    assert seconds("Flat", search, (100, 10), (1000, 20)) == 2 * 10 * 2
    assert seconds("HNSW32,Flat", search, (100, 10), (10_000, 10)) == pytest.approx(2 * 2)  # log 10,000 / log 100
    assert seconds("HNSW32,Flat", build, (100, 10), (10_000, 10)) == pytest.approx(2 * 2 * 100)
    # 100 lists, 64 of them looked into: 100 + 64 x 10 vectors, then 100 + 64 x 100
    assert seconds("IVF100,SQ8", search, (1000, 8), (10_000, 8)) == pytest.approx(2 * 6500 / 740)
    # 10 x 1000 x 100 to learn and 1000 x 100 to add; then ten times both
    assert seconds("IVF100,SQ8", build, (1000, 8), (10_000, 8)) == pytest.approx(2 * 10)
    codes = projection.build_work(projection.parts_of("IVF100,PQ4np", 1000, 8))
    counted = projection.evaluate(codes, projection.parts_of("IVF100,PQ4np", 1000, 8))
    assert counted == 8 * (10 * 1000 * 100 + 25 * 1000 * 256 + 1000 * (100 + 256))


def test_a_formula_is_its_own_text():
    assert projection.computed("4 * log(n) + min(n, 2)", n=math.e) == {
        "formula": "4 * log(n) + min(n, 2)",
        "inputs": {"n": math.e},
        "result": 6,
    }


def test_synthetic_rows_are_the_same_in_any_cut_and_exact_search_is_brute_force():
    vectors = million.Synthetic(24)
    rows = vectors.rows(np.arange(12_000))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    some = np.array([3, 4999, 5000, 11_999])
    assert (million.Synthetic(24).rows(some) == rows[some]).all()
    queries = vectors.rows(np.arange(15_000, 15_020))
    brute = np.argsort(-(queries @ rows[:11_000].T), axis=1)[:, :10]
    assert (million.exact(vectors, 11_000, queries, 10) == brute).mean() > 0.99  # sums differ in their last digits


TAKE_40_MB = """
import json, numpy, footprint
before = footprint.memory()
with footprint.Watch() as watch:
    block = numpy.ones(40_000_000 // 8)
print(json.dumps([before, watch.most, block.sum()]))
"""


def test_memory_that_is_taken_is_seen():
    # In a process of its own, as it is used: this one has memory that the collector may give back meanwhile.
    folder = Path(footprint.__file__).parent
    asked = subprocess.run([sys.executable, "-c", TAKE_40_MB], cwd=folder, capture_output=True, text=True, check=True)
    before, most, total = json.loads(asked.stdout)
    assert total == 5_000_000
    assert 35_000_000 < most["anonymous"] - before["anonymous"] < 60_000_000
    assert before["resident"] >= before["anonymous"] + before["file_backed"] > 0
