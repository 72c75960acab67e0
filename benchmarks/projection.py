"""What each kind of index would take for all of wiki-18, by arithmetic from what was measured; and the picture of both.

A formula is stored as the text that is evaluated, with its inputs. Times are scaled from the largest index that was
measured (a million vectors, else the real passages) by the work that a build or a search does. Left out: recall, which
no formula gives, and what a disk adds that is slower than memory.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from footprint import BATCH

from searchr1_lite.retrieval.dense import NPROBE, factory_of
from searchr1_lite.retrieval.index import SHARD

PASSAGES, DIMENSION = 21_015_324, 768  # wiki-18, e5-base-v2
WORDS = 100  # of a passage of wiki-18: DPR's cut (arXiv 2004.04906, section 4.1)
ITERATIONS = 10  # of k-means for an IVF's lists (FAISS 1.15.1, Level1Quantizer)
CODE_ITERATIONS, CODE_SAMPLE = (
    25,
    65536,
)  # of k-means for PQ's codes, and the most vectors it looks at (FAISS, Clustering)
COPIES = 3  # of the sample that lists and codes are learned from: as read, in one piece, and less its lists' centres
GRAPH = "nodes * (8 * m + 4 * m / (m - 1) + 12)"  # neighbours at the bottom and above, a level and an offset
GROWS = {
    "bm25": "disk, build and search with the postings, so with passages (our search skips some: at most); vocabulary "
    "by Heaps's law",
    "flat": "disk, build and search with passages x dimension",
    "hnsw": "disk with passages; build with n log n; search with log n where the vectors are in memory, and slower by "
    "cache misses, which are not counted (at least)",
    "ivf": "disk with passages; lists by the square root of passages until 16,384, so that training and adding grow "
    "with n^1.5 until then; a search looks into 64 lists of n / lists vectors: by the square root, then linear. From "
    "16,384 lists on a graph finds the nearest lists, which is faster than counted here (at most)",
}

Numbers = dict[str, float]


def evaluate(formula: str, inputs: Numbers) -> float:
    return eval(formula, {"__builtins__": {}, "log": math.log, "min": min, "max": max}, dict(inputs))


def computed(formula: str, **inputs: float) -> dict[str, Any]:
    """A formula as text, its inputs, and what it comes to."""
    return {"formula": formula, "inputs": inputs, "result": evaluate(formula, inputs)}


def scaled(work: str, seconds: float, measured: Numbers, projected: Numbers) -> dict[str, Any]:
    """Measured seconds times the work to come over the work that was done."""
    done, to_do = evaluate(work, measured), evaluate(work, projected)
    return {
        "formula": f"measured seconds * work(projected) / work(measured), work = {work}",
        "inputs": {"measured": {"seconds": seconds, **measured}, "projected": projected},
        "result": seconds * to_do / done,
    }


# What a factory string says


def parts_of(factory: str, passages: int, dimension: int) -> Numbers:
    """The numbers that the formulas need; raises ValueError for a factory that they do not cover."""
    wanted = r"(?:IVF(?P<lists>\d+)(?:_HNSW(?P<coarse>\d+))?,|HNSW(?P<m>\d+),)?(?:Flat|SQ8|PQ(?P<codes>\d+)(?:np)?)"
    found = re.fullmatch(wanted, factory)
    if not found:
        raise ValueError(f"no formula for the factory {factory!r}")
    has = {name: int(text) for name, text in found.groupdict().items() if text}
    code = has.get("codes") or (dimension if factory.endswith("SQ8") else 4 * dimension)
    book = 1024 * dimension if "codes" in has else 8 * dimension * factory.endswith("SQ8")
    parts = {"passages": passages, "dimension": dimension, "code_bytes": code, "codebook_bytes": book}
    if "lists" in has:
        sample = min(passages, max(100_000, 40 * has["lists"]))
        searched = 256 if "codes" in has else 0  # each part of a vector is compared with 256 codes
        parts |= {"lists": has["lists"], "probed": min(NPROBE, has["lists"]), "sample": sample, "codes": searched}
    if "m" in has or "coarse" in has:
        parts |= {"m": has.get("m") or has["coarse"], "nodes": passages if "m" in has else has["lists"]}
    return parts


def index_bytes(factory: str, passages: int, dimension: int) -> dict[str, Any]:
    """Bytes of the index's file: codes, ids and centres of lists, links of graphs."""
    parts = parts_of(factory, passages, dimension)
    formula = "passages * code_bytes + codebook_bytes"
    formula += " + passages * 8 + lists * dimension * 4" * ("lists" in parts) + f" + {GRAPH}" * ("m" in parts)
    return computed(formula, **parts)


def must_bytes(factory: str, passages: int, dimension: int) -> dict[str, Any]:
    """Bytes that opening reads into memory: an IVF's centres and codebook. All else is mapped."""
    parts = parts_of(factory, passages, dimension)
    if "lists" not in parts:
        return computed("0")
    return computed("codebook_bytes + lists * dimension * 4" + f" + {GRAPH}" * ("m" in parts), **parts)


def building_bytes(factory: str, passages: int, dimension: int) -> dict[str, Any]:
    """Bytes that a build has at once: the index, and a shard of vectors or the sample it learns from."""
    parts = parts_of(factory, passages, dimension) | {"shard": min(SHARD, passages)}
    index = index_bytes(factory, passages, dimension)["formula"]
    return computed(f"{index} + {COPIES} * 4 * dimension * max(shard, sample)", **{"sample": 0} | parts)


def build_work(parts: Numbers) -> str:
    if "lists" in parts:
        lists, codes = f"{ITERATIONS} * sample * lists", f"{CODE_ITERATIONS} * min(sample, {CODE_SAMPLE}) * codes"
        return f"dimension * ({lists} + {codes} + passages * (lists + codes))"
    return "dimension * passages * log(passages)" if "m" in parts else "dimension * passages"


def search_work(parts: Numbers) -> str:
    if "lists" in parts:
        return "dimension * (lists + probed * passages / lists)"
    return "dimension * log(passages)" if "m" in parts else "dimension * passages"


# From what was measured


def points(result: dict[str, Any], million: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By kind, what was measured of it, the largest last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, its in result["kinds"].items():
        if "disk_bytes" in its and "+" not in kind:
            seconds = {way: 1 / rate["median"] for way, rate in its["queries_a_second"].items()}
            found[kind] = [_point(its, "real passages", result["corpus"]["passages"], result["encoder"]["dimension"])]
            found[kind][0]["seconds_a_query"] = seconds
    for kind, its in million.get("kinds", {}).items():
        point = _point(its, "synthetic vectors", million["vectors"], million["dimension"])
        point["seconds_a_query"] = {way: 1 / rate for way, rate in its["queries_a_second"].items()}
        point["building_bytes"] = its["build"]["most_bytes"]["anonymous"]
        found.setdefault(kind, []).append(point)
    large = result.get("flat_search_beyond_cache")
    if large and "flat" in found:
        rates = {size: its["queries_a_second"]["ours"] for size, its in large["sizes"].items()}
        batch = str(BATCH) if str(BATCH) in rates else max(rates, key=int)
        seconds = {"one_by_one": 1 / rates["1"], f"batches_of_{BATCH}": 1 / rates[batch]}
        place = {"on": "random vectors, search alone", "passages": large["vectors"], "dimension": large["dimension"]}
        found["flat"].append(found["flat"][0] | place | {"seconds_a_query": seconds, "only_search": True})
    return found


def _point(its: dict[str, Any], on: str, passages: int, dimension: int) -> dict[str, Any]:
    return {
        "on": on,
        "passages": passages,
        "dimension": dimension,
        "factory": its["factory"],
        "bytes": its["disk_bytes"]["index"],
        "indexing_seconds": its["indexing_seconds"],
    }


def project_dense(kind: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    factory = factory_of(kind, DIMENSION, PASSAGES)
    to = parts_of(factory, PASSAGES, DIMENSION)
    built = [point for point in measured if not point.get("only_search")][-1]
    searched = measured[-1]
    of = {id(point): parts_of(point["factory"], point["passages"], point["dimension"]) for point in measured}
    family = next((name for name in ("ivf", "hnsw") if name in factory.lower()), "flat")
    return {
        "factory": factory,
        "disk_bytes": index_bytes(factory, PASSAGES, DIMENSION),
        "memory_bytes": index_bytes(factory, PASSAGES, DIMENSION),
        "anonymous_bytes": must_bytes(factory, PASSAGES, DIMENSION),
        "anonymous_bytes_while_building": building_bytes(factory, PASSAGES, DIMENSION),
        "indexing_seconds": scaled(build_work(to), built["indexing_seconds"], of[id(built)], to),
        "seconds_a_query": {
            way: scaled(search_work(to), seconds, of[id(searched)], to)
            for way, seconds in searched["seconds_a_query"].items()
        },
        "measured_on": {"build": built["on"], "search": searched["on"]},
        "grows": GROWS[family],
    }


def project_bm25(result: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    corpus, memory = result["corpus"], result["kinds"]["bm25"]["memory"]["bytes"]
    longer = WORDS / corpus["words_a_passage"]
    of = {"passages": corpus["passages"], "words": corpus["words_a_passage"]}
    to = {"passages": PASSAGES, "words": WORDS}
    words = computed(
        "different_words * (passages / measured_passages) ** growth",
        different_words=corpus["different_words"],
        passages=PASSAGES,
        measured_passages=corpus["passages"],
        growth=corpus["growth_of_different_words"],
    )
    disk = computed(
        "passages * 8 * postings_a_passage * longer + different_words * bytes_a_word",
        passages=PASSAGES,
        postings_a_passage=corpus["postings_a_passage"],  # a score of 4 bytes and a passage's number of 4
        longer=longer,
        different_words=words["result"],
        bytes_a_word=(measured["bytes"] - 8 * corpus["passages"] * corpus["postings_a_passage"])
        / corpus["different_words"],
    )
    anonymous = computed(
        "different_words * measured_bytes / measured_words + 4 * passages",
        different_words=words["result"],
        measured_bytes=max(0, memory["anonymous"]),
        measured_words=corpus["different_words"],
        passages=PASSAGES,
    )
    return {
        "factory": None,
        "different_words": words,
        "disk_bytes": disk,
        "memory_bytes": computed("mapped + anonymous", mapped=disk["result"], anonymous=anonymous["result"]),
        "anonymous_bytes": anonymous,
        "indexing_seconds": scaled("passages * words", measured["indexing_seconds"], of, to),
        "seconds_a_query": {
            way: scaled("passages * words", seconds, of, to) for way, seconds in measured["seconds_a_query"].items()
        },
        "measured_on": {"build": measured["on"], "search": measured["on"]},
        "grows": GROWS["bm25"],
    }


def sizes_checked(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The formulas for bytes on disk against each file that was made; not BM25's, which is fitted to it."""
    rows = []
    for kind, measured in found.items():
        for point in (point for point in measured if point["factory"] and not point.get("only_search")):
            by_formula = index_bytes(point["factory"], point["passages"], point["dimension"])["result"]
            row = {key: point[key] for key in ("on", "passages", "dimension", "factory")}
            sizes = {"formula": round(by_formula), "measured": point["bytes"], "ratio": by_formula / point["bytes"]}
            rows.append({"kind": kind} | row | sizes)
    return rows


def building_checked(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The formula for memory while building, which leaves the libraries' own out, against the processes that built."""
    rows = []
    for kind, point in ((kind, point) for kind, measured in found.items() for point in measured):
        if "building_bytes" in point:
            by_formula = building_bytes(point["factory"], point["passages"], point["dimension"])["result"]
            row = {"kind": kind, "passages": point["passages"], "formula": by_formula}
            rows.append(row | {"measured": point["building_bytes"], "ratio": by_formula / point["building_bytes"]})
    return rows


def times_checked(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The formulas for time from the smaller index to the larger one, where both were measured."""
    rows = []
    for kind, measured in found.items():
        if kind == "bm25" or len(measured) < 2:
            continue
        small, large = measured[0], measured[-1]
        of, to = (parts_of(point["factory"], point["passages"], point["dimension"]) for point in (small, large))
        pairs = {
            f"a query, {way}": (search_work(to), seconds, large["seconds_a_query"][way])
            for way, seconds in small["seconds_a_query"].items()
        }
        if not large.get("only_search"):
            pairs["indexing"] = (build_work(to), small["indexing_seconds"], large["indexing_seconds"])
        for what, (work, seconds, measured_seconds) in pairs.items():
            by_formula = scaled(work, seconds, of, to)["result"]
            row = {"kind": kind, "from": small["on"], "to": large["on"], "seconds": what, "formula": by_formula}
            rows.append(row | {"measured": measured_seconds, "ratio": by_formula / measured_seconds})
    return rows


def project(result: dict[str, Any], million_file: Path | None = None) -> dict[str, Any]:
    """Disk, memory, build and search of each measured kind for wiki-18 and e5-base-v2."""
    there = million_file is not None and million_file.is_file()
    found = points(result, json.loads(million_file.read_text(encoding="utf-8")) if there else {})
    kinds: dict[str, Any] = {}
    for kind, measured in list(found.items()):
        try:
            kinds[kind] = project_bm25(result, measured[-1]) if kind == "bm25" else project_dense(kind, measured)
        except ValueError as error:  # FAISS has more factories than there are formulas here
            kinds[kind] = {"not_projected": str(error)}
            del found[kind]
    rate = next(value for name, value in result["encoding"].items() if name.startswith("passages_a_second"))
    texts = text_bytes(result)
    return {
        "what": "projected, not measured",
        "passages": PASSAGES,
        "dimension": DIMENSION,
        "memory": "anonymous_bytes must be had; the rest of memory_bytes is mapped, and what of it is looked at often "
        "(all of it for flat and HNSW) should fit too, or the disk is waited for. Joined kinds need the sum of theirs.",
        "encoding_seconds_on_this_cpu": computed("passages / rate", passages=PASSAGES, rate=rate),
        "passages_on_disk_bytes": computed(
            "passages * bytes_a_passage * longer",
            passages=PASSAGES,
            bytes_a_passage=texts,
            longer=WORDS / result["corpus"]["words_a_passage"],
        ),
        "kinds": kinds,
        "sizes_checked": sizes_checked(found),
        "building_memory_checked": building_checked(found),
        "times_checked": times_checked(found),
        "million": "its sizes and times are used" if there else "not measured yet: run million.py first",
    }


def text_bytes(result: dict[str, Any]) -> float:
    """Bytes of a passage in an index folder."""
    its = next(its for its in result["kinds"].values() if "disk_bytes" in its)
    return its["disk_bytes"]["passages"] / result["corpus"]["passages"]


# The picture

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREYS = ("black", "0.35", "0.6")


def draw(result: dict[str, Any], path: Path) -> None:
    """Recall against flat over speed, recall of what is needed, and memory, measured and projected."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {kind: its for kind, its in result["kinds"].items() if "queries_a_second" in its}
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    _draw_speed(panels[0], kinds)
    _draw_needed(panels[1], kinds)
    _draw_memory(panels[2], result, kinds)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(its: dict[str, float]) -> list[list[float]]:
    return [[its["mean"] - its["low"]], [its["high"] - its["mean"]]]


def _legend(panel: Any, columns: int) -> None:
    panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=columns)


def _draw_speed(panel: Any, kinds: dict[str, Any]) -> None:
    dense = {kind: its for kind, its in kinds.items() if "bm25" not in kind and "recall@3_against_flat" in its}
    for number, (kind, its) in enumerate(dense.items()):
        recall = its["recall@3_against_flat"]
        for way, filled in (("one_by_one", False), (f"batches_of_{BATCH}", True)):
            grey = GREYS[number % len(GREYS)]
            panel.errorbar(
                its["queries_a_second"][way]["median"],
                recall["mean"],
                yerr=_bars(recall),
                marker=MARKS[number % len(MARKS)],
                markersize=8,
                color=grey,
                markerfacecolor=grey if filled else "white",
                capsize=3,
                linestyle="",
                label=kind if filled else None,
            )
    panel.set_xscale("log")
    panel.set_xlabel(f"queries a second (hollow: one by one; filled: batches of {BATCH})")
    panel.set_ylabel("recall@3 against flat")
    panel.set_title("approximate search", fontsize=10)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if f"{x:.0e}"[0] == "3" else "")
    _legend(panel, 3)
    panel.grid(alpha=0.3, which="both")


def _draw_needed(panel: Any, kinds: dict[str, Any]) -> None:
    names = list(kinds)
    for k, mark, grey, shift in ((3, "o", "black", -0.12), (10, "s", "0.5", 0.12)):
        for row, kind in enumerate(names):
            its = kinds[kind][f"recall@{k}"]
            label = f"among the first {k}" if row == 0 else None
            panel.errorbar(its["mean"], row + shift, xerr=_bars(its), marker=mark, color=grey, capsize=3, label=label)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xlabel("share of the supporting passages found")
    panel.set_title("what a question needs", fontsize=10)
    _legend(panel, 2)
    panel.grid(alpha=0.3, axis="x")


def _draw_memory(panel: Any, result: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Lengths are logarithmic; figures stand beside them."""
    projected = result["projection"]["kinds"]
    names = [kind for kind in kinds if "disk_bytes" in projected.get(kind, {})]
    for row, kind in enumerate(names):
        measured = max(1, kinds[kind]["memory"]["bytes"]["resident"]) / 1e9
        whole = projected[kind]["memory_bytes"]["result"] / 1e9
        panel.barh(row - 0.2, measured, 0.36, color="0.35", label="measured, resident" if row == 0 else None)
        label = "projected, all pages in memory" if row == 0 else None
        panel.barh(row + 0.2, whole, 0.36, color="0.85", edgecolor="0.3", hatch="///", label=label)
        panel.text(measured * 1.15, row - 0.2, f"{measured:.2g}", va="center", fontsize=8)
        panel.text(whole * 1.15, row + 0.2, f"{whole:.3g}", va="center", fontsize=8)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlim(0.003, 1500)
    panel.set_xlabel("memory, GB of 10⁹ bytes")
    size = f"{result['corpus']['passages']:,} x {result['encoder']['dimension']}"
    panel.set_title(f"{size}, and 21,015,324 x 768", fontsize=10)
    _legend(panel, 2)
    panel.grid(alpha=0.3, axis="x")
