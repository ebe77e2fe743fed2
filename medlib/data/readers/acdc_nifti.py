"""ACDC as the organisers publish it: a folder per patient with NIfTI files and `Info.cfg`.

Orientation. Axis 2 of the file is the slice axis (never swapped: a short-axis stack is oblique, and its slice axis can
be closer to left-right than to head-feet). The canonical frame is

- Z: slice 0 is the apex. From base to apex the heart points to the patient's left, front and feet; the slice axis is
  turned over where its world direction has a positive component along that diagonal (-1, 1, -1) of RAS space.
- W: the in-plane axis that runs most nearly along the patient's left, turned to point there.
- H: the other one, turned so that (W, H, Z) is right-handed. Rows then run towards the back and the feet, and the
  right ventricle lies to the left of the left one. No choice depends on a small number, and no heart is mirrored.

A header whose slice axis runs exactly along head-feet describes no short-axis stack: it kept the spacing and lost the
orientation (an identity direction matrix). Such a stack is taken to lie base first along +S, the order measured on the
real ones in SSL4MIS's form (see `acdc_ssl4mis`); there Z is -S, W left and H posterior.
"""

import re
from pathlib import Path

import numpy as np

from ..cases import Case, DataError, Volume
from ..descriptions import DESCRIPTIONS
from ..nifti import LEFT, directions, open_nifti, read_frame, read_voxels

INFO = DESCRIPTIONS["acdc"]
LAYOUT = "the official training/patient001/{Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz}"
BASE_TO_APEX = np.array([-1.0, 1.0, -1.0]) / np.sqrt(3)
FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(?:\.gz)?")


def _patients(root: Path) -> list[tuple[Path, str | None]]:
    """Patient folders and the part they belong to: those of root, root/training and root/testing."""
    found: list[tuple[Path, str | None]] = []
    for folder, part in ((root, None), (root / "training", None), (root / "testing", "test")):
        if folder.is_dir():
            part = "test" if folder.name == "testing" else part
            found += [(path, part) for path in sorted(folder.glob("patient*")) if path.is_dir()]
    return found


def recognise(root: Path) -> bool:
    return bool(_patients(root))


def _info(folder: Path) -> dict[str, str]:
    path = folder / "Info.cfg"
    if not path.is_file():
        raise DataError(f"{path} is missing: it says which frames are ED and ES; unpack the patient again")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    info = {key.strip(): value.strip() for key, value in entries.items()}
    for phase in ("ED", "ES"):
        if not (info.get(phase, "").isascii() and info.get(phase, "").isdigit()):
            raise DataError(f"{path} has no frame number for {phase} (found {info}): unpack the patient again")
    return info


def find(root: Path) -> list[Case]:
    cases: list[Case] = []
    seen: dict[str, Path] = {}
    for folder, part in _patients(root):
        if folder.name in seen:
            raise DataError(f"{folder} and {seen[folder.name]} are the same patient: remove one of them")
        seen[folder.name] = folder
        cases += _patient_cases(folder, part)
    return cases


def _patient_cases(folder: Path, part: str | None) -> list[Case]:
    patient, info = folder.name, _info(folder)
    phases = {int(info["ED"]): "ED", int(info["ES"]): "ES"}
    group = {"group": info["Group"]} if "Group" in info else {}
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    cine = None
    for path in sorted(folder.glob("[!.]*.nii*")):  # macOS leaves ._ files beside the real ones
        match = FRAME.fullmatch(path.name)
        if path.name in (f"{patient}_4d.nii.gz", f"{patient}_4d.nii"):
            cine = path
        elif match and match[1] == patient:
            found = labels if match[3] else images
            if int(match[2]) in found:
                raise DataError(f"{path} and {found[int(match[2])]} are the same frame: remove one of them")
            found[int(match[2])] = path
        elif not match or match[1] != patient:
            raise DataError(f"{path} does not belong to {patient}: names must be {patient}_frame01[_gt].nii.gz")
    for number in sorted(set(images) | set(labels) | set(phases)):
        image = folder / f"{patient}_frame{number:02d}.nii.gz"
        if number not in images:
            why = "its label is there" if number in labels else f"Info.cfg says it is {phases[number]}"
            raise DataError(f"{image} is missing although {why}: unpack the patient again")
        if number not in labels and (part != "test" or labels):
            raise DataError(f"{images[number]} has no label {patient}_frame{number:02d}_gt.nii.gz: unpack it again")
        if number not in phases:
            raise DataError(f"{images[number]} is neither ED nor ES by {folder / 'Info.cfg'} ({info}): which is right?")
    cases = []
    for number, path in images.items():
        label = (labels[number],) if number in labels else ()
        shape = open_nifti(path, 3).shape
        if label and open_nifti(label[0], 3).shape != shape:
            raise DataError(f"{label[0]} has shape {open_nifti(label[0], 3).shape}, its image {shape}: not of one scan")
        facts = {"phase": phases[number], **group}
        name = f"{patient}_frame{number:02d}"
        cases.append(Case(INFO, name, patient, (path,), label, "acdc_nifti", part=part, info=facts))
    if cine is not None:
        frames = open_nifti(cine, 4).shape[3]
        if max(phases) > frames:
            raise DataError(
                f"{cine} has {frames} frames, but Info.cfg places ED and ES at {sorted(phases)}: not of one scan"
            )
        for number in sorted(set(range(1, frames + 1)) - set(phases)):
            name, facts = f"{patient}_frame{number:02d}", {"phase": "cine", **group}
            cases.append(Case(INFO, name, patient, (cine,), (), "acdc_nifti", frame=number - 1, part=part, info=facts))
    return cases


def notes(root: Path) -> list[str]:
    folders = _patients(root)
    bare = [folder.name for folder, _ in folders if not any(folder.glob(f"{folder.name}_4d.nii*"))]
    return [f"{len(bare)} patients have no 4D file ({bare[0]}, ...): no cine frames from them"] if bare else []


def canonical_axes(axes: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How to turn an (X, Y, Z) array with these world directions (columns, RAS) into the canonical (Z, H, W).

    Returns the file axes that become Z, H, W, and for each whether it is turned over.
    """
    normal = axes[:, 2]
    bare = abs(normal[2]) > 1 - 1e-8  # within 0.01 degrees
    flip_z = bool(normal[2] > 0 if bare else normal @ BASE_TO_APEX > 0)
    up = -normal if flip_z else normal  # from apex to base
    if bare:
        up = -up  # the header's +S is the heart's base to apex
    column = int(np.argmax(np.abs(axes[:, :2].T @ LEFT)))
    row = 1 - column
    flip_w = bool(axes[:, column] @ LEFT < 0)
    right = -axes[:, column] if flip_w else axes[:, column]
    flip_h = bool(np.cross(right, axes[:, row]) @ up < 0)
    return (2, row, column), (flip_z, flip_h, flip_w)


def _oriented(array: np.ndarray, order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> np.ndarray:
    return array.transpose(order)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)]


def load(case: Case) -> Volume:
    path = case.images[0]
    file = open_nifti(path, 3 if case.frame is None else 4)
    axes, spacing = directions(file, path)
    order, flips = canonical_axes(axes)
    voxels = read_voxels(file, path) if case.frame is None else read_frame(path, case.frame)
    image = np.ascontiguousarray(_oriented(voxels, order, flips), dtype=np.float32)
    label = None
    if case.labels:
        source = case.labels[0]
        mask = open_nifti(source, 3)
        if np.abs(directions(mask, source)[0] - axes).max() > 0.01:
            raise DataError(f"{source} is oriented otherwise than its image {path}: repair the header of one of them")
        label = np.ascontiguousarray(_oriented(read_voxels(mask, source), order, flips))
    return Volume(case, image, label, (spacing[order[0]], spacing[order[1]], spacing[order[2]]))
