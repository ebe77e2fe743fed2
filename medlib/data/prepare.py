"""Volumes to arrays a network can eat: resampled, normalised, once, on disk; square slices or whole volumes.

`prepare` writes one folder per scan under the cache. A second run opens them memory-mapped without touching a voxel.
A scan whose files, protocol or way of preparing changed gets another folder, so nothing stale is ever read; the
whole cache may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..paths import resolve, written_whole
from .cases import Case, DataError, slice_positions
from .readers import load_volume

VERSION = 1  # of what this module computes: another number, another cache
UNLABELLED = -1  # label value of a voxel that no loss may look at
CHUNK = 8  # slices resampled at a time, which bounds the memory above the volume itself
STALE = 3600.0  # seconds after which an unfinished folder is what a killed process left behind
NORMALISATIONS = ("zscore", "minmax", "dataset", "none")
LARGEST = 65504.0  # that float16 holds
SAMPLES = 10_000  # foreground intensities that stand for one scan in the statistics of a data set

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """What is learnt of a data set's foreground: where intensities are cut (or None), their mean and their deviation.

    In the unit of the scans. See `learn_statistics`.
    """

    cut: tuple[float, float] | None
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class Preparation(ABC):
    """How a paper makes arrays of a scan: its intensities, and (in `Protocol` and `VolumeProtocol`) its grid.

    Intensities are first cut: at `window`, two values in the unit of the scans (HU for CT), or at `clip`, two
    percentiles. Then `normalise`:

    - "zscore": to mean 0 and standard deviation 1 of the resampled volume
    - "minmax": to [0, 1], the ends of the window (an HU then has the same value in every scan) or else of the volume
    - "dataset": by the `statistics` that `learn_statistics` found in labelled training scans (nnU-Net, GuidedNet);
      percentiles are then those of the data set's foreground
    - "none": not at all

    All but "dataset" need the volume itself only.
    """

    normalise: str = "zscore"
    clip: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] <= 100:
            raise ValueError(f"clip must be two rising percentiles in 0..100 or None, got {self.clip}")
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window must be two rising intensities or None, got {self.window}")
        if self.window is not None and self.clip is not None:
            raise ValueError(f"give window (intensities) or clip (percentiles), not both: {self.window}, {self.clip}")
        if self.statistics is not None and self.normalise != "dataset":
            raise ValueError(f"statistics are for normalise='dataset', got normalise={self.normalise!r}")

    def for_scan(self, case: Case) -> Self:
        """Itself; without `window` for a scan that says it is no CT, in a data set of both: its values are no HU."""
        no_units = case.info.get("modality", "CT") != "CT"
        return dataclasses.replace(self, window=None) if self.window is not None and no_units else self

    @abstractmethod
    def grid(self, native: Size, spacing: Spacing | None) -> Size:
        """The shape of a resampled scan of shape `native` (Z, H, W)."""

    @abstractmethod
    def frame(self, grid: Size) -> Size:
        """The shape of its arrays: `grid` padded or cropped about the centre of its slices."""

    @abstractmethod
    def inputs(self, image: np.ndarray) -> torch.Tensor:
        """A prepared image (Z, H, W) as a network takes it, (B, 1, *space) float32."""

    def arrays(
        self, image: np.ndarray, label: np.ndarray | None, spacing: Spacing | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A native volume (Z, H, W) and its label to arrays of one shape: `frame`.

        Images are resampled linearly, labels as linearly resampled one-hot maps of which the largest wins. The image is
        float16 (float32 where not normalised), the label uint8.
        """
        grid = self.grid(_size(image), spacing)
        depth, height, width = self.frame(grid)
        resampled = np.empty(grid, np.float32)
        for target, source, weights in _slabs(len(image), grid[0]):
            slab = _blend(torch.from_numpy(image[source])[None], weights)
            resampled[target] = resample(slab, *grid[1:])[0].numpy()
        self.rescale(resampled)
        prepared = np.empty((depth, height, width), np.float32 if self.normalise == "none" else np.float16)
        for start in range(0, depth, CHUNK):
            chunk = slice(start, start + CHUNK)
            part = fit(torch.from_numpy(resampled[chunk]), height, width).numpy()
            prepared[chunk] = part if prepared.dtype == np.float32 else np.clip(part, -LARGEST, LARGEST, out=part)
        if label is None:
            return prepared, None
        del resampled
        mask = np.empty((depth, height, width), np.uint8)
        for target, source, weights in _slabs(len(label), grid[0]):
            mask[target] = fit(_resample_label(label[source], weights, *grid[1:]), height, width).numpy()
        return prepared, mask

    def rescale(self, grid: np.ndarray) -> None:
        """Cut and normalise the intensities of a resampled volume (Z, H, W) in place."""
        cut = self.window
        if self.normalise == "dataset":
            if self.statistics is None:
                raise ValueError("normalise='dataset' needs statistics: take them from learn_statistics")
            cut = self.statistics.cut
        elif self.clip is not None:
            cut = tuple(np.percentile(grid, self.clip))
        if cut is not None:
            np.clip(grid, *cut, out=grid)
            if self.window is not None and grid.min() == grid.max():
                raise DataError(f"no voxel lies within the window {self.window}: is the scan in HU?")
        if self.normalise == "none":
            return
        if self.statistics is not None:
            shift, scale = self.statistics.mean, self.statistics.std
        elif self.normalise == "zscore":
            shift, scale = _moments(grid)
        else:
            low, high = self.window or (grid.min(), grid.max())
            shift, scale = low, high - low
        grid -= np.float32(shift)
        grid /= np.float32(max(float(scale), 1e-6))

    def restore(self, probabilities: torch.Tensor, native: Size, spacing: Spacing | None) -> np.ndarray:
        """Class probabilities (C, *frame) to the most probable class (Z, H, W) uint8 on the native grid.

        Undoes padding and cropping (what was cropped away is background) and interpolates the probabilities, before it
        takes the largest.
        """
        _, height, width = self.grid(native, spacing)
        mask = np.empty(native, np.uint8)
        for target, source, weights in _slabs(probabilities.shape[1], native[0]):
            chunk = _blend(probabilities[:, source].detach().float(), weights)
            outside = fit(torch.ones_like(chunk[:1]), height, width).eq(0)  # cropped away: certainly background
            grid = fit(chunk, height, width)
            grid = torch.cat([grid[:1] + outside, grid[1:]])
            likeliest = resample(grid, *native[1:]).max(dim=0).indices  # four times as fast as argmax
            mask[target] = likeliest.to(torch.uint8).cpu().numpy()
        return mask


@dataclass(frozen=True)
class Protocol(Preparation):
    """How a paper makes slices: `size` px square at `spacing` mm in plane.

    With a spacing (and a scan that knows its own) slices are resampled to it, then padded with zeros or cropped about
    the centre to `size`. Without either, the whole field of view is resized to `size` x `size`, not keeping its aspect,
    as SSL4MIS does. Padding comes after the intensities of `Preparation`: with "zscore", 0 is the mean.
    """

    size: int
    spacing: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 8:
            raise ValueError(f"size must be at least 8 px, got {self.size}")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError(f"spacing must be > 0 mm or None, got {self.spacing}")

    def grid(self, native: Size, spacing: Spacing | None) -> Size:
        if self.spacing is None or spacing is None:
            return native[0], self.size, self.size
        height, width = (max(1, round(n * mm / self.spacing)) for n, mm in zip(native[1:], spacing[1:], strict=True))
        return native[0], height, width

    def frame(self, grid: Size) -> Size:
        return grid[0], self.size, self.size

    def inputs(self, image: np.ndarray) -> torch.Tensor:
        """Slices, (Z, 1, S, S)."""
        return torch.from_numpy(np.array(image, np.float32))[:, None]


@dataclass(frozen=True)
class VolumeProtocol(Preparation):
    """How a paper makes volumes for 3D networks: resampled to `spacing` (z, y, x) mm, whole; None: as they are."""

    spacing: Spacing | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spacing is not None and not (len(self.spacing) == 3 and all(mm > 0 for mm in self.spacing)):
            raise ValueError(f"spacing must be (z, y, x) in mm, each > 0, or None, got {self.spacing}")

    def grid(self, native: Size, spacing: Spacing | None) -> Size:
        if self.spacing is None:
            return native
        if spacing is None:
            raise DataError(
                f"a scan without voxel spacing cannot be resampled to {self.spacing} mm: use VolumeProtocol(None)"
            )
        depth, height, width = (max(1, round(n * a / b)) for n, a, b in zip(native, spacing, self.spacing, strict=True))
        return depth, height, width

    def frame(self, grid: Size) -> Size:
        return grid

    def inputs(self, image: np.ndarray) -> torch.Tensor:
        """One volume, (1, 1, Z, H, W)."""
        return torch.from_numpy(np.array(image, np.float32))[None, None]


def _size(array: np.ndarray) -> Size:
    depth, height, width = array.shape
    return depth, height, width


@dataclass
class Prepared:
    """One prepared scan: `image` (Z, S, S) float16 (float32 where not normalised) and `label` (Z, S, S) uint8 or None.

    With a `VolumeProtocol` both are (Z, H, W) of any shape. They are memory-mapped and read-only. `native_shape`
    (Z, H, W) and `spacing` (z, y, x) in mm or None are those of `load_volume(case)`, the grid that metrics are computed
    on and `restore` returns to.
    """

    case: Case
    protocol: Preparation
    image: np.ndarray
    label: np.ndarray | None
    native_shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None

    @property
    def positions(self) -> np.ndarray:
        """The position of each slice, (Z,) float32 in (0, 1]."""
        return slice_positions(len(self.image))

    def inputs(self) -> torch.Tensor:
        """The image as a network takes it, float32 in memory: slices (Z, 1, S, S) or one volume (1, 1, Z, H, W)."""
        return self.protocol.inputs(self.image)

    def restore(self, probabilities: torch.Tensor) -> np.ndarray:
        """Class probabilities (C, Z, S, S) on the prepared grid to a label map (Z, H, W) uint8 on the native one.

        See `Preparation.restore`. Raises `ValueError` for another shape.
        """
        if probabilities.ndim != 4 or tuple(probabilities.shape[1:]) != self.image.shape:
            expected = ", ".join(map(str, self.image.shape))
            raise ValueError(f"probabilities must be (C, {expected}), got {tuple(probabilities.shape)}")
        return self.protocol.restore(probabilities, self.native_shape, self.spacing)


def resample(array: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(A, B, H, W) to (A, B, height, width): linear, averaging over what a coarser pixel covers."""
    if tuple(array.shape[2:]) == (height, width):
        return array
    return F.interpolate(array, size=(height, width), mode="bilinear", antialias=True)


def fit(array: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., H, W) to (..., height, width) about the centre: padded with zeros where smaller, cropped where larger.

    `fit` of the result back to (H, W) puts every kept pixel where it was.
    """
    for axis, target in ((-2, height), (-1, width)):
        size = array.shape[axis]
        before = abs(target - size) // 2
        if target < size:
            array = array.narrow(axis, before, target)
        elif target > size:
            pad = (before, target - size - before)
            array = F.pad(array, (0, 0, *pad) if axis == -2 else pad)
    return array


def _slabs(depth: int, target: int) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """How `depth` slices are resampled to `target`, `CHUNK` at a time: (slices made, slices they are made of, weights).

    Weights are (made, made of), those of `resample` along one axis; None where the slices stay as they are.
    """
    if depth == target:
        for start in range(0, depth, CHUNK):
            yield slice(start, start + CHUNK), slice(start, start + CHUNK), None
        return
    weights = resample(torch.eye(depth)[None, None], target, depth)[0, 0]
    for start in range(0, target, CHUNK):
        rows = weights[start : start + CHUNK]
        used = rows.ne(0).any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        yield slice(start, start + CHUNK), slice(first, last), rows[:, first:last]


def _blend(slab: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """(A, n, H, W) to (A, m, H, W) with weights (m, n)."""
    if weights is None:
        return slab
    return (weights.to(slab.device) @ slab.flatten(2)).unflatten(2, slab.shape[2:])


def _resample_label(label: np.ndarray, weights: torch.Tensor | None, height: int, width: int) -> torch.Tensor:
    """A slab of a label map (n, H, W) to (m, height, width) uint8: the class whose resampled one-hot map is largest.

    One class at a time, and only those that occur: sixteen one-hot maps of a CT would not fit into memory.
    """
    best, winner = None, None
    for value in np.flatnonzero(np.bincount(label.ravel())):
        share = resample(_blend(torch.from_numpy((label == value).astype(np.float32))[None], weights), height, width)[0]
        if best is None or winner is None:
            best, winner = share, torch.full(share.shape, int(value), dtype=torch.uint8)
        else:
            winner.masked_fill_(share > best, int(value))
            best = torch.maximum(best, share)
    assert winner is not None
    return winner


def _moments(grid: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in float64, a slice at a time: `np.std` would copy the whole volume in float64."""
    mean = grid.mean(dtype=np.float64)
    squares = sum(float(np.square(part - mean).sum()) for part in grid)
    return float(mean), math.sqrt(squares / grid.size)


def learn_statistics(
    cases: Sequence[Case], protocol: Preparation, cache: str | Path, workers: int = 2, progress: bool = True
) -> Statistics:
    """Mean, standard deviation and, with `protocol.clip`, percentiles of the foreground intensities of `cases`.

    For `dataclasses.replace(protocol, statistics=...)` where `normalise` is "dataset". `cases` must be the labelled
    training scans: whatever else is among them would be learnt from. Each scan counts the same, however large its
    organs: it is represented by `SAMPLES` evenly spaced order statistics of its foreground (label > 0) on its native
    grid. The percentiles are those of all scans together, mean and deviation those of the intensities after the cut
    (nnU-Net takes them before it). The result is kept in `cache`.

    Raises `ValueError` for a case without a label, `DataError` where no scan has foreground or one cannot be read.
    """
    unlabelled = [case.case for case in cases if not case.labels]
    if unlabelled or not cases:
        raise ValueError(f"statistics are learnt from labelled scans, at least one; without a label: {unlabelled}")
    cases = sorted(cases, key=lambda case: case.case)
    folder = _make_cache(cache) / cases[0].dataset
    keys = [cache_key(case, dataclasses.replace(protocol, statistics=None)) for case in cases]
    path = folder / f"statistics-{hashlib.sha256(repr((SAMPLES, keys)).encode()).hexdigest()[:16]}.json"
    if path.is_file():
        known = json.loads(path.read_text())
        return Statistics(tuple(known["cut"]) if known["cut"] else None, known["mean"], known["std"])
    found = _each(_foreground, cases, workers, f"statistics of {cases[0].dataset}", progress, of=len(cases))
    values = np.concatenate(found).astype(np.float64)
    if not len(values):
        raise DataError(f"no voxel of {len(cases)} labels is foreground ({cases[0].labels[0]}, ...): nothing to learn")
    cut = protocol.window
    if protocol.clip is not None:
        low, high = np.percentile(values, protocol.clip)
        cut = (float(low), float(high))
    if cut is not None:
        values.clip(*cut, out=values)
    learnt = Statistics(cut, float(values.mean()), float(values.std()))
    folder.mkdir(exist_ok=True)
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(learnt)))
    return learnt


def _foreground(case: Case) -> np.ndarray:
    """`SAMPLES` foreground intensities of a scan, rising, evenly spaced by rank; none where it has no foreground."""
    volume = load_volume(case)
    assert volume.label is not None
    values = volume.image[volume.label > 0]
    values.sort()
    ranks = (np.arange(SAMPLES) + 0.5) / SAMPLES * len(values)
    return values[ranks.astype(int)] if len(values) else values


def cache_key(case: Case, protocol: Preparation) -> str:
    """16 hex digits that change with the scan's files (path, size, time of change), the protocol and `VERSION`."""
    files = [(str(path), *_stamp(path)) for path in (*case.images, *case.labels)]
    facts = (VERSION, case.dataset, case.case, case.reader, case.frame, case.about.classes, files, repr(protocol))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): read the data set again") from error
    return state.st_size, state.st_mtime_ns


def prepare(
    cases: Sequence[Case], protocol: Preparation, cache: str | Path, workers: int = 2, progress: bool = True
) -> list[Prepared]:
    """All `cases` under a protocol, in the order given: what `cache` has is opened, the rest made by `workers` threads.

    Interrupted, it goes on where it stopped; two processes may prepare the same cases at the same time. No case is
    left out: `DataError` lists every case that could not be prepared, `OSError` says that the cache cannot be written.
    """
    if protocol.normalise == "dataset" and protocol.statistics is None:
        raise ValueError("normalise='dataset' needs statistics: take them from learn_statistics")
    folder = _make_cache(cache)
    _sweep(folder)
    protocols = [protocol.for_scan(case) for case in cases]
    keys = [cache_key(case, own) for case, own in zip(cases, protocols, strict=True)]
    targets = [folder / case.dataset / f"{case.case}-{key}" for case, key in zip(cases, keys, strict=True)]
    found = [_open(*scan) for scan in zip(cases, protocols, targets, strict=True)]
    todo = [index for index, item in enumerate(found) if item is None]
    made = _each(
        lambda index: _make(cases[index], protocols[index], targets[index]),
        todo,
        workers,
        f"preparing {cases[0].dataset if cases else ''}",
        progress,
        of=len(cases),
    )
    for index, item in zip(todo, made, strict=True):
        found[index] = item
    return [item for item in found if item is not None]


def _make_cache(cache: str | Path) -> Path:
    folder = resolve(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the cache {folder} ({error.strerror}): choose another") from error
    return folder


def _each(
    work: Callable[[S], T], scans: Sequence[S], workers: int, description: str, progress: bool, of: int
) -> list[T]:
    """`work` of every scan, by `workers` threads, in the order given; one `DataError` names all that fail."""
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not scans:
        return []
    results: dict[int, T] = {}
    failures: list[str] = []
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(work, scan): index for index, scan in enumerate(scans)}
        with tqdm(total=len(scans), desc=description, unit="scan", disable=not progress) as bar:
            for job in as_completed(jobs):
                try:
                    results[jobs[job]] = job.result()
                except (DataError, FileNotFoundError) as error:
                    failures.append(str(error))
                bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures:
        shown = "\n".join(sorted(failures)[:10])
        raise DataError(f"{len(failures)} of {of} scans cannot be prepared:\n{shown}")
    return [results[index] for index in range(len(scans))]


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written long ago."""
    for path in folder.glob("*/.unfinished-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue


def _open(case: Case, protocol: Preparation, target: Path) -> Prepared | None:
    """What lies in the cache for a case, or None where nothing does or what does was damaged."""
    try:
        facts = json.loads((target / "case.json").read_text())
        native, spacing = tuple(facts["native_shape"]), facts["spacing"]
        image = np.load(target / "image.npy", mmap_mode="r")
        label = np.load(target / "label.npy", mmap_mode="r") if case.labels else None
    except FileNotFoundError:
        return None
    except (ValueError, OSError, EOFError, KeyError, TypeError):  # cut off, by a full disk or a copy that stopped
        return None
    if label is not None and label.shape != image.shape:
        return None
    return Prepared(case, protocol, image, label, native, tuple(spacing) if spacing else None)


def _make(case: Case, protocol: Preparation, target: Path) -> Prepared:
    volume = load_volume(case)
    try:
        image, label = protocol.arrays(volume.image, volume.label, volume.spacing)
    except DataError as error:
        raise DataError(f"{case.images[0]}: {error}") from error
    facts = {"case": case.case, "native_shape": volume.image.shape, "spacing": volume.spacing}
    unfinished = target.parent / f".unfinished-{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        np.save(unfinished / "image.npy", image)
        if label is not None:
            np.save(unfinished / "label.npy", label)
        (unfinished / "case.json").write_text(json.dumps(facts))
        _publish(unfinished, target, case, protocol)
    except OSError as error:
        free = shutil.disk_usage(target.parent.parent).free // 2**20
        message = f"cannot write {case.case} to the cache {target.parent} ({error.strerror or error}; {free} MiB free)"
        raise OSError(error.errno, f"{message}: make room or choose another cache folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    done = _open(case, protocol, target)
    if done is None:
        raise DataError(f"{target} was written but cannot be read back: is the disk full or failing?")
    return done


def _publish(unfinished: Path, target: Path, case: Case, protocol: Preparation) -> None:
    """Move a finished folder into place in one step. Where another process was first, its folder stays."""
    try:
        os.replace(unfinished, target)
    except OSError:
        if not target.is_dir():
            raise
        if _open(case, protocol, target) is None:  # damaged: out of the way, then in
            os.replace(target, unfinished.with_name(f"{unfinished.name}-damaged"))
            shutil.rmtree(unfinished.with_name(f"{unfinished.name}-damaged"), ignore_errors=True)
            os.replace(unfinished, target)
