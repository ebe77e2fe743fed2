"""The layout of the CHD scans (ct_1001_image.nii.gz and ct_1001_label.nii.gz in one folder) for drawn hearts.

Every seven patients in a row hold each of `MALFORMATIONS` once, in random order. Most are children. Label values are
1 LV, 2 RV, 3 LA, 4 RA, 5 myocardium, 6 aorta with its arch and descending part, 7 pulmonary artery.
"""

from pathlib import Path

import numpy as np

from medlib.data.phantoms.cardiac import cardiac_scan
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.data.phantoms.whole_heart import MALFORMATIONS
from medlib.rng import numpy_generator

GEOMETRY = {
    "small": Geometry(-88, 98, 96, Range(2.3, 2.7), Range(2.4, 3.2)),
    "full": Geometry(-88, 98, 512, Range(0.4, 0.5), Range(0.6, 0.9)),
}
VALUES = np.arange(8, dtype=np.uint8)  # of whole_heart.PARTS
BODY = Range(0.5, 1.0)  # size of the patient; 1 is an adult


def malformation(seed: int, number: int) -> str:
    """What patient `number` (1, 2, ...) has, a key of `MALFORMATIONS`."""
    block, place = divmod(number - 1, len(MALFORMATIONS))
    order = numpy_generator(seed, "phantom", "chd", "kinds", block).permutation(len(MALFORMATIONS))
    return list(MALFORMATIONS)[order[place]]


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    rng = numpy_generator(seed, "phantom", "chd", number)
    body, kind = BODY.draw(rng), malformation(seed, number)
    geometry = GEOMETRY[size].scaled(body)
    scan = cardiac_scan(rng, geometry, "CT", kind, whole_aorta=True, size=body)
    name = f"ct_{1000 + number}"
    save(scan, root / f"{name}_image.nii.gz", root / f"{name}_label.nii.gz", VALUES)
