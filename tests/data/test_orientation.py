"""One anatomy, stored in every order, direction and tilt, must come out as one array."""

import itertools
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes

from medlib.data import DataError, load_volume, read_dataset
from medlib.data.scans import UNSTATED, check_headers

from .trees import SHAPE, body, save_scan

CODES = [
    "".join(signs[axis] for axis, signs in zip(order, flips, strict=True))
    for order in itertools.permutations(range(3))
    for flips in itertools.product(("RAS", "LPI"), repeat=3)
]
SPACING = (3.0, 2.0, 1.0)


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross, angle = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]), np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def read_one(root: Path):
    return load_volume(read_dataset("btcv", root)[0])


def write_one(root: Path, codes: str, **how) -> None:
    image, label = body()
    save_scan(root / "img/img0001.nii.gz", image, codes, **how)
    save_scan(root / "label/label0001.nii.gz", label, codes, **how)


def test_there_are_48_orders():
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("codes", CODES)
def test_all_48_axis_orders_give_one_array(tmp_path, codes):
    write_one(tmp_path, codes)
    stored = nibabel.load(tmp_path / "img/img0001.nii.gz")
    assert "".join(aff2axcodes(stored.affine)) == codes, "the test wrote something else"
    volume = read_one(tmp_path)
    image, label = body()
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)
    assert volume.spacing == pytest.approx(SPACING)
    assert volume.case.info["axes"] == codes


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CODES),
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    st.floats(0, 40),
    st.tuples(*[st.floats(0.3, 6)] * 3),
    st.sampled_from([np.uint8, np.int16, np.float32]),
)
def test_oblique_scans_of_any_order_and_spacing_give_one_array(codes, axis, degrees, spacing, kind):
    """A tilt of up to 40 degrees about any axis, any voxel shape, any type of the label's voxels."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        image, label = body()
        how = {"codes": codes, "spacing": spacing, "tilt": rotation(axis, degrees)}
        save_scan(root / "img/img0001.nii.gz", image, **how)
        save_scan(root / "label/label0001.nii.gz", label.astype(kind), **how)
        volume = read_one(root)
    np.testing.assert_array_equal(volume.image, image)
    np.testing.assert_array_equal(volume.label, label)
    assert volume.spacing == pytest.approx(spacing, rel=1e-5)


def test_the_frame_is_a_radiologists(tmp_path):
    """Slices run to the head, rows to the back, columns to the patient's left: +S, -A and -R of NIfTI's world."""
    write_one(tmp_path, "RAS")
    save_scan(tmp_path / "img/img0001.nii.gz", np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE), "RAS")
    stored = nibabel.load(tmp_path / "img/img0001.nii.gz")
    volume = read_one(tmp_path)
    world = {}
    for voxel in itertools.product((0, 1), repeat=3):
        value = volume.image[tuple(np.array(voxel) * (np.array(SHAPE) - 1))]
        where = np.argwhere(np.asarray(stored.dataobj) == value)
        world[voxel] = nibabel.affines.apply_affine(stored.affine, where[0])
    np.testing.assert_allclose(world[1, 0, 0] - world[0, 0, 0], [0, 0, 15])
    np.testing.assert_allclose(world[0, 1, 0] - world[0, 0, 0], [0, -16, 0])
    np.testing.assert_allclose(world[0, 0, 1] - world[0, 0, 0], [-7, 0, 0])


def test_image_and_label_stored_in_different_orders_are_refused(tmp_path):
    image, label = body(shape=(6, 6, 6))
    save_scan(tmp_path / "img/img0001.nii.gz", image, "RAS")
    save_scan(tmp_path / "label/label0001.nii.gz", label, "LPS")
    with pytest.raises(DataError, match="label0001.nii.gz lies up to .* voxels away from its image .*img0001.nii.gz"):
        read_dataset("btcv", tmp_path)


@pytest.mark.parametrize(("shift", "fits"), [(0.4, True), (0.6, False)])
def test_half_a_voxel_is_the_tolerance(tmp_path, shift, fits):
    write_one(tmp_path, "RAS")
    path = tmp_path / "label/label0001.nii.gz"
    file = nibabel.load(path)
    affine = file.affine.copy()
    affine[0, 3] += shift * 1.0  # x is the smallest side of a voxel, 1 mm
    nibabel.save(nibabel.Nifti1Image(np.asarray(file.dataobj), affine), path)
    if fits:
        assert read_one(tmp_path).label is not None
    else:
        with pytest.raises(DataError, match="lies up to 0.6 voxels away"):
            read_dataset("btcv", tmp_path)


def test_a_header_without_orientation_is_said(tmp_path):
    write_one(tmp_path, "LAS")
    for path in tmp_path.rglob("*.nii.gz"):
        file = nibabel.load(path)
        file.set_qform(None, code=0)
        file.set_sform(None, code=0)
        nibabel.save(file, path)
    assert check_headers(tmp_path / "img/img0001.nii.gz") == UNSTATED
    np.testing.assert_array_equal(read_one(tmp_path).image, body()[0])  # NIfTI without orientation means LAS
