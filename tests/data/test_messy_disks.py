"""What a messy disk holds and what users do to phantoms: found by trying, each once read wrongly or lost."""

import gzip
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medlib.data import (
    Case,
    DataError,
    Protocol,
    check_dataset,
    dataset_info,
    load_volume,
    prepare,
    read_dataset,
    write_phantoms,
)
from medlib.data.nifti import check_whole
from medlib.data.phantoms import STAMP, is_phantom
from medlib.data.splits import ratio_split

from .trees import TREES, write_json

IMAGE = "imagesTr/hippocampus_003.nii.gz"
LABEL = "labelsTr/hippocampus_003.nii.gz"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    TREES["msd"].write(tmp_path)
    return tmp_path


def case_of(root: Path, name: str = "hippocampus_003") -> Case:
    return next(case for case in read_dataset("msd", root) if case.case == name)


def test_a_header_that_scales_its_voxels_is_read_as_the_scan_is(task):
    file = nibabel.load(task / IMAGE)
    raw = np.asarray(file.dataobj).astype(np.int16)
    before = load_volume(case_of(task)).image
    scaled = nibabel.Nifti1Image(raw, file.affine)
    scaled.header.set_slope_inter(2, -1024)
    with gzip.open(task / IMAGE, "wb") as stream:  # the writer of nibabel would choose a scaling of its own
        header = scaled.header.copy()
        header["vox_offset"] = 352
        stream.write(header.binaryblock + b"\0" * 4 + raw.tobytes(order="F"))
    assert nibabel.load(task / IMAGE).dataobj.inter == -1024
    np.testing.assert_allclose(load_volume(case_of(task)).image, 2 * np.rint(before) - 1024)


def test_a_flipped_bit_in_a_compressed_file_is_found_by_check(task):
    content = bytearray((task / IMAGE).read_bytes())
    content[-6] ^= 1  # in the checksum: what is unpacked no longer fits it
    (task / IMAGE).write_bytes(content)
    with pytest.raises(DataError, match="hippocampus_003.nii.gz is cut off or damaged"):
        check_whole(task / IMAGE)
    assert any("hippocampus_003" in problem for problem in check_dataset("msd", task).problems)


def test_names_in_capitals_are_scans_too(task):
    for name in (IMAGE, LABEL):
        (task / name).rename((task / name).with_name("hippocampus_003.NII.GZ"))
    assert load_volume(case_of(task)).label is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"0": "liver", "1": "Anterior", "2": "Posterior"}}, "calls label 0 'liver'"),
        ({"labels": {"0": "background", "1": "tumour", "2": "tumour"}}, "no two alike"),
        ({"labels": {str(i): f"c{i}" if i else "background" for i in range(129)}}, "at most 126 classes"),
        ({"patients": {"hippocampus_003.nii.gz": "anna"}}, "the patient of 'hippocampus_003.nii.gz'"),
    ],
    ids=["zero is an organ", "twice", "too many", "no such scan"],
)
def test_a_json_that_would_be_misread_is_refused(task, changes, message):
    write_json(task, **changes)
    with pytest.raises(DataError, match=message):
        read_dataset("msd", task)


def test_what_is_cached_under_other_classes_is_not_taken(task, tmp_path):
    cache = tmp_path / "cache"
    first = prepare([case_of(task)], Protocol(32), cache, progress=False)[0]
    write_json(task, labels={"0": "background", "1": "Anterior", "2": "Posterior", "3": "other"})
    again = prepare([case_of(task)], Protocol(32), cache, progress=False)[0]
    assert again.label.filename != first.label.filename


def test_a_cache_whose_facts_were_lost_is_made_again(task, tmp_path):
    cache = tmp_path / "cache"
    first = prepare([case_of(task)], Protocol(32), cache, progress=False)[0]
    folder = Path(first.image.filename).parent
    for damage in ("{}", "[]"):
        (folder / "case.json").write_text(damage)
        assert prepare([case_of(task)], Protocol(32), cache, progress=False)[0].native_shape == first.native_shape


def test_a_spike_is_finite_in_half_precision_and_named_by_check(task):
    file = nibabel.load(task / IMAGE)
    voxels = np.asarray(file.dataobj, dtype=np.float32).copy()
    voxels[0, 0, 0] = 1e7
    nibabel.save(nibabel.Nifti1Image(voxels, file.affine), task / IMAGE)
    wild = Protocol(32, normalise="minmax", window=(0.0, 1e-3))
    assert np.isfinite(wild.arrays(load_volume(case_of(task)).image, None, None)[0]).all()
    assert any("far beyond all others" in anomaly for anomaly in check_dataset("msd", task).anomalies)


def test_a_scan_outside_its_window_is_refused_and_a_shifted_one_named(task):
    write_json(task, modality={"0": "CT"}, window=[-75, 275])
    file = nibabel.load(task / IMAGE)
    nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj, dtype=np.float32) + 1024, file.affine), task / IMAGE)
    image = np.full((4, 16, 16), 3024, np.float32) + np.arange(16)
    with pytest.raises(DataError, match="no voxel lies within the window"):
        Protocol(16, window=(-75, 275)).arrays(image, None, None)
    assert any("are these HU" in anomaly for anomaly in check_dataset("msd", task).anomalies)


def test_labels_that_are_all_background_stop_before_training(task):
    for path in sorted((task / "labelsTr").glob("*.nii.gz")):
        file = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.zeros(file.shape, np.uint8), file.affine), path)
    assert any("background everywhere" in problem for problem in check_dataset("msd", task).problems)


def test_a_huge_label_value_is_named(task):
    file = nibabel.load(task / LABEL)
    label = np.asarray(file.dataobj, dtype=np.float32).copy()
    label[0, 0, 0] = 1e30
    nibabel.save(nibabel.Nifti1Image(label, file.affine), task / LABEL)
    with pytest.raises(DataError, match=r"hippocampus_003.*values \[1\.0\d*e\+30\]"):
        load_volume(case_of(task))


def test_phantoms_never_take_other_files_with_them(tmp_path):
    root = write_phantoms("msd", tmp_path / "msd", 1, 0)
    (root / "imagesTr" / "mine.nii.gz").write_bytes(b"a patient")
    with pytest.raises(FileExistsError, match="mine.nii.gz is no phantom's"):
        write_phantoms("msd", root, 2, 0)
    assert (root / "imagesTr" / "mine.nii.gz").read_bytes() == b"a patient"
    (root / "imagesTr" / "mine.nii.gz").unlink()
    write_phantoms("msd", root, 2, 0)
    with pytest.raises(ValueError, match="patients must be"):
        write_phantoms("msd", root, 2.5, 0)


def test_a_phantom_is_known_as_one_from_any_folder_within(tmp_path):
    root = write_phantoms("msd", tmp_path / "msd", 1, 0)
    assert is_phantom(root) and is_phantom(root / "imagesTr") and not is_phantom(tmp_path)
    shutil.rmtree(root / "imagesTr")
    assert (root / STAMP).is_file() and "files" in json.loads((root / STAMP).read_text())


def test_a_patient_with_a_label_and_a_test_scan_is_no_test_patient():
    def scan(name: str, patient: str, part: str | None, labelled: bool) -> Case:
        files = (Path(name),)
        return Case(dataset_info("msd"), name, patient, files, files if labelled else (), "msd", part=part)

    cases = [scan(f"s{i}", f"p{i}", None, True) for i in range(10)] + [scan("t", "p0", "test", False)]
    split = ratio_split(cases, 0.5)
    assert len(split.test) == 2 and sum(map(len, (split.train, split.val, split.test))) == 10


def test_a_release_without_its_validation_part_gives_some_of_training():
    files = (Path("x"),)
    cases = [Case(dataset_info("amos22"), f"s{i}", f"s{i}", files, files, "amos22", part="train") for i in range(16)]
    split = ratio_split(cases, 0.5)
    assert len(split.val) == 2 and len(split.train) == 14 and not set(split.val) & set(split.train)
