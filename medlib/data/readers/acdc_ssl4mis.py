"""ACDC as SSL4MIS prepared it: HDF5 files with `image` (min-max scaled float32) and `label`, and patient lists.

Training volumes come as one file per slice (`patient099_frame01_slice_7.h5`, counted from 1), validation and test
volumes as one file each. `frame01` is the end of diastole, `frame02` the end of systole. No spacing is stored.

Slice 1 is the base: over all 160 volumes of the 80 train and val patients the area of the right ventricle falls with
the slice number (slope of a line through the slices that show it; negative in 160 of 160). Volumes are therefore
turned over, so that slice 0 is the apex here as in `acdc_nifti`. In plane nothing is changed: the right ventricle lies
to the left of the left one (smaller column) in 160 of 160.
"""

import re
from pathlib import Path

import h5py
import numpy as np

from ..cases import Case, DataError, Volume
from ..descriptions import DESCRIPTIONS

INFO = DESCRIPTIONS["acdc"]
LAYOUT = "SSL4MIS's train.list, val.list and data/patient001_frame01.h5, data/patient001_frame01_slice_1.h5"
PHASES = {"01": "ED", "02": "ES"}
NAME = re.compile(r"(patient\d{3})_frame(\d\d)(?:_slice_(\d+))?\.h5")


def recognise(root: Path) -> bool:
    return (root / "data").is_dir() and (any(root.glob("*.list")) or any((root / "data").rglob("*.h5")))


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing: it says which volumes belong to that part; copy it beside data/")
    return [line.strip().removesuffix(".h5") for line in path.read_text().splitlines() if line.strip()]


def _listed(root: Path) -> dict[str, str]:
    """Volume name -> part, from the three lists. `test.list` may be absent."""
    parts: dict[str, str] = {}
    for part in ("train", "val", "test"):
        if part == "test" and not (root / "test.list").exists():
            continue
        for name in _read_list(root / f"{part}.list"):
            if not NAME.fullmatch(f"{name}.h5"):
                raise DataError(f"{root / f'{part}.list'} names {name!r}, expected names like patient001_frame01")
            if name in parts:
                raise DataError(f"{root / f'{part}.list'} names {name}, which is listed under {parts[name]} already")
            parts[name] = part
    sides: dict[str, str] = {}
    for name, part in parts.items():
        if sides.setdefault(name[:10], part) != part:
            raise DataError(f"{root / f'{part}.list'} names {name}, a patient who is also in {sides[name[:10]]}.list")
    return parts


def find(root: Path) -> list[Case]:
    parts = _listed(root)
    volumes: dict[str, Path] = {}
    slices: dict[str, dict[int, Path]] = {}
    for folder in (root / "data", root / "data" / "slices"):
        for path in sorted(folder.glob("*.h5")):
            match = NAME.fullmatch(path.name)
            if not match:
                raise DataError(f"{path} is not named like patient001_frame01[_slice_1].h5: rename or remove it")
            name = f"{match[1]}_frame{match[2]}"
            if name not in parts:
                raise DataError(f"{path} is in none of the lists in {root}: add {name} to one, or remove the file")
            if match[3] is None:
                volumes[name] = path
            elif int(match[3]) in slices.setdefault(name, {}):
                raise DataError(
                    f"{path} and {slices[name][int(match[3])]} are both slice {match[3]} of {name}: remove one"
                )
            else:
                slices[name][int(match[3])] = path
    _check_slice_list(root, slices)
    cases = []
    for name, part in parts.items():
        if part == "train":
            files = _stack(root, name, slices.get(name, {}), volumes.get(name))
        elif name in volumes:
            files = (volumes[name],)
        elif part == "test":
            continue  # not an error: `notes` reports it
        else:
            raise DataError(f"{root / 'data' / f'{name}.h5'} is missing, but {part}.list names it: download it again")
        for path in files:
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty: download it again")
        info = {"phase": PHASES.get(name[-2:], name[-2:])}
        cases.append(Case(INFO, name, name[:10], files, files, "acdc_ssl4mis", part=part, info=info))
    return cases


def _check_slice_list(root: Path, slices: dict[str, dict[int, Path]]) -> None:
    """`train_slices.list`, where it is there, must agree with the slice files both ways."""
    if not (root / "train_slices.list").exists():
        return
    present = {path.stem for found in slices.values() for path in found.values()}
    listed = set(_read_list(root / "train_slices.list"))
    for name in sorted(listed - present)[:1]:
        raise DataError(f"{root / 'data' / f'{name}.h5'} is missing, but train_slices.list names it: download it again")
    for name in sorted(present - listed)[:1]:
        raise DataError(f"{name}.h5 is in {root / 'data'} but not in train_slices.list: are they of one release?")


def _stack(root: Path, name: str, found: dict[int, Path], volume: Path | None) -> tuple[Path, ...]:
    if not found and volume is not None:
        return (volume,)
    for number in range(1, max(found, default=1) + 1):
        if number not in found:
            path = root / "data" / f"{name}_slice_{number}.h5"
            raise DataError(f"{path} is missing ({len(found)} slices of {name} are there): download it again")
    return tuple(found[number] for number in sorted(found))


def notes(root: Path) -> list[str]:
    absent = [
        name for name, part in _listed(root).items() if part == "test" and not (root / "data" / f"{name}.h5").exists()
    ]
    if not absent:
        return []
    return [f"{len(absent)} test volumes are listed but not there ({absent[0]}, ...): test scores cannot be reported"]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with h5py.File(path) as file:
            for key in ("image", "label"):
                if key not in file:
                    raise DataError(f"{path} has no {key!r} (it has {sorted(file)}): is it from another release?")
            return file["image"][()], file["label"][()]
    except OSError as error:
        raise DataError(f"{path} is cut off or damaged ({error}): download it again") from error


def load(case: Case) -> Volume:
    parts = [_read(path) for path in case.images]
    if case.part == "train" and len(parts) > 1 or parts[0][0].ndim == 2:
        for path, (image, label) in zip(case.images, parts, strict=True):
            for key, array in (("image", image), ("label", label)):
                if array.shape != parts[0][0].shape or array.ndim != 2:
                    raise DataError(f"{path}: {key} has shape {array.shape}, the first slice {parts[0][0].shape}")
        image, label = np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts])
    else:
        image, label = parts[0]
    return Volume(case, np.ascontiguousarray(image[::-1], dtype=np.float32), np.ascontiguousarray(label[::-1]), None)
