"""A task of the Medical Segmentation Decathlon in its layout, like Task04_Hippocampus: crops of about 36x50x35 mm.

Every sixth patient is a test scan without labels (imagesTs). The crops are small, so both sizes are the release's, and
as there every file says RAS, 1 mm, whichever way the head lay.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from medlib.data.phantoms.hippocampus import PARTS, draw_temporal_lobe
from medlib.data.phantoms.solids import Stack, Warp, turn
from medlib.data.phantoms.volumes import save, take
from medlib.rng import numpy_generator

VALUES = np.arange(len(PARTS) + 1, dtype=np.uint8)


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    rng = numpy_generator(seed, "phantom", "msd", number)
    depth, rows, columns = (int(rng.integers(low, high)) for low, high in ((30, 41), (46, 56), (32, 40)))
    x, y, z = (float(shift) for shift in rng.normal(0, (0.8, 1.0, 0.8)))
    pose = turn(*rng.normal(0, 4, 3))  # the head in the scanner
    stack = Stack.around((depth, rows, columns), (1, 1, 1), (x, y, z), (1, 1, 1), pose, (0, 0, 0))
    scan = take(rng, draw_temporal_lobe(rng), PARTS, stack, Warp.draw(rng, stack, 14.0, 0.7), "MR", 1.0)
    affine = np.eye(4)
    affine[:3, 3] = 1
    scan = replace(scan, affine=affine, codes="RAS")
    name = f"hippocampus_{number:03d}.nii.gz"
    test = number % 6 == 0
    save(scan, root / f"images{'Ts' if test else 'Tr'}" / name, None if test else root / "labelsTr" / name, VALUES)


def finish(root: Path) -> None:
    """Write dataset.json over what lies under `root`."""
    training = sorted(path.name for path in (root / "imagesTr").glob("*.nii.gz"))
    test = sorted(path.name for path in (root / "imagesTs").glob("*.nii.gz"))
    content = {
        "name": "Hippocampus",
        "description": "Phantoms in the layout of Task04_Hippocampus, drawn by medlib",
        "tensorImageSize": "3D",
        "licence": "MIT",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in enumerate(("background", *PARTS))},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in training],
        "test": [f"./imagesTs/{name}" for name in test],
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
