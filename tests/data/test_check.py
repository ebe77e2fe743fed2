import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medlib.__main__ import main
from medlib.data import labelled_cases, load_volume
from medlib.data.check import check_dataset
from medlib.data.phantoms import PHANTOMS, STAMP, write_phantoms
from medlib.explore.report import check_page, write_page

from .trees import TREES, body, save_nifti, save_pair, save_scan, write_json, write_official, write_ssl4mis

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


@pytest.mark.parametrize("name", TREES)
def test_every_data_set_gets_a_report(tmp_path, name):
    TREES[name].write(tmp_path)
    report = check_dataset(name, tmp_path)
    assert report.ok, report.text()
    assert "spacing   3 mm between slices, 1..2 mm in plane" in report.text()
    assert f"{len(TREES[name].labelled)} with label" in report.text()
    assert "axes      " in report.text()
    assert report.info is report.cases[0].about


def test_a_task_is_reported_with_the_classes_of_its_file(tmp_path):
    TREES["msd"].write(tmp_path)
    text = check_dataset("msd", tmp_path).text()
    assert "Decathlon, Hippocampus" in text and "class 1   Anterior" in text and "class 2   Posterior" in text


def test_anomalies_of_body_scans(tmp_path):
    TREES["btcv"].write(tmp_path)
    base = tmp_path / "RawData/Training"
    for seed, number, spacing, values in (
        (2, 3, (3.0, 2.0, 1.0), (0, 1, 2)),  # the image of patient 2 again
        (4, 4, (0.003, 0.002, 0.001), (0, 1, 2)),  # metres
        (5, 5, (3.0, 5.0, 1.0), (0, 1, 2)),
        (6, 6, (3.0, 2.0, 1.0), (0, 0, 0)),
    ):
        save_pair(base, f"img/img{number:04d}.nii", f"label/label{number:04d}.nii", seed, values, spacing=spacing)
    report = check_dataset("btcv", tmp_path)
    assert report.ok
    for text in (
        "img0003 and img0002 are the same image under two patients",
        "img0004 has a spacing of 0.003 x 0.002 x 0.001 mm",
        "img0005 has voxels of 3 x 5 x 1 mm, far from square",
        "img0006 has a label that is all background",
        "no scan at all has liver",
        "img0001 has no left kidney, no gallbladder",
    ):
        assert any(entry.startswith(text) for entry in report.anomalies), (text, report.anomalies)
    assert not any("img0001 and" in entry for entry in report.anomalies)


def test_two_scans_of_one_patient_may_be_alike(tmp_path):
    for number in (1, 2):
        save_pair(tmp_path, f"imagesTr/scan_{number}.nii", f"labelsTr/scan_{number}.nii")
    for patients, twins in (({}, 1), ({"scan_1": "anna", "scan_2": "anna"}, 0)):
        write_json(tmp_path, patients=patients)
        found = check_dataset("msd", tmp_path).anomalies
        assert sum("same image" in entry for entry in found) == twins


def test_what_a_reader_put_right_is_said(tmp_path):
    save_pair(tmp_path, "ct_train_1001_image.nii", "ct_train_1001_label.nii", values=(0, 420, 421))
    assert any("16 voxels have the value 421" in entry for entry in check_dataset("mmwhs", tmp_path).anomalies)


def test_headers_without_orientation_are_an_anomaly(tmp_path):
    image, label = body()
    for name, array in (("ct_1001_image.nii", image), ("ct_1001_label.nii", label)):
        save_scan(tmp_path / name, array, "LAS")
        file = nibabel.load(tmp_path / name)
        file.set_qform(None, code=0)
        file.set_sform(None, code=0)
        nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj), None, file.header), tmp_path / name)
    assert any("1 headers do not say how the scan lies" in entry for entry in check_dataset("chd", tmp_path).anomalies)


# ------------------------------------------------------------------------------------------------ the figure page


def test_a_page_shows_scans_curves_and_shares(tmp_path):
    TREES["mmwhs"].write(tmp_path)
    report = check_dataset("mmwhs", tmp_path)
    figure = check_page(report)
    assert len(figure.layout.images) == 3, "one picture for each labelled scan"
    assert {trace.name for trace in figure.data if trace.type == "scatter"} == {"background", "LV", "RV"}
    (bars,) = (trace for trace in figure.data if trace.type == "bar")
    assert list(bars.y) == list(report.info.classes[1:])
    assert list(bars.marker.color) == list(report.info.colours[1:])
    assert bars.x[0] == pytest.approx(100 * 24 / body()[0].size)
    assert bars.text[0] == "3/3" and bars.text[6] == "0/3"
    assert "PHANTOM" not in figure.layout.title.text


def test_at_most_twelve_scans_are_shown_and_the_picture_is_true_to_scale(tmp_path):
    for number in range(30):
        save_pair(tmp_path, f"ct_{number}_image.nii", f"ct_{number}_label.nii", number)
    images = check_page(check_dataset("chd", tmp_path)).layout.images
    assert len(images) == 12
    figure = check_page(check_dataset("chd", tmp_path)).layout
    inner = (figure.width - 80, figure.height - figure.margin.t - figure.margin.b)
    height, width = images[0].sizey * inner[1], images[0].sizex * inner[0]
    assert height / width == pytest.approx(9 * 2 / (8 * 1), rel=0.01), "9 rows of 2 mm, 8 columns of 1 mm"


def test_phantoms_are_named_as_such(tmp_path):
    TREES["btcv"].write(tmp_path)
    (tmp_path / STAMP).write_text("{}")
    report = check_dataset("btcv", tmp_path)
    assert "PHANTOM" in report.text().splitlines()[0] and "PHANTOM" in check_page(report).layout.title.text


def test_scans_without_labels_can_be_drawn_and_nothing_at_all_cannot(tmp_path):
    save_pair(tmp_path, "RawData/Testing/img/img0061.nii", None)
    figure = check_page(check_dataset("btcv", tmp_path))
    assert len(figure.layout.images) == 1 and not figure.data
    (tmp_path / "RawData/Testing/img/img0061.nii").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing to draw"):
        check_page(check_dataset("btcv", tmp_path))


def test_the_command_writes_the_page(tmp_path, capsys):
    TREES["lits"].write(tmp_path / "data")
    page = tmp_path / "pages/look.html"
    assert main(["check", "lits", str(tmp_path / "data"), "--figure", str(page)]) == 0
    assert "plotly" in page.read_text(encoding="utf-8") and "look.html" in capsys.readouterr().out
    assert main(["check", "lits", str(tmp_path / "data"), "--figure", str(tmp_path / "look.doc")]) == 2
    assert "must end in one of .html, .png" in capsys.readouterr().err


def test_a_picture_without_a_chrome_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDLIB_PNG", "0")
    TREES["chd"].write(tmp_path)
    with pytest.raises(OSError, match="needs a Chrome on this machine: write .*look.html"):
        write_page(check_page(check_dataset("chd", tmp_path)), tmp_path / "look.png")


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_slices():
    report = check_dataset("acdc", Path(REAL or "") / "acdc")
    twins = "patient076_frame{0} and patient074_frame{0} are the same image under two patients".format
    assert report.ok and len(report.anomalies) == 2
    assert all(found.startswith(twins(frame)) for found, frame in zip(report.anomalies, ("01", "02"), strict=True))
    assert "1522 in 160 scans" in report.text()


# -------------------------------------------------------------------------------------------------- phantom twins


@pytest.mark.parametrize("name", sorted(set(PHANTOMS) & set(TREES)))
def test_the_phantom_twin_of_every_layout_is_read_loaded_and_checked(tmp_path, name):
    root = write_phantoms(name, tmp_path / "phantoms", 4, 0)
    report = check_dataset(name, root)
    assert report.ok, report.text()
    assert report.phantom and "PHANTOM" in report.text().splitlines()[0]
    assert len({case.patient for case in report.cases}) == 4
    assert not any("same image" in entry or "spacing" in entry for entry in report.anomalies)
    classes = report.info.classes
    total = sum(summary.voxels for summary in report.summaries.values() if summary.voxels is not None)
    assert len(total) == len(classes) and (total > 0).mean() > 0.6, "most structures are drawn"
    if "liver" in classes:
        volume = load_volume(labelled_cases(report.cases)[0])
        liver = np.argwhere(volume.label == classes.index("liver")).mean(axis=0)
        assert liver[2] < volume.image.shape[2] / 2, "the liver lies on the left of a picture"
