import os
from pathlib import Path

import numpy as np
import pytest

from medlib.data.check import check_dataset

from .trees import save_nifti, write_official, write_ssl4mis

REAL = os.environ.get("MEDLIB_DATA")


def test_a_sound_data_set(tmp_path):
    report = check_dataset("acdc", write_official(tmp_path, testing=1))
    text = report.text()
    assert report.ok and str(report) == text
    for part in (
        "read as   acdc_nifti",
        "patients  4 (3 no part given, 1 test)",
        "scans     20, 8 with label (4 patients)",
        "12 cine",
        "depth     6\n",
        "spacing   8 mm between slices, 1.4..1.5 mm in plane",
        "class 3   LV",
        "8/8 scans",
        "Ready to train.",
    ):
        assert part in text, text


def test_absent_test_volumes_and_spacing_are_said(tmp_path):
    text = check_dataset("acdc", write_ssl4mis(tmp_path)).text()
    assert "2 test volumes are listed but not there" in text
    assert "spacing   not stored" in text


def test_oddities_are_named_but_do_not_stop(tmp_path):
    write_official(tmp_path, training=3)
    folder = tmp_path / "training/patient002"
    save_nifti(folder / "patient002_frame01_gt.nii.gz", np.ones((6, 24, 20), np.uint8))
    report = check_dataset("acdc", tmp_path)
    assert report.ok
    assert "patient002_frame01 has no background, no MYO, no LV" in report.anomalies
    save_nifti(folder / "patient002_frame01.nii.gz", np.random.default_rng(0).normal(0, 9000, (6, 24, 20)))
    assert any(
        "patient002_frame01 has intensities over" in entry for entry in check_dataset("acdc", tmp_path).anomalies
    )


def test_all_broken_files_are_problems(tmp_path):
    write_official(tmp_path, training=3)
    for number in (1, 3):
        path = tmp_path / f"training/patient{number:03d}/patient{number:03d}_frame04.nii.gz"
        path.write_bytes(path.read_bytes()[:2000])
    report = check_dataset("acdc", tmp_path)
    assert not report.ok
    for number, entry in zip((1, 3), report.problems, strict=True):
        assert f"patient00{number}_frame04.nii.gz is cut off" in entry
    assert "Not usable until the problems are solved." in report.text()


@pytest.mark.parametrize("make", [False, True])
def test_a_root_without_data_is_a_problem_in_words(tmp_path, make):
    if make:
        (tmp_path / "root").mkdir()
    report = check_dataset("acdc", tmp_path / "root")
    assert not report.ok
    assert ("is empty" if make else "does not exist") in report.text()


def test_an_unknown_name_raises(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'acd'"):
        check_dataset("acd", tmp_path)


def test_data_without_any_label_is_a_problem(tmp_path):
    write_official(tmp_path, training=0, testing=2)
    for path in tmp_path.rglob("*_gt.nii.gz"):
        path.unlink()
    assert "none of the 10 scans" in check_dataset("acdc", tmp_path).problems[0]


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_slices():
    report = check_dataset("acdc", Path(REAL or "") / "acdc")
    assert report.ok and not report.anomalies
    assert "1522 in 160 scans" in report.text()
