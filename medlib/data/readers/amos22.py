"""AMOS22: 200 CT and 40 MR scans to train on, 100 CT and 20 MR to validate, all labelled; 240 for test without labels.

Scans with an id below 500 are CT, the others MR (the release's readme).
"""

from pathlib import Path

from ..cases import Case
from ..descriptions import DESCRIPTIONS
from ..scans import Source, absent_files, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["amos22"]
LAYOUT = "dataset.json, imagesTr/amos_0001.nii.gz, labelsTr/amos_0001.nii.gz, imagesVa, labelsVa and imagesTs"


def _modality(number: str) -> dict[str, str]:
    return {"modality": "CT" if int(number) < 500 else "MR"}


def _source(suffix: str, part: str, labelled: bool = True) -> Source:
    labels = (f"labels{suffix}",) if labelled else ()
    name = "amos_{}"
    return Source((f"images{suffix}",), name, name, labels, name if labelled else None, part, info=_modality)


SOURCES = (_source("Tr", "train"), _source("Va", "val"), _source("Ts", "test", labelled=False))
load = load_scan


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "amos22", root, SOURCES)


def notes(root: Path) -> list[str]:
    return absent_files(root) if (root / "dataset.json").is_file() else []
