"""The layout of AMOS22 (dataset.json, imagesTr, labelsTr, imagesVa, labelsVa, imagesTs) for drawn abdomens.

Every sixth patient is scanned by MR and has an id of 500 or more, the others by CT with an id below 500; MR shows the
upper abdomen only in every second of them. Of every seven patients in a row the fifth is a validation scan and the
seventh a test scan without labels.
"""

import json
from pathlib import Path

from medlib.data.descriptions import DESCRIPTIONS
from medlib.data.phantoms.abdominal import SMALL, abdominal_scan, label_values
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.volumes import Geometry, save
from medlib.rng import numpy_generator

LIMIT = 598  # patients: as many as CT ids reach
GEOMETRY = {
    ("CT", "small"): Geometry(-342, 105, 96, SMALL, Range(6.4, 7.4)),
    ("CT", "full"): Geometry(-342, 105, 512, Range(0.66, 0.85), Range(2.0, 5.0)),
    ("MR", "small"): Geometry(-342, 100, 96, SMALL, Range(6.4, 7.4)),
    ("MR", "full"): Geometry(-342, 100, 320, Range(1.12, 1.3), Range(3.0, 5.0)),
    ("upper MR", "small"): Geometry(-130, 100, 96, SMALL, Range(5.0, 6.5)),
    ("upper MR", "full"): Geometry(-130, 100, 320, Range(1.12, 1.3), Range(2.5, 4.0)),
}
VALUES = label_values(DESCRIPTIONS["amos22"].classes)
NAMES = (  # as its dataset.json spells them
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota",
    "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip


def scan_id(number: int) -> int:
    """The id of patient `number` (1, 2, ...): below 500 for CT, from 500 on for MR."""
    magnetic = number // 6
    return 499 + magnetic if number % 6 == 0 else number - magnetic


def write_patient(root: Path, number: int, seed: int, size: str) -> None:
    """Draw patient `number` (1, 2, ...) and write its files under `root`."""
    modality = "MR" if scan_id(number) >= 500 else "CT"
    kind = "upper MR" if number % 12 == 6 else modality
    rng = numpy_generator(seed, "phantom", "amos22", number)
    scan = abdominal_scan(rng, GEOMETRY[kind, size], modality)
    part = {4: "Va", 6: "Ts"}.get((number - 1) % 7, "Tr")
    name = f"amos_{scan_id(number):04d}.nii.gz"
    save(scan, root / f"images{part}" / name, None if part == "Ts" else root / f"labels{part}" / name, VALUES)


def finish(root: Path) -> None:
    """Write dataset.json over what lies under `root`."""
    parts: dict[str, list[dict[str, str]]] = {}
    for suffix, part in (("Tr", "training"), ("Va", "validation"), ("Ts", "test")):
        names = sorted(path.name for path in (root / f"images{suffix}").glob("*.nii.gz"))
        parts[part] = [{"image": f"./images{suffix}/{name}"} for name in names]
        if suffix != "Ts":
            parts[part] = [{**pair, "label": pair["image"].replace("images", "labels")} for pair in parts[part]]
    content = {
        "name": "AMOS",
        "description": "Phantoms in the layout of AMOS22, drawn by medlib",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {str(value): name for value, name in enumerate(NAMES)},
        "numTraining": len(parts["training"]),
        "numValidation": len(parts["validation"]),
        "numTest": len(parts["test"]),
        **parts,
    }
    (root / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
