"""Volumes to arrays a network can eat: resampled, normalised, square, once, on disk.

`prepare` writes one folder per scan under the cache. A second run opens them memory-mapped without touching a voxel.
A scan whose files, protocol or way of preparing changed gets another folder, so nothing stale is ever read; the
whole cache may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..paths import resolve
from .cases import Case, DataError, DatasetInfo, slice_positions
from .readers import load_volume

VERSION = 1  # of what this module computes: another number, another cache
CHUNK = 8  # slices resampled at a time, which bounds the memory above the volume itself
STALE = 3600.0  # seconds after which an unfinished folder is what a killed process left behind
NORMALISATIONS = ("zscore", "minmax", "none")


@dataclass(frozen=True)
class Protocol:
    """How a paper makes slices: `size` px square, `spacing` mm in plane, intensities.

    With a spacing (and a scan that knows its own) slices are resampled to it, then padded with zeros or cropped about
    the centre to `size`. Without either, the whole field of view is resized to `size` x `size`, not keeping its aspect,
    as SSL4MIS does. `clip` are two percentiles of the resampled volume, cut before `normalise`: "zscore" (mean and
    standard deviation of the volume), "minmax" (to [0, 1]) or "none". Padding comes last: then 0 is
    the mean.
    """

    size: int
    spacing: float | None = None
    normalise: str = "zscore"
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size must be at least 8 px, got {self.size}")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError(f"spacing must be > 0 mm or None, got {self.spacing}")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, got {self.normalise!r}")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] <= 100:
            raise ValueError(f"clip must be two rising percentiles in 0..100 or None, got {self.clip}")

    def grid(self, native: tuple[int, int], spacing: tuple[float, float, float] | None) -> tuple[int, int]:
        """The height and width of a resampled slice, before it is padded or cropped to `size`."""
        if self.spacing is None or spacing is None:
            return self.size, self.size
        height, width = (max(1, round(n * mm / self.spacing)) for n, mm in zip(native, spacing[1:], strict=True))
        return height, width


def default_protocol(info: DatasetInfo) -> Protocol:
    """The protocol of the papers for a data set: its size and spacing, z-scored."""
    return Protocol(size=info.size, spacing=info.spacing)


@dataclass
class Prepared:
    """One prepared scan: `image` (Z, S, S) float16 (float32 where not normalised) and `label` (Z, S, S) uint8 or None.

    Both are memory-mapped and read-only. `native_shape` (Z, H, W) and `spacing` (z, y, x) in mm or None are those of
    `load_volume(case)`, the grid that metrics are computed on and `restore` returns to.
    """

    case: Case
    protocol: Protocol
    image: np.ndarray
    label: np.ndarray | None
    native_shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None

    @property
    def positions(self) -> np.ndarray:
        """The position of each slice, (Z,) float32 in (0, 1]."""
        return slice_positions(len(self.image))

    def restore(self, probabilities: torch.Tensor) -> np.ndarray:
        """Class probabilities (C, Z, S, S) on the prepared grid to a label map (Z, H, W) uint8 on the native one.

        Undoes padding and cropping (what was cropped away is background), interpolates the probabilities, then takes
        the most probable class. Raises `ValueError` for another shape.
        """
        expected = (len(self.image), self.protocol.size, self.protocol.size)
        if probabilities.ndim != 4 or tuple(probabilities.shape[1:]) != expected:
            raise ValueError(
                f"probabilities must be (C, {', '.join(map(str, expected))}), got {tuple(probabilities.shape)}"
            )
        native = (self.native_shape[1], self.native_shape[2])
        height, width = self.protocol.grid(native, self.spacing)
        slices = []
        for chunk in probabilities.detach().float().split(CHUNK, dim=1):
            outside = fit(torch.ones_like(chunk[:1]), height, width).eq(0)  # cropped away: certainly background
            grid = fit(chunk, height, width)
            grid = torch.cat([grid[:1] + outside, grid[1:]])
            slices.append(resample(grid, *native).argmax(dim=0).to(torch.uint8).cpu())
        return torch.cat(slices).numpy()


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


def prepare_arrays(
    image: np.ndarray,
    label: np.ndarray | None,
    spacing: tuple[float, float, float] | None,
    classes: int,
    protocol: Protocol,
) -> tuple[np.ndarray, np.ndarray | None]:
    """A native volume (Z, H, W) and its label to (Z, S, S) arrays under a protocol.

    Images are resampled linearly, labels as linearly resampled one-hot maps of which the largest wins.
    """
    height, width = protocol.grid((image.shape[1], image.shape[2]), spacing)
    grid = np.empty((len(image), height, width), np.float32)
    for start in range(0, len(image), CHUNK):
        chunk = torch.from_numpy(image[start : start + CHUNK])
        grid[start : start + CHUNK] = resample(chunk[None], height, width)[0].numpy()
    normalise(grid, protocol)
    size = protocol.size
    kind = np.float32 if protocol.normalise == "none" else np.float16
    squares = fit(torch.from_numpy(grid), size, size).numpy().astype(kind)
    if label is None:
        return squares, None
    masks = np.empty((len(label), size, size), np.uint8)
    for start in range(0, len(label), CHUNK):
        chunk = torch.from_numpy(label[start : start + CHUNK]).long()
        one_hot = F.one_hot(chunk, classes).movedim(-1, 1).float()
        masks[start : start + CHUNK] = fit(resample(one_hot, height, width).argmax(dim=1), size, size).numpy()
    return squares, masks


def normalise(grid: np.ndarray, protocol: Protocol) -> None:
    """Clip and scale a resampled volume in place, by statistics of this volume alone."""
    if protocol.clip is not None:
        low, high = np.percentile(grid, protocol.clip)
        np.clip(grid, low, high, out=grid)
    if protocol.normalise == "none":
        return
    zscore = protocol.normalise == "zscore"
    shift = grid.mean(dtype=np.float64) if zscore else grid.min()
    scale = grid.std(dtype=np.float64) if zscore else grid.max() - shift
    grid -= np.float32(shift)
    grid /= np.float32(max(float(scale), 1e-6))


def cache_key(case: Case, protocol: Protocol) -> str:
    """16 hex digits that change with the scan's files (path, size, time of change), the protocol and `VERSION`."""
    files = [(str(path), *_stamp(path)) for path in (*case.images, *case.labels)]
    facts = (VERSION, case.dataset, case.case, case.reader, case.frame, files, dataclasses.astuple(protocol))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): read the data set again") from error
    return state.st_size, state.st_mtime_ns


def prepare(
    cases: Sequence[Case], protocol: Protocol, cache: str | Path, workers: int = 2, progress: bool = True
) -> list[Prepared]:
    """All `cases` under a protocol, in the order given: what `cache` has is opened, the rest made by `workers` threads.

    Interrupted, it goes on where it stopped; two processes may prepare the same cases at the same time. No case is
    left out: `DataError` lists every case that could not be prepared, `OSError` says that the cache cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folder = resolve(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the cache {folder} ({error.strerror}): choose another") from error
    _sweep(folder)
    targets = [folder / case.dataset / f"{case.case}-{cache_key(case, protocol)}" for case in cases]
    found = [_open(case, protocol, target) for case, target in zip(cases, targets, strict=True)]
    todo = [index for index, item in enumerate(found) if item is None]
    if todo:
        failures: list[str] = []
        pool = ThreadPoolExecutor(workers)
        try:
            jobs = {pool.submit(_make, cases[index], protocol, targets[index]): index for index in todo}
            bar = tqdm(total=len(todo), desc=f"preparing {cases[0].dataset}", unit="scan", disable=not progress)
            with bar:
                for job in as_completed(jobs):
                    try:
                        found[jobs[job]] = job.result()
                    except (DataError, FileNotFoundError) as error:
                        failures.append(str(error))
                    bar.update()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if failures:
            shown = "\n".join(sorted(failures)[:10])
            raise DataError(f"{len(failures)} of {len(cases)} scans cannot be prepared:\n{shown}")
    return [item for item in found if item is not None]


def _sweep(folder: Path) -> None:
    """Remove what a killed process left half-written long ago."""
    for path in folder.glob("*/.unfinished-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue


def _open(case: Case, protocol: Protocol, target: Path) -> Prepared | None:
    """What lies in the cache for a case, or None where nothing does or what does was damaged."""
    try:
        facts = json.loads((target / "case.json").read_text())
        image = np.load(target / "image.npy", mmap_mode="r")
        label = np.load(target / "label.npy", mmap_mode="r") if case.labels else None
    except FileNotFoundError:
        return None
    except (ValueError, OSError, EOFError):  # cut off, by a full disk or a copy that stopped
        return None
    spacing = facts["spacing"]
    return Prepared(case, protocol, image, label, tuple(facts["native_shape"]), tuple(spacing) if spacing else None)


def _make(case: Case, protocol: Protocol, target: Path) -> Prepared:
    volume = load_volume(case)
    image, label = prepare_arrays(volume.image, volume.label, volume.spacing, len(case.about.classes), protocol)
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
        message = f"cannot write {case.case} to the cache {target.parent} ({error.strerror}; {free} MiB free)"
        raise OSError(error.errno, f"{message}: make room or choose another cache folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    done = _open(case, protocol, target)
    if done is None:
        raise DataError(f"{target} was written but cannot be read back: is the disk full or failing?")
    return done


def _publish(unfinished: Path, target: Path, case: Case, protocol: Protocol) -> None:
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
