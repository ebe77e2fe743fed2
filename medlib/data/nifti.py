"""Reading NIfTI files: errors that say what to do, and arrays turned into one orientation by the affine."""

from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np

from .cases import DataError

LEFT = np.array([-1.0, 0.0, 0.0])  # world axes of NIfTI point to the patient's right, anterior and superior (RAS)


def open_nifti(path: Path, dimensions: int) -> nibabel.Nifti1Image:
    """The header of a NIfTI file with `dimensions` axes; voxels are read later, by `read_voxels`.

    Raises `DataError` for a file that is empty, cut off, no NIfTI, or that has another number of axes.
    """
    try:
        size = path.stat().st_size
    except OSError as error:  # a link that leads nowhere or in a circle
        raise DataError(f"{path} cannot be opened ({error.strerror}): unpack it again") from error
    if size == 0:
        raise DataError(f"{path} is empty: download or unpack it again")
    try:
        image = nibabel.load(path)
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


def read_voxels(image: nibabel.Nifti1Image, path: Path, frame: int | None = None) -> np.ndarray:
    """The voxels of an opened file, (X, Y, Z) in the file's own order; `frame` picks one of a 4D file."""
    if frame is not None:
        return _read_all_frames(path, path.stat().st_mtime_ns)[..., frame]
    try:
        return np.asanyarray(image.dataobj)
    except Exception as error:
        raise DataError(f"{path} is cut off or damaged ({error}): download or unpack it again") from error


@lru_cache(maxsize=2)
def _read_all_frames(path: Path, stamp: int) -> np.ndarray:
    """A whole 4D file. The last two are kept: the frames of one are asked for in a row, and gzip cannot skip to one."""
    return read_voxels(open_nifti(path, 4), path)


def directions(image: nibabel.Nifti1Image, path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Unit vectors of the array axes in RAS world space, one per column, and the voxel spacing (x, y, z) in mm."""
    matrix = np.asarray(image.affine, dtype=float)[:3, :3]
    spacing = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(matrix).all() or spacing.min() <= 1e-6 or abs(np.linalg.det(matrix / spacing)) < 0.5:
        raise DataError(f"{path} has an affine that no scan can have ({matrix.tolist()}): repair the header")
    return matrix / spacing, (float(spacing[0]), float(spacing[1]), float(spacing[2]))
