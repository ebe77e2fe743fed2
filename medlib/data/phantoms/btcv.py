"""The layout of BTCV's RawData (Training/img/img0001.nii.gz, Training/label, Testing/img) for drawn abdomens.

Every fifth patient is a test scan without labels. Training ids are 1 to 10, 21 to 60 and 81 on, test ids 61 to 80 and
then from 5001 on: as in the release, 11 to 20 are missing and 61 to 80 are the test scans.
"""

from pathlib import Path

from medlib.data.descriptions import DESCRIPTIONS
from medlib.data.phantoms.abdominal import SMALL, abdominal_scan, label_values
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.rng import numpy_generator

GEOMETRY = {
    "small": Geometry(-205, 112, 96, SMALL, Range(5.0, 6.5)),
    "full": Geometry(-205, 112, 512, Range(0.66, 0.85), Range(2.5, 5.0)),
}
VALUES = label_values(DESCRIPTIONS["btcv"].classes)


def training_id(count: int) -> int:
    """The id of the training scan number `count` (1, 2, ...)."""
    return count + 10 * (count > 10) + 20 * (count > 50)


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`/RawData."""
    scan = abdominal_scan(numpy_generator(seed, "phantom", "btcv", number), GEOMETRY[size])
    tests = number // 5  # test scans up to this patient
    if number % 5 == 0:
        name = f"{60 + tests if tests <= 20 else 4980 + tests:04d}.nii.gz"
        save(scan, root / "RawData" / "Testing" / "img" / f"img{name}", None, VALUES)
    else:
        name, folder = f"{training_id(number - tests):04d}.nii.gz", root / "RawData" / "Training"
        save(scan, folder / "img" / f"img{name}", folder / "label" / f"label{name}", VALUES)
