"""BTCV as Synapse publishes it (syn3193805, Abdomen/RawData.zip): 30 scans with labels, 20 test scans without."""

from pathlib import Path

from ..cases import Case
from ..descriptions import DESCRIPTIONS
from ..scans import Source, find_scans, load_scan, recognises

INFO = DESCRIPTIONS["btcv"]
LAYOUT = "RawData/Training/{img/img0001.nii.gz, label/label0001.nii.gz} and RawData/Testing/img/img0061.nii.gz"
SOURCES = (
    Source(
        images=("RawData/Training/img", "Training/img", "img"),
        image="img{}",
        labels=("RawData/Training/label", "Training/label", "label"),
        label="label{}",
        case="img{}",
    ),
    Source(images=("RawData/Testing/img", "Testing/img"), image="img{}", case="img{}", part="test"),
)
load = load_scan


def recognise(root: Path) -> bool:
    return recognises(root, SOURCES)


def find(root: Path) -> list[Case]:
    return find_scans(INFO, "btcv", root, SOURCES)


def notes(root: Path) -> list[str]:
    return []
