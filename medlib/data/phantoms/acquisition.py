"""From a drawn signal to the numbers a scanner stores, and the NIfTI files that hold them."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter1d

from medlib.data.phantoms.shapes import Array, Grid, rotate


def coil_field(grid: Grid, reach: float, angle: float, ripple: Array) -> Array:
    """Receive sensitivity (H, W): 1 at the centre, grows towards `angle` by e every `reach` mm, times exp(`ripple`)."""
    along, _ = rotate(grid.x, grid.y, angle)
    return np.exp(np.clip(along / reach, -2, 2) + ripple)


def banding(grid: Grid, radius: float, unrest: Array) -> Array:
    """Dark bands (H, W) of balanced steady-state pictures where the field is off resonance: 1 between, 0 in a band.

    The field is good in the middle; the first band lies about `radius` mm out, the next ones closer and closer.
    `unrest` (H, W), in radian, bends them.
    """
    phase = np.pi * (np.hypot(grid.x, grid.y) / radius) ** 5 + unrest
    return 1 - 0.85 * np.exp(-((np.cos(phase / 2) / 0.3) ** 2))


def scan(
    signal: Array, rng: np.random.Generator, *, field: Array, sigma: float, gain: float, blur: float
) -> np.ndarray:
    """What the scanner stores for `signal` (..., H, W), where blood is 1: int16 of the same shape.

    `field` (H, W) multiplies the signal, which passes a point spread of `blur` pixels; complex noise of `sigma` (share
    of blood) is added before the magnitude is taken (Rician); `gain` is the stored value of blood.
    """
    real = signal * field
    for axis in (-1, -2):
        real = gaussian_filter1d(real, blur, axis=axis, truncate=2)
    real += np.float32(sigma) * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = np.float32(sigma) * rng.standard_normal(signal.shape, dtype=np.float32)
    magnitude = np.hypot(real, imaginary)
    magnitude *= gain
    return np.clip(magnitude, 0, 4095).astype(np.int16)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write `array` (X, Y, Z[, T]) in mm; the same array gives the same bytes (no time stamp in the gzip header)."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
