"""The layout of FLARE22 for drawn abdomens: labelled scans, an unlabelled pool and validation scans without labels.

Of every six patients in a row the first, third and fifth are labelled, the second and fourth belong to the unlabelled
pool and the sixth to the validation scans. An image is named like its label with `_0000` appended.
"""

from pathlib import Path

from medlib.data.descriptions import DESCRIPTIONS
from medlib.data.phantoms.abdominal import SMALL, abdominal_scan, label_values
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.rng import numpy_generator

GEOMETRY = {
    "small": Geometry(-190, 112, 96, SMALL, Range(4.8, 6.2)),
    "full": Geometry(-190, 112, 512, Range(0.64, 0.84), Range(2.0, 3.0)),
}
VALUES = label_values(DESCRIPTIONS["flare22"].classes)


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    scan = abdominal_scan(numpy_generator(seed, "phantom", "flare22", number), GEOMETRY[size])
    block, place = divmod(number - 1, 6)
    if place in (0, 2, 4):
        folder, name = root / "Training" / "FLARE22_LabeledCase50", f"FLARE22_Tr_{3 * block + place // 2 + 1:04d}"
        save(scan, folder / "images" / f"{name}_0000.nii.gz", folder / "labels" / f"{name}.nii.gz", VALUES)
    elif place in (1, 3):
        folder = root / "Training" / "FLARE22_UnlabeledCase1-1000"
        save(scan, folder / f"Case_{2 * block + place // 2 + 1:05d}_0000.nii.gz", None, VALUES)
    else:
        save(scan, root / "Validation" / f"FLARETs_{block + 1:04d}_0000.nii.gz", None, VALUES)
