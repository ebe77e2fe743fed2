"""The first two things on the way of data: `Case` (one scan on disk) and `Volume` (one scan in memory)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """Data on disk that cannot be used. The message names the file, what is wrong with it and what to do."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set before it is opened: used by readers, preparation, figures and the README.

    `classes[i]` is the name of label value i, 0 being the background; `colours[i]` its colour as a hex code
    (background transparent), chosen so that neighbours stay apart for colour-blind readers. `size` and `spacing` are
    the 2D protocol the papers used: square slices of `size` px at `spacing` mm in plane. `patch` (voxels) and
    `volume_spacing` (mm), both (z, y, x), are their 3D protocol. `window` are the intensities that a protocol cuts at,
    in HU for CT; None where intensities have no unit.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    colours: tuple[str, ...]
    modality: str
    size: int
    spacing: float | None
    licence: str
    url: str
    patient_rule: str
    window: tuple[float, float] | None = None
    patch: tuple[int, int, int] | None = None
    volume_spacing: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.colours) != len(self.classes):
            raise ValueError(f"{self.name}: {len(self.classes)} classes but {len(self.colours)} colours")


@dataclass(frozen=True)
class Case:
    """One scan on disk. Nothing of it has been read yet except headers and names.

    `about` describes the data set it is from. `images` is one file, or the files of its slices in order; `labels` is
    empty for a scan without labels and may name the same files where a file holds both. `frame` is an index into a 4D
    file. `part` is "train", "val" or "test" where the release itself says so. `patient` is what a split divides: all
    scans of one patient stay together.
    """

    about: DatasetInfo
    case: str
    patient: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    reader: str
    frame: int | None = None
    part: str | None = None
    info: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.about.name


def labelled_cases(cases: Iterable[Case]) -> list[Case]:
    """Those of `cases` that have a label, in the order given."""
    return [case for case in cases if case.labels]


def slice_positions(depth: int) -> np.ndarray:
    """Where each of `depth` slices lies along its volume: (z + 1) / depth, float32 in (0, 1], as in CORAL's code."""
    return (np.arange(1, depth + 1) / depth).astype(np.float32)


@dataclass
class Volume:
    """One scan in memory: `image` (Z, H, W) float32 and `label` (Z, H, W) uint8 or None, `spacing` (z, y, x) in mm.

    `spacing` is None where the files do not say. Slice 0 is the same anatomical end in every patient of a data set; the
    reader's module says which. `remarks` say what the reader put right in the file.
    """

    case: Case
    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None
    remarks: tuple[str, ...] = ()

    @property
    def positions(self) -> np.ndarray:
        """The position of each slice, (Z,) float32 in (0, 1]."""
        return slice_positions(len(self.image))
