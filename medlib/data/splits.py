"""Which patients are learnt from with labels, without, chosen on and reported: always whole patients.

Published lists are files `data/splits/<data set>_<protocol>.json`; one that has `dataset` is a protocol by this name.
Such a file holds

- `source`, and `reading`: which reading was taken where the source contradicts itself or leaves something open.
- `patient`: how a patient's id is made from an id in the lists, `{}` standing for it.
- `train`, `val`, `test`: ids. `train` may be lists by label ratio, where a ratio changes the unlabelled patients.
- `labelled`: lists by label ratio; or one list, of which a ratio of the training patients is taken from the front.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..paths import SPLITS
from ..rng import numpy_generator
from .cases import Case, DataError, labelled_cases


@dataclass(frozen=True)
class Split:
    """Patient ids of each part. `labelled` and `unlabelled` together are the training patients.

    `test` is empty where the data at hand has no labelled test patients. `labelled` is in the order in which a larger
    ratio adds patients: of two ratios of one split, the smaller is a prefix of the larger.
    """

    name: str
    labelled: tuple[str, ...]
    unlabelled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def train(self) -> tuple[str, ...]:
        """All training patients, the labelled ones first."""
        return self.labelled + self.unlabelled


@cache
def published(name: str) -> dict[str, Any]:
    """The published list `data/splits/<name>.json`, with its `source`. Raises `ValueError` for an unknown name."""
    path = SPLITS / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in SPLITS.glob("*.json"))
        raise ValueError(f"no published split {name!r}: known are {', '.join(known)}")
    lists: dict[str, Any] = json.loads(path.read_text())
    return lists


def _count(train: Sequence[str], ratio: float | None, labelled: int | None) -> int:
    """How many of the training patients are labelled: at least one."""
    if (ratio is None) == (labelled is None):
        raise ValueError(f"give either ratio or labelled, not both or neither (ratio={ratio}, labelled={labelled})")
    if labelled is not None:
        if type(labelled) is not int or not 1 <= labelled <= len(train):
            raise ValueError(f"labelled must be 1..{len(train)} patients, got {labelled}")
        return labelled
    assert ratio is not None
    if isinstance(ratio, str) or not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return max(1, math.floor(ratio * len(train) + 1e-9))


def _patients(cases: Iterable[Case]) -> list[str]:
    return sorted({case.patient for case in cases})


def ratio_split(cases: Sequence[Case], ratio: float | None = None, seed: int = 0, labelled: int | None = None) -> Split:
    """A split for any data set: `ratio` of the training patients (at least one) are labelled.

    Where the release assigns patients to parts, they stay there. The others are shuffled by the seed and divided
    70/10/20 into train, val and test (7/8 and 1/8 where the release has a labelled test part). The division does
    not depend on the ratio, and a larger ratio contains the smaller. Patients without any label are trained on
    without. `labelled` gives a number of patients in place of the ratio.

    Raises `DataError` where too few patients have labels to fill train and val.
    """
    with_label = _patients(labelled_cases(cases))
    part = {case.patient: case.part for case in labelled_cases(cases) if case.part}
    anywhere = {case.patient: case.part for case in cases if case.part}
    train, val, test = ([p for p in with_label if part.get(p) == name] for name in ("train", "val", "test"))
    free = [p for p in with_label if p not in part]
    free = [free[i] for i in numpy_generator(seed, "split").permutation(len(free))]
    if not test and len(free) > 2:
        share = max(1, round(0.2 * len(free)))
        test, free = free[:share], free[share:]
    if not val and len(free) > 1:
        share = max(2 if len(free) >= 8 else 1, round(len(free) / 8))  # one patient is no ground to choose on
        val, free = free[:share], free[share:]
    train = [train[i] for i in numpy_generator(seed, "split", "train").permutation(len(train))] + free
    if not val and len(train) > 1:  # the release has a part to choose on, and it is not here
        share = max(2 if len(train) >= 8 else 1, round(len(train) / 8))
        val, train = train[-share:], train[:-share]
    if not train or not val:
        raise DataError(f"{len(with_label)} patients with labels are too few to train on some and choose on others")
    count = _count(train, ratio, labelled)
    pool = [p for p in _patients(cases) if p not in with_label and anywhere.get(p) in (None, "train")]
    return Split(f"ratio, seed {seed}", tuple(train[:count]), (*train[count:], *pool), tuple(val), tuple(sorted(test)))


def acdc_split(cases: Sequence[Case], ratio: float | None = None, labelled: int | None = None) -> Split:
    """The 70/10/20 lists of SSL4MIS, labelled in published order: ratio 0.01 -> 1, 0.05 -> 3, 0.1 -> 7 patients.

    Listed test patients that are not among `cases` (they were never published in SSL4MIS's layout) are left out.
    """
    lists = published("acdc_ssl4mis")
    here = set(_patients(labelled_cases(cases)))
    absent = [p for p in lists["train"] + lists["val"] if p not in here]
    if absent:
        raise DataError(f"the SSL4MIS split needs {absent[0]} and {len(absent) - 1} more patients that are not here")
    count = _count(lists["train"], ratio, labelled)
    test = tuple(p for p in lists["test"] if p in here)
    return Split(
        "SSL4MIS 70/10/20", tuple(lists["train"][:count]), tuple(lists["train"][count:]), tuple(lists["val"]), test
    )


def coral_split(cases: Sequence[Case], fold: int, labelled: int) -> Split:
    """One of CORAL's five folds over the 100 ACDC patients: 80 train, 20 val, M = 2, 6 or 10 labelled, no test part.

    The paper pre-trains on all patients, those of val included: that is a matter of what the caller hands to
    pre-training, not of the split. Raises `ValueError` for other folds or M, `DataError` where patients are absent.
    """
    lists = published("acdc_coral")
    if not 0 <= fold < len(lists["folds"]):
        raise ValueError(f"fold must be 0..{len(lists['folds']) - 1}, got {fold}")
    chosen, val = lists["folds"][fold]["labelled"], lists["folds"][fold]["val"]
    if not 1 <= labelled <= len(chosen):
        raise ValueError(f"the published list has 1..{len(chosen)} labelled patients, got {labelled}")
    every = [f"patient{number:03d}" for number in range(1, 101)]
    absent = sorted(set(every) - set(_patients(labelled_cases(cases))))
    if absent:
        raise DataError(f"CORAL's folds need {absent[0]} and {len(absent) - 1} more patients that are not here")
    rest = tuple(p for p in every if p not in chosen[:labelled] and p not in val)
    return Split(f"CORAL fold {fold}", tuple(chosen[:labelled]), rest, tuple(val), ())


def protocols(name: str) -> list[str]:
    """The protocols with published lists for the data set `name`, besides "common" and CORAL's folds."""
    files = sorted(SPLITS.glob(f"{name}_*.json"))
    return [file.stem.removeprefix(f"{name}_") for file in files if "dataset" in published(file.stem)]


def listed_split(
    name: str, cases: Sequence[Case], protocol: str, ratio: float | None = None, labelled: int | None = None
) -> Split:
    """The published lists of `protocol` for the data set `name`; patients in none of them are left out.

    Raises `ValueError` for a ratio or number of labelled patients that was not published, `DataError` where listed
    patients, or the labels of those that need one, are not among `cases`.
    """
    lists = published(f"{name}_{protocol}")
    chosen = _labelled(lists, f"{name}_{protocol}", ratio, labelled)
    train = lists["train"][chosen[0]] if isinstance(lists["train"], dict) else lists["train"]
    parts = {"labelled": chosen[1], "unlabelled": [i for i in train if i not in set(chosen[1])]}
    parts |= {part: lists[part] for part in ("val", "test")}
    patients = {part: tuple(lists["patient"].format(i) for i in ids) for part, ids in parts.items()}
    here, with_label = set(_patients(cases)), set(_patients(labelled_cases(cases)))
    absent = [
        p for part, ids in patients.items() for p in ids if p not in (here if part == "unlabelled" else with_label)
    ]
    if absent:
        shown = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        missing = f"{len(absent)} patients that are not here or have no label"
        raise DataError(f"protocol {protocol!r} of {name!r} needs {missing}: {shown}")
    return Split(f"{name}, {protocol}", **patients)


def _labelled(lists: dict[str, Any], file: str, ratio: float | None, labelled: int | None) -> tuple[str, list[str]]:
    """The key of the published ratio ("" for a list that any ratio cuts) and the labelled ids."""
    published_lists = lists["labelled"]
    if isinstance(published_lists, list):
        return "", published_lists[: _count(lists["train"], ratio, labelled)]
    if (ratio is None) == (labelled is None):
        raise ValueError(f"give either ratio or labelled, not both or neither (ratio={ratio}, labelled={labelled})")
    for key, ids in published_lists.items():
        if len(ids) == labelled or ratio is not None and math.isclose(float(key), ratio):
            return key, ids
    counts = ", ".join(f"{key} ({len(ids)} patients)" for key, ids in published_lists.items())
    raise ValueError(f"{file} was published for the ratios {counts}: got ratio={ratio}, labelled={labelled}")


def split_cases(
    name: str,
    cases: Sequence[Case],
    ratio: float | None = None,
    seed: int = 0,
    protocol: str = "common",
    *,
    labelled: int | None = None,
    fold: int = 0,
) -> Split:
    """The split of the data set `name` under a protocol, with `ratio` or a number of `labelled` patients.

    "common": the published SSL4MIS lists for `acdc` where all of their train and val patients are there, else
    `ratio_split`. "coral": CORAL's fold `fold` of ACDC (needs `labelled`). Any other name: a published list of this
    data set, see `protocols`.
    """
    if protocol in protocols(name):
        return listed_split(name, cases, protocol, ratio, labelled)
    if protocol not in ("common", "coral"):
        known = ", ".join(repr(entry) for entry in ("common", "coral", *protocols(name)))
        raise ValueError(f"protocol must be one of {known} for {name!r}, got {protocol!r}")
    if protocol == "coral":
        if name != "acdc" or labelled is None:
            raise ValueError(
                f"protocol 'coral' is for 'acdc' with a number of labelled patients, got {name!r}, {labelled}"
            )
        return coral_split(cases, fold, labelled)
    if name == "acdc":
        lists = published("acdc_ssl4mis")
        if set(lists["train"] + lists["val"]) <= set(_patients(labelled_cases(cases))):
            return acdc_split(cases, ratio, labelled)
    return ratio_split(cases, ratio, seed, labelled)
