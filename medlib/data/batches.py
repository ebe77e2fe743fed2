"""From prepared volumes to batches: slices held on the device, 3D patches, endless shuffled batches of their rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from medlib.data.cases import DatasetInfo, slice_positions
from medlib.data.patches import Patches
from medlib.data.prepare import UNLABELLED, Prepared
from medlib.data.splits import Split


@dataclass
class Slices:
    """All slices of some volumes, on one device.

    ``images`` (N, S, S) float16 or float32; ``labels`` (N, S, S) int8, ``UNLABELLED`` where the training may not see a
    label; ``positions`` (N,) float32 in (0, 1]; ``index`` (N,) the slice's index in its volume, ``depth`` (N,) that
    volume's number of slices, ``volume`` (N,) and ``patient`` (N,) running numbers; ``labelled`` (N,) bool.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    index: Tensor
    depth: Tensor
    volume: Tensor
    patient: Tensor
    labelled: Tensor
    cases: tuple[str, ...]
    patients: tuple[str, ...]

    @classmethod
    def of(cls, volumes: Sequence[Prepared], labelled_patients: Sequence[str], device: torch.device | str) -> "Slices":
        """Stack the slices of ``volumes``; only labels of ``labelled_patients`` are kept, all others are hidden."""
        if not volumes:
            raise ValueError("there is no volume to take slices from")
        patients = tuple(dict.fromkeys(volume.case.patient for volume in volumes))
        visible = set(labelled_patients)
        images, labels, positions, index, depth, volume_of, patient_of, labelled = ([] for _ in range(8))
        for number, volume in enumerate(volumes):
            slices = len(volume.image)
            seen = volume.label is not None and volume.case.patient in visible
            images.append(torch.from_numpy(np.array(volume.image)))
            label = np.array(volume.label, dtype=np.int8) if seen else np.full(volume.image.shape, UNLABELLED, np.int8)
            labels.append(torch.from_numpy(label))
            positions.append(torch.from_numpy(slice_positions(slices)))
            index.append(torch.arange(slices))
            depth.append(torch.full((slices,), slices))
            volume_of.append(torch.full((slices,), number))
            patient_of.append(torch.full((slices,), patients.index(volume.case.patient)))
            labelled.append(torch.full((slices,), seen))
        return cls(
            images=torch.cat(images).to(device),
            labels=torch.cat(labels).to(device),
            positions=torch.cat(positions).to(device),
            index=torch.cat(index).to(device),
            depth=torch.cat(depth).to(device),
            volume=torch.cat(volume_of).to(device),
            patient=torch.cat(patient_of).to(device),
            labelled=torch.cat(labelled).to(device),
            cases=tuple(volume.case.case for volume in volumes),
            patients=patients,
        )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, S, S) float32 and labels (B, S, S) int64 of ``rows`` (B,)."""
        return self.images[rows].float().unsqueeze(1), self.labels[rows].long()


class ShuffledRows:
    """Endless batches of rows: every row once an epoch, in an order drawn anew for each; batches run across epochs.

    Args:
        rows: (N,) int64, on the device the batches shall be on.
        batch_size: rows a batch; may exceed N, a batch then holds rows more than once.
        generator: draws the orders; on the device of ``rows``.
        rank, world: of ``world`` processes that draw the same batches, this one takes every ``world``-th row.
    """

    def __init__(self, rows: Tensor, batch_size: int, generator: torch.Generator, rank: int = 0, world: int = 1):
        if len(rows) == 0:
            raise ValueError("there is nothing to draw from: no row (is a patient labelled?)")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world} processes")
        self.rank, self.world = rank, world
        self.rows = rows
        self.batch_size = batch_size
        self.generator = generator
        self.waiting = rows[:0]  # drawn into an order, not yet into a batch

    def draw(self) -> Tensor:
        """The next ``batch_size`` rows, or this process's share of them."""
        while len(self.waiting) < self.batch_size:
            order = torch.randperm(len(self.rows), generator=self.generator, device=self.rows.device)
            self.waiting = torch.cat([self.waiting, self.rows[order]])
        batch, self.waiting = self.waiting[: self.batch_size], self.waiting[self.batch_size :]
        return batch[self.rank :: self.world]


@dataclass
class TrainingData:
    """The volumes of one experiment, prepared and divided by patient.

    ``train`` holds labelled and unlabelled volumes alike (``split.labelled`` says which patients' labels may be used).
    """

    info: DatasetInfo
    split: Split
    train: list[Prepared]
    val: list[Prepared]
    test: list[Prepared]
    _slices: dict[tuple[str, bool], Slices] = field(default_factory=dict, repr=False)
    _patches: dict[tuple[str, tuple[int, int, int], bool], Patches] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> int:
        """Number of classes, background included."""
        return len(self.info.classes)

    def slices(self, device: torch.device | str, everything: bool = False) -> Slices:
        """The training slices on ``device``, moved there once.

        Args:
            everything: also the images (never the labels) of the validation and test patients, as the transductive
                pre-training of PCL and CORAL has it.
        """
        key = (str(device), everything)
        if key not in self._slices:
            volumes = self.train + (self.val + self.test if everything else [])
            self._slices[key] = Slices.of(volumes, self.split.labelled, device)
        return self._slices[key]

    def patches(self, device: torch.device | str, size: tuple[int, int, int], everything: bool = False) -> Patches:
        """Random patches of the training volumes for a 3D method, brought to ``device``; see `Patches`.

        Args:
            size: (z, y, x) in voxels.
            everything: as in `slices`.
        """
        key = (str(device), size, everything)
        if key not in self._patches:
            volumes = self.train + (self.val + self.test if everything else [])
            self._patches[key] = Patches.of(volumes, self.split.labelled, size, device)
        return self._patches[key]

    def fingerprint(self, labels: bool, everything: bool = False) -> str:
        """A hash of what a stage of training can see: every volume's content and, with ``labels``, who is labelled."""
        volumes = self.train + (self.val + self.test if everything else [])
        digest = hashlib.sha256()
        for volume in volumes:
            digest.update(f"{volume.case.case} {volume.image.shape}".encode())
            digest.update(_bytes(volume.image))
            if labels and volume.label is not None and volume.case.patient in self.split.labelled:
                digest.update(_bytes(volume.label))
        return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    """An array's bytes in C order, without a copy of a memory-mapped volume."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
