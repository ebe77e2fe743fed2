"""The loop: deterministic, resumable bit for bit, reusing what is unchanged, stopping where it must."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medlib.methods import build
from medlib.methods.baselines import Supervised
from medlib.methods.pretraining import _Pretraining
from medlib.paths import PROJECT
from medlib.train import NonFiniteLoss, StopTraining, Trained, _save, make_fabric, train
from tests.tiny import SETTINGS, training_data
from tests.two_processes import pretrain


@pytest.fixture
def fabric():
    return make_fabric("cpu")


def run(name: str, folder: Path, *, seed: int = 0, labelled: int = 1, method=None, **settings) -> Trained:
    options = {
        k: settings.pop(k) for k in ("callback", "checkpoint_seconds", "log_every", "validate", "keep") if k in settings
    }
    method = method or build(name, **{**SETTINGS, **settings})
    data = training_data(labelled=labelled)
    options = {"log_every": 2, "progress": False, **options}
    return train(method, data, seed=seed, output_dir=folder, fabric=make_fabric("cpu"), **options)


def weights(trained: Trained) -> dict[str, Tensor]:
    return trained.networks.state_dict()


def same(first: Trained, second: Trained) -> bool:
    mine, theirs = weights(first), weights(second)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_seed_decides_everything_and_global_randomness_nothing(tmp_path):
    torch.manual_seed(1)
    first = run("coral", tmp_path / "a")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = run("coral", tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)
    other = weights(run("coral", tmp_path / "c", seed=1))
    for name in ("unet.classifier.weight", "head.mlp.0.weight", "contrast.loss.direction"):
        assert not torch.equal(weights(first)[name], other[name])


class Stop(Exception):
    pass


@pytest.mark.parametrize(("stage", "step"), [("pretrain", 3), ("finetune", 2), ("finetune", 5)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, stage, step):
    """The death is a real one for the loop: an exception at a log line, after the last checkpoint."""
    whole = run("coral", tmp_path / "whole", log_every=1)

    def die(name: str, at: int, terms: object) -> None:
        if (name, at) == (stage, step):
            raise Stop

    with pytest.raises(Stop):
        run("coral", tmp_path / "cut", log_every=1, checkpoint_seconds=0.0, callback=die)
    resumed = run("coral", tmp_path / "cut", log_every=1)
    assert same(whole, resumed)

    def terms(trained: Trained) -> list[dict]:
        lines = [line for part in trained.stages for line in part.history()]
        return [{k: v for k, v in line.items() if k != "time"} for line in lines]

    assert terms(whole) == terms(resumed)


def test_dropout_is_part_of_what_is_resumed(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class WithDropout(Supervised):
        def networks(self, classes: int) -> nn.ModuleDict:
            networks = super().networks(classes)
            networks["unet"].classifier = nn.Sequential(nn.Dropout(0.5), networks["unet"].classifier)
            return networks

    method = WithDropout(**{k: v for k, v in SETTINGS.items() if k != "pretrain_steps"})

    def die(name: str, at: int, terms: object) -> None:
        if at == 4:
            raise Stop

    whole = run("", tmp_path / "whole", method=method)
    with pytest.raises(Stop):
        run("", tmp_path / "cut", method=method, checkpoint_seconds=0.0, callback=die)
    torch.manual_seed(123)
    assert same(whole, run("", tmp_path / "cut", method=method))


def test_pretraining_is_done_once_for_all_label_ratios(tmp_path):
    first, second = run("coral", tmp_path, labelled=1), run("coral", tmp_path, labelled=2)
    assert [part.reused for part in first.stages] == [False, False]
    assert [part.reused for part in second.stages] == [True, False]
    assert second.stages[0].seconds == first.stages[0].seconds
    again = run("coral", tmp_path, labelled=2)
    assert [part.reused for part in again.stages] == [True, True] and same(again, second)


@pytest.mark.parametrize(
    "change", [dict(temperature=0.2), dict(pretrain_steps=7), dict(projection_dim=9), dict(ordinal_weight=0.0)]
)
def test_a_changed_setting_trains_anew(tmp_path, change):
    run("coral", tmp_path)
    assert not run("coral", tmp_path, **change).stages[0].reused


def test_a_setting_of_finetuning_leaves_pretraining_as_it_is(tmp_path):
    run("coral", tmp_path)
    assert [part.reused for part in run("coral", tmp_path, frozen=False).stages] == [True, False]


def test_a_reused_stage_shows_its_history_to_the_callback(tmp_path):
    def lines(folder: Path) -> list[tuple]:
        seen: list[tuple] = []
        run("coral", folder, callback=lambda stage, step, terms: seen.append((stage, step, dict(terms))))
        return seen

    assert lines(tmp_path) == lines(tmp_path) != []


def test_weights_are_kept_after_the_steps_that_were_asked_for(tmp_path):
    plain = run("supervised", tmp_path)
    with pytest.raises(ValueError, match=r"keep=\[3\]"):
        plain.state("finetune", 3)
    kept = run("supervised", tmp_path, keep=[0, 3, 6, 99])
    assert not kept.stages[0].reused and same(plain, kept)
    assert run("supervised", tmp_path, keep=[3]).stages[0].reused

    def differ(step: int) -> bool:
        then = kept.state("finetune", step)
        return any(not torch.equal(now, then[name]) for name, now in weights(kept).items())

    assert differ(0) and differ(3) and not differ(6)
    assert sorted(path.name for path in kept.stages[0].folder.glob("step-*")) == ["step-0.pt", "step-3.pt", "step-6.pt"]


def test_kept_weights_survive_a_killed_run(tmp_path):
    def die(name: str, at: int, terms: object) -> None:
        if at == 4:
            raise Stop

    whole = run("supervised", tmp_path / "whole", keep=[2, 5])
    with pytest.raises(Stop):
        run("supervised", tmp_path / "cut", keep=[2, 5], log_every=1, checkpoint_seconds=0.0, callback=die)
    resumed = run("supervised", tmp_path / "cut", keep=[2, 5])
    for step in (2, 5):
        mine, theirs = (one.state("finetune", step) for one in (whole, resumed))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_leaves_a_checkpoint(tmp_path, number):
    def interrupt(stage: str, step: int, terms: object) -> None:
        if (stage, step) == ("finetune", 2):
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="step 2 of 6 of finetune; the checkpoint is written"):
        run("supervised", tmp_path, callback=interrupt)
    assert signal.getsignal(number) is handler
    seen: list[int] = []
    resumed = run("supervised", tmp_path, callback=lambda stage, step, terms: seen.append(step))
    assert min(seen) > 2
    assert same(resumed, run("supervised", tmp_path / "whole"))


@pytest.mark.parametrize("last", ["pretrain", "finetune"])
def test_a_stop_at_the_last_step_of_a_stage_is_no_beginning_of_the_next(tmp_path, last):
    seen: list[tuple[str, int]] = []

    def stop(stage: str, step: int, terms: object) -> None:
        seen.append((stage, step))
        if seen[-1] == (last, 6):
            raise StopTraining

    with pytest.raises(KeyboardInterrupt, match=f"stopped after the last step of {last}"):
        run("coral", tmp_path, callback=stop)
    assert seen[-1] == (last, 6)
    assert same(run("coral", tmp_path), run("coral", tmp_path / "whole"))


@pytest.mark.parametrize(("steps", "first"), [(5000, 10), (88, 22)])
def test_a_long_stage_is_validated_early_too(tmp_path, steps, first):
    def stop(stage: str, step: int, terms: Mapping[str, Any]) -> None:
        if "val_dice" in terms:
            raise StopTraining

    with pytest.raises(KeyboardInterrupt, match=f"step {first} of {steps}"):
        run("supervised", tmp_path, finetune_steps=steps, validate=lambda predict: {"mean": 0.5}, callback=stop)


def test_training_works_off_the_main_thread(tmp_path):
    results: list[Trained] = []
    thread = threading.Thread(target=lambda: results.append(run("supervised", tmp_path)))
    thread.start()
    thread.join(60)
    assert len(results) == 1


def test_a_loss_that_is_not_finite_stops_with_its_name(tmp_path, monkeypatch):
    forward = _Pretraining.forward
    calls = []

    def poisoned(self, **batch):
        terms = forward(self, **batch)
        calls.append(1)
        if len(calls) == 3:
            terms["ordinal"] = terms["ordinal"] * float("nan")
        return terms

    monkeypatch.setattr(_Pretraining, "forward", poisoned)
    with pytest.raises(NonFiniteLoss, match="loss term ordinal of coral's stage 'pretrain'"):
        run("coral", tmp_path)
    assert len(calls) <= 4  # within log_every steps


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = run("supervised", tmp_path).stages[0].folder
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for damage in ({"step": "6"}, {"networks": {}}, {"networks": None}, {"seconds": None}, {"step": 3}):
        torch.save(saved | damage, folder / "checkpoint.pt")
        with pytest.raises(RuntimeError, match=f"{folder.name}/checkpoint.pt cannot be read.*delete its folder"):
            run("supervised", tmp_path)
    (folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(RuntimeError, match=f"{folder.name}.*delete its folder"):
        run("supervised", tmp_path)


@pytest.mark.parametrize("damaged", ["half a li", "[]", '{"stage": "finetune"}', '{"step": "1"}'])
def test_a_damaged_line_of_metrics_is_named(tmp_path, damaged):
    stage = run("supervised", tmp_path).stages[0]
    path = stage.folder / "metrics.jsonl"
    path.write_text(f"{path.read_text().splitlines()[0]}\n{damaged}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is damaged"):
        stage.history()


def test_half_a_line_of_metrics_is_passed_over(tmp_path):
    stage = run("supervised", tmp_path).stages[0]
    whole = stage.history()
    with open(stage.folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "fine')
    assert stage.history() == whole


def test_a_checkpoint_is_never_half_written(tmp_path, monkeypatch):
    run("supervised", tmp_path, finetune_steps=2)
    save = torch.save

    def fail(state: object, file: object) -> None:
        save({"half": 1}, file)
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        run("supervised", tmp_path, finetune_steps=3)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"checkpoint.pt", "metrics.jsonl", "stage.json", "lock"}
    assert len(list(tmp_path.rglob("checkpoint.pt"))) == 1


def test_equal_states_are_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        _save({"networks": {"weight": torch.arange(3.0)}}, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_a_stage_leaves_behind(tmp_path):
    validated = []

    def validate(predict) -> dict[str, float]:
        probabilities = predict(torch.rand(2, 1, 32, 32))
        validated.append(probabilities.sum(dim=1).sub(1).abs().max().item())
        return {"mean": 0.5}

    trained = run("coral", tmp_path, validate=validate)
    assert [part.name for part in trained.stages] == ["pretrain", "finetune"]
    assert max(validated) < 1e-5 and not trained.networks.training
    pretrain, finetune = (part.history() for part in trained.stages)
    assert {"total", "relational", "ordinal", "lr", "time", "step", "stage"} == set(pretrain[0])
    assert [line["val_dice"] for line in finetune if "val_dice" in line] == [{"mean": 0.5}] * len(validated)
    assert not any("val_dice" in line for line in pretrain)
    assert pretrain[0]["lr"] > pretrain[-1]["lr"]
    settings = json.loads((trained.stages[0].folder / "stage.json").read_text())
    assert settings["contrast"]["temperature"] == 0.1 and settings["method"] == "coral"


def test_pretraining_lowers_its_loss(tmp_path):
    history = run("coral", tmp_path, pretrain_steps=60, log_every=1).stages[0].history()
    start, end = (sum(line["total"] for line in part) / 10 for part in (history[:10], history[-10:]))
    assert end < start - 0.3


def test_a_finished_stage_opens_quickly(tmp_path):
    run("coral", tmp_path)
    started = time.monotonic()
    run("coral", tmp_path)
    assert time.monotonic() - started < 2


def test_an_unknown_or_absent_device_is_refused():
    with pytest.raises(ValueError, match="auto, cpu, cuda or mps"):
        make_fabric("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            make_fabric("cuda")
    with pytest.raises(ValueError, match="32-true, bf16-mixed"):
        make_fabric("cpu", precision="bf16-true")


def test_two_processes_learn_what_one_learns(tmp_path):
    """Embeddings are gathered with their gradients: the contrast sees the whole batch on every process."""
    (alone := tmp_path / "1").mkdir()
    (together := tmp_path / "2").mkdir()
    pretrain(1, alone)
    command = [sys.executable, "-m", "tests.two_processes", "2", str(together)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(folder / "pretrained.pt", weights_only=True) for folder in (alone, together))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_a_diverged_stage_is_not_kept(tmp_path):
    with pytest.raises(NonFiniteLoss):
        run("coral", tmp_path, pretrain_learning_rate=1e20)
    assert all(torch.load(path, weights_only=True)["step"] < 6 for path in tmp_path.rglob("checkpoint.pt"))


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    folder = run("supervised", tmp_path).stages[0].folder
    torch.save({"a": 1}, folder / "checkpoint.pt")
    with pytest.raises(RuntimeError, match="it lacks networks, seconds, step"):
        run("supervised", tmp_path)


def test_two_runs_of_one_stage_at_once_train_it_once(tmp_path):
    """The second is started in the middle of the first: it waits, then takes the result; no line is written twice."""
    late: list[Trained] = []
    second = threading.Thread(target=lambda: late.append(run("coral", tmp_path, log_every=1)))

    def start(stage: str, step: int, terms: object) -> None:
        if (stage, step) == ("pretrain", 2):
            second.start()
            second.join(timeout=0.3)

    first = run("coral", tmp_path, log_every=1, callback=start)
    second.join(timeout=60)
    assert same(first, late[0])
    assert late[0].stages[0].reused
    assert [line["step"] for line in first.stages[0].history()] == [1, 2, 3, 4, 5, 6]


def test_levels_computed_again_give_the_same_weights_also_after_a_resume_with_another_number(tmp_path, fabric):
    data, method = training_data(labelled=1), build("mona", scale="ci")
    calls = []

    def follow(folder: str, **options: Any) -> Trained:
        return train(method, data, seed=0, output_dir=tmp_path / folder, fabric=fabric, progress=False, **options)

    def stop(name: str, step: int, terms: object) -> None:
        calls.append(name)
        if name == "finetune" and step == 3:
            raise StopTraining

    plain = follow("plain")
    assert same(plain, follow("lean", recompute=2))
    with pytest.raises(KeyboardInterrupt):
        follow("cut", recompute=2, log_every=1, callback=stop)
    assert same(plain, follow("cut", recompute=1)) and "finetune" in calls
    assert len(list((tmp_path / "cut" / "stages").iterdir())) == 2  # the number is part of no key
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="recompute must be a whole number of levels, 0 or more, got"):
            follow("never", recompute=wrong)
    assert not (tmp_path / "never").exists()


def test_levels_can_be_computed_again_more_than_once(tmp_path, fabric):
    """Deep co-training differentiates one graph twice: for its adversarial images, then for the weights."""
    data, method = training_data(), build("deep_cotraining", scale="ci", steps=3)
    plain, lean = (
        train(method, data, seed=0, output_dir=tmp_path / str(n), fabric=fabric, progress=False, recompute=n)
        for n in (0, 2)
    )
    assert same(plain, lean)
