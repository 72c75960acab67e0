"""Early stopping: which weights are kept, when a run stops, and that a kill at any moment changes nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import CutOffError, cut_off_at, run, some_rollouts_are_better  # noqa: F401

from searchr1_lite.config import load_profile
from searchr1_lite.training import early_stop
from searchr1_lite.training.early_stop import EarlyStop, restore_best, saved_steps

HEALTHY = {"reward": 0.5, "kl": 0.01, "entropy": 0.3, "answer_rate": 1.0, "response_length": 50.0, "searches": 1.0}
EXACT = [0.1, 0.2, 0.3, 0.4, 0.2, 0.6, 0.4, 0.3]  # means of 3: step 3 .2, 4 .3, 5 .3, 6 .4, 7 .4, 8 .433


class Stub:
    """What the loop does around it, with a model of one trained weight, whose value is the number of steps done."""

    def __init__(self, folder, done=0):
        self.folder, self.done, self.said, self.alarm = folder, done, [], None
        self.model = torch.nn.Linear(1, 1)
        self.model.bias.requires_grad = False
        self.stopping = EarlyStop(load_profile("tiny", stop_early=True), folder, self.said.append)

    def go(self, steps, **wrong):
        """Steps done from where it is; `wrong` are columns of the last one."""
        self.stopping.forget_after(self.done)
        for step in range(self.done + 1, steps + 1):
            assert self.alarm is None
            self.model.weight.data.fill_(self.done)
            self.stopping.keep(self.model)
            self.model.weight.data.fill_(step)
            row = {"step": step, "exact_match": EXACT[step - 1]} | HEALTHY | (wrong if step == steps else {})
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.alarm, self.done = self.stopping.look(), step
        return self

    def rewind(self, step):
        """A new process, in a folder whose metrics were cut back to a checkpoint's."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:step]
        (self.folder / "metrics.jsonl").write_text("".join(lines))
        return Stub(self.folder, step)


def test_it_stops_at_the_alarm_and_ends_with_what_wrote_the_best_rollouts(tmp_path):
    stub = Stub(tmp_path).go(5)
    assert stub.alarm is None
    assert list(saved_steps(tmp_path)) == [3, 4]  # step 5 is no better
    restore_best(stub.model, tmp_path)
    assert stub.model.weight.item() == 5  # nothing was stopped: the last weights
    stub = stub.rewind(5).go(7, response_length=500.0)
    assert stub.alarm.kind == "length blow-up"
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["step"], stopped["kind"], stopped["best_step"]) == (7, "length blow-up", 6)
    assert stopped["best_exact_match"] == pytest.approx(0.4)
    assert len(stub.said) == 1
    assert "stopped at step 7, length blow-up" in stub.said[0]
    assert "weights of step 6, exact match 0.40" in stub.said[0]
    restore_best(stub.model, tmp_path)
    assert stub.model.weight.item() == 5  # of step 6's rollouts: five steps' updates were done
    assert list(load_file(tmp_path / "best/step-6.safetensors")) == ["weight"]  # what is not trained is not kept


def test_an_alarm_before_the_fourth_step_leaves_the_third_ones_weights(tmp_path):
    stub = Stub(tmp_path).go(3, response_length=500.0)
    assert stub.alarm is None  # the third step belongs to the run's beginning: no doubling yet
    stub = stub.rewind(0).go(3, kl=9.0)
    assert stub.alarm.step == 3
    assert json.loads((tmp_path / "stopped.json").read_text())["best_step"] == 3


def test_going_on_from_a_checkpoint_forgets_later_steps_and_a_later_alarm(tmp_path):
    stub = Stub(tmp_path).go(4)
    stub.stopping.drop_older()
    assert list(saved_steps(tmp_path)) == [4]  # the best up to the checkpoint is enough to go on from it
    stub = stub.rewind(4).go(8, response_length=900.0)
    assert list(saved_steps(tmp_path)) == [4, 6, 8]
    assert (tmp_path / "stopped.json").is_file()
    again = stub.rewind(4)  # killed before evaluation; the newest checkpoint is step 4's
    again.stopping.forget_after(4)
    assert list(saved_steps(tmp_path)) == [4]
    assert not (tmp_path / "stopped.json").exists()
    weights = load_file(tmp_path / "best/step-4.safetensors")["weight"].item()
    again.go(7, response_length=500.0)
    assert json.loads((tmp_path / "stopped.json").read_text())["best_step"] == 6
    assert weights == 3.0  # those that wrote step 4


def test_a_run_that_never_betters_its_checkpoint_ends_with_what_was_best_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.EXACT", [0.5, 0.6, 0.7, 0.3, 0.2, 0.1])
    stub = Stub(tmp_path).go(4)
    stub.stopping.drop_older()
    stub = stub.rewind(4).go(6, response_length=500.0)
    restore_best(stub.model, tmp_path)
    assert stub.model.weight.item() == 2.0


def test_other_processes_read_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(early_stop, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    stub = Stub(tmp_path).go(4, kl=9.0)
    assert not saved_steps(tmp_path) and stub.alarm is None and not stub.stopping.weights
    assert not (tmp_path / "stopped.json").exists()


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def test_a_real_run_stops_restores_and_ends_the_same_when_cut_off(tmp_path, tokenizer, retriever, monkeypatch):
    """The alarm is made up, at step 6; the run is cut off at step 5, after a checkpoint, and again at the end."""
    alarm = early_stop.Alarm(6, "collapse", "made up")
    monkeypatch.setattr(early_stop, "alarms", lambda rows: [alarm] * (rows[-1]["step"] >= 6))
    monkeypatch.setattr(
        "searchr1_lite.evaluation.rollout_metrics.exact_match", lambda text, golden: float(len(text) % 2)
    )
    settings = {"steps": 8, "stop_early": True}
    straight, said = tmp_path / "straight", []
    run(straight, tokenizer, retriever, said.append, **settings)
    steps = [json.loads(line)["step"] for line in (straight / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (straight / "checkpoints/checkpoint-4").exists()
    assert not (straight / "checkpoints/checkpoint-6").exists()  # a run killed now comes to its alarm again
    assert sum("stopped at step 6, collapse" in line for line in said) == 1
    stopped = json.loads((straight / "stopped.json").read_text())
    best = load_file(straight / f"best/step-{stopped['best_step']}.safetensors")
    kept = {name.replace(".default.", "."): weight for name, weight in best.items()}
    assert kept.keys() == adapter(straight).keys()
    assert all(torch.equal(kept[name], weight) for name, weight in adapter(straight).items())
    assert any(weight.abs().sum() for name, weight in kept.items() if "lora_B" in name)
    cut = tmp_path / "cut"
    with pytest.raises(CutOffError):
        run(cut, tokenizer, retriever, cut_off_at(5), **settings)
    assert not (cut / "stopped.json").exists()
    run(cut, tokenizer, retriever, **settings)
    (cut / "evaluation.json").unlink()  # killed in the evaluation
    run(cut, tokenizer, retriever, **settings)
    assert json.loads((cut / "stopped.json").read_text()) == stopped
    assert all(torch.equal(adapter(cut)[name], weight) for name, weight in adapter(straight).items())
