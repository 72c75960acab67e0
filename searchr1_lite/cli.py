"""The command `searchr1`: every verb, its arguments and its help; what a user can put right is printed here.

Each verb is a plain function that a notebook can call as well. Imports of what a verb needs are inside it, so that
`--help` and completion are quick. Settings of a profile follow as name=value, with the values of YAML.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer import Argument, Option

from searchr1_lite.errors import UserError
from searchr1_lite.printable import printable

EXTRAS = {"pymilvus": "milvus", "fastapi": "service", "uvicorn": "service", "prometheus_client": "service"}
OPTIONS = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None}
app = typer.Typer(help="Train a language model to search by reinforcement, and see what it learned.", **OPTIONS)
index = typer.Typer(help="Make a corpus or an index of it, and measure what is found.", **OPTIONS)
report = typer.Typer(help="Tables, pictures and pages of runs and evaluations.", **OPTIONS)
app.add_typer(index, name="index")
app.add_typer(report, name="report")

Settings = Annotated[list[str] | None, Argument(metavar="[NAME=VALUE]...", help="Settings that replace the profile's.")]
ProfileName = Annotated[str, Option("--profile", help="A profile's name or a .yaml file.")]
RunProfile = Annotated[str | None, Option("--profile", help="A profile; else the run's, else tiny.")]
Adapter = Annotated[Path | None, Option(help="A run folder, or the folder of a PEFT adapter.")]
Folder = Annotated[Path, Option("--out", help="The folder to write; work that was cut off goes on there.")]
File = Annotated[Path, Option("--out", help="The file to write.")]
Stem = Annotated[Path, Option("--out", help="The files to write, without their endings.")]
Seeds = Annotated[str | None, Option(help="Seeds in place of the experiment's, as 0,1,2.")]
Corpus = Annotated[Path, Argument(help="Passages: a .jsonl or .jsonl.gz file.")]
Encoder = Annotated[str, Option(help="For vectors: minilm, a hub name or a folder.")]


@app.command()
def train(out: Folder, settings: Settings = None, profile: ProfileName = "tiny") -> None:
    """Train a model to search, by the profile and settings given.

    On several GPUs: accelerate launch --multi_gpu --num_processes 2 -m searchr1_lite train --out FOLDER
    """
    from searchr1_lite.config import load_profile
    from searchr1_lite.training import loop

    loop.train(load_profile(profile, **parse_settings(settings)), out)


@app.command()
def evaluate(
    out: Folder,
    settings: Settings = None,
    profile: RunProfile = None,
    adapter: Adapter = None,
    decoding: Annotated[str, Option(help="greedy, sampled or both.")] = "both",
) -> None:
    """Answer held-out questions with a model, or with a base and an adapter; score, sum up and keep every answer."""
    from searchr1_lite.evaluation.evaluate import evaluate_into, format_scores, resolve_model

    chosen, folder = resolve_model(profile, adapter, parse_settings(settings))
    print(format_scores(evaluate_into(out, chosen, decoding, folder)))


@app.command()
def ask(
    words: Annotated[list[str] | None, Argument(metavar="[QUESTION] [NAME=VALUE]...", help="One, in quotes.")] = None,
    profile: RunProfile = None,
    adapter: Adapter = None,
    sampled: Annotated[bool, Option("--sampled", help="Draw from what the model finds likely; else greedy.")] = False,
    seed: Annotated[int | None, Option(help="Of what is drawn; else the profile's.")] = None,
) -> None:
    """Answer a question of yours, and show the trajectory while it is written; without one, answer lines of stdin."""
    from searchr1_lite.evaluation.ask import answer_words
    from searchr1_lite.evaluation.evaluate import resolve_model

    settings = [word for word in words or () if re.match(r"\w+=", word)]
    questions = [word for word in words or () if word not in settings]
    values = parse_settings(settings) | ({} if seed is None else {"seed": seed})
    answer_words(questions, *resolve_model(profile, adapter, values), sampled=sampled)


@app.command()
def experiment(
    names: Annotated[
        list[str] | None, Argument(help="By name, a .yaml file of yours, or all; none: list them.")
    ] = None,
    seeds: Seeds = None,
    partial: Annotated[bool, Option("--partial", help="Train nothing; sum up the runs that are finished.")] = False,
    workers: Annotated[int, Option(min=1, help="Runs at a time, one thread each.")] = 2,
) -> None:
    """Redo experiments: train the runs that are missing, and sum them up in data/results/experiments."""
    from searchr1_lite.experiments.run import run_experiments

    run_experiments(names or [], parse_numbers(seeds), partial=partial, workers=workers)


@index.command("build")
def build_index(
    corpus: Corpus,
    out: Folder,
    kind: Annotated[str, Option(help="bm25, flat, hnsw, ivf-sq8, ivf-pq or faiss:<factory string>.")] = "bm25",
    encoder: Encoder = "minilm",
    vectors: Annotated[Path | None, Option(help="A flat FAISS index or .npy of the vectors, else encoded.")] = None,
    shard: Annotated[int, Option(min=1, help="Passages encoded and saved at once.")] = 50_000,
) -> None:
    """Build an index folder for retriever=index:FOLDER, or go on with one that was cut off."""
    from searchr1_lite.retrieval.index import build_index_folder

    build_index_folder(corpus, out, kind, encoder, shard, vectors)
    print(f"{out}: whole")


@index.command()
def documents(
    paths: Annotated[list[Path], Argument(help="Files or folders: text, Markdown, HTML.")],
    out: File,
    words: Annotated[int, Option(min=1, help="Words of a passage, at most.")] = 100,
) -> None:
    """Cut documents of yours into passages: a corpus to build an index of."""
    from searchr1_lite.retrieval.documents import write_corpus

    print(f"{out}: {write_corpus(paths, out, words):,} passages")


@index.command()
def wiki18(
    out: Folder = Path("data/cache/wiki-18"),
    no_index: Annotated[bool, Option("--no-index", help="The corpus alone.")] = False,
    plan: Annotated[bool, Option("--plan", help="Say what it takes, and stop.")] = False,
) -> None:
    """Fetch, verify and unpack the paper's Wikipedia of 2018 and its e5 index."""
    from searchr1_lite.retrieval.wiki18 import fetch

    fetch(out, with_index=not no_index, plan=plan)


@index.command()
def subset(
    corpus: Corpus,
    questions: Annotated[str, Argument(help="A data set's name, or a .jsonl(.gz) file.")],
    out: Folder,
    split: Annotated[str | None, Option(help="Or several, as train+test; else all of a file, or test.")] = None,
    limit: Annotated[int | None, Option(min=1, help="So many questions of a split, drawn at random.")] = None,
    per_question: Annotated[int, Option(min=1, help="Passages for a question that names none.")] = 10,
    distractors: Annotated[int, Option(min=0, help="Other passages, drawn at random.")] = 100_000,
    seed: int = 0,
    index: Annotated[Path | None, Option(help="The corpus's flat index, to cut the vectors out of.")] = None,
    encoder: Annotated[str | None, Option(help="Search densely for passages, instead of by BM25.")] = None,
) -> None:
    """Cut a corpus that fits a laptop out of a big one: what the questions need, and distractors."""
    from searchr1_lite.retrieval.subset import cut

    cut(corpus, questions, out, split, limit, per_question, distractors, seed, index, encoder)


@index.command()
def measure(
    corpus: Corpus,
    questions: Annotated[Path, Argument(help="Questions with supporting passages, or BEIR queries.")],
    out: File,
    qrels: Annotated[Path | None, Option(help="BEIR judgements, a .tsv file.")] = None,
    ks: Annotated[str, Option(help="How many passages to look at.")] = "1,3,5,10,100",
    encoder: Encoder = "minilm",
) -> None:
    """Measure what BM25 and exact vector search find of what the questions need."""
    from searchr1_lite.retrieval.measure import measure_corpus

    measure_corpus(corpus, questions, out, qrels, parse_numbers(ks), encoder)


@index.command()
def milvus(
    corpus: Corpus,
    to: Annotated[str, Option(help="milvus:FILE.db, or milvus:http://HOST:19530/COLLECTION.")],
    encoder: Encoder = "minilm",
    batch: Annotated[int, Option(min=1, help="Passages encoded and sent at once.")] = 1000,
) -> None:
    """Load a corpus into Milvus (a file, or a cluster), or go on with one that was cut off."""
    from searchr1_lite.retrieval.milvus import load_corpus_into

    load_corpus_into(corpus, to, encoder, batch)


@app.command()
def serve(
    folders: Annotated[list[Path], Argument(metavar="INDEX...", help="Index folders; several are fused.")],
    rerank: Annotated[str | None, Option(help="A cross-encoder that orders what was found.")] = None,
    host: Annotated[str, Option(help="Any but this machine needs SEARCHR1_TOKEN set.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535)] = 8000,
    topk: Annotated[int, Option(min=1, max=256, help="Passages for a request that does not say.")] = 3,
) -> None:
    """Serve indexes over HTTP, as Search-R1's retrieval server does."""
    from searchr1_lite.retrieval.server import serve_folders

    serve_folders(folders, rerank, host, port, topk)


@report.command()
def page(
    folder: Annotated[Path, Argument(help="A run or evaluation folder, or a trajectories.jsonl.gz.")],
    out: File,
    against: Annotated[Path | None, Option(help="Another one: the same questions side by side.")] = None,
) -> None:
    """Write trajectories as one HTML file, to read and to filter."""
    from searchr1_lite.analysis.page import load_source, write_page

    sources = [load_source(one) for one in (folder, against) if one]
    write_page(sources[0], out, sources[1] if against else None)
    print(f"{out}: {sum(len(source.rows) for source in sources)} trajectories, {out.stat().st_size / 1e6:.1f} MB")


@report.command()
def table(folders: Annotated[list[Path], Argument(help="Comparisons of ways to answer.")], out: Stem) -> None:
    """Write the table of ways to answer (Markdown, CSV, LaTeX, PNG), with intervals and paired tests."""
    from searchr1_lite.analysis.table import report_table

    report_table(folders, out)


@report.command()
def findings(results: Annotated[list[Path], Argument(help="Result files of experiments.")], out: Stem) -> None:
    """Compare what experiments gave with what the paper says, claim by claim."""
    from searchr1_lite.analysis.findings import write_findings

    write_findings(results, out)


@report.command()
def runs(folders: Annotated[list[Path], Argument(help="Run folders.")], out: Stem) -> None:
    """Sum up run folders (JSON) and draw their learning curves (PNG)."""
    from searchr1_lite.analysis.summary import write_summary

    write_summary(folders, out)


@app.command()
def export(
    questions: Annotated[str, Argument(help="As in a profile: a name, a file, a folder, a hub data set.")],
    out: File,
    split: Annotated[str, Option(help="train, test, ...")] = "train",
    data_source: Annotated[str | None, Option(help="Of all rows; else each question's own.")] = None,
) -> None:
    """Write questions as the parquet file that Search-R1 and verl read."""
    from searchr1_lite.training.export import export as write_parquet

    write_parquet(questions, split, out, data_source)


@app.command()
def memory(settings: Settings = None, profile: ProfileName = "tiny") -> None:
    """Say what memory a profile needs on a GPU, without loading the model."""
    from searchr1_lite.config import load_profile
    from searchr1_lite.memory import format_plan, memory_plan

    chosen = load_profile(profile, **parse_settings(settings))
    print(format_plan(chosen, memory_plan(chosen)))


@app.command()
def tour() -> None:
    """Run the notebooks and write runs/tour/index.html, to read without Jupyter."""
    from searchr1_lite.tour import tour as run_tour

    run_tour()


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """{"seed": 3} of ["seed=3"], each value read as YAML (3, 0.001, true, [a, b], text)."""
    values = {}
    for text in settings or ():
        if not re.match(r"\w+=", text):
            raise UserError(f"{text!r} is not of the form name=value")
        name, _, value = text.partition("=")
        try:
            values[name] = yaml.safe_load(value)
        except Exception as error:  # a date such as 2026-99-99 is a ValueError of PyYAML's
            raise UserError(f"{text!r}: the value is not YAML ({str(error).splitlines()[0]})") from None
    return values


def parse_numbers(text: str | None) -> list[int]:
    """[0, 1] of "0,1"; none of nothing."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{text!r}: whole numbers with commas between are expected, as 0,1,2") from None


def main(arguments: list[str] | None = None) -> None:
    """The program: exits with 0, 1 for what a user can put right, 2 for a wrong command line, 130 for Ctrl-C."""
    try:
        app(arguments, prog_name="searchr1")
    except (UserError, OSError) as error:
        sys.exit(f"error: {printable(str(error))}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"error: {error.name} is not installed; run: pip install 'searchr1_lite[{EXTRAS[error.name]}]'")
    except SystemExit as stop:
        if stop.code == 130:
            print("stopped; the same command goes on from what was saved", file=sys.stderr)
        raise
