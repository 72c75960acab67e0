r"""Evaluate a model, or a base with an adapter, from a shell; any setting of the profile can follow as name=value.

    python -m searchr1_lite.evaluation --out runs/base
    python -m searchr1_lite.evaluation --out runs/mine-again --adapter data/results/runs/tiny-masked-seed0
    python -m searchr1_lite.evaluation --out runs/rag strategy=rag model=data/tiny-instruct
    python -m searchr1_lite.evaluation --profile qwen2.5-3b-4bit --out runs/released quantization=none \
        model=PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-3b-em-grpo questions=paper eval_questions=60000

`--adapter` takes a run folder, whose profile is used unless one is named, or the folder of a PEFT adapter. Questions
are `eval_questions` of the split, those that training holds out, drawn from all sets together whatever the seed; a
number as large as the split asks every one. The folder gets config.yaml, environment.json, trajectories.jsonl.gz (a
row an answer, with its decoding and scores) and, last, evaluation.json: for each decoding the summary of all
questions, those by data set, and the sets' unweighted mean ("macro_average", the papers' "Avg"). The same command
again goes on after a cut to the same result.

To evaluate as the paper does (arXiv 2503.09516; Search-R1, scripts/nq_hotpotqa): exact match over wiki-18 with
e5-base-v2, topk=3, max_turns=4, chat_template=true for base and for instruct models, since both were trained in the
template, and quantization=none. The tags stay ordinary text, as in training: a re-evaluation of the released
checkpoints (GaurisankarJ/reason_over_search, docs/COMPARISON_PLAN_B_v1.md) lost points on NQ while they were special
tokens.

Greedy or sampled? Search-R1's validation asks for greedy decoding, but the request is lost on the way to its search
loop, which samples at temperature 1 (ray_trainer.py, _validate; llm_agent/generation.py, run_llm_loop). How the
published figures were decoded is therefore not certain, and both are made here unless one is asked for. Its validation
also drops the last batch if that is not full; here every question counts.
"""

import time
from pathlib import Path
from typing import Any

from searchr1_lite.config import ConfigError, Profile, load_profile, resolve_path, save_config
from searchr1_lite.evaluation.evaluate import (
    SECONDS_BETWEEN_LINES,
    Answered,
    evaluate,
    figures,
    progress_line,
    scored_row,
    summarise_figures,
)
from searchr1_lite.evaluation.metrics import macro_average
from searchr1_lite.files import append_rows, read_rows, write_json
from searchr1_lite.retrieval.batching import cached
from searchr1_lite.retrieval.index import load_retriever
from searchr1_lite.rollout.policy import Policy, PolicyError, environment, load_policy, with_adapter
from searchr1_lite.runfolder import RunFolderError, check_same_run, fingerprint, is_finished, read_json
from searchr1_lite.tasks.questions import held_out
from searchr1_lite.types import Question, RetrievalError, Retriever

SECONDS_BETWEEN_WRITES = 1.0  # what is lost where an evaluation is cut off, besides what was under way
DECODINGS = {"greedy": ["greedy"], "sampled": ["sampled"], "both": ["greedy", "sampled"]}
ROWS, MARK = "trajectories.jsonl.gz", "progress.json"


def evaluate_into(out: Path, profile: Profile, decoding: str = "both", adapter: Path | None = None) -> dict[str, Any]:
    """Answer the profile's held-out questions, leave the folder that the module describes, return evaluation.json.

    Raises RunFolderError where the folder holds something else, and whatever loading and answering raise.
    """
    questions = held_out(profile)
    adapted = profile.model_copy(update={"model": str(adapter)})
    inputs = fingerprint(profile, questions, questions) | {"decoding": decoding}
    inputs["adapter"] = fingerprint(adapted, [], [])["model"]
    check_same_run(out, profile, inputs)
    if is_finished(out):
        print(f"{out}: finished already, nothing to do")
        return read_json(out / "evaluation.json")
    policy = policy_of(profile, adapter)
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
    before, began, waiting = mark["answered"], time.monotonic(), []
    said = began
    total, extra = len(questions) * len(decodings), {"phase": "evaluation", "strategy": profile.strategy}
    for number, name in enumerate(decodings):
        retriever = cached(inner)  # anew, so that what one decoding asked does not spare the next its calls
        written, called = time.monotonic(), 0

        def keep(trajectory: Answered, name: str = name, retriever: Retriever = retriever) -> None:
            nonlocal written, called, said
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
            if now - said >= SECONDS_BETWEEN_LINES:
                said = now
                line = progress_line(mark["answered"], total, now - began, before)
                print(f"{out.name}: {name}, {line}", flush=True)

        rest = questions[max(0, before - number * len(questions)) :]
        if rest:
            evaluate(policy, rest, retriever, profile, name == "greedy", profile.seed, done=keep, progress=_silent)


def _silent(line: str) -> None:
    """`keep` says how far it is."""


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


def named(profile: str | None, adapter: Path | None, settings: dict[str, Any]) -> tuple[Profile, Path | None]:
    """The profile and the PEFT folder that a command names; a run folder brings both, and a profile named wins."""
    name = profile or "tiny"
    if adapter and (adapter / "config.yaml").is_file():
        name, adapter = profile or adapter / "config.yaml", adapter / "adapter"
    chosen = load_profile(name, Profile, {"defects"}, **settings)  # of the bug lab: what was trained, not how
    if adapter:
        check_base(adapter, chosen.model)
    return chosen, adapter


def policy_of(profile: Profile, adapter: Path | None) -> Policy:
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
