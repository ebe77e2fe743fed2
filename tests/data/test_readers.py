import gzip
import itertools
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.data import DataError, load_volume, read_dataset
from medlib.data.readers import find_reader
from medlib.data.readers.acdc_nifti import BASE_TO_APEX, canonical_axes

from .trees import LPS, anatomy, save_h5, save_nifti, write_official, write_patient, write_ssl4mis

REAL = os.environ.get("MEDLIB_DATA")


@pytest.fixture
def official(tmp_path):
    return write_official(tmp_path / "ACDC", testing=1)


@pytest.fixture
def ssl4mis(tmp_path):
    return write_ssl4mis(tmp_path / "ssl4mis")


def by_name(cases):
    return {case.case: case for case in cases}


# ---------------------------------------------------------------------------------------- the official layout


def test_official_layout(official):
    cases = by_name(read_dataset("acdc", official))
    assert len(cases) == 4 * 5
    ed, cine = cases["patient002_frame01"], cases["patient002_frame03"]
    assert (ed.patient, ed.part, ed.frame, dict(ed.info)) == ("patient002", None, None, {"phase": "ED", "group": "DCM"})
    assert cases["patient002_frame04"].info["phase"] == "ES"
    assert (cine.labels, cine.frame, cine.info["phase"]) == ((), 2, "cine")
    assert cases["patient101_frame01"].part == "test"
    assert list(cases) == sorted(cases)


def test_training_itself_may_be_the_root(official):
    assert {case.patient for case in read_dataset("acdc", official / "training")} == {
        f"patient{n:03d}" for n in (1, 2, 3)
    }


def test_a_volume_comes_out_apex_first_with_its_spacing(official):
    volume = load_volume(by_name(read_dataset("acdc", official))["patient002_frame01"])
    image, label = anatomy(seed=2)
    np.testing.assert_array_equal(volume.label, label)
    np.testing.assert_array_equal(volume.image, image.astype(np.int16))
    assert (volume.image.dtype, volume.label.dtype) == (np.float32, np.uint8)
    assert volume.spacing == pytest.approx((8.0, 1.4, 1.5))


def test_a_cine_frame_is_that_frame_of_the_4d_file(official):
    cases = by_name(read_dataset("acdc", official))
    first, third = load_volume(cases["patient001_frame01"]), load_volume(cases["patient001_frame03"])
    np.testing.assert_array_equal(third.image, first.image + 6)
    assert third.label is None


def test_test_patients_may_have_no_label_at_all(official):
    for path in (official / "testing").rglob("*_gt.nii.gz"):
        path.unlink()
    assert not by_name(read_dataset("acdc", official))["patient101_frame01"].labels


def test_a_patient_without_4d_file_is_noted(official):
    (official / "training/patient002/patient002_4d.nii.gz").unlink()
    assert len(read_dataset("acdc", official)) == 4 * 5 - 3
    assert "1 patients have no 4D file (patient002" in find_reader("acdc", official).notes(official)[0]


# ------------------------------------------------------------------------------------------------ orientation


def turned(array: np.ndarray, axes: np.ndarray, flips: tuple[int, ...], swap: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same anatomy stored otherwise: some of (x, y, z) reversed, x and y exchanged."""
    stored, axes = array.T.copy(), axes.copy()
    for axis in flips:
        stored, axes[:, axis] = np.flip(stored, axis), -axes[:, axis]
    if swap:
        stored, axes = stored.swapaxes(0, 1), axes[:, [1, 0, 2]]
    return stored.T, axes


OBLIQUE = np.linalg.qr(np.array([[-0.75, 0.05, 0.55], [-0.4, -0.6, -0.6], [0.3, -0.75, 0.6]]))[0]
OBLIQUE = OBLIQUE * np.sign(np.diag(np.array([[-0.75, 0.05, 0.55], [-0.4, -0.6, -0.6], [0.3, -0.75, 0.6]]).T @ OBLIQUE))


@pytest.mark.parametrize("axes", [LPS, OBLIQUE], ids=["axial header", "short axis"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("flips", [f for n in range(4) for f in itertools.combinations(range(3), n)], ids=str)
def test_one_anatomy_in_every_orientation_gives_the_same_arrays(tmp_path, axes, flips, swap):
    write_patient(tmp_path / "patient001")
    image, label = anatomy()
    if axes is LPS:  # a header without the heart's orientation: base first along +S
        image, label = image[::-1], label[::-1]
    for suffix, array in (("", image), ("_gt", label)):
        stored, directions = turned(array, axes, flips, swap)
        spacing = (1.4, 1.5, 8.0) if swap else (1.5, 1.4, 8.0)
        save_nifti(tmp_path / f"patient001/patient001_frame01{suffix}.nii.gz", stored, directions, spacing)
    volume = load_volume(by_name(read_dataset("acdc", tmp_path))["patient001_frame01"])
    expected = anatomy()
    np.testing.assert_array_equal(volume.image, expected[0])
    np.testing.assert_array_equal(volume.label, expected[1])
    assert volume.spacing == pytest.approx((8.0, 1.4, 1.5))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.floats(0, 6.28),
    st.permutations([0, 1]),
    st.tuples(*[st.booleans()] * 3),
)
def test_any_stack_within_35_degrees_of_the_hearts_axis_is_turned_alike(tilt, spin, order, flips):
    """Apex first, never mirrored, columns within 45 degrees of the patient's left, however the file stores it."""
    tilt = np.array(tilt) / max(1.0, float(np.linalg.norm(tilt))) * np.tan(np.radians(35))
    z = -BASE_TO_APEX + tilt - tilt @ BASE_TO_APEX * BASE_TO_APEX
    z /= np.linalg.norm(z)
    x = np.cross(z, [np.cos(spin), np.sin(spin), 0.3])
    x /= np.linalg.norm(x)
    axes = np.stack([x, np.cross(z, x), z], axis=1)[:, [*order, 2]] * np.where(flips, -1, 1)
    (third, row, column), (flip_z, flip_h, flip_w) = canonical_axes(axes)
    found_z, found_h, found_w = (
        axes[:, axis] * (-1 if flip else 1) for axis, flip in ((third, flip_z), (row, flip_h), (column, flip_w))
    )
    np.testing.assert_allclose(found_z, z, atol=1e-9)
    np.testing.assert_allclose(np.cross(found_w, found_h), found_z, atol=1e-9)
    left = np.array([-1.0, 0, 0]) + z[0] * z  # in the plane of the slice
    assert found_w @ left / np.linalg.norm(left) >= np.cos(np.radians(45)) - 1e-9


def test_phantoms_come_out_apex_first(tmp_path):
    from medlib.data import write_phantoms

    cases = read_dataset("acdc", write_phantoms("acdc", tmp_path / "phantoms", 8, 3, cine_frames=0))
    for case in cases:
        label = load_volume(case).label
        columns = np.arange(label.shape[2])
        area = (label == 1).sum((1, 2))
        assert area[: len(area) // 2].sum() < area[len(area) // 2 :].sum(), f"{case.case}: RV larger at the apex"
        right, left = ((label == k).sum((0, 1)) @ columns / (label == k).sum() for k in (1, 3))
        assert right < left, f"{case.case}: RV to the right of the LV"


# ------------------------------------------------------------------------------------------ the SSL4MIS layout


def test_ssl4mis_layout(ssl4mis):
    cases = by_name(read_dataset("acdc", ssl4mis))
    assert Counter(case.part for case in cases.values()) == {"train": 6, "val": 2}
    case = cases["patient001_frame02"]
    assert (case.patient, case.info["phase"], case.reader) == ("patient001", "ES", "acdc_ssl4mis")
    assert [path.stem[-8:] for path in case.images[8:10]] == ["_slice_9", "slice_10"]
    assert "2 test volumes are listed but not there" in find_reader("acdc", ssl4mis).notes(ssl4mis)[0]


@pytest.mark.parametrize("name", ["patient002_frame01", "patient004_frame01"])
def test_ssl4mis_slices_and_volumes_come_out_apex_first(ssl4mis, name):
    volume = load_volume(by_name(read_dataset("acdc", ssl4mis))[name])
    image, label = anatomy(depth=12, seed=int(name[7:10]) * 10 + 1)
    np.testing.assert_array_equal(volume.label, label)
    np.testing.assert_allclose(volume.image, image / 400, rtol=1e-6)
    assert volume.spacing is None


def test_slices_may_lie_in_a_folder_of_their_own(ssl4mis):
    (ssl4mis / "data/slices").mkdir()
    for path in (ssl4mis / "data").glob("*_slice_*.h5"):
        path.rename(path.parent / "slices" / path.name)
    assert len(read_dataset("acdc", ssl4mis)) == 8


# ------------------------------------------------------------------------------------------------ broken trees


def remove(path):
    return lambda root: (root / path).unlink()


def empty(path):
    return lambda root: (root / path).write_bytes(b"")


def cut(path):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[: (root / path).stat().st_size * 2 // 3])


def voxels(path, change):
    def break_it(root):
        file = nibabel.load(root / path)
        array = change(np.asarray(file.dataobj))
        nibabel.save(nibabel.Nifti1Image(array, file.affine), root / path)

    return break_it


def duplicate(root):
    shutil.copytree(root / "training/patient001", root / "testing/patient001")


def turned_label(root):
    path = root / LABEL
    file = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj), file.affine @ np.diag([1, 1, -1, 1])), path)


def no_phase(root):
    (root / "training/patient002/Info.cfg").write_text("ED: 1\nES: soon\n")


def other_phase(root):
    (root / "training/patient002/Info.cfg").write_text("ED: 1\nES: 3\n")


IMAGE = "training/patient002/patient002_frame01.nii.gz"
LABEL = "training/patient002/patient002_frame01_gt.nii.gz"
CINE = "training/patient002/patient002_4d.nii.gz"

STRUCTURE = {  # found by read_dataset
    "image without label": (remove(LABEL), "patient002_frame01.nii.gz has no label"),
    "label without image": (remove(IMAGE), "patient002_frame01.nii.gz is missing although its label is there"),
    "no Info.cfg": (remove("training/patient002/Info.cfg"), "Info.cfg is missing"),
    "Info.cfg without phase": (no_phase, "Info.cfg has no frame number for ES"),
    "Info.cfg of another patient": (
        other_phase,
        "patient002_frame03.nii.gz is missing although Info.cfg says it is ES",
    ),
    "empty file": (empty(IMAGE), "patient002_frame01.nii.gz is empty"),
    "no NIfTI": (lambda root: (root / IMAGE).write_bytes(b"not an image" * 40), "cannot be read as NIfTI"),
    "shapes differ": (voxels(LABEL, lambda a: a[:-1]), "_gt.nii.gz has shape .* its image"),
    "4D label": (voxels(LABEL, lambda a: a[..., None]), "_gt.nii.gz has shape .* expected 3 axes"),
    "4D image": (voxels(IMAGE, lambda a: np.stack([a, a], -1)), "frame01.nii.gz has shape .* expected 3 axes"),
    "3D cine": (voxels(CINE, lambda a: a[..., 0]), "_4d.nii.gz has shape .* expected 4 axes"),
    "short cine": (voxels(CINE, lambda a: a[..., :2]), "_4d.nii.gz has 2 frames"),
    "twice the same patient": (duplicate, "patient001 and .*patient001 are the same patient"),
    "a stranger": (
        lambda root: shutil.copy(root / IMAGE, root / "training/patient001/patient002_frame01.nii.gz"),
        "belong",
    ),
}
CONTENT = {  # found by load_volume
    "truncated image": (cut(IMAGE), "patient002_frame01.nii.gz is cut off or damaged"),
    "truncated label": (cut(LABEL), "patient002_frame01_gt.nii.gz is cut off or damaged"),
    "nan": (
        voxels(IMAGE, lambda a: np.where(a > 300, np.nan, a).astype(np.float32)),
        "frame01.nii.gz has .* not finite",
    ),
    "constant": (voxels(IMAGE, np.zeros_like), "frame01.nii.gz is 0.0 everywhere"),
    "label values": (voxels(LABEL, lambda a: a * 2), r"_gt.nii.gz has label values \[0, 2, 4, 6\], expected 0..3"),
    "half label values": (voxels(LABEL, lambda a: (a * 0.5).astype(np.float32)), "has label values"),
    "nan label": (voxels(LABEL, lambda a: np.where(a == 3, np.nan, a).astype(np.float32)), "has label values"),
    "label turned over": (turned_label, "_gt.nii.gz is oriented otherwise than its image"),
    "deleted since": (remove(IMAGE), "is gone"),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_a_broken_tree_is_refused_when_it_is_read(official, fault):
    break_it, message = STRUCTURE[fault]
    break_it(official)
    with pytest.raises(DataError, match=message):
        read_dataset("acdc", official)


@pytest.mark.parametrize("fault", CONTENT)
def test_a_broken_file_is_refused_when_it_is_loaded(official, fault):
    case = by_name(read_dataset("acdc", official))["patient002_frame01"]
    break_it, message = CONTENT[fault]
    break_it(official)
    with pytest.raises((DataError, FileNotFoundError), match=message):
        load_volume(case)


SLICE = "data/patient002_frame01_slice_3.h5"


def rewrite(path, image=lambda a: a, label=lambda a: a):
    def break_it(root):
        array, mask = anatomy(depth=12)
        save_h5(root / path, image(array[3]), label(mask[3]))

    return break_it


def append(path, text):
    return lambda root: (root / path).write_text((root / path).read_text() + text)


SSL_STRUCTURE = {
    "gap": (lambda r: (remove(SLICE)(r), remove("train_slices.list")(r)), "slice_3.h5 is missing .11 slices"),
    "slice not there": (remove(SLICE), "slice_3.h5 is missing, but train_slices.list"),
    "slice not listed": (
        rewrite("data/patient002_frame01_slice_13.h5"),
        "slice_13.h5 is in .* not in train_slices.list",
    ),
    "volume not listed": (rewrite("data/patient077_frame01.h5"), "patient077_frame01.h5 is in none of the lists"),
    "odd name": (rewrite("data/copy of patient.h5"), "copy of patient.h5 is not named like"),
    "no val volume": (remove("data/patient004_frame01.h5"), "patient004_frame01.h5 is missing, but val.list"),
    "no list": (remove("val.list"), "val.list is missing"),
    "empty slice": (empty(SLICE), "slice_3.h5 is empty"),
    "in two parts": (append("val.list", "patient001_frame01\n"), "patient001_frame01, which is listed under train"),
    "patient on both sides": (append("val.list", "patient001_frame03\n"), "a patient who is also in train.list"),
    "odd list": (append("val.list", "someone\n"), "val.list names 'someone'"),
}
SSL_CONTENT = {
    "truncated": (cut(SLICE), "slice_3.h5 is cut off or damaged"),
    "no hdf5": (lambda root: (root / SLICE).write_bytes(b"x" * 3000), "slice_3.h5 is cut off or damaged"),
    "shapes differ": (rewrite(SLICE, lambda a: a[:-1], lambda a: a[:-1]), "slice_3.h5: image has shape"),
    "label of another shape": (rewrite(SLICE, label=lambda a: a[:-1]), "slice_3.h5: label has shape"),
    "nan": (rewrite(SLICE, lambda a: a * np.nan), "not finite"),
    "label values": (rewrite(SLICE, label=lambda a: a + 2), "label values"),
}


@pytest.mark.parametrize("fault", SSL_STRUCTURE)
def test_a_broken_ssl4mis_tree_is_refused(ssl4mis, fault):
    break_it, message = SSL_STRUCTURE[fault]
    break_it(ssl4mis)
    with pytest.raises(DataError, match=message):
        read_dataset("acdc", ssl4mis)


@pytest.mark.parametrize("fault", SSL_CONTENT)
def test_a_broken_slice_is_refused(ssl4mis, fault):
    case = by_name(read_dataset("acdc", ssl4mis))["patient002_frame01"]
    break_it, message = SSL_CONTENT[fault]
    break_it(ssl4mis)
    with pytest.raises(DataError, match=message):
        load_volume(case)


def test_a_missing_root_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the folder"):
        read_dataset("acdc", tmp_path / "nowhere")


def test_an_empty_a_strange_and_a_doubled_root_say_what_belongs_there(tmp_path, ssl4mis):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is empty: .*Info.cfg.* or .*train.list"):
        read_dataset("acdc", tmp_path / "empty")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/notes.txt").write_text("")
    with pytest.raises(DataError, match="strange holds nothing of the expected form"):
        read_dataset("acdc", tmp_path / "strange")
    with pytest.raises(DataError, match=re.escape("notes.txt is a file")):
        read_dataset("acdc", tmp_path / "strange/notes.txt")
    write_official(ssl4mis, training=1)
    with pytest.raises(DataError, match="several layouts"):
        read_dataset("acdc", ssl4mis)


def test_empty_patient_folders_and_link_loops_are_refused(tmp_path):
    folder = tmp_path / "ACDC/training/patient001"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="Info.cfg is missing"):
        read_dataset("acdc", tmp_path / "ACDC")
    folder.rmdir()
    folder.symlink_to(folder)
    with pytest.raises(DataError, match="holds nothing of the expected form"):
        read_dataset("acdc", tmp_path / "ACDC")


def test_an_affine_that_no_scan_can_have_is_refused(tmp_path):
    write_patient(tmp_path / "patient001")
    path = tmp_path / "patient001/patient001_frame01.nii.gz"
    flat = np.eye(3)
    flat[:, 2] = flat[:, 1]
    save_nifti(path, anatomy()[0], flat)
    with pytest.raises(DataError, match="affine that no scan can have"):
        load_volume(read_dataset("acdc", tmp_path)[0])


def test_uncompressed_nifti_is_read_too(official):
    for path in official.rglob("*.nii.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    cases = read_dataset("acdc", official)
    assert len(cases) == 20
    assert load_volume(cases[0]).label is not None


# ----------------------------------------------------------------------------------------------- the real files


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_slices(tmp_path):
    root = Path(REAL or "") / "acdc"
    cases = read_dataset("acdc", root)
    assert Counter(case.part for case in cases) == {"train": 140, "val": 20}
    assert sum(len(case.images) for case in cases if case.part == "train") == 1312
    for case in cases[::16]:
        volume = load_volume(case)
        area = (volume.label == 1).sum((1, 2))
        seen = np.flatnonzero(area)
        assert np.polyfit(seen, area[seen], 1)[0] > 0, f"{case.case}: RV does not grow from apex to base"
