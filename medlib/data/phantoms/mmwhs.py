"""The layout of MM-WHS 2017 (ct_train/ct_train_1001_image.nii.gz, ..._label.nii.gz, mr_train, ct_test, mr_test).

Of every six patients in a row the first and third are CT, the second and fourth MR scans to train on; the fifth (CT)
and sixth (MR) are test scans without labels. Label values are the release's: 500 LV, 600 RV, 420 LA, 550 RA, 205
myocardium, 820 ascending aorta, 850 pulmonary artery.
"""

from pathlib import Path

import numpy as np

from medlib.data.phantoms.cardiac import cardiac_scan
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.rng import numpy_generator

GEOMETRY = {
    ("CT", "small"): Geometry(-78, 82, 96, Range(2.2, 2.7), Range(2.4, 3.2)),
    ("CT", "full"): Geometry(-78, 82, 512, Range(0.39, 0.5), Range(0.6, 0.9)),
    ("MR", "small"): Geometry(-82, 84, 96, Range(2.7, 3.3), Range(2.6, 3.4)),
    ("MR", "full"): Geometry(-82, 84, 288, Range(0.95, 1.1), Range(0.95, 1.2)),
}
VALUES = np.array([0, 500, 600, 420, 550, 205, 820, 850], np.int16)  # of whole_heart.PARTS


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    block, place = divmod(number - 1, 6)
    modality = ("CT", "MR")[place % 2]
    rng = numpy_generator(seed, "phantom", "mmwhs", number)
    scan = cardiac_scan(rng, GEOMETRY[modality, size], modality, "none", whole_aorta=False)
    if place < 4:
        folder, name = f"{modality.lower()}_train", 1001 + 2 * block + place // 2
        label = root / folder / f"{folder}_{name}_label.nii.gz"
    else:
        folder, name, label = f"{modality.lower()}_test", 2001 + block, None
    save(scan, root / folder / f"{folder}_{name}_image.nii.gz", label, VALUES)
