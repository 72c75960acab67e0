"""Profiles: every one loads, and what cannot work is one clear error."""

from pathlib import Path

import pytest

from searchr1_lite.config import (
    PROFILES,
    ROOT,
    ConfigError,
    load_profile,
    profile_names,
    resolve_path,
    retriever_parts,
    save_config,
)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_under_its_own_name(name):
    assert load_profile(name).name == name


def test_there_are_the_tiny_run_and_the_real_ones():
    assert profile_names() == ["qwen2.5-0.5b", "qwen2.5-3b-4bit", "qwen2.5-3b-4bit-24gb", "qwen2.5-7b-4bit", "tiny"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"learning_rat": 1.0}, "learning_rat: there is no such setting; did you mean learning_rate?"),
        ({"steps": "many"}, "steps: .*valid integer.*'many'"),
        ({"learning_rate": float("inf")}, "learning_rate: .*finite number"),
        ({"seed": 2**32}, "seed: .*less than 4294967296"),
        ({"defects": ["no_clip"]}, r"defects: .* by searchr1_lite\.lab\.defects\.train_broken .*notebook 10"),
        (
            {"reward": "exact"},
            "reward: no reward 'exact'; did you mean exact_match.; there are exact_match, f1, .* module:name",
        ),
        ({"reward": "a:b:c"}, "no reward 'a:b:c'"),
        ({"steps": 2.5}, "steps: .*2.5"),
        ({"steps": 0}, "steps: .*greater than 0"),
        ({"group_size": 1}, "group_size = 1 has no group"),
        ({"quantization": "int8"}, "quantization: .*'none' or 'nf4'"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens: .*greater than 0"),
        ({"micro_batch_size": 4}, "micro_batch_size: there is no such setting; did you mean micro_batch_tokens"),
        ({"temperature": 0}, "temperature: .*greater than 0"),
        ({"lora_dropout": 1.5}, "lora_dropout: .*less than or equal to 1"),
        ({"masked": "perhaps"}, "masked: .*'perhaps'"),
        ({"questions_per_step": 5, "group_size": 5, "updates_per_rollout": 4}, "questions_per_step x group_size = 25"),
        ({"max_context_tokens": 100}, "max_context_tokens = 100 leaves no room"),
        ({"retriever": "bm52"}, r"no retriever 'bm52'; did you mean bm25\?"),
        ({"retriever": "online:serpapi"}, r"no retriever 'online:serpapi'.*searchr1_lite\.retrieval\.online:SerpAPI"),
        ({"retriever": "milvus:"}, "no retriever 'milvus:'"),
        ({"retriever": "dense"}, "retriever: .*no retriever 'dense'; there are bm25, flat, "),
        ({"retriever": "bm25+oracle"}, "no retriever 'oracle' to be fused; there are"),
        ({"retriever": "bm25+"}, "no retriever ''"),
        ({"retriever": "faiss:"}, "no retriever 'faiss:'"),
        ({"retriever": "oracle", "noise_end": 0.5}, "an oracle has no noise"),
        ({"noise_start": 1.5}, "noise_start: .*less than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_profile("tiny", **override)


@pytest.mark.parametrize(
    ("retriever", "parts"),
    [
        ("bm25", ["bm25"]),
        ("bm25+faiss:IVF64,SQ8+index:runs/a", ["bm25", "faiss:IVF64,SQ8", "index:runs/a"]),
        ("oracle", ["oracle"]),
        ("http://127.0.0.1:8000/retrieve?a=1+2", ["http://127.0.0.1:8000/retrieve?a=1+2"]),
        ("milvus:my+own.db", ["milvus:my+own.db"]),
        ("milvus:http://h:19530/wiki", ["milvus:http://h:19530/wiki"]),
        ("flat+my.module:MySearch", ["flat", "my.module:MySearch"]),
    ],
)
def test_what_a_retriever_is_made_of(retriever, parts):
    assert retriever_parts(load_profile("tiny", retriever=retriever).retriever) == parts


def test_all_faults_are_in_one_message():
    with pytest.raises(ConfigError) as raised:
        load_profile("tiny", steps=0, beta=-1.0, no_such=1)
    assert all(name in str(raised.value) for name in ("steps", "beta", "no_such"))


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    path = tmp_path / "mine.yaml"
    text = (PROFILES / "tiny.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("learning_rate: 0.003", "learning_rate: 1e-5"), encoding="utf-8")
    assert load_profile(path).learning_rate == 1e-5
    changed = load_profile("tiny", steps="5", masked="false", learning_rate=1)  # papermill's -p masked false
    assert (changed.steps, changed.masked, changed.learning_rate) == (5, False, 1.0)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xff", b"seed: 2026-99-99", b"a: !!timestamp x", b"[" * 5000])
def test_a_file_that_is_no_yaml_is_one_error(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml: this is not YAML in UTF-8"):
        load_profile(tmp_path / "bad.yaml")


def test_a_missing_setting_and_a_missing_profile(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("name: short\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="model: is missing"):
        load_profile(path)
    with pytest.raises(ConfigError, match=r"no profile 'huge'; there are .*tiny"):
        load_profile("huge")
    path.write_text("- a list\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="mapping of settings"):
        load_profile(path)


def test_none_overrides_nothing_and_a_saved_profile_loads_again(tmp_path):
    profile = load_profile("tiny", steps=3, seed=None)
    assert (profile.steps, profile.seed) == (3, 0)
    save_config(profile, tmp_path / "config.yaml")
    assert load_profile(tmp_path / "config.yaml") == profile


def test_a_relative_path_is_found_from_the_project_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("pyproject.toml") == Path(ROOT) / "pyproject.toml"
    (tmp_path / "here.jsonl").touch()
    assert resolve_path("here.jsonl") == Path("here.jsonl")
