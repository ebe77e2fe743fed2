"""The layout of LiTS (Training Batch 1/volume-0.nii, segmentation-0.nii; Batch 2 from 28 on) for drawn livers.

A liver holds 0 to 6 tumours. The files are not compressed, as in the release.
"""

from pathlib import Path

from medlib.data.descriptions import DESCRIPTIONS
from medlib.data.phantoms.abdominal import SMALL, abdominal_scan, label_values
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.rng import numpy_generator

GEOMETRY = {
    "small": Geometry(-150, 118, 96, SMALL, Range(4.4, 5.8)),
    "full": Geometry(-150, 118, 512, Range(0.64, 0.85), Range(1.0, 2.5)),
}
VALUES = label_values(DESCRIPTIONS["lits"].classes)
MOST = 6  # tumours


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    tumours = int(numpy_generator(seed, "phantom", "lits", number, "tumours").integers(0, MOST + 1))
    scan = abdominal_scan(numpy_generator(seed, "phantom", "lits", number), GEOMETRY[size], tumours=tumours)
    folder = root / f"Training Batch {1 if number <= 28 else 2}"
    save(scan, folder / f"volume-{number - 1}.nii", folder / f"segmentation-{number - 1}.nii", VALUES)
