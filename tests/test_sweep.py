"""A sweep leaves one record a run, skips what it has, and shares pre-training between its runs."""

import json
import shlex

import pytest

from medlib.__main__ import main
from medlib.data import write_phantoms
from medlib.results import load_records, read_record, table
from medlib.train import StageResult


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantoms("acdc", tmp_path_factory.mktemp("sweep") / "phantoms", patients=10, seed=0, cine_frames=0)


def sweep(root, folder, *extra: str) -> int:
    fixed = ["--scale", "ci", "--device", "cpu", "--phantom", "--records", str(folder / "records")]
    return main(["sweep", "acdc", str(root), *fixed, "--output-dir", str(folder / "runs"), *extra])


def test_a_grid_of_runs(root, tmp_path, capsys):
    grid = ["--methods", "supervised", "coral", "--labelled", "1", "2", "--seeds", "0"]
    assert sweep(root, tmp_path, *grid) == 0
    records = load_records(tmp_path / "records")
    assert len(records) == 4 and len(list((tmp_path / "runs" / "stages").glob("coral-pretrain-*"))) == 1
    assert all(record.data["kind"] == "phantom" and record.test is None for record in records)
    assert set(table(records, part="val").index) == {(m, n) for m in ("supervised", "coral") for n in (1, 2)}
    capsys.readouterr()
    assert sweep(root, tmp_path, *grid) == 0
    assert capsys.readouterr().out.count("there already") == 4


def test_settings_reach_the_runs_and_their_names(root, tmp_path):
    extra = ["-s", "frozen", "False", "-s", "finetune_steps", "3", "--name", "tuned", "--open-test"]
    assert sweep(root, tmp_path, "--methods", "coral", "--labelled", "1", "--seeds", "3", *extra) == 0
    [path] = (tmp_path / "records").iterdir()
    assert path.name == "coral-tuned-1p-s3.record.json"
    [record] = load_records(tmp_path / "records")
    assert record.settings["frozen"] is False and record.settings["finetune_steps"] == 3 and record.test is not None
    assert "-s frozen False" in record.command and str(tmp_path) not in path.read_text()


def test_ablations_are_the_runs_that_their_names_and_settings_would_make(root, tmp_path, capsys):
    call = ["--methods", "coral", "--labelled", "1", "--seeds", "0", "-s", "finetune_steps", "3"]
    rows = ["--ablation", "whole", "--ablation", "tuned", "frozen=False", "finetune_steps=2"]
    assert sweep(root, tmp_path, *call, *rows, "--name", "few") == 0
    whole, tuned = (tmp_path / "records" / f"coral-few+{row}-1p-s0.record.json" for row in ("whole", "tuned"))
    records = [read_record(path) for path in (whole, tuned)]
    assert [(record.settings["finetune_steps"], record.settings["frozen"]) for record in records] == [
        (3, True), (2, False),
    ]  # fmt: skip
    assert len(list((tmp_path / "runs" / "stages").glob("coral-pretrain-*"))) == 1
    for path, record in ((whole, records[0]), (tuned, records[1])):
        words = shlex.split(record.command)
        assert "--ablation" not in words and words[words.index("--name") + 1] == path.name.split("-")[1]
        before = path.read_bytes()
        capsys.readouterr()
        arguments = [{"ROOT": str(root), "RECORDS": str(tmp_path / "records")}.get(word, word) for word in words[3:]]
        assert main([*arguments, "--output-dir", str(tmp_path / "runs"), "--device", "cpu"]) == 0
        assert "there already" in capsys.readouterr().out and path.read_bytes() == before


def test_varied_settings_meet_every_ablation_and_one_another(root, tmp_path):
    call = ["--methods", "coral", "--labelled", "1", "--seeds", "0", "-s", "finetune_steps", "1", "--name", "grid"]
    rows = ["--ablation", "ice", "frozen=True", "--ablation", "free", "frozen=False"]
    varied = ["--vary", "pretrain_steps", "1", "2", "--vary", "pretrain_learning_rate", "0.00001", "0.5"]
    assert sweep(root, tmp_path, *call, *rows, *varied) == 0
    found = {path.name: read_record(path).settings for path in (tmp_path / "records").iterdir()}
    expected = {
        f"coral-grid+{row}+pretrain_steps={n}+pretrain_learning_rate={lr}-1p-s0.record.json": (row == "ice", n, lr, 1)
        for row in ("ice", "free") for n in (1, 2) for lr in (1e-05, 0.5)
    }  # fmt: skip
    names = ("frozen", "pretrain_steps", "pretrain_learning_rate", "finetune_steps")
    assert {name: tuple(s[each] for each in names) for name, s in found.items()} == expected
    assert len(list((tmp_path / "runs" / "stages").glob("coral-pretrain-*"))) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "corall", "--labelled", "1"], "unknown method 'corall'"),
        (["--methods", "coral", "--labelled", "99"], "labelled must be 1..6"),
        (["--methods", "coral", "--labelled", "1", "-s", "temprature", "1"], "did you mean 'temperature'"),
        (["--methods", "coral", "--labelled", "1", "--protocol", "dhc"], "protocol must be"),
        (["--methods", "coral", "--labelled", "1", "-s", "scale", "ci"], "scale is no setting of a method"),
        (
            ["--methods", "coral", "--labelled", "1", "-s", "augmentation", "3"],
            "augmentation must be of type",
        ),
        (["--methods", "coral", "--labelled", "1", "--ablation", "off", "temprature=1"], "did you mean 'temperature'"),
        (["--methods", "coral", "--labelled", "1", "--ablation", "off", "frozen"], "SETTING=VALUE, got 'frozen'"),
        (["--methods", "coral", "--labelled", "1", "--ablation", "frozen=False"], "a name of its own, got 'frozen=F"),
        (["--methods", "coral", "--labelled", "1", *["--ablation", "on"] * 2], "a name of its own, got 'on'"),
        (["--methods", "coral", "--labelled", "1", "--ablation", "../up"], "name becomes part of file names"),
        (["--methods", "coral", "--labelled", "1", "--vary", "temprature", "1"], "did you mean 'temperature'"),
        (["--methods", "coral", "--labelled", "1", "--vary", "temperature", "cold"], "temperature must be float"),
        (["--methods", "coral", "--labelled", "1", "--vary", "temperature"], "temperature is varied without values"),
        (["--methods", "coral", "--labelled", "1", *["--vary", "frozen", "True"] * 2], "give all its values at once"),
        (["--methods", "coral", "--labelled", "1", "--vary", "frozen", "(1,)"], "write --ablation NAME frozen=VALUE"),
        (["--methods", "coral", "--labelled", "1", "--vary", "frozen", "[1]"], "write --ablation NAME frozen=VALUE"),
        (["--methods", "coral", "--labelled", "1", "--vary", "temperature", "1", "1.0"], "takes a value twice"),
        (["--methods", "coral", "--labelled", "1", "--vary", "seed", "1", "2"], "seed is no setting of a method"),
        (
            ["--methods", "coral", "--labelled", "1", "--ablation", "on", "frozen=True", "--vary", "frozen", "False"],
            "frozen is both varied and set",
        ),
    ],
)
def test_a_wrong_call_ends_before_anything_runs(root, tmp_path, capsys, wrong, message):
    assert sweep(root, tmp_path, *wrong) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_record_of_other_settings_is_not_taken_for_the_run(root, tmp_path, capsys):
    call = ["--methods", "supervised", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *call) == 0
    assert sweep(root, tmp_path, *call, "-s", "finetune_steps", "3") == 2
    assert "other settings (finetune_steps)" in capsys.readouterr().err
    for wrong in (["--name", "../up"], ["-s", "frozen", "maybe"], ["-s", "finetune_steps", "0"]):
        assert sweep(root, tmp_path, *call, *wrong) == 2


def test_a_setting_younger_than_a_record_had_its_default_then(root, tmp_path, capsys):
    call = ["--methods", "labelled_only", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *call) == 0
    (path,) = (tmp_path / "records").iterdir()
    content = json.loads(path.read_text())
    assert content["settings"].pop("optimizer") == "sgd"
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert sweep(root, tmp_path, *call) == 0 and "there already" in capsys.readouterr().out
    assert sweep(root, tmp_path, *call, "-s", "optimizer", "adamw") == 2
    assert "other settings (optimizer)" in capsys.readouterr().err


def test_a_precision_is_recorded_and_never_mixed_with_another(root, tmp_path, capsys):
    call = ["--methods", "supervised", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *call, "--precision", "bf16-mixed", "--name", "bf16") == 0
    assert sweep(root, tmp_path, *call) == 0
    full, half = load_records(tmp_path / "records")
    assert (half.device, full.device) == ("cpu, bf16-mixed", "cpu") and "--precision bf16-mixed" in half.command
    stages = [StageResult("", "", folder, 0, 0, False) for folder in (tmp_path / "runs" / "stages").iterdir()]
    mine, theirs = ([line["total"] for line in stage.history() if "total" in line] for stage in stages)
    assert mine != theirs  # neither took the other's checkpoint
    assert mine == pytest.approx(theirs, abs=0.05)
    capsys.readouterr()
    assert sweep(root, tmp_path, *call, "--precision", "bf16-mixed") == 2
    assert "other settings (precision)" in capsys.readouterr().err
    assert sweep(root, tmp_path, *call, "--precision", "32-true") == 0
    assert sweep(root, tmp_path, *call, "--precision", "half") == 2
    assert "precision must be one of 32-true, bf16-mixed" in capsys.readouterr().err


def test_a_record_of_another_data_set_or_split_is_not_taken_for_the_run(root, tmp_path, capsys):
    grid = ["--methods", "supervised", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *grid) == 0
    assert sweep(root, tmp_path, *grid, "--open-test") == 2 and "other settings (test)" in capsys.readouterr().err
    other = write_phantoms("acdc", tmp_path / "other", patients=11, seed=0, cine_frames=0)
    assert sweep(other, tmp_path, *grid) == 2 and "other settings (patients)" in capsys.readouterr().err


def test_a_record_under_another_name_is_not_taken_for_the_run(root, tmp_path, capsys):
    grid = ["--methods", "supervised", "labelled_only", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *grid) == 0
    mine = tmp_path / "records" / "labelled_only-1p-s0.record.json"
    for name, method, seed, word in (
        ("labelled_only-1p-s7", "labelled_only", "7", "seed"), ("mean_teacher-1p-s0", "mean_teacher", "0", "method"),
    ):  # fmt: skip
        mine.with_name(f"{name}.record.json").write_bytes(mine.read_bytes())
        capsys.readouterr()
        assert sweep(root, tmp_path, "--methods", method, "--labelled", "1", "--seeds", seed) == 2
        assert f"other settings ({word}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["-s", "spacing", "-1"], "spacing must be above 0 mm and finite, or None, got -1"),
        (["-s", "spacing", "1e999"], "spacing must be above 0 mm and finite, or None, got inf"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or mps, got 'gpu'"),
        (["--name", "x" * 190], "name makes a file name of"),
        (["--seeds", "1", "5"], "labelled_only-1p-s5.record.json: not JSON"),
    ],
)
def test_what_stops_one_run_of_a_grid_stops_all_before_the_first(root, tmp_path, capsys, extra, message):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "labelled_only-1p-s5.record.json").write_text('{"schema": 1, "met')
    grid = ["--methods", "labelled_only", "--labelled", "1", "--seeds", "1", "2"]
    assert sweep(root, tmp_path, *grid, *extra) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "stages").exists() and len(list((tmp_path / "records").iterdir())) == 1


def test_phantoms_are_recorded_as_such_and_folders_are_tried_first(root, tmp_path, capsys):
    arguments = ["sweep", "acdc", str(root), "--scale", "ci", "--device", "cpu", "--methods", "supervised"]
    folders = ["--records", str(tmp_path / "records"), "--output-dir", str(tmp_path / "runs")]
    assert main([*arguments, *folders, "--labelled", "1", "--seeds", "0"]) == 0
    assert load_records(tmp_path / "records")[0].data["kind"] == "phantom"
    (tmp_path / "a file").touch()
    for below in ("a file/records", "a file"):
        for option in ("--records", "--output-dir"):
            assert main([*arguments, *folders, "--labelled", "1", "--seeds", "1", option, str(tmp_path / below)]) == 2
            assert "cannot be written to" in capsys.readouterr().err
    assert main([*arguments, "--records", str(tmp_path / "a file"), "--labelled", "1", "--seeds", "0"]) == 2


def test_computing_levels_again_is_in_the_command_and_no_setting(root, tmp_path, capsys):
    call = ["--methods", "labelled_only", "--labelled", "1", "--seeds", "0"]
    assert sweep(root, tmp_path, *call, "--recompute", "2") == 0
    (record,) = load_records(tmp_path / "records")
    assert "--recompute 2" in record.command and "recompute" not in record.settings
    capsys.readouterr()
    assert sweep(root, tmp_path, *call) == 0 and "there already" in capsys.readouterr().out
    assert sweep(root, tmp_path, *call, "--recompute", "-1") == 2
    assert "recompute must be a whole number of levels, 0 or more, got -1" in capsys.readouterr().err
