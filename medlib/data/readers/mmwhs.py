"""MM-WHS 2017: 20 CT and 20 MR scans with labels, 40 of each without, all of different patients.

Label values of the files are 500 LV, 600 RV, 420 LA, 550 RA, 205 myocardium, 820 ascending aorta and 850 pulmonary
artery; they become classes 1 to 7 in this order. A few files hold the value 421 at the left atrium: it is read as 420,
and a remark says so.
"""

from pathlib import Path

from ..cases import Case, Volume
from ..descriptions import DESCRIPTIONS
from ..scans import Source, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["mmwhs"]
LAYOUT = "ct_train/{ct_train_1001_image.nii.gz, ct_train_1001_label.nii.gz}, mr_train/..., ct_test/..., mr_test/..."
VALUES = {0: 0, 500: 1, 600: 2, 420: 3, 550: 4, 205: 5, 820: 6, 850: 7}
STRAY = {421: 3}


def _sources(kind: str) -> tuple[Source, Source]:
    facts = {"modality": kind.upper()}
    train = Source(
        images=(f"{kind}_train*", "."),
        image=f"{kind}_train_{{}}_image",
        label=f"{kind}_train_{{}}_label",
        case=f"{kind}_train_{{}}",
        info=lambda number: facts,
    )
    test = Source(
        images=(f"{kind}_test*", "."),
        image=f"{kind}_test_{{}}_image",
        ignored=f"{kind}_test_{{}}_label_encrypt_1mm",
        case=f"{kind}_test_{{}}",
        part="test",
        info=lambda number: facts,
    )
    return train, test


SOURCES = (*_sources("ct"), *_sources("mr"))


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "mmwhs", root, SOURCES)


def notes(root: Path) -> list[str]:
    kinds = {case.info["modality"] for case in find(root)}
    if kinds == {"CT", "MR"}:
        return [
            "CT and MR scans lie here: the papers use one of them at a time, give ct_train or mr_train alone for that"
        ]
    return []


def load(case: Case) -> Volume:
    return load_scan(case, VALUES, STRAY)
