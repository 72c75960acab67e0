"""Questions as the parquet file that Search-R1 and verl train from: `searchr1 export --help`.

Column for column what Search-R1's scripts/data_process/qa_search_train_merge.py leaves (PeterJinGo/nq_hotpotqa_train is
made by it), with one difference: there, `extra_info.index` starts at 0 again with each set, and the trainer groups
rollouts by it, so that an NQ and a HotpotQA question of one number are one GRPO group; here it counts through the file.

`data_source` chooses the reward. Search-R1 (verl/trainer/main_ppo.py, _select_rm_score_fn) knows the seven sets of the
paper, by the names they have here, and stops at any other: give questions of your own one of those with
`--data-source nq`; exact match is the reward of all. Today's verl has it under "searchR1_nq" and so on. Left out: other
prompts, `metadata.context` (as everywhere here), and the tool settings that verl's own recipe adds.
"""

import os
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from searchr1_lite.rollouts.protocol import render_prompt
from searchr1_lite.tasks.questions import EVALUATION, Named, keep_apart, load_by_set


def training_table(pairs: list[Named], split: str) -> pa.Table:
    """One row a question, in order; `metadata` is the last column where there is any, of one type through all rows."""
    names, questions = zip(*pairs, strict=True)
    texts = [question.question.strip() for question in questions]
    answers = [list(question.golden_answers) for question in questions]
    columns = {
        "id": [question.id for question in questions],
        "question": [text if text.endswith("?") else f"{text}?" for text in texts],
        "golden_answers": answers,
        "data_source": names,
        "prompt": [[{"role": "user", "content": render_prompt(text)}] for text in texts],
        "ability": ["fact-reasoning"] * len(pairs),
        "reward_model": [{"style": "rule", "ground_truth": {"target": target}} for target in answers],
        "extra_info": [{"split": split, "index": index} for index in range(len(pairs))],
    }
    metadata = [question.metadata or None for question in questions]
    try:
        return pa.table(columns | ({"metadata": pa.array(metadata)} if any(metadata) else {}))
    except pa.ArrowException as problem:
        print(f"note: without metadata, whose values are of more than one type ({problem})")
        return pa.table(columns)


def export(source: str, split: str, out: Path, data_source: str | None = None) -> pa.Table:
    """Write the questions of a split to `out`, whole or not at all; `data_source` replaces the sets' names.

    Prints what was written, and which `data_source` Search-R1 does not know. Raises QuestionError.
    """
    pairs = load_by_set(source, split)
    questions = keep_apart(pairs, source)
    table = training_table([(data_source, question) for question in questions] if data_source else pairs, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".new")
    parquet.write_table(table, beside)
    os.replace(beside, out)
    print(f"{out}: {table.num_rows:,} questions, {', '.join(table.column_names)}")
    if unknown := sorted(set(table["data_source"].unique().to_pylist()) - set(EVALUATION)):
        print(f"note: Search-R1 stops at the data_source {', '.join(unknown)}; it knows {', '.join(EVALUATION)}")
    return table
