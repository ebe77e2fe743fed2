"""Reading NIfTI files: errors that say what to do, and arrays turned into one orientation by the affine."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from .cases import DataError

LEFT = np.array([-1.0, 0.0, 0.0])  # world axes of NIfTI point to the patient's right, anterior and superior (RAS)


def open_nifti(path: Path, dimensions: int) -> nibabel.Nifti1Image:
    """The header of a NIfTI file with `dimensions` axes; voxels are read later, by `read_voxels`.

    Raises `DataError` for a file that is empty, cut off, no NIfTI, or that has another number of axes.
    """
    try:
        state = path.stat()
    except OSError as error:  # a link that leads nowhere or in a circle
        raise DataError(f"{path} cannot be opened ({error.strerror}): unpack it again") from error
    if state.st_size == 0:
        raise DataError(f"{path} is empty: download or unpack it again")
    try:
        image = _load(path, state.st_mtime_ns, state.st_size)
    except PermissionError as error:
        raise DataError(f"{path} may not be read: change its permissions") from error
    except Exception as error:  # nibabel, gzip and zlib raise a dozen unrelated types for a broken file
        raise DataError(f"{path} cannot be read as NIfTI ({error}): download or unpack it again") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise DataError(f"{path} is a {type(image).__name__}, expected a NIfTI-1 file: convert it")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path} holds {image.get_data_dtype()} voxels, expected one number a voxel: convert it")
    if len(image.shape) != dimensions:
        raise DataError(
            f"{path} has shape {image.shape}, expected {dimensions} axes: is it another file under this name?"
        )
    return image


@lru_cache(maxsize=1024)
def _load(path: Path, changed: int, size: int) -> nibabel.filebasedimages.FileBasedImage:
    """The header of a file as it was at that time. Finding, checking and loading a scan each ask for it."""
    return nibabel.load(path)


def read_voxels(image: nibabel.Nifti1Image, path: Path) -> np.ndarray:
    """The voxels of an opened file, in the file's own order; float32 where the header scales them."""
    with _reading(path):
        proxy: Any = image.dataobj
        return np.asanyarray(proxy) if (proxy.slope, proxy.inter) == (1, 0) else np.asarray(proxy, dtype=np.float32)


def read_channel(image: nibabel.Nifti1Image, path: Path, channel: int) -> np.ndarray:
    """One channel (X, Y, Z) of an opened 4D file, without the others in memory."""
    with _reading(path):
        return np.asanyarray(image.dataobj[..., channel])


def read_frame(path: Path, frame: int) -> np.ndarray:
    """One frame (X, Y, Z) of a 4D file whose frames are asked for in a row."""
    return _read_all_frames(path, path.stat().st_mtime_ns)[..., frame]


@lru_cache(maxsize=2)
def _read_all_frames(path: Path, stamp: int) -> np.ndarray:
    """A whole 4D file. The last two are kept: the frames of one are asked for in a row, and gzip cannot skip to one."""
    return read_voxels(open_nifti(path, 4), path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} may not be read: change its permissions") from error
    except Exception as error:
        raise DataError(f"{path} is cut off or damaged ({error}): download or unpack it again") from error


def check_whole(path: Path) -> None:
    """Read a compressed file to its end, where the checksum is; `DataError` where it is not that of the content.

    nibabel stops at the last voxel it needs, so a flipped bit would pass.
    """
    if path.suffix == ".gz":
        with _reading(path), gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def directions(image: nibabel.Nifti1Image, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Unit vectors of the array axes in RAS world space, one per column, and the voxel spacing (x, y, z) in mm."""
    matrix = np.asarray(image.affine, dtype=float)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(matrix).all() or spacing.min() <= 1e-3 or abs(np.linalg.det(matrix / spacing)) < 0.5:
        raise DataError(f"{path} has an affine that no scan can have ({matrix.tolist()}): repair the header")
    return matrix / spacing, (float(spacing[0]), float(spacing[1]), float(spacing[2]))
