"""From prepared volumes to 3D patches: cut out of the memory-mapped arrays, some about a voxel of an organ.

A step reads its patches from disk and nothing else. What the whole of a label is needed for, where each class lies, is
found once and kept beside the label.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medlib.data.prepare import UNLABELLED, Prepared
from medlib.paths import written_whole

VOXELS = 10_000  # of a class and volume that patches are centred on; nnU-Net keeps as many
FOREGROUND = "foreground.npy"

Window = tuple[slice, slice, slice]


def foreground_voxels(label: np.ndarray) -> np.ndarray:
    """Where the classes of a label map (Z, H, W) lie: rows (class, z, y, x), (N, 4) uint16, rising.

    Of each foreground class all voxels, or `VOXELS` of them, evenly spaced in the order of the array.
    """
    flat = label.reshape(-1)
    places = np.flatnonzero(flat)
    classes = flat[places]
    rows = []
    for value in np.flatnonzero(np.bincount(classes)):
        mine = places[classes == value]
        count = min(VOXELS, len(mine))
        mine = mine[((np.arange(count) + 0.5) / count * len(mine)).astype(int)]
        where = np.unravel_index(mine, label.shape)
        rows.append(np.stack([np.full(count, value), *where], axis=1).astype(np.uint16))
    return np.concatenate(rows) if rows else np.zeros((0, 4), np.uint16)


def _foreground(label: np.ndarray) -> np.ndarray:
    """`foreground_voxels` of a prepared label; of a memory-mapped one it is kept in a file beside it."""
    if not isinstance(label, np.memmap) or label.filename is None:
        return foreground_voxels(label)
    path = Path(label.filename).with_name(FOREGROUND)
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # not there yet, or damaged: made again
        known: np.ndarray = np.load(path)
        return known
    found = foreground_voxels(label)
    # a cache that is full or read-only costs time, nothing else
    with contextlib.suppress(OSError), written_whole(path) as unfinished:
        np.save(unfinished, found)
    return found


def _by_class(voxels: np.ndarray) -> list[np.ndarray]:
    """Rows (class, z, y, x) as (z, y, x) of each class that is there."""
    borders = np.flatnonzero(np.diff(voxels[:, 0])) + 1
    return [part[:, 1:] for part in np.split(voxels, borders) if len(part)]


@dataclass
class Patches:
    """Random patches of some volumes, `size` (z, y, x) voxels each, on one device. A row is a volume.

    ``images`` (Z, H, W) and ``labels`` (Z, H, W), None where they may not be seen, stay on disk. ``labelled`` (N,) bool
    lies on the device, as the rows do that `medlib.data.batches.ShuffledRows` draws from it. ``foreground`` are voxels
    (n, 3) of each class that a labelled volume has, see `foreground_voxels`.
    """

    images: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray | None, ...]
    labelled: Tensor
    foreground: tuple[list[np.ndarray], ...]
    size: tuple[int, int, int]
    cases: tuple[str, ...]

    @classmethod
    def of(
        cls,
        volumes: Sequence[Prepared],
        labelled_patients: Sequence[str],
        size: tuple[int, int, int],
        device: torch.device | str,
    ) -> "Patches":
        """Patches of ``volumes``; only labels of ``labelled_patients`` are read, all others are hidden."""
        if not volumes:
            raise ValueError("there is no volume to take patches from")
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"size must be (z, y, x) in voxels, each at least 1, got {size}")
        kinds = {volume.image.dtype for volume in volumes}
        if len(kinds) > 1:
            raise ValueError(f"the volumes were prepared by different protocols: images are {kinds}")
        visible = set(labelled_patients)
        labels = [volume.label if volume.case.patient in visible else None for volume in volumes]
        return cls(
            images=tuple(volume.image for volume in volumes),
            labels=tuple(labels),
            labelled=torch.tensor([label is not None for label in labels], device=device),
            foreground=tuple([] if label is None else _by_class(_foreground(label)) for label in labels),
            size=size,
            cases=tuple(volume.case.case for volume in volumes),
        )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, generator: torch.Generator, foreground: float = 1 / 3) -> tuple[Tensor, Tensor]:
        """A random patch of each volume of ``rows`` (B,): images (B, 1, D, H, W) float32, labels (B, D, H, W) int64.

        A volume smaller than the patch lies in its middle; around it the image is 0 and the label ``UNLABELLED``, which
        is all there is of a volume whose label is hidden.

        Args:
            generator: draws where the patches lie; on any device.
            foreground: of the patches of labelled volumes, the share that is centred (as far as the border allows) on a
                voxel of a class that is drawn from those the volume has, whatever their sizes; nnU-Net takes 1/3. All
                others lie anywhere.
        """
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground is a share of patches, 0..1, got {foreground}")
        images = np.zeros((len(rows), *self.size), self.images[0].dtype)
        labels = np.full(images.shape, UNLABELLED, np.int8)
        draws = torch.rand(len(rows), 6, generator=generator, device=generator.device).tolist()
        for i, (row, draw) in enumerate(zip(rows.tolist(), draws, strict=True)):
            source, target = self._place(row, draw, foreground)
            images[i][target] = self.images[row][source]
            if (label := self.labels[row]) is not None:
                labels[i][target] = label[source]
        device = self.labelled.device
        return torch.from_numpy(images).to(device).float().unsqueeze(1), torch.from_numpy(labels).to(device).long()

    def _place(self, row: int, draw: Sequence[float], foreground: float) -> tuple[Window, Window]:
        """What is shown of volume ``row`` and where in the patch it lies; ``draw`` are 6 numbers in [0, 1)."""
        shape, classes = self.images[row].shape, self.foreground[row]
        starts = [int(u * (max(n - size, 0) + 1)) for u, n, size in zip(draw[3:], shape, self.size, strict=True)]
        if classes and draw[0] < foreground:
            voxels = classes[int(draw[1] * len(classes))]
            centre = voxels[int(draw[2] * len(voxels))]
            starts = [
                min(max(int(c) - size // 2, 0), max(n - size, 0))
                for c, n, size in zip(centre, shape, self.size, strict=True)
            ]
        source, target = [], []
        for start, n, size in zip(starts, shape, self.size, strict=True):
            shown = min(n, size)
            before = (size - shown) // 2
            source.append(slice(start, start + shown))
            target.append(slice(before, before + shown))
        return (source[0], source[1], source[2]), (target[0], target[1], target[2])
