import dataclasses

import numpy as np
import pytest

from medlib.data import DATASETS, Case, Volume, dataset_info, labelled_cases, slice_positions
from medlib.data.cases import DatasetInfo


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
