"""Verdicts on the paper's claims: hand-computed intervals, each form of a claim, and how honest three seeds are."""

import json

import numpy as np
import pytest
import yaml
from conftest import searchr1
from scipy import stats

from searchr1_lite.analysis import findings
from searchr1_lite.analysis.findings import estimate, judge, load_claims, load_result, measured, value, verdict
from searchr1_lite.analysis.runs import RunError
from searchr1_lite.experiments.plan import experiment_names, load_experiment

SAID = {"claim": "More is right with it", "paper": ".4 and .3", "source": "a paper"}


def run(seed, final=0.5, curve=tuple(range(24)), **more):
    measures = {"final": final, "drop": 0.1, "speed": 0.4, "searches": 1.5, "answer_rate": 1.0, "length": 40.0}
    names = ("exact_match", "searches", "response_length", "entropy", "grad_norm")
    curves = {"step": list(range(1, len(curve) + 1)), **{name: list(curve) for name in names}}
    after = {"exact_match": final, "mean_searches_by_hops": {"1": 1.0, "3": 3.0}}
    return {"seed": seed, "measures": measures, "curves": curves, "after": after, **more}


def result(**arms):
    """A result file's record; each arm is a list of final scores, for seeds 0, 1, …"""
    made = {arm: [run(seed, final) for seed, final in enumerate(finals)] for arm, finals in arms.items()}
    return {"date": "2026-11-21", "experiment": "mask", "seeds": [0], "arms": made}


def between(record, **claim):
    return judge({**SAID, "measure": "final", "more": "with", "less": "without", **claim}, record, "mask.json")


def test_a_verdict_computed_by_hand():
    # Differences .5, .6, .7: mean .6, standard error .1 / sqrt 3; Student's t of 2 degrees of freedom: 4.302653
    found = between(result(**{"with": [0.9, 0.9, 0.9], "without": [0.4, 0.3, 0.2]}))
    gap = found["difference"]
    half = 4.302653 * 0.1 / 3**0.5
    assert gap["values"] == pytest.approx([0.5, 0.6, 0.7])
    assert [gap["mean"], gap["low"], gap["high"]] == pytest.approx([0.6, 0.6 - half, 0.6 + half], abs=1e-6)
    assert found["verdict"] == "agrees" and found["seeds"] == [0, 1, 2]
    assert [side["mean"] for side in found["sides"]] == pytest.approx([0.9, 0.3])
    assert measured(found) == (
        "held-out exact match: with 0.90 [0.90, 0.90]; without 0.30 [0.05, 0.55]; "
        "difference +0.60 [+0.35, +0.85], 3 seeds"
    )


def test_the_difference_is_paired_by_seed_in_whatever_order_the_runs_are():
    record = result(**{"with": [0.2, 0.5, 0.8], "without": [0.1, 0.4, 0.7]})
    record["arms"]["without"].reverse()
    gap = between(record)["difference"]
    assert [gap["low"], gap["high"]] == pytest.approx([0.1, 0.1])  # unpaired, it would hold 0


def test_it_is_scipys_paired_t_test():
    rng = np.random.default_rng(5)
    one, other = rng.random(5).tolist(), rng.random(5).tolist()
    gap = between(result(**{"with": one, "without": other}))["difference"]
    expected = stats.ttest_rel(one, other).confidence_interval()
    assert [gap["low"], gap["high"]] == pytest.approx([expected.low, expected.high], abs=1e-7)


@pytest.mark.parametrize(
    ("low", "high", "within", "said"),
    [
        (0.01, 0.2, None, "agrees"),
        (-0.2, -0.01, None, "disagrees"),
        (-0.01, 0.2, None, "not separated"),
        (0.0, 0.2, None, "not separated"),
        (0.3, 0.3, None, "agrees"),
        (0.0, 0.0, None, "not separated"),
        (-0.04, 0.02, 0.05, "agrees"),
        (0.0, 0.0, 0.05, "agrees"),
        (0.06, 0.2, 0.05, "disagrees"),
        (-0.2, -0.06, 0.05, "disagrees"),
        (-0.2, 0.02, 0.05, "not separated"),
        (-0.2, 0.2, 0.05, "not separated"),
        (None, None, None, "not separated"),
        (None, None, 0.05, "not separated"),
    ],
)
def test_what_an_interval_says(low, high, within, said):
    assert verdict(low, high, within) == said


def test_one_seed_has_no_interval_and_equal_differences_have_a_point():
    assert estimate([0.4]) == {"mean": 0.4, "low": None, "high": None, "values": [0.4]}
    alone = between(result(**{"with": [0.9], "without": [0.1]}))
    assert alone["verdict"] == "not separated" and measured(alone).endswith(
        "difference +0.80, 1 seed: one seed has no interval"
    )
    same = between(result(**{"with": [0.3, 0.2], "without": [0.2, 0.1]}))  # equal but for the last bits of a float
    assert (same["difference"]["low"], same["difference"]["high"]) == (0.1, 0.1) and same["verdict"] == "agrees"
    nothing = between(result(**{"with": [0.3, 0.2], "without": [0.3, 0.2]}))
    assert nothing["verdict"] == "not separated"


def test_what_was_not_separated_says_what_would_have_been_seen():
    found = between(result(**{"with": [0.5, 0.7, 0.6], "without": [0.6, 0.6, 0.6]}))  # differences -.1, .1, 0
    assert found["verdict"] == "not separated"
    assert measured(found).endswith("3 seeds: only a difference of more than 0.25 would have been seen")


def test_measures_of_one_run():
    one = run(0, final=0.7, curve=[0, 1, 2, 9, 9, 9, 9, 9, *[4] * 13, 5, 6, 10])
    assert value(one, "final") == value(one, "after.exact_match") == 0.7
    assert value(one, "after.mean_searches_by_hops.3") == 3
    assert value(one, "searches@first") == 1 and value(one, "searches@last") == 7 and value(one, "searches@early") == 9
    assert value(one, 0) == 0.0
    assert value(run(0), "searches~step") == pytest.approx(1)
    assert value(run(0, curve=range(24, 0, -1)), "searches~step") == pytest.approx(-1)
    assert value(run(0, curve=[0.0] * 24), "searches~step") == 0  # stands still: goes with nothing
    assert value(run(0, curve=[1, None, 3, *[0] * 21]), "searches@first") == 2  # no such question in that step
    assert [value(run(0, curve=[5.0]), f"searches@{window}") for window in ("first", "early", "last")] == [5, 5, 5]


def test_a_claim_about_one_arm_over_time():
    record = result(**{"with": [0.5, 0.6]})
    claim = {**SAID, "arm": "with", "more": "searches@last", "less": "searches@first"}
    found = judge(claim, record, "x.json")
    assert found["difference"]["values"] == [21.0, 21.0] and found["verdict"] == "agrees"
    assert measured(found).startswith(
        "with: searches in training, the last eighth 22 [22, 22]; searches in training, the"
    )
    turned = judge({**claim, "more": claim["less"], "less": claim["more"]}, record, "x.json")
    assert turned["verdict"] == "disagrees"
    alike = {**SAID, "arm": "with", "alike": ["after.mean_searches_by_hops.3", 3], "within": 0.5}
    found = judge(alike, record, "x.json")
    assert found["verdict"] == "agrees"
    assert measured(found) == (  # the number that it is compared with was not measured
        "with: searches a held-out question of three hops 3.00 [3.00, 3.00]; difference +0.00 [+0.00, +0.00], 2 seeds"
    )


def test_errors_name_the_arm_the_measure_and_what_there_is(tmp_path):
    record = result(**{"with": [0.5, 0.6], "without": [0.5, 0.6]})
    with pytest.raises(
        RunError, match=r"mask\.json: no arm 'witout', which the claim 'More is .*; there are with, without"
    ):
        between(record, less="witout")
    for measure in ("finale", "searches@middle", "loss@last", "loss~step", "after.mean_searches_by_hops.9"):
        with pytest.raises(RunError, match=f"'with' has no '{measure}', which the claim 'More is right with it' names"):
            between(record, measure=measure)
    file = tmp_path / "mask.json"
    record["arms"]["with"].pop()
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"the arms have other seeds, \{'with': \[0\], 'without': \[0, 1\]\}"):
        load_result(file)
    file.write_text(json.dumps(record | {"missing": ["masked=False-seed1"]}))
    assert between(load_result(file))["seeds"] == [0]
    file.write_text("{}")
    with pytest.raises(RunError, match="lacks experiment, date, arms"):
        load_result(file)


def test_a_partial_result_without_a_pair_of_seeds_is_not_measured():
    found = between(result(**{"with": [0.5], "without": []}) | {"missing": ["masked=False-seed0"]})
    assert found["verdict"] == "not measured" and measured(found) == "no seed of both sides is finished yet"


@pytest.mark.parametrize("change", [{"more": None}, {"source": None}, {"arm": "with"}, {"within": 0.1}, {"reson": "x"}])
def test_a_claim_that_says_too_little_or_too_much_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.setattr(findings, "CLAIMS", tmp_path)
    claim = {**SAID, "measure": "final", "more": "with", "less": "without"} | change
    claims = {"claims": [{key: text for key, text in claim.items() if text is not None}]}
    (tmp_path / "mask.yaml").write_text(yaml.safe_dump(claims))
    with pytest.raises(RunError, match=r"claim 1 has .*; it needs claim, paper, source and: less, measure, more; "):
        load_claims("mask")


def everything(name):
    arms = load_experiment(name).arms
    return {**result(**{arm: [0.5, 0.6, 0.7] for arm in arms}), "experiment": name}


@pytest.mark.parametrize("name", experiment_names())
def test_every_claim_that_is_made_can_be_judged(name):
    claims = load_claims(name)
    assert claims
    for claim in claims:
        found = judge(claim, everything(name), "x.json")
        assert found["verdict"] in findings.VERDICTS and measured(found)
        assert len({str(side) for side in claim.get("alike") or (claim["more"], claim["less"])}) == 2


def test_the_papers_scores_in_the_claims_are_those_of_the_committed_table():
    scores = json.loads((findings.ROOT / "data/results/paper.json").read_text())["exact_match"]["7B"]
    short = {name: f"{row['average']:.3f}"[1:] for name, row in scores.items()}
    papers = {
        name: " ".join(claim["paper"] for claim in load_claims(name)) for name in ("mask", "algorithms", "search")
    }
    base = short["search_r1_base"]
    assert f"{base} with the mask, {short['search_r1_base_unmasked']} without" in papers["mask"]
    assert f"7B base {base} and {short['search_r1_base_grpo']}" in papers["algorithms"]
    assert f"7B instruct {short['search_r1_instruct']} and {short['search_r1_instruct_grpo']}" in papers["algorithms"]
    assert f"7B base {base} and {short['r1_base']}" in papers["search"]


def test_the_command_writes_the_findings_and_a_picture_beside_each_result(tmp_path, capsys, monkeypatch):
    file, out = tmp_path / "experiments" / "dynamics.json", tmp_path / "findings"
    file.parent.mkdir()
    record = everything("dynamics")
    file.write_text(json.dumps(record))
    searchr1("report", "findings", file, "--out", out)
    found = json.loads(out.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    made = load_claims("dynamics") + load_claims("untestable")
    assert [one["claim"] for one in found["claims"]] == [one["claim"] for one in made]
    assert found["claims"][0]["verdict"] == "disagrees"  # the curve rises, so it is not longer first
    assert found["claims"][-1]["verdict"] == "not testable at this size"
    table = out.with_suffix(".md").read_text().splitlines()
    assert table[0] == "5 agrees, 3 disagrees, 0 not separated, 11 not testable at this size, 0 not measured."
    assert len(table) == 4 + len(made) and all(row.count(" | ") == 4 for row in table[4:])
    assert "| **disagrees** | [dynamics](experiments/dynamics.json) |" in table[4]
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and file.with_suffix(".png").stat().st_size < 250_000
    assert "disagrees      dynamics   First the responses get shorter" in capsys.readouterr().out
    record["arms"]["base"] = []  # partial: an arm without runs
    file.write_text(json.dumps(record | {"missing": ["base-seed0"]}))
    searchr1("report", "findings", file, "--out", out)
    assert "not measured   dynamics   First" in capsys.readouterr().out
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"error: .*dynamics\.json: the arms have other seeds"):
        searchr1("report", "findings", file, "--out", out)
