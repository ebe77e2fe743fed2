"""The public releases, one module each. A module put into this folder is found by itself: no list to edit.

A reader module has

- `INFO`: its `DatasetInfo`, from `medlib.data.descriptions`. Two modules with the same `INFO.name` are two layouts of
  one data set.
- `LAYOUT`: one line that says which files it expects, for error messages.
- `recognise(root) -> bool`: whether the folder looks like this layout, however incomplete.
- `find(root) -> list[Case]`: names and headers are checked here, so that a broken download is refused within seconds.
- `notes(root) -> list[str]`: what is absent but not an error (test volumes that were never published, say).
- `load(case) -> Volume`: reads the voxels, oriented so that slice 0 is the same end in every patient.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import numpy as np

from ...paths import resolve
from ..cases import Case, DataError, DatasetInfo, Volume

READERS: dict[str, ModuleType] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
}
DATASETS: dict[str, DatasetInfo] = {module.INFO.name: module.INFO for module in READERS.values()}


def dataset_info(name: str) -> DatasetInfo:
    """What is known about the data set `name` before it is opened; what its files add is in its cases' `about`.

    Raises `ValueError` with the known names for another one.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: known are {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def find_reader(name: str, root: Path) -> ModuleType:
    """The reader module for what lies in `root`. Raises `FileNotFoundError` or `DataError` where none fits."""
    info = dataset_info(name)
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist: give the folder that holds {info.title} (from {info.url})")
    if not root.is_dir():
        raise DataError(f"{root} is a file: give the unpacked folder that holds {info.title}")
    readers = [module for module in READERS.values() if module.INFO.name == name]
    fitting = [module for module in readers if module.recognise(root)]
    if not fitting:
        state = "is empty" if not any(root.iterdir()) else "holds nothing of the expected form"
        layouts = "; or ".join(module.LAYOUT for module in readers)
        raise DataError(f"{root} {state}: for {name!r} it must hold {layouts} (from {info.url})")
    if len(fitting) > 1:
        layouts = "; and ".join(module.LAYOUT for module in fitting)
        raise DataError(f"{root} holds several layouts of {name!r} at once ({layouts}): give the folder of one of them")
    return fitting[0]


def read_dataset(name: str, root: str | Path) -> list[Case]:
    """All scans of the data set `name` under `root`, labelled or not, sorted by case.

    Checks names and headers, not voxels. Raises `FileNotFoundError` for a missing root and `DataError`, naming the
    file, for anything else that would stop a training later.
    """
    folder = resolve(root)
    cases: list[Case] = find_reader(name, folder).find(folder)
    if not cases:
        raise DataError(f"{folder} has the folders of {name!r} but no scans: was it unpacked completely?")
    cases.sort(key=lambda case: case.case)
    for first, second in zip(cases, cases[1:], strict=False):
        if first.case == second.case:
            raise DataError(f"{second.images[0]} and {first.images[0]} are both {first.case}: remove one of them")
    return cases


def load_volume(case: Case) -> Volume:
    """The scan in memory, checked: shapes agree, every voxel finite, image not constant, label values known.

    Raises `DataError` that names the file, `FileNotFoundError` where it has gone since `read_dataset`.
    """
    for path in (*case.images, *case.labels):
        if not path.is_file():
            raise FileNotFoundError(f"{path} of {case.case} is gone: read the data set again")
    volume: Volume = READERS[case.reader].load(case)
    image, label, source = volume.image, volume.label, case.images[0]
    if image.ndim != 3 or 0 in image.shape:
        raise DataError(f"{source} has shape {image.shape}, expected (Z, H, W)")
    if not np.isfinite(image).all():
        raise DataError(
            f"{source} has {int((~np.isfinite(image)).sum())} voxels that are not finite: repair or remove it"
        )
    if image.min() == image.max():
        raise DataError(f"{source} is {image.min()} everywhere: it is no scan, download it again or remove it")
    if label is not None:
        source = case.labels[0]
        if label.shape != image.shape:
            raise DataError(f"{source} has shape {label.shape}, its image {image.shape}: they are not of one scan")
        names = case.about.classes
        if label.min() < 0 or label.max() >= len(names) or label.dtype.kind == "f" and (label != np.rint(label)).any():
            values = np.unique(label).tolist()
            raise DataError(
                f"{source} has label values {values[:10]}, expected 0..{len(names) - 1} ({', '.join(names)})"
            )
        volume.label = label.astype(np.uint8, copy=False)
    return volume
