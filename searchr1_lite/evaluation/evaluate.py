"""How good a model is: answer questions, judge the answers, sum up; and all of it into a folder, which resumes.

The profile's strategy says how questions are answered: by `rollout`, or as `strategies.py` has it. An evaluation folder
has config.yaml, environment.json, trajectories.jsonl.gz (a row an answer, with its decoding and scores) and, last,
evaluation.json: for each decoding the summary of all questions, those by data set, and the sets' unweighted mean
("macro_average", the papers' "Avg").

To evaluate as the paper does (arXiv 2503.09516; Search-R1, scripts/nq_hotpotqa): exact match over wiki-18 with
e5-base-v2, topk=3, max_turns=4, quantization=none, chat_template=true for base and for instruct models, since both were
trained in the template. The tags stay ordinary text, as in training: a re-evaluation of the released checkpoints
(GaurisankarJ/reason_over_search, docs/COMPARISON_PLAN_B_v1.md) lost points on NQ while they were special tokens.

Greedy or sampled? Search-R1's validation asks for greedy decoding, but the request is lost on the way to its search
loop, which samples at temperature 1 (ray_trainer.py, _validate; llm_agent/generation.py, run_llm_loop). How the
published figures were decoded is therefore not certain, and both are made here unless one is asked for. Its validation
also drops the last batch if that is not full; here every question counts.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from searchr1_lite.config import ConfigError, Profile, load_profile, resolve_path, save_config
from searchr1_lite.evaluation.metrics import by_hops, macro_average, mean, share_interval
from searchr1_lite.evaluation.strategies import STRATEGIES, Attempt, answer
from searchr1_lite.files import append_rows, read_rows, write_json
from searchr1_lite.printable import printable
from searchr1_lite.retrieval.batching import cached
from searchr1_lite.retrieval.controls import Empty
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollouts.engine import rollout
from searchr1_lite.rollouts.policy import Policy, PolicyError, environment, load_policy, with_adapter
from searchr1_lite.rollouts.rows import trajectory_to_row
from searchr1_lite.rollouts.trajectory import Trajectory
from searchr1_lite.runfolder import RunFolderError, check_same_run, fingerprint, is_finished, read_json
from searchr1_lite.tasks.answers import exact_match, f1, substring_match
from searchr1_lite.tasks.questions import QuestionError, held_out
from searchr1_lite.types import Question, RetrievalError, Retriever

Answered = Trajectory | Attempt
SCORES = {"exact_match": exact_match, "f1": f1, "substring_match": substring_match}
FIGURES = (*SCORES, "searches", "response_length", "retrieved_tokens", "finished", "invalid_actions")
DECODINGS = {"greedy": ["greedy"], "sampled": ["sampled"], "both": ["greedy", "sampled"]}
ROWS, MARK = "trajectories.jsonl.gz", "progress.json"
SECONDS_BETWEEN_WRITES = 1.0  # what is lost where an evaluation is cut off, besides what was under way


def evaluate(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    profile: Profile,
    greedy: bool = True,
    seed: int = 0,
    done: Callable[[Answered], None] = lambda trajectory: None,
) -> tuple[dict, list[Answered]]:
    """One trajectory (or attempt) a question, in order, and their summary (see `summarise`).

    `done` gets each trajectory, in order, as soon as it is ready. What takes over ten seconds shows its progress.
    """
    if not questions:
        raise QuestionError("there are no questions to evaluate on; check the profile's questions and test_split")
    started = time.monotonic()
    with tqdm(total=len(questions), unit=" questions", delay=10, mininterval=5) as bar:

        def one_more(trajectory: Answered) -> None:
            done(trajectory)
            bar.update()

        work_through = answer if profile.strategy in STRATEGIES else rollout
        trajectories = work_through(policy, questions, retriever, profile, greedy=greedy, seed=seed, done=one_more)
    summary = summarise(trajectories)
    return summary | {"seconds": round(time.monotonic() - started, 3), "greedy": greedy}, trajectories


def scored_row(trajectory: Answered, tokenizer: Any = None, **extra: Any) -> dict[str, Any]:
    """`trajectory_to_row`, with the scores of what the model wrote; retrieved text is never judged."""
    golden = trajectory.question.golden_answers
    scores = {name: score(trajectory.policy_text, golden) for name, score in SCORES.items()}
    return trajectory_to_row(trajectory, tokenizer, **extra, **scores, invalid_actions=trajectory.invalid_actions)


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """The little of a scored row that a summary needs; the texts, which would fill the memory, are left behind."""
    more = {"hops": row["question"]["metadata"].get("hops"), "failed": row["stop_reason"].startswith("search ")}
    return {name: row[name] for name in FIGURES} | more


def summarise(trajectories: Sequence[Answered]) -> dict:
    """Means over trajectories, one of which belongs to each question; see `summarise_figures`."""
    return summarise_figures([figures(scored_row(trajectory)) for trajectory in trajectories])


def summarise_figures(rows: Sequence[dict[str, Any]]) -> dict:
    """Means over the `figures` of answered questions.

    `exact_match` judges what the model wrote, never retrieved text; its interval is Wilson's, 95 %. `f1` is of words,
    `substring_match` the share whose answer holds a golden one.
    `response_length` is in tokens that the model wrote, `retrieved_tokens` in those of what it was shown, both a
    trajectory, as `invalid_actions` and searches are; `answer_rate` is the share that ended in an answer. The
    `_by_hops` values have keys "1", "2", … for the hop counts that the questions' metadata names, and are empty where
    it names none. A question whose search failed is in no mean and not among `questions`; `failed_searches` counts
    them. Raises ValueError where no other is left.
    """
    failed = sum(row["failed"] for row in rows)
    rows = [row for row in rows if not row["failed"]]
    if not rows:
        raise RetrievalError(f"the search of every question failed ({failed}): there is nothing to sum up")
    column = {name: [float(row[name]) for row in rows] for name in FIGURES}
    correct = column["exact_match"]
    return {
        "questions": len(rows),
        "exact_match": mean(correct),
        "exact_match_interval": list(share_interval(round(sum(correct)), len(correct))),
        "exact_match_by_hops": by_hops(correct, rows),
        "f1": mean(column["f1"]),
        "substring_match": mean(column["substring_match"]),
        "mean_searches": mean(column["searches"]),
        "mean_searches_by_hops": by_hops(column["searches"], rows),
        "response_length": mean(column["response_length"]),
        "retrieved_tokens": mean(column["retrieved_tokens"]),
        "answer_rate": mean(column["finished"]),
        "invalid_actions": mean(column["invalid_actions"]),
        "failed_searches": failed,
    }


def closed_book(policy: Policy, questions: Sequence[Question], profile: Profile) -> float:
    """Exact match when nothing can be looked up: one turn, no search, greedy."""
    summary, _ = evaluate(policy, questions, Empty(), profile.model_copy(update={"max_turns": 0}))
    return summary["exact_match"]


def evaluate_into(out: Path, profile: Profile, decoding: str = "both", adapter: Path | None = None) -> dict[str, Any]:
    """Answer the profile's held-out questions, leave the folder that the module describes, return evaluation.json.

    Raises RunFolderError where the folder holds something else, and whatever loading and answering raise.
    """
    if decoding not in DECODINGS:
        raise ConfigError(f"no decoding {decoding!r}; there are {', '.join(DECODINGS)}")
    questions = held_out(profile)
    adapted = profile.model_copy(update={"model": str(adapter)})
    inputs = fingerprint(profile, questions, questions) | {"decoding": decoding}
    inputs["adapter"] = fingerprint(adapted, [], [])["model"]
    check_same_run(out, profile, inputs)
    if is_finished(out):
        print(f"{out}: finished already, nothing to do")
        return read_json(out / "evaluation.json")
    policy = load_adapted(profile, adapter)
    if not (out / "config.yaml").is_file():
        made = environment(policy) | {"adapter": adapter and str(adapter), "inputs": inputs}
        write_json(out / "environment.json", made)
        save_config(profile, out / "config.yaml")
    made = read_json(out / "environment.json")
    if made["quantization"] != policy.quantization:
        raise RunFolderError(f"{out} was begun with quantization {made['quantization']}, which does not work here")
    answer_all(out, policy, questions, profile, DECODINGS[decoding])
    asked = profile.model_dump(include={"model", "strategy", "questions", "test_split", "seed"})
    result = made | asked | _summaries(out, profile.questions)
    write_json(out / "evaluation.json", result)
    (out / MARK).unlink()
    return result


def answer_all(out: Path, policy: Policy, questions: list[Question], profile: Profile, decodings: list[str]) -> None:
    """Append what is missing to the rows; the mark says how far they are whole, and what each decoding took."""
    inner = load_retriever(profile)
    mark = {"answered": 0, "bytes": 0, "seconds": {}, "retriever_calls": {}} | read_json(out / MARK)
    with (out / ROWS).open("ab") as rows:
        if rows.tell() < mark["bytes"]:
            raise RunFolderError(f"{out / ROWS} was changed since {MARK} was written; delete {out} to start again")
        rows.truncate(mark["bytes"])
    before, extra = mark["answered"], {"phase": "evaluation", "strategy": profile.strategy}
    for number, name in enumerate(decodings):
        retriever = cached(inner)  # anew, so that what one decoding asked does not spare the next its calls
        written, called, waiting = time.monotonic(), 0, []

        def keep(trajectory: Answered, name: str = name, retriever: Retriever = retriever, waiting: list = waiting):
            nonlocal written, called
            if trajectory.stop_reason == "search failed":  # a retriever that is there again may well find something
                question = trajectory.question.id
                raise RetrievalError(f"question {question}: its search failed; the same command goes on from {out}")
            mark["answered"] += 1
            waiting.append(scored_row(trajectory, policy.tokenizer, decoding=name, **extra))
            now, last = time.monotonic(), mark["answered"] % len(questions) == 0
            if now - written < SECONDS_BETWEEN_WRITES and not last:
                return
            append_rows(out / ROWS, waiting)
            waiting.clear()
            mark["bytes"] = (out / ROWS).stat().st_size
            mark["seconds"][name] = mark["seconds"].get(name, 0.0) + now - written
            calls = getattr(retriever, "asked", 0) - getattr(retriever, "hits", 0)
            mark["retriever_calls"][name] = mark["retriever_calls"].get(name, 0) + calls - called
            written, called = now, calls
            write_json(out / MARK, mark)

        if rest := questions[max(0, before - number * len(questions)) :]:
            evaluate(policy, rest, retriever, profile, name == "greedy", profile.seed, done=keep)


def _summaries(out: Path, source: str) -> dict[str, dict[str, Any]]:
    """For each decoding, from the rows that were written: all questions, each data set, and the sets' mean.

    Where the questions are of more than one set their metadata says which; else `source` is their name.
    """
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _, row in read_rows(out / ROWS, RunFolderError, "trajectories"):
        name = row["question"]["metadata"].get("data_source", source)
        grouped.setdefault(row["decoding"], {}).setdefault(name, []).append(figures(row))
    result, mark = {}, read_json(out / MARK)
    for decoding, sets in grouped.items():
        by_set = {name: summarise_figures(rows) for name, rows in sets.items()}
        shares = [(one["exact_match"], *one["exact_match_interval"]) for one in by_set.values()]
        average, low, high = macro_average(shares)
        result[decoding] = summarise_figures([row for rows in sets.values() for row in rows])
        result[decoding] |= {key: mark[key].get(decoding) for key in ("seconds", "retriever_calls")}
        result[decoding] |= {"macro_average": average, "macro_average_interval": [low, high], "by_data_set": by_set}
    return result


def resolve_model(profile: str | None, adapter: Path | None, settings: dict[str, Any]) -> tuple[Profile, Path | None]:
    """The profile and the PEFT folder that a command names; a run folder brings both, and a profile named wins."""
    name = profile or "tiny"
    if adapter and (adapter / "config.yaml").is_file():
        name, adapter = profile or adapter / "config.yaml", adapter / "adapter"
    chosen = load_profile(name, Profile, {"defects"}, **settings)  # of the bug lab: what was trained, not how
    if adapter:
        check_base(adapter, chosen.model)
    return chosen, adapter


def load_adapted(profile: Profile, adapter: Path | None) -> Policy:
    """The profile's model, with the adapter of a PEFT folder on it if there is one."""
    return with_adapter(load_policy(profile), adapter) if adapter else load_policy(profile)


def check_base(adapter: Path, model: str) -> None:
    """Refuse an adapter that names another base than the model in use, which may well load and answer."""
    if not (adapter / "adapter_config.json").is_file():
        raise PolicyError(f"{adapter}: no adapter_config.json is there; a run has its adapter once it is finished")
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if base and resolve_path(base).resolve() != resolve_path(model).resolve():
        advice = f"give model={base}, or, if the two are copies of one model, correct the name in adapter_config.json"
        raise ConfigError(f"{adapter} was trained on {base}, but the model in use is {model}; {advice}")


def format_scores(result: dict[str, Any]) -> str:
    """evaluation.json in a line for each decoding, and for each data set where there are several."""
    lines = []
    for decoding in (name for name in DECODINGS["both"] if name in result):
        sets = result[decoding]["by_data_set"]
        for name, scores in ({"all": result[decoding]} | (sets if len(sets) > 1 else {})).items():
            low, high = scores["exact_match_interval"]
            line = f"{decoding}, {printable(name)}: {scores['questions']} questions, exact match "
            line += f"{scores['exact_match']:.3f} [{low:.3f}, {high:.3f}], F1 {scores['f1']:.3f}, "
            line += f"{scores['mean_searches']:.2f} searches"
            if scores["failed_searches"]:
                line += f"; left out, since a query was refused: {scores['failed_searches']}"
            lines.append(line)
    return "\n".join(lines)
