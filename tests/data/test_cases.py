import dataclasses

import numpy as np
import pytest

from medlib.data import DATASETS, Case, Volume, dataset_info, labelled_cases, slice_positions
from medlib.data.cases import DatasetInfo
from medlib.data.descriptions import COLOURS, colours_of, overview
from medlib.paths import DATA


def test_positions_end_at_one_and_are_those_of_corals_code():
    np.testing.assert_allclose(slice_positions(4), [0.25, 0.5, 0.75, 1.0])
    assert slice_positions(4).dtype == np.float32


def test_a_volume_knows_the_positions_of_its_slices(tmp_path):
    case = Case(dataset_info("acdc"), "a", "a", (tmp_path,), (), "acdc_nifti")
    volume = Volume(case, np.zeros((5, 2, 2), np.float32), None, None)
    np.testing.assert_array_equal(volume.positions, slice_positions(5))


def test_cases_are_frozen_and_hashable(tmp_path):
    case = Case(dataset_info("acdc"), "a", "a", (tmp_path,), (), "acdc_nifti", info={"phase": "ED"})
    assert len({case, dataclasses.replace(case)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.patient = "b"  # type: ignore[misc]


def test_labelled_cases_keep_their_order(tmp_path):
    cases = [
        Case(dataset_info("acdc"), name, name, (tmp_path,), (tmp_path,) * (name != "b"), "acdc_nifti") for name in "cba"
    ]
    assert [case.case for case in labelled_cases(cases)] == ["c", "a"]


@pytest.mark.parametrize("info", DATASETS.values(), ids=lambda info: info.name)
def test_every_data_set_is_described_completely(info: DatasetInfo):
    assert info.classes[0] == "background"
    assert len(set(info.colours)) == len(info.classes), "two classes share a colour"
    assert info.colours[0] == "#00000000"
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in info.colours[1:])
    assert info.size >= 8
    assert info.url.startswith("https://")


def test_a_colour_too_few_is_refused():
    info = dataset_info("acdc")
    with pytest.raises(ValueError, match="4 classes but 3 colours"):
        dataclasses.replace(info, colours=info.colours[:3])


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'acdcc': known are .*acdc"):
        dataset_info("acdcc")


def test_an_organ_has_one_colour_in_every_data_set():
    found: dict[str, set[str]] = {}
    for info in DATASETS.values():
        for name, colour in zip(info.classes, info.colours, strict=True):
            found.setdefault(name, set()).add(colour)
    assert {name: colours for name, colours in found.items() if len(colours) > 1} == {}
    assert {"liver", "aorta", "LV"} <= set(found)


# Machado et al. 2009, severity 1.0: linear RGB as seen with normal vision, protanopia, deuteranopia and tritanopia.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}
TOUCHING = [
    ("liver", organ) for organ in ("right kidney", "gallbladder", "stomach", "inferior vena cava", "duodenum", "tumour")
] + [
    ("spleen", "left kidney"), ("spleen", "stomach"), ("spleen", "pancreas"), ("spleen", "left adrenal"),
    ("stomach", "pancreas"), ("stomach", "oesophagus"), ("pancreas", "duodenum"), ("aorta", "inferior vena cava"),
    ("pancreas", "portal and splenic veins"), ("aorta", "oesophagus"), ("right kidney", "right adrenal"),
    ("left kidney", "left adrenal"), ("bladder", "prostate or uterus"), ("gallbladder", "duodenum"),
]  # fmt: skip


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """CIELAB of a hex colour as somebody sees it."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = to_xyz @ np.clip(seen @ linear, 0, 1) / np.array([0.9505, 1, 1.0888])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_organs_that_touch_are_told_apart_by_every_reader(vision):
    for pair in TOUCHING:
        one, other = (lab(COLOURS[organ], VISION[vision]) for organ in pair)
        assert np.linalg.norm(one - other) > 30, f"{pair} look alike with {vision}"


def test_unknown_classes_get_colours_of_their_own():
    names = ("background", "liver", *(f"part {n}" for n in range(12)))
    found = colours_of(names)
    assert found[:2] == (COLOURS["background"], COLOURS["liver"])
    assert len(set(found)) == len(names)
    assert colours_of(names[:5]) == found[:5], "a further class must not change the colours of the others"


def test_the_readme_holds_the_table_of_data_sets():
    assert overview() in (DATA / "README.md").read_text(), "print overview() and put it there"
