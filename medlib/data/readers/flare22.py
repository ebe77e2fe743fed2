"""FLARE22: 50 labelled scans, an unlabelled pool of up to 2000, 50 validation scans whose labels stay unpublished.

An image is named like its label with `_0000` appended. The labelled scans belong to no part: a split divides them.
"""

from pathlib import Path

from ..cases import Case
from ..descriptions import DESCRIPTIONS
from ..scans import Source, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["flare22"]
LAYOUT = (
    "Training/FLARE22_LabeledCase50/{images/FLARE22_Tr_0001_0000.nii.gz, labels/FLARE22_Tr_0001.nii.gz},"
    " Training/...UnlabeledCase.../Case_00001_0000.nii.gz and Validation/FLARETs_0001_0000.nii.gz"
)
LABELLED = ("Training/FLARE22_LabeledCase50/", "FLARE22_LabeledCase50/", "")
SOURCES = (
    Source(
        images=tuple(f"{folder}images" for folder in LABELLED),
        image="FLARE22_Tr_{}_0000",
        labels=tuple(f"{folder}labels" for folder in LABELLED),
        label="FLARE22_Tr_{}",
        case="FLARE22_Tr_{}",
    ),
    Source(
        images=("Training/*[Uu]nlabel*", "*[Uu]nlabel*", "Training/*[Uu]nlabel*/*", "*[Uu]nlabel*/*"),
        image="Case_{}_0000",
        case="Case_{}",
    ),
    Source(images=("Validation", "Validation/images"), image="FLARETs_{}_0000", case="FLARETs_{}", part="val"),
)
load = load_scan


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "flare22", root, SOURCES)


def notes(root: Path) -> list[str]:
    if any(case.labels or case.part for case in find(root)) and not recognises(root, SOURCES[1:2]):
        return ["the unlabelled pool is not here: unlabelled patients are labelled ones whose labels are set aside"]
    return []
