"""A record comes back as it was written, says what is wrong with it, and does not mix with another table's."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from medlib.data.splits import Split
from medlib.evaluate import CaseMetrics, Evaluation, pooled_dice, volume_metrics
from medlib.methods import build
from medlib.paths import RESULTS
from medlib.results import (
    RunRecord,
    departures,
    full_settings,
    load_records,
    paired_bootstrap,
    read_record,
    seeds_table,
    table,
    versions,
)
from medlib.results.records import without_paths

CLASSES = ("background", "RV", "LV")


def evaluation(shift=1, patients=("p8", "p9")):
    """Two scans each: a bar of each class, found ``shift`` columns off; the last scan has no RV in its label."""
    label = np.zeros((2, 8, 12), np.uint8)
    label[:, 1:3, 2:8], label[:, 5:7, 2:8] = 1, 2
    cases, pairs = [], []
    for patient in patients:
        for phase in ("ED", "ES"):
            truth = np.where(label == 1, 0, label) if (patient, phase) == (patients[-1], "ES") else label
            pairs.append((np.roll(truth, shift, axis=2), truth))
            metrics = volume_metrics(*pairs[-1], CLASSES, (10.0, 1.5, 1.5))
            cases.append(CaseMetrics(f"{patient}_{phase}", patient, {"phase": phase}, metrics))
    return Evaluation(tuple(cases), pooled_dice(pairs, CLASSES))


def record(**changes):
    found = RunRecord(
        method="coral",
        variant="paper",
        settings={"temperature": 0.1, "terms": ("relational", "ordinal"), "data_root": Path("/scans/ACDC")},
        scale="laptop",
        seed=0,
        dataset="acdc",
        data={"kind": "phantom", "root": "acdc", "patients": 20},
        split=Split(name="ratio", labelled=("p1",), unlabelled=("p2", "p3"), val=("p7",), test=("p8", "p9")),
        versions={"python": "3.11.2"},
        device="cpu",
        command="python -m medlib run 04_coral -p data_root /scans/ACDC -p ratio 0.1",
        seconds={"pretrain": 1.5, "finetune": 2.0},
        parameters=1000,
        val=evaluation(2, ("p7",)),
        test=evaluation(1),
        history="metrics.jsonl",
    )
    return dataclasses.replace(found, **changes)


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = record().save(tmp_path / "deep" / "a.record.json")
    again = read_record(path)
    np.testing.assert_equal(again.to_dict(), record().to_dict())
    assert again.split == record().split and again.settings["terms"] == ["relational", "ordinal"]
    assert math.isnan(again.test.cases[-1].classes["RV"]["dice"])
    assert again.test.frame().equals(record().test.frame())
    assert [p.name for p in path.parent.iterdir()] == ["a.record.json"]  # nothing unfinished is left


def test_no_path_of_this_machine_is_written(tmp_path):
    text = record().save(tmp_path / "a.record.json").read_text()
    assert "/scans" not in text and str(tmp_path) not in text
    assert json.loads(text)["command"].endswith("-p data_root .../ACDC -p ratio 0.1")
    assert json.loads(text)["settings"]["data_root"] == ".../ACDC"
    with pytest.raises(ValueError, match="history.*relative"):
        record(history="/scans/runs/metrics.jsonl")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/data/ACDC/", ".../ACDC"),
        ("-p data_root=/a/b -p x 1", "-p data_root=.../b -p x 1"),
        ("['/a/b', '~/c/d']", "['.../b', '.../d']"),
        (r"C:\Users\me\ACDC", ".../ACDC"),
        ("file:///scans/x", ".../x"),
        ("runs/04_coral.ipynb and https://a.org/b, 1 / 3, 1/3", "runs/04_coral.ipynb and https://a.org/b, 1 / 3, 1/3"),
    ],
)
def test_paths_are_cut_and_nothing_else(text, shown):
    assert without_paths(text) == shown == without_paths(shown)


def test_a_part_that_is_missing_has_a_reason(tmp_path):
    with pytest.raises(ValueError, match=r"missing\['test'\]"):
        record(test=None)
    found = record(test=None, missing={"test": "the test volumes are not in this release"})
    again = read_record(found.save(tmp_path / "a.record.json"))
    assert again.test is None
    with pytest.raises(ValueError, match="coral seed 0 has no test evaluation: the test volumes"):
        again.evaluation("test")


def broken(change):
    values = json.loads(json.dumps(record().to_dict()))
    change(values)
    return values


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("seed"), "missing key 'seed'"),
        (lambda v: v.update(sead=1), "unknown key 'sead'"),
        (lambda v: v.update(schema=2), "'schema' must be 1, got 2"),
        (lambda v: v.update(seed="0"), "'seed' must be int, got '0'"),
        (lambda v: v.update(parameters=True), "'parameters' must be int"),
        (lambda v: v.update(data={"kind": "fake"}), r"data\['kind'\].*'fake'"),
        (lambda v: v["split"].pop("val"), "'split.val' must be a list of patients"),
        (lambda v: v["split"].update(val=[1]), r"'split.val'.*\[1\]"),
        (lambda v: v["test"].pop("cases"), "'test': 'cases' is missing"),
        (lambda v: v["test"]["cases"][1].pop("patient"), r"'test': 'cases\[1\].patient' is missing"),
        (
            lambda v: v["test"]["cases"][0]["classes"]["LV"].pop("hd95"),
            r"'test': 'cases\[0\].classes.LV.hd95' is missing",
        ),
        (lambda v: v["val"]["cases"][0]["classes"]["LV"].update(dice="1"), r"'val': 'cases\[0\].classes.LV.dice'.*'1'"),
        (lambda v: v.update(test=None), r"missing\['test'\]"),
        (lambda v: v.update(val={}), r"'val': 'cases' is missing"),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_key(tmp_path, change, message):
    path = tmp_path / "wrong.record.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ValueError, match=r"wrong\.record\.json: .*" + message):
        read_record(path)


def test_a_torn_or_foreign_file_is_refused(tmp_path):
    (tmp_path / "torn.record.json").write_text('{"schema": 1, "met')
    with pytest.raises(ValueError, match="torn.record.json: not JSON"):
        load_records(tmp_path)
    (tmp_path / "torn.record.json").write_text("[]")
    with pytest.raises(ValueError, match="torn.record.json.*list.*not a run record"):
        load_records(tmp_path)


def test_a_failed_save_leaves_the_old_record(tmp_path):
    path = record().save(tmp_path / "a.record.json")
    before = path.read_text()
    with pytest.raises(TypeError):
        record(settings={"temperature": object()}).save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"\.record\.json.*'a.json'"):
        record().save(tmp_path / "a.json")


def test_records_are_found_below_a_folder(tmp_path):
    for seed in (1, 0):
        record(seed=seed).save(tmp_path / f"seed{seed}" / "coral.record.json")
    (tmp_path / "notes.json").write_text("{}")
    assert [r.seed for r in load_records(tmp_path)] == [0, 1]
    with pytest.raises(FileNotFoundError, match="nowhere.*record"):
        load_records(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert load_records(tmp_path / "empty") == []


def test_versions_name_what_decides_a_result():
    assert {"python", "torch", "monai", "numpy", "medlib"} <= versions().keys()


# ---- table

MORE = Split(name="ratio", labelled=("p1", "p2"), unlabelled=("p3",), val=("p7",), test=("p8", "p9"))


def test_table_is_mean_and_spread_over_seeds():
    runs = [record(seed=s, test=evaluation(s)) for s in (0, 1, 2)] + [record(seed=0, split=MORE, test=evaluation(0))]
    found = table(runs)
    assert list(found.index) == [("coral", 1), ("coral", 2)]
    dice = [1, 5 / 6, 4 / 6]  # a bar of six columns, 0 to 2 columns off
    row = found.loc[("coral", 1)]
    assert row["n"] == 3 and row["mean"] == pytest.approx(np.mean(dice)) and row["std"] == pytest.approx(1 / 6)
    assert row["RV"] == row["LV"] == pytest.approx(np.mean(dice)) and row["missed"] == 0
    assert found.loc[("coral", 2), "mean"] == 1 and math.isnan(found.loc[("coral", 2), "std"])
    assert table(runs, metric="pooled_dice").loc[("coral", 1), "mean"] == pytest.approx(np.mean(dice))
    assert table(runs, metric="hd95").loc[("coral", 2), "mean"] == 0
    assert table(runs, part="val").loc[("coral", 1), "mean"] == pytest.approx(4 / 6)


def test_table_shows_an_undefined_distance_and_the_misses_behind_it():
    row = table([record(seed=0, test=evaluation(1)), record(seed=1, test=evaluation(12 // 2))], metric="assd").iloc[0]
    assert row["n"] == 2 and row["missed"] == 0 and row["mean"] > 0
    nothing = evaluation(0)
    label = np.full((1, 4, 4), 2)
    missed = CaseMetrics("p8_ED", "p8", {}, volume_metrics(0 * label, label, CLASSES, (10.0, 1.5, 1.5)))
    runs = [record(seed=0, test=nothing), record(seed=1, test=Evaluation((missed,), {"RV": 0.0, "LV": 0.0}))]
    row = table(runs, metric="assd").iloc[0]
    assert math.isnan(row["mean"]) and math.isnan(row["LV"]) and row["missed"] == 0.5


@pytest.mark.parametrize(
    "change, name",
    [
        ({"scale": "ci"}, "scale"),
        ({"dataset": "chd"}, "dataset"),
        ({"data": {"kind": "real", "root": "acdc"}}, "data"),
        ({"split": dataclasses.replace(MORE, test=("p9",))}, "split"),
        ({"split": dataclasses.replace(MORE, labelled=("p3",), unlabelled=("p1", "p2"))}, "split"),
        ({"settings": {"temperature": 0.2}}, "settings"),
        ({"variant": "released"}, "settings"),
    ],
)
def test_table_refuses_to_mix_unless_asked(change, name):
    runs = [record(seed=0), record(seed=1, **change)]
    with pytest.raises(ValueError, match=rf"differ in {name}: .*mix=\['{name}'\]"):
        table(runs)
    assert table(runs, mix=[name])["n"].sum() == 2


def test_table_takes_settings_apart_by_a_label():
    runs = [record(), record(variant="released")]
    found = table(runs, label=lambda r: f"CORAL, {r.variant}")
    assert list(found.index) == [("CORAL, paper", 1), ("CORAL, released", 1)]


def test_table_refuses_a_seed_twice_an_unknown_metric_and_an_absent_part():
    with pytest.raises(ValueError, match=r"seed twice: \[0, 0\]"):
        table([record(), record()])
    with pytest.raises(ValueError, match="'dize'"):
        table([record()], metric="dize")
    with pytest.raises(ValueError, match="no test evaluation: not released"):
        table([record(test=None, missing={"test": "not released"})])


def cps_record(**changes):
    settings = build("cps", scale="laptop").plain()
    return record(method="cps", settings=settings | changes.pop("settings", {}), **changes)


def test_a_setting_younger_than_its_record_had_its_default_then():
    young, old = cps_record(seed=0), cps_record(seed=1)
    old.settings.pop("optimizer"), old.settings.pop("learning_rate")
    assert full_settings(old) == full_settings(young) and full_settings(old)["learning_rate"] == 0.03  # of `laptop`
    assert departures(old, build("cps", scale="laptop")) == {}
    assert table([young, old])["n"].item() == 2
    other = cps_record(settings={"width": 8, "gone": 1})
    assert departures(other, build("cps", scale="laptop")) == {"width": 8, "gone": 1}
    assert departures(old, build("cps", scale="laptop", optimizer="adamw")) == {"optimizer": "sgd"}
    assert full_settings(record(method="sixth paper")) == record().settings


def test_the_records_of_this_repository_make_tables():
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for found in load_records(folder):
            assert departures(found, build(found.method, scale=found.scale)).keys() <= found.settings.keys()
            assert full_settings(found).keys() == build(found.method, scale=found.scale).plain().keys()


def test_a_table_for_reading():
    runs = [record(seed=s, method="b", test=evaluation(s)) for s in (0, 1, 2)]
    runs += [record(seed=s, method="b", split=MORE, test=evaluation(s)) for s in (0, 2)]
    runs += [record(seed=5, method="a", split=MORE, test=evaluation(0))]
    found = seeds_table(runs, part="test").fillna("")
    assert list(found.index) == ["b", "a"] and list(found.columns) == ["1 labelled", "2 labelled"]
    assert found.values.tolist() == [["0.833 ± 0.167", "0.833 ± 0.236 (2)"], ["", "1.000 (1)"]]
    assert list(seeds_table(runs, part="test", label=lambda r: f"{r.method}!").index) == ["b!", "a!"]


def test_records_feed_the_paired_interval():
    ours = [record(seed=s, test=evaluation(1)).test.frame() for s in (0, 1)]
    theirs = [record(seed=s, test=evaluation(2)).test.frame() for s in (0, 1)]
    found = paired_bootstrap(ours, theirs)
    assert found.difference == found.low == found.high == pytest.approx(1 / 6)
