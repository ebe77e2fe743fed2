"""A monitor and real, tiny trainings: in the background, stopped and resumed, failing, and of another process."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medlib.explore import TrainingMonitor, pixels, training_monitor
from medlib.methods import build
from medlib.train import CHECKPOINT, METRICS, NonFiniteLoss, StopTraining, make_fabric, predictor, train
from tests.tiny import SETTINGS, training_data, volume

PATIENCE = 60  # s, for what takes a fraction of one


@pytest.fixture(autouse=True)
def page(monkeypatch) -> list[tuple[str, str, int]]:
    """What went to the page: how, its sentence, and the number of points in its picture."""
    sent: list[tuple[str, str, int]] = []

    def shown(widget, twin, alt, send) -> None:
        sent.append((send.__name__, alt, sum(len(trace.x or ()) for trace in twin.data)))

    monkeypatch.setattr("medlib.explore.monitor.show_widget", shown)
    return sent


def runner(folder: Path, name: str = "coral", **settings: Any) -> Callable[..., Any]:
    """A run of all stages, to be called with ``callback=``, and without one."""
    method = build(name, **{**SETTINGS, **settings})
    here = {"seed": 0, "output_dir": folder, "fabric": make_fabric("cpu"), "progress": False, "log_every": 1}
    return partial(train, method, training_data(), validate=lambda predict: {"LV": 0.5, "RV": 0.25}, **here)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def curve(monitor: TrainingMonitor, name: str) -> tuple[list[float], list[float]]:
    trace = next(t for t in monitor.figures["training"].data if t.name == name)
    return list(trace.x), list(trace.y)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_goes_on_in_the_background_and_is_drawn(tmp_path):
    gate, whole = threading.Event(), runner(tmp_path)

    def run(callback):
        assert gate.wait(PATIENCE)
        return whole(callback=callback)

    monitor = training_monitor(run, interval=0.3)
    assert monitor.state == "ready" and monitor.controls["stop"].disabled and not monitor.controls["start"].disabled
    monitor.controls["start"].click()  # returns, though the run cannot begin before the gate opens
    assert monitor.state == "running" and monitor.controls["start"].disabled and not monitor.controls["stop"].disabled
    with pytest.raises(RuntimeError, match=r"going on \(running\); stop it first"):
        monitor.start()
    with pytest.raises(TimeoutError, match="still running after 0.01 s"):
        monitor.wait(timeout=0.01)
    gate.set()
    trained = monitor.wait(PATIENCE)
    assert monitor.state == "finished" and "<b>finished</b> · finetune, step 6" in monitor.controls["status"].value
    assert not monitor.controls["start"].disabled and monitor.controls["stop"].disabled
    logged = [line for stage in trained.stages for line in stage.history()]
    assert [{k: v for k, v in line.items() if k != "time"} for line in logged] == monitor.history
    pretrain, finetune = (stage.history() for stage in trained.stages)
    steps, values = curve(monitor, "relational")
    assert steps == [1, 2, 3, 4, 5, 6] and values == pytest.approx([line["relational"] for line in pretrain], rel=1e-4)
    steps, values = curve(monitor, "cross_entropy")
    assert steps == [7, 8, 9, 10, 11, 12]  # stages follow each other
    rates = [line["lr"] for line in [*pretrain, *finetune] if "lr" in line]
    assert curve(monitor, "learning rate")[1] == pytest.approx(rates, rel=1e-4)
    checks = [6 + line["step"] for line in finetune if "val_dice" in line]
    assert curve(monitor, "mean Dice") == (checks, [0.375] * len(checks)) and len(checks) > 1
    assert curve(monitor, "Dice of RV")[1] == [0.25] * len(checks)
    stages, names = (
        [note for note in monitor.figures["training"].layout.annotations if (note.xref == "x2") == beside]
        for beside in (False, True)
    )
    assert [note.text for note in stages] == ["pretrain", "finetune"]
    ends = {note.text: note.y for note in names}
    assert list(ends) == sorted(finetune[-1]["val_dice"], key=finetune[-1]["val_dice"].__getitem__) and len(ends) > 1
    assert min(np.diff(sorted(ends.values()))) > 0.1 and {note.x for note in names} == {checks[-1]}
    assert {t.name for t in monitor.figures["training"].data if t.showlegend} >= {"total", "relational", "ordinal"}
    assert "learning rate 1" in monitor.figures["training"].layout.title.text


def test_a_stopped_run_goes_on_to_the_weights_of_one_that_was_never_stopped(tmp_path):
    whole = runner(tmp_path / "whole", finetune_steps=14)().networks.state_dict()
    first = training_monitor(runner(tmp_path / "cut", finetune_steps=14), interval=0.3)
    stopped_at: list[int] = []
    hear = first._hear

    def press(stage: str, step: int, terms: dict) -> None:
        if (stage, step) == ("finetune", 9) and not stopped_at:
            stopped_at.append(step)
            first.controls["stop"].click()
            assert first.state == "stopping" and first.controls["stop"].disabled
        hear(stage, step, terms)

    first._hear = press
    first.start()
    with pytest.raises(KeyboardInterrupt, match="stopped at step 9 of 14 of finetune; the checkpoint is written"):
        first.wait(PATIENCE)
    assert first.state == "stopped" and "the same call goes on from there" in first.controls["status"].value
    saved = torch.load(next((tmp_path / "cut").glob(f"stages/*finetune*/{CHECKPOINT}")), weights_only=True)
    assert saved["step"] == 9
    second = training_monitor(runner(tmp_path / "cut", finetune_steps=14), interval=0.3)  # as in a new kernel
    second.start()
    assert same(second.wait(PATIENCE).networks.state_dict(), whole)
    assert min(line["step"] for line in second.history if line["stage"] == "finetune") == 10
    steps = [line["step"] for line in first.history if line["stage"] == "finetune"]
    assert max(steps) == 9
    first.start()  # here all is there already, and shown again
    assert same(first.wait(PATIENCE).networks.state_dict(), whole)
    shown = [line["step"] for line in first.history if line["stage"] == "finetune" and "lr" in line]
    assert shown == list(range(1, 15)), "no line twice"


def test_a_stop_before_the_start_is_no_stop(tmp_path):
    monitor = training_monitor(runner(tmp_path, "supervised"), interval=0.3)
    monitor.stop()
    assert monitor.state == "ready"
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        monitor.wait()
    monitor.start()
    assert [stage.steps for stage in monitor.wait(PATIENCE).stages] == [6]


def test_a_stop_is_heard_while_a_finished_stage_is_shown_again(tmp_path):
    runner(tmp_path)()
    monitor = training_monitor(runner(tmp_path, finetune_steps=9), interval=0.3)
    monitor._ask.set = lambda: None  # pressed before: the flag is set below, as the first line is shown
    monitor._ask.is_set = lambda: True
    monitor.start()
    with pytest.raises(StopTraining):
        monitor.wait(PATIENCE)
    assert monitor.state == "stopped" and len(monitor.history) == 1


def test_an_error_of_the_run_is_shown_and_raised(tmp_path):
    monitor = training_monitor(runner(tmp_path, pretrain_learning_rate=1e20), interval=0.3)
    monitor.start()
    with pytest.raises(NonFiniteLoss, match="became infinite"):
        monitor.wait(PATIENCE)
    text = monitor.controls["status"].value
    assert monitor.state == "failed" and 'role="alert"' in text and "NonFiniteLoss: loss term" in text
    assert "where it happened" in text and "medlib/train.py" in text
    assert not monitor.controls["start"].disabled, "the cause mended, it can be tried again"


def test_what_cannot_be_drawn_is_said_and_ends_nothing(tmp_path, monkeypatch):
    other = volume("patient007")
    other.image = np.zeros((5, 30, 30), np.float16)  # no multiple of what the network halves
    other.label = np.ones((5, 30, 30), np.uint8)
    monitor = training_monitor(runner(tmp_path, "supervised"), samples=[other], interval=0.3)
    monkeypatch.setattr(monitor._curves, "draw", lambda history: 1 / 0)
    monitor.start()
    assert monitor.wait(PATIENCE) is not None and monitor.state == "finished"
    assert "cannot be drawn: ZeroDivisionError" in monitor.controls["status"].value


def test_samples_are_predicted_at_each_validation(tmp_path):
    data = training_data()
    method = build("supervised", **{**SETTINGS, "finetune_steps": 8})
    train_it = runner(tmp_path, "supervised", finetune_steps=8)

    def run(callback):
        networks = train_it(callback=callback).networks
        return SimpleNamespace(networks=networks, predict=predictor(method, networks, make_fabric("cpu")))

    with pytest.raises(ValueError, match="patient050_frame01 has no label"):
        training_monitor(run, samples=[volume("patient050", labelled=False)])
    scan = data.val[0]
    monitor = training_monitor(run, samples=[scan], interval=0.3)
    figure = monitor.figures["training"]
    assert "total" not in {trace.name for trace in figure.data}
    seen: list[int] = []
    predict = monitor._predict
    monitor._predict = lambda network, step: (seen.append(step), predict(network, step))
    texts = [note.text for note in figure.layout.annotations]
    assert texts == ["<b>patient099, slice 1</b>", "label", "not predicted yet"]
    monitor.start()
    outcome = monitor.wait(PATIENCE)
    assert seen == [2, 4, 6, 8, 8]  # a quarter of the stage each, and the finished run's own
    z = int((scan.label > 0).sum(axis=(1, 2)).argmax())
    guess = outcome.predict(scan.inputs())[z].argmax(dim=0).numpy()
    wrong = 100 * np.mean(guess != scan.label[z])
    assert 0 < wrong < 100
    assert [note.text for note in figure.layout.annotations][-1] == "predicted at step 8"
    assert f"{wrong:.1f} % wrong" in [note.text for note in figure.layout.annotations]
    box = pixels.focus(scan.label[z])
    gray = pixels.to_gray(scan.image[z].astype(np.float32)[box])
    layer = pixels.disagreement_overlay(scan.label[z][box], guess[box], data.info.colours)
    assert figure.layout.images[1].source == pixels.data_uri(pixels.blend(gray, layer))
    before = runner(tmp_path / "plain", "supervised", finetune_steps=8)().networks.state_dict()
    assert same(outcome.networks.state_dict(), before), "looking on changes nothing"


def test_interrupting_the_wait_stops_the_run(tmp_path):
    monitor = training_monitor(runner(tmp_path, "supervised", finetune_steps=3_000), interval=0.3)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monitor.start()
    until(lambda: len(monitor.history) > 3)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()  # as the kernel's interrupt button does
    try:
        with pytest.raises(KeyboardInterrupt):
            monitor.wait(PATIENCE)
    finally:
        signal.signal(signal.SIGINT, handler)
        monitor.stop()
    until(lambda: monitor.state == "stopped")
    saved = torch.load(next(tmp_path.glob(f"stages/*/{CHECKPOINT}")), weights_only=True)
    assert saved["step"] == monitor.history[-1]["step"] < 3_000


def test_the_page_keeps_the_picture_of_the_whole_run(tmp_path, page):
    monitor = training_monitor(runner(tmp_path), title="Tiny", interval=0.3)
    monitor.show()
    monitor.start()
    monitor.wait(PATIENCE)
    assert [one[0] for one in page] == ["display", "update"]
    assert "not begun yet" in page[0][1] and page[0][2] == 0
    assert page[1][1].startswith("Tiny: loss terms") and "over the steps of pretrain, finetune" in page[1][1]
    assert page[1][2] > 40


def test_a_folder_that_another_process_writes_is_watched(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        training_monitor(tmp_path / "nowhere")
    method, data = build("coral", **SETTINGS), training_data()
    with pytest.raises(ValueError, match="give method=..."):
        training_monitor(tmp_path, samples=data.val)
    monitor = training_monitor(tmp_path, method=method, samples=data.val, interval=0.3)
    try:
        assert monitor.state == "watching" and "nothing is trained" in monitor.controls["status"].value

        def follow(stage: str, step: int, terms: dict[str, Any]) -> None:
            """Waits for the monitor, which could miss a whole stage of a run as short as this one."""
            until(lambda: any(line["stage"] == stage for line in monitor.history))

        trained = runner(tmp_path)(callback=follow)
        lines = [line for stage in trained.stages for line in stage.history()]
        until(lambda: monitor.history == lines)
        until(lambda: "step 6 of 6 · finished" in monitor.controls["status"].value)
        assert trained.stages[1].folder.name in monitor.controls["status"].value
        until(lambda: "at step 6" in monitor.figures["training"].layout.annotations[-1].text)
        scan = data.val[0]
        guess = method.predict(trained.networks, scan.inputs()).argmax(dim=1).numpy()[0]
        assert f"{100 * np.mean(guess != scan.label[0]):.1f} % wrong" in str(monitor.figures["training"].layout)
        with pytest.raises(RuntimeError, match="no run of this kernel"):
            monitor.wait()
    finally:
        monitor.stop()
    assert monitor.state == "stopped" and not monitor.controls["start"].disabled
    monitor.start()
    assert monitor.state == "watching"
    monitor.stop()
    one = training_monitor(trained.stages[0].folder, interval=60.0)
    one.stop()
    assert one.history == trained.stages[0].history()


def test_a_folder_moves_on_to_another_run_only_when_the_first_has_ended(tmp_path):
    def stage(name: str, seed: int, steps: int, age: float) -> None:
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stage.json").write_text(
            json.dumps({"method": "coral", "seed": seed, "steps": 4, "uses_labels": True})
        )
        lines = [json.dumps({"stage": name, "step": s, "lr": 0.1, "total": 1.0}) for s in range(1, steps + 1)]
        (folder / METRICS).write_text("\n".join(lines) + "\n")
        written = time.time() - age
        os.utime(folder / METRICS, (written, written))

    def shown() -> list[str]:
        monitor.refresh()
        return list(dict.fromkeys(line["stage"] for line in monitor.history))

    stage("first", 0, 2, age=9)
    monitor = training_monitor(tmp_path, interval=600.0)
    try:
        assert shown() == ["first"] and "step 2 of 4 · last line" in monitor.controls["status"].value
        stage("other", 1, 2, age=1)
        assert shown() == ["first"]  # which is not finished
        stage("first", 0, 4, age=2)
        assert shown() == ["other"]  # another seed: another run
        stage("next", 1, 1, age=0)
        assert shown() == ["other"]
        stage("other", 1, 3, age=100)  # killed: no line for longer than a minute
        assert shown() == ["other", "next"]
    finally:
        monitor.stop()


def test_a_watched_folder_that_cannot_be_read_says_which_file_and_is_watched_on(tmp_path):
    folder = tmp_path / "stages" / "coral-finetune-1"
    folder.mkdir(parents=True)
    (folder / METRICS).write_text(json.dumps({"stage": "finetune", "step": 1, "lr": 0.1, "total": 1.0}) + "\n")
    monitor = training_monitor(tmp_path, interval=600.0)
    try:

        def said() -> str:
            monitor.refresh()
            assert monitor.state == "watching"
            return monitor.controls["status"].value

        assert "stage.json" in said() and 'role="alert"' in said()
        (folder / "stage.json").write_text('{"method": "co')
        assert "stage.json is no description of a stage" in said()
        whole = json.dumps({"method": "coral", "seed": 0, "steps": 4, "uses_labels": True})
        (folder / "stage.json").write_text(whole)
        assert "step 1 of 4" in said() and "alert" not in said()
        (folder / METRICS).write_text("no json\n")
        os.utime(folder / METRICS, (1, 1))
        assert f"{METRICS} has a line that cannot be read" in said()
    finally:
        monitor.stop()


def test_arguments_that_cannot_be_watched_are_refused(tmp_path):
    for run in (None, 5, ""):
        with pytest.raises(TypeError, match="run must be"):
            training_monitor(run)
    for interval in (0, "1", None, float("nan")):
        with pytest.raises(ValueError, match="interval must be a positive"):
            training_monitor(tmp_path, interval=interval)
    for samples in (None, training_data().val[0], iter(())):
        with pytest.raises(TypeError, match="samples must be a sequence"):
            training_monitor(tmp_path, samples=samples)
    with pytest.raises(TypeError, match="method must be a built method"):
        training_monitor(tmp_path, method="coral")
