"""LiTS as CodaLab publishes it: 131 labelled scans in two training batches, 70 test scans without labels."""

from pathlib import Path

from ..cases import Case
from ..descriptions import DESCRIPTIONS
from ..scans import Source, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["lits"]
LAYOUT = "Training Batch 1/{volume-0.nii, segmentation-0.nii}, Training Batch 2/..., or all these files in one folder"
SOURCES = (
    Source(images=("Training*Batch*", "."), image="volume-{}", label="segmentation-{}", case="volume-{}"),
    Source(images=("Test*", "."), image="test-volume-{}", case="test-volume-{}", part="test"),
)
load = load_scan


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "lits", root, SOURCES)


def notes(root: Path) -> list[str]:
    return []
