"""A run is recorded in a small file, opened from it or from its folder, and nothing is trained on the way."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from medlib import experiment, finished, notebook
from medlib.__main__ import main
from medlib.explore import RecordedRun, explore, open_run
from medlib.explore import recorded as module
from medlib.methods import build
from medlib.results import read_record
from medlib.rng import numpy_generator


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The project's data folder replaced, ten patients a scale, and one recording made by the command."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("recorded")
        for place in ("medlib.explore.recorded.DATA", "medlib.finished.DATA"):
            patch.setattr(place, folder / "data")
        patch.setattr(experiment, "CACHE", folder / "cache")
        patch.setitem(notebook.PHANTOM_PATIENTS, "ci", 10)
        words = ["--scale", "ci", "--device", "cpu", "--output", str(folder / "run.npz")]
        assert main(["record", *words, "--output-dir", str(folder / "runs")]) == 0
        yield folder


@pytest.fixture
def untrainable(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a run was trained")

    monkeypatch.setattr("medlib.train._Loop._train", refuse)
    monkeypatch.setattr(experiment, "train", refuse)


def made_up(**changes) -> RecordedRun:
    rng = numpy_generator(0, "recorded")
    values = {
        "title": "made up",
        "command": "python -m medlib record",
        "features": {"one": {0: rng.normal(size=(12, 6)), 5: rng.normal(size=(12, 6))}, "two": {5: np.eye(12)}},
        "positions": np.arange(1, 13) / 12,
        "patients": [f"p{i // 4}" for i in range(12)],
        "thumbnails": rng.integers(0, 255, (12, 8, 8), np.uint8),
        "labels": rng.integers(0, 2, (12, 8, 8), np.uint8),
        "predictions": {"two": rng.integers(0, 2, (12, 8, 8), np.uint8)},
        "columns": {"error": np.linspace(0, 1, 12), "third": np.repeat(["a", "b"], 6)},
        "groups": ["DCM", "NOR"] * 6,
        "classes": ("background", "LV"),
        "colours": ("#00000000", "#D55E00"),
    }
    return RecordedRun(**{**values, **changes})


def test_what_is_written_is_read_back(tmp_path):
    run = made_up()
    again = RecordedRun.load(run.save(tmp_path / "a" / "run.npz"))
    assert [(name, list(steps)) for name, steps in again.features.items()] == [("one", [0, 5]), ("two", [5])]
    np.testing.assert_allclose(again.features["one"][5], run.features["one"][5], atol=4e-3)
    np.testing.assert_array_equal(again.labels, run.labels)
    np.testing.assert_array_equal(again.predictions["two"], run.predictions["two"])
    np.testing.assert_allclose(again.columns["error"], run.columns["error"], atol=1e-3)
    assert again.columns["third"].tolist() == run.columns["third"].tolist()
    assert (again.groups, again.patients, again.title) == (run.groups, run.patients, run.title)
    bare = RecordedRun.load(made_up(labels=None, groups=None, predictions={}, columns={}).save(tmp_path / "b.npz"))
    assert bare.labels is None and bare.groups is None and not bare.predictions and not bare.columns
    assert (tmp_path / "a" / "run.npz").read_bytes() == made_up().save(tmp_path / "c.npz").read_bytes()
    assert {path.name for path in tmp_path.rglob("*.*")} == {"run.npz", "b.npz", "c.npz"}


def test_collapsed_embeddings_keep_their_differences(tmp_path):
    base = numpy_generator(0, "collapse").normal(size=(12, 6))
    collapsed = 1000 + 1e-3 * base  # float16 would make them all equal
    again = RecordedRun.load(made_up(features={"one": {0: collapsed}}).save(tmp_path / "run.npz"))
    found = again.features["one"][0].astype(float)
    correlation = np.corrcoef((found - found.mean(axis=0)).ravel(), (base - base.mean(axis=0)).ravel())[0, 1]
    assert np.abs(found - 1000).max() < 0.01 and correlation > 0.99


def test_both_explorers_open_from_the_file(tmp_path):
    path = made_up().save(tmp_path / "run.npz")
    run = open_run(path)
    film, last = run.training(), run.embedding()
    assert list(film.controls["step"].options) == [0, 5]
    assert set(last.controls["colour"].options) == {"position", "patient", "group", "error", "third"}
    last.controls["point"].value = 4
    assert "prediction of two" in last.controls["strip"].value
    both = explore(path)
    assert len(both.widget.children) == 2 and {"picture", "measures", "embedding"} <= set(both.figures)
    assert {"training step", "point"} <= set(both.controls)
    with pytest.raises(ValueError, match="only one step"):
        made_up(features={"two": {5: np.eye(12)}}).training()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"patient": np.arange(12)}}, "another name"),
        ({"features": {"one": {0: np.full((12, 6), np.nan)}}}, "must be finite"),
    ],
)
def test_what_could_not_be_opened_is_not_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made_up(**change).save(tmp_path / "run.npz")
    assert not (tmp_path / "run.npz").exists()


def test_files_that_are_no_recording_are_named(tmp_path, monkeypatch):
    (tmp_path / "torn.npz").write_bytes(made_up().save(tmp_path / "whole.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn\.npz is not a recorded run"):
        open_run(tmp_path / "torn.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match=r"other\.npz is not a recorded run.*about"):
        open_run(tmp_path / "other.npz")
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(ValueError, match="its format is 1, this version reads 2"):
        open_run(tmp_path / "whole.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        made_up().save(tmp_path / "run.npy")
    monkeypatch.setattr(module, "RECORDED", tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="python -m medlib record"):
        open_run()


def test_the_command_records_steps_thumbnails_and_errors(patched):
    run = open_run(patched / "run.npz")
    assert list(run.features) == ["CORAL", "PCL"] and run.command.startswith("python -m medlib record")
    assert all(list(steps) == [0, 1, 2, 3, 4, 6] for steps in run.features.values())  # of 6, at the shares of SHARES
    count = len(run.positions)
    assert run.features["PCL"][6].shape == (count, 16) and run.thumbnails.shape == run.labels.shape == (count, 32, 32)
    np.testing.assert_allclose(run.features["CORAL"][0], run.features["PCL"][0], atol=0.02)  # the same initial weights
    assert np.abs(run.features["CORAL"][6] - run.features["PCL"][6]).max() > 0.05
    first = min(np.flatnonzero(run.labels.any(axis=(1, 2))))
    wrong = run.predictions["CORAL"][first] != run.labels[first]
    either = (run.predictions["CORAL"][first] > 0) | (run.labels[first] > 0)
    assert run.columns["error (CORAL)"][first] == pytest.approx(wrong.sum() / either.sum(), abs=1e-3)
    assert run.columns["entropy (PCL)"].min() > 0 and run.columns["entropy (PCL)"].max() <= 1
    assert run.columns["height"][np.argmin(run.positions)] == "1st third"
    assert (patched / "run.npz").stat().st_size < 300_000


def test_a_finished_folder_opens_without_training(patched, untrainable):
    from_folder, from_file = open_run(patched / "runs"), open_run(patched / "run.npz")
    assert list(from_folder.features) == list(from_file.features)
    for name, steps in from_file.features.items():
        for step, features in steps.items():
            scale = np.abs(features - features.mean(axis=0)).max()
            np.testing.assert_allclose(from_folder.features[name][step], features, atol=2e-3 * scale + 1e-6)
        np.testing.assert_array_equal(from_folder.predictions[name], from_file.predictions[name])
    np.testing.assert_array_equal(from_folder.labels, from_file.labels)
    [one] = (patched / "runs" / "records").glob("pcl-*")
    alone = open_run(one)
    assert list(alone.features) == ["PCL"] and list(alone.features["PCL"]) == [0, 1, 2, 3, 4, 6]


def test_a_folder_says_what_is_missing(patched, untrainable, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run record"):
        open_run(tmp_path)
    shutil.copytree(patched / "runs", tmp_path / "runs")
    [folder] = (tmp_path / "runs" / "stages").glob("coral-pretrain-*")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=f"stage 'pretrain' is not in .*{folder.name}"):
        open_run(tmp_path / "runs")
    [path] = (tmp_path / "runs" / "records").glob("pcl-*")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "data": {"kind": "real", "root": "acdc"}}))
    with pytest.raises(ValueError, match="of real scans .acdc.: give their folder as data_root"):
        open_run(path)
    path.write_text(json.dumps({**values, "settings": {**values["settings"], "colour": 3}}))
    with pytest.raises(ValueError, match="no setting colour in this version"):
        open_run(path)
    path.write_text(json.dumps({**values, "method": "dvcl3"}))
    with pytest.raises(ValueError, match="there is no method 'dvcl3'"):
        open_run(path)


@pytest.mark.parametrize("name", ["coral", "mona", "ideal", "dvcl", "dacl"])
def test_settings_survive_their_record(name, patched):
    [path] = (patched / "runs" / "records").glob("coral-*")
    method = build(name, scale="ci")
    plain = json.loads(json.dumps(dataclasses.asdict(method)))
    record = dataclasses.replace(read_record(path), method=name, settings=plain)
    assert finished.method_of(record) == method


def test_a_wrong_call_is_one_line(patched, capsys):
    assert main(["record", "--scale", "huge", "--output", str(patched / "no.npz")]) == 2
    assert "scale" in capsys.readouterr().err
    assert main(["record", "--scale", "ci", "--methods", "dacl", "--output", str(patched / "no.npz")]) == 2
    assert "does not embed slices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--output", "a file/x.npz", "output"),
        ("--output", "folder.npz", "output must be a .npz file"),
        ("--output-dir", "a file/runs", "output_dir"),
        ("--ratio", "nan", "ratio must be above 0 and at most 1, got nan"),
        ("--seed", "-1", "seed must be 0 or more, got -1"),
        ("--device", "tpu", "device must be auto, cpu, cuda or mps"),
    ],
)
def test_what_a_recording_cannot_have_is_refused_before_any_scan_is_drawn(
    tmp_path, monkeypatch, capsys, option, value, message
):
    def never(*args: object, **options: object) -> None:
        raise AssertionError("phantoms are drawn")

    monkeypatch.setattr("medlib.data.write_phantoms", never)
    (tmp_path / "a file").touch()
    (tmp_path / "folder.npz").mkdir()
    given = {"--output": str(tmp_path / "x.npz"), "--output-dir": str(tmp_path / "runs")}
    given[option] = str(tmp_path / value) if "output" in option else value
    assert main(["record", "--scale", "ci", *(word for pair in given.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


def test_the_recording_of_this_repository_opens():
    if not module.RECORDED.exists():
        pytest.skip("nothing is recorded yet: python -m medlib record")
    assert module.RECORDED.stat().st_size <= module.LIMIT
    run = open_run()
    assert run.command.startswith("python -m medlib record") and len(run.features) >= 2
    assert all(len(steps) >= 5 for steps in run.features.values())
    assert run.labels is not None and set(run.predictions) == set(run.features)


def test_a_record_opens_the_weights_of_its_own_precision(patched, tmp_path):
    root = patched / "data" / "phantoms" / "acdc-10"
    fixed = ["sweep", "acdc", str(root), "--methods", "supervised", "--labelled", "1", "--seeds", "0", "--scale", "ci"]
    fixed += ["--device", "cpu", "--output-dir", str(tmp_path), "--records", str(tmp_path / "records")]
    assert main(fixed) == 0 and main([*fixed, "--precision", "bf16-mixed", "--name", "half"]) == 0
    for path in (tmp_path / "records").iterdir():
        [stage] = finished.reopen(path, device="cpu").trained.stages
        assert {stage.name: stage.seconds} == read_record(path).seconds  # no two trainings take the same time
