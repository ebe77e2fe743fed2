"""Any task of the Medical Segmentation Decathlon, and a user's own data in that form.

Classes, modality and licence come from `dataset.json`. Of images with several channels (4D files) the first is taken.
The 2D and 3D grids are chosen from the scans: in-plane size and patch hold the largest of them, up to 320 px and
64 x 128 x 128 voxels, at the median spacing.

Beyond the Decathlon's own form, `dataset.json` may hold "patients": {case: patient} where one patient has several
scans (without it every scan is a patient), and "window": [low, high], the HU at which a CT is cut.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform

from ..cases import Case, DataError
from ..descriptions import DESCRIPTIONS, colours_of
from ..nifti import directions, open_nifti
from ..scans import FRAME, Source, absent_files, find_scans, load_scan, read_json

INFO = DESCRIPTIONS["msd"]
LAYOUT = "dataset.json, imagesTr/NAME.nii.gz, labelsTr/NAME.nii.gz and imagesTs/NAME.nii.gz"
SOURCES = (
    Source(("imagesTr",), "{}", "{}", labels=("labelsTr",), label="{}", number=".+"),
    Source(("imagesTs",), "{}", "{}", part="test", number=".+"),
)
load = load_scan


def recognise(root: Path) -> bool:
    return (root / "dataset.json").is_file() or (root / "imagesTr").is_dir()


def _channels(content: dict[str, Any], root: Path) -> dict[str, str]:
    modality = content.get("modality")
    if not isinstance(modality, dict) or "0" not in modality:
        raise DataError(f'{root / "dataset.json"} has no "modality" such as {{"0": "CT"}}: add it')
    return modality


def _classes(content: dict[str, Any], root: Path) -> tuple[str, ...]:
    labels: Any = content.get("labels")
    if not isinstance(labels, dict) or len(labels) < 2 or set(labels) != {str(value) for value in range(len(labels))}:
        expected = '{"0": "background", "1": NAME, ...} without gaps'
        raise DataError(f"{root / 'dataset.json'} has the labels {labels}, expected {expected}")
    names = [str(labels[str(value)]) for value in range(len(labels))]
    if names[0].lower() != "background":
        raise DataError(
            f"{root / 'dataset.json'} calls label 0 {names[0]!r}: 0 is the background, count classes from 1"
        )
    if len(names) > 127 or len({*names}) < len(names):
        raise DataError(f"{root / 'dataset.json'} must name at most 126 classes, no two alike, got {names}")
    return ("background", *names[1:])


def find(root: Path) -> list[Case]:
    content = read_json(root)
    modality, classes = _channels(content, root), _classes(content, root)
    cases = find_scans(INFO, "msd", root, SOURCES, channels=len(modality) if len(modality) > 1 else None)
    patients = content.get("patients", {})
    if not isinstance(patients, dict):
        raise DataError(f"{root / 'dataset.json'} has the patients {patients!r}, expected {{case: patient, ...}}")
    if stray := sorted(set(patients) - {case.case for case in cases}):
        raise DataError(f"{root / 'dataset.json'} names the patient of {stray[0]!r}, which is no scan here")
    info = dataclasses.replace(
        INFO,
        window=_window(content, root),
        title=f"Medical Segmentation Decathlon, {content.get('name', root.name)}",
        classes=classes,
        colours=colours_of(classes),
        modality=str(modality["0"]),
        licence=str(content.get("licence", content.get("license", INFO.licence))),
        **_grid(cases),
    )
    return [dataclasses.replace(case, about=info, patient=str(patients.get(case.case, case.case))) for case in cases]


def _window(content: dict[str, Any], root: Path) -> tuple[float, float] | None:
    window: Any = content.get("window")
    if window is None:
        return None
    numbers = isinstance(window, list) and len(window) == 2 and all(type(value) in (int, float) for value in window)
    if not numbers or not window[0] < window[1]:
        raise DataError(f"{root / 'dataset.json'} has the window {window!r}, expected two rising HU such as [-75, 275]")
    return float(window[0]), float(window[1])


def _grid(cases: list[Case]) -> dict[str, Any]:
    """The protocol that fits these scans: see the module's text."""
    if not cases:
        return {}
    shapes, spacings = [], []
    for case in cases:
        file: nibabel.Nifti1Image = open_nifti(case.images[0], 3 if case.frame is None else 4)
        order = np.argsort(ornt_transform(io_orientation(file.affine), FRAME)[:, 0])[::-1]
        shapes.append(np.array(file.shape[:3])[order])
        spacings.append(np.array(directions(file, case.images[0])[1])[order])
    z, y, x = (float(value) for value in np.median(spacings, axis=0).round(4))
    extent = np.max(np.array(shapes) * np.array(spacings), axis=0)  # mm
    whole = [16 * math.ceil(round(mm / step / 16, 3)) for mm, step in zip(extent, (z, y, x), strict=True)]
    patch = tuple(min(side, most) for side, most in zip(whole, (64, 128, 128), strict=True))
    size = 16 * math.ceil(round(extent[1:].max() / min(y, x) / 16, 3))
    return {"size": min(size, 320), "spacing": min(y, x), "patch": patch, "volume_spacing": (z, y, x)}


def notes(root: Path) -> list[str]:
    content = read_json(root)
    modality = _channels(content, root)
    lines = absent_files(root)
    if modality["0"] == "CT" and _window(content, root) is None:
        lines.append('CT that is cut at no HU, so that air and bone rule its contrast: add "window": [-75, 275] or so')
    if len(modality) > 1:
        names = ", ".join(str(modality[key]) for key in sorted(modality))
        lines.append(f"images have {len(modality)} channels ({names}): the first, {modality['0']}, is taken")
    return lines
