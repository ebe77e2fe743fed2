import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from medlib.data import Case, DataError, dataset_info, read_dataset, split_cases
from medlib.data.splits import Split, acdc_split, coral_split, protocols, published, ratio_split
from medlib.paths import SPLITS

from .trees import write_ssl4mis

REAL = os.environ.get("MEDLIB_DATA")


def made(patients, labelled=True, part=None) -> list[Case]:
    """Two scans of each patient."""
    file = (Path("scan.nii.gz"),)
    return [
        Case(
            dataset_info("acdc"),
            f"{patient}_frame{frame:02d}",
            patient,
            file,
            file if labelled else (),
            "acdc_nifti",
            part=part,
        )
        for patient in patients
        for frame in (1, 2)
    ]


def numbered(first: int, last: int) -> list[str]:
    return [f"patient{number:03d}" for number in range(first, last + 1)]


ALL = made(numbered(1, 100))


def check(split: Split, patients: set[str]) -> None:
    """Every patient on exactly one side."""
    parts = [*split.labelled, *split.unlabelled, *split.val, *split.test]
    assert len(parts) == len(set(parts))
    assert set(parts) == patients
    assert split.labelled and split.val


# -------------------------------------------------------------------------------------------------- by a ratio


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(0, 5), st.floats(0.001, 1), st.floats(0.001, 1))
def test_ratios_are_nested_and_divide_patients(number, seed, one, other):
    cases = made(numbered(1, number))
    small, large = (ratio_split(cases, ratio, seed) for ratio in sorted((one, other)))
    check(small, set(numbered(1, number)))
    assert large.labelled[: len(small.labelled)] == small.labelled
    assert (small.val, small.test, set(small.train)) == (large.val, large.test, set(large.train))
    assert len(large.labelled) == max(1, math.floor(max(one, other) * len(large.train) + 1e-9))


def test_shares_are_70_10_20():
    split = ratio_split(ALL, 0.1)
    assert [len(part) for part in (split.train, split.val, split.test)] == [70, 10, 20]
    assert len(split.labelled) == 7, "0.1 * 70 is 7, also in floating point"


def test_two_patients_at_least_to_choose_on_where_there_are_ten():
    for number in range(10, 16):
        assert len(ratio_split(made(numbered(1, number)), 0.1).val) == 2


def test_the_seed_decides_and_the_order_of_cases_does_not():
    assert ratio_split(ALL, 0.1, 1) == ratio_split(ALL[::-1], 0.1, 1)
    assert ratio_split(ALL, 0.1, 1).labelled != ratio_split(ALL, 0.1, 2).labelled


def test_parts_of_the_release_are_kept():
    cases = made(numbered(1, 16)) + made(numbered(101, 105), part="test")
    split = ratio_split(cases, 0.5)
    assert split.test == tuple(numbered(101, 105))
    assert [len(split.train), len(split.val)] == [14, 2]
    cases = made(["c", "d"], part="train") + made(["v"], part="val") + made(["t"], part="test")
    split = ratio_split(cases, 1.0)
    assert (set(split.labelled), split.val, split.test) == ({"c", "d"}, ("v",), ("t",))


def test_patients_without_labels_are_trained_on_and_nothing_else():
    cases = made(numbered(1, 10)) + made(["pool"], labelled=False) + made(["hidden"], labelled=False, part="test")
    split = ratio_split(cases, 1.0)
    assert split.unlabelled == ("pool",)
    check(split, {*numbered(1, 10), "pool"})


def test_cine_frames_do_not_count_as_labels():
    cases = made(numbered(1, 10)) + made(numbered(1, 20), labelled=False)
    assert set(ratio_split(cases, 1.0).unlabelled) == set(numbered(11, 20))


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be in"):
        ratio_split(ALL, ratio)


def test_a_number_of_patients_instead_of_a_ratio():
    assert len(ratio_split(ALL, labelled=6).labelled) == 6
    with pytest.raises(ValueError, match="labelled must be 1..70 patients, got 71"):
        ratio_split(ALL, labelled=71)
    with pytest.raises(ValueError, match="either ratio or labelled"):
        ratio_split(ALL)
    with pytest.raises(ValueError, match="either ratio or labelled"):
        ratio_split(ALL, 0.1, labelled=3)


def test_too_few_patients_are_refused():
    with pytest.raises(DataError, match="1 patients with labels are too few"):
        ratio_split(made(["only"]), 1.0)
    with pytest.raises(DataError, match="0 patients with labels"):
        ratio_split(made(numbered(1, 9), labelled=False), 1.0)


# --------------------------------------------------------------------------------------------- published lists


@pytest.mark.parametrize("path", sorted(SPLITS.glob("*.json")), ids=lambda path: path.stem)
def test_every_published_list_names_its_source(path):
    assert len(json.loads(path.read_text())["source"]) > 20


@pytest.mark.parametrize(
    ("ratio", "labelled"), [(0.01, [99]), (0.05, [99, 38, 50]), (0.1, [99, 38, 50, 100, 58, 21, 49])]
)
def test_acdc_takes_the_ssl4mis_lists(ratio, labelled):
    split = split_cases("acdc", ALL, ratio)
    check(split, set(numbered(1, 100)))
    assert [len(part) for part in (split.train, split.val, split.test)] == [70, 10, 20]
    assert split.labelled == tuple(f"patient{number:03d}" for number in labelled)
    assert split == split_cases("acdc", ALL, ratio, seed=7), "published lists do not depend on a seed"
    assert split == split_cases("acdc", ALL, labelled=len(labelled))


def test_absent_test_patients_are_left_out():
    lists = published("acdc_ssl4mis")
    split = split_cases("acdc", made(lists["train"] + lists["val"]), 0.1)
    assert (split.name, split.test) == ("SSL4MIS 70/10/20", ())


def test_fewer_patients_with_acdcs_ids_get_a_split_of_their_own():
    split = split_cases("acdc", made(numbered(1, 99)), 0.1)
    assert split.name.startswith("ratio")
    check(split, set(numbered(1, 99)))
    with pytest.raises(DataError, match="needs patient100 and 0 more"):
        acdc_split(made(numbered(1, 99)), 0.1)


def test_corals_folds():
    vals = []
    for fold in range(5):
        two, six, ten = (split_cases("acdc", ALL, protocol="coral", fold=fold, labelled=m) for m in (2, 6, 10))
        for split in (two, six, ten):
            check(split, set(numbered(1, 100)))
            assert [len(split.train), len(split.val), len(split.test)] == [80, 20, 0]
        assert ten.labelled[:6] == six.labelled and six.labelled[:2] == two.labelled
        vals += ten.val
    assert sorted(vals) == numbered(1, 100)
    assert coral_split(ALL, 3, 2).labelled == ("patient070", "patient018")


def test_corals_folds_refuse_what_was_not_published():
    with pytest.raises(ValueError, match="fold must be 0..4, got 5"):
        coral_split(ALL, 5, 2)
    with pytest.raises(ValueError, match="1..10 labelled patients, got 11"):
        coral_split(ALL, 0, 11)
    with pytest.raises(DataError, match="need patient100"):
        coral_split(made(numbered(1, 99)), 0, 2)
    with pytest.raises(ValueError, match="for 'acdc' with a number"):
        split_cases("acdc", ALL, 0.1, protocol="coral")
    with pytest.raises(ValueError, match="protocol must be"):
        split_cases("acdc", ALL, 0.1, protocol="corral")


def test_the_lists_agree_with_corals_recipe():
    """The folds are those of the released code, drawn again."""
    lists = published("acdc_coral")["folds"]
    folds = KFold(5, shuffle=True, random_state=12345).split(np.arange(100))
    for fold, (train, val) in zip(lists, folds, strict=True):
        assert fold["val"] == [f"patient{number + 1:03d}" for number in val]
        drawn = random.Random(1234).sample([int(number) + 1 for number in train], 10)
        assert fold["labelled"] == [f"patient{number:03d}" for number in drawn]


# --------------------------------------------------------------------------- published lists of the other data sets

LISTS = sorted(path.stem for path in SPLITS.glob("*.json") if "dataset" in published(path.stem))
COUNTS = {  # train, val, test and labelled patients by ratio, as the notes on the papers and their code state them
    "acdc_gcl": (78, 2, 20, {0.0125: 1, 0.025: 2, 0.1: 8}),
    "amos22_dhc": (216, 24, 120, {0.02: 4, 0.05: 10, 0.1: 21}),
    "amos22_guidednet": (180, 60, 60, {0.1: 18, 0.5: 90}),
    "btcv_dhc": (20, 4, 6, {0.1: 2, 0.2: 4, 0.4: 8}),
    "btcv_genericssl": (20, 4, 6, {0.1: 2, 0.2: 4}),
    "btcv_magicnet": (16, 2, 12, {0.1: 2, 0.3: 5, 0.4: 7, 0.5: 9}),
    "flare22_guidednet": ({0.1: 300, 0.5: 60}, 10, 10, {0.1: 30, 0.5: 30}),
    "lits_mona": (90, 10, 31, {0.01: 1, 0.05: 5, 0.1: 10}),
    "mmwhs_gcl": (8, 2, 10, {0.1: 1, 0.2: 2, 0.4: 4, 1.0: 8}),
    "mmwhs_mona": (13, 2, 5, {0.05: 1, 0.1: 2}),
    "mmwhs_sifa_ct": (13, 3, 4, {0.1: 1, 0.2: 2, 1.0: 13}),
    "mmwhs_sifa_mr": (13, 3, 4, {0.1: 1, 0.2: 2, 1.0: 13}),
}


def release(name: str) -> list[Case]:
    """Every scan of a release, as far as lists can name it, all but FLARE22's pool with labels."""
    ids = {
        "acdc": numbered(1, 100),
        "amos22": [f"amos_{n:04d}" for n in range(1, 601)],
        "btcv": [f"img{n:04d}" for n in (*range(1, 11), *range(21, 41))],
        "flare22": [f"FLARE22_Tr_{n:04d}" for n in range(1, 51)],
        "lits": [f"volume-{n}" for n in range(131)],
        "mmwhs": [f"{kind}_train_{n}" for kind in ("ct", "mr") for n in range(1001, 1021)],
    }[name]
    pool = [f"Case_{n:05d}" for n in range(1, 2001)] if name == "flare22" else []
    return made(ids) + made(pool, labelled=False)


def test_every_list_is_checked():
    assert set(LISTS) == set(COUNTS)
    assert protocols("btcv") == ["dhc", "genericssl", "magicnet"]
    assert protocols("chd") == []


@pytest.mark.parametrize("file", LISTS)
def test_a_published_list_divides_patients_in_the_counts_stated(file):
    name, protocol = file.split("_", 1)
    train, val, test, labelled = COUNTS[file]
    cases = release(name)
    for ratio, count in labelled.items():
        split = split_cases(name, cases, ratio, protocol=protocol)
        check(split, {*split.train, *split.val, *split.test})
        expected = train[ratio] if isinstance(train, dict) else train
        assert [len(split.train), len(split.val), len(split.test), len(split.labelled)] == [expected, val, test, count]
        assert split == split_cases(name, cases[::-1], ratio, seed=9, protocol=protocol)
        assert split.labelled == split_cases(name, cases, labelled=count, protocol=protocol).labelled


@pytest.mark.parametrize("file", LISTS)
def test_a_published_list_says_how_it_was_read_and_has_no_stray_id(file):
    lists = published(file)
    assert len(lists["reading"]) > 20 and lists["dataset"] == file.split("_")[0]
    train = lists["train"]
    every = [set(ids) for ids in (train.values() if isinstance(train, dict) else [train])]
    for ids in lists["labelled"].values() if isinstance(lists["labelled"], dict) else [lists["labelled"]]:
        assert len(set(ids)) == len(ids) and any(set(ids) <= training for training in every)
    for ids in (lists["val"], lists["test"]):
        assert len(set(ids)) == len(ids) and not any(set(ids) & training for training in every)
    assert not set(lists["val"]) & set(lists["test"])


def test_contradictions_are_resolved_as_the_files_say():
    dhc, generic = published("btcv_dhc"), published("btcv_genericssl")
    assert len(set(generic["test"]) & set(dhc["train"])) == 5, "the list at DHC's head overlaps its old train list"
    gcl = published("acdc_gcl")
    assert "011" in gcl["val"] and "011" not in gcl["train"] and "031" in gcl["train"]
    assert all(int(i) < 500 for part in ("train", "val", "test") for i in published("amos22_guidednet")[part])
    assert {len(published("flare22_guidednet")["published"][part]) for part in ("val", "test")} == {14}


def test_magicnets_order_is_its_list_shuffled_with_its_seed():
    order = [f"{n:04d}" for n in (31, 7, 9, 5, 26, 39, 24, 34, 33, 30, 23, 40, 10, 21, 6, 27, 28, 37)]
    np.random.RandomState(1337).shuffle(order)
    lists = published("btcv_magicnet")
    assert lists["train"] + lists["val"] == order
    assert all(ids == order[: len(ids)] for ids in lists["labelled"].values())


def test_patients_that_a_list_needs_and_lacks_are_named():
    cases = [case for case in release("btcv") if case.patient not in ("img0002", "img0033")]
    with pytest.raises(DataError, match="'dhc' of 'btcv' needs 2 patients .*: img0002, img0033$"):
        split_cases("btcv", cases, 0.2, protocol="dhc")
    unlabelled = [case for case in release("btcv") if case.patient != "img0002"] + made(["img0002"], labelled=False)
    with pytest.raises(DataError, match="no label: img0002"):
        split_cases("btcv", unlabelled, 0.2, protocol="dhc")
    assert "img0002" in split_cases("btcv", unlabelled, 0.1, protocol="dhc").unlabelled


def test_a_share_that_was_not_published_is_refused():
    cases = release("btcv")
    with pytest.raises(ValueError, match=r"btcv_dhc was published for the ratios 0.1 \(2 patients\), 0.2 .*ratio=0.3"):
        split_cases("btcv", cases, 0.3, protocol="dhc")
    with pytest.raises(ValueError, match="labelled=3"):
        split_cases("btcv", cases, protocol="dhc", labelled=3)
    with pytest.raises(ValueError, match="either ratio or labelled"):
        split_cases("btcv", cases, 0.1, protocol="dhc", labelled=2)
    with pytest.raises(ValueError, match="must be one of 'common', 'coral', 'mona' for 'lits', got 'dhc'"):
        split_cases("lits", release("lits"), 0.1, protocol="dhc")


# -------------------------------------------------------------------------------------------------- from files


def test_the_parts_of_ssl4mis_lists_are_kept(tmp_path):
    split = split_cases("acdc", read_dataset("acdc", write_ssl4mis(tmp_path)), 0.4)
    assert (len(split.labelled), len(split.unlabelled), split.val, split.test) == (1, 2, ("patient004",), ())


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_lists_are_the_published_ones():
    root = Path(REAL or "") / "acdc"
    for part in ("train", "val", "test"):
        names = (root / f"{part}.list").read_text().split()
        assert list(dict.fromkeys(name[:10] for name in names)) == published("acdc_ssl4mis")[part]
    split = split_cases("acdc", read_dataset("acdc", root), 0.1)
    assert [len(split.labelled), len(split.train), len(split.val), len(split.test)] == [7, 70, 10, 0]
    slices = {case.patient: 0 for case in read_dataset("acdc", root)}
    for case in read_dataset("acdc", root):
        slices[case.patient] += len(case.images)
    assert sum(slices[patient] for patient in split.labelled) == 136
