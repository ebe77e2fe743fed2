"""From a drawn signal to the numbers a scanner stores, and the NIfTI files that hold them."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from medlib.data.phantoms.shapes import Array, Grid, rotate

RAYS = 512  # directions in which a streak may run


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


def ct_scan(
    signal: Array, rng: np.random.Generator, *, pixel: float, sigma: float, blur: float, streaks: float
) -> np.ndarray:
    """What a CT scanner stores for `signal` (Z, H, W) in HU with pixels of `pixel` mm: int16 of the same shape.

    The kernel blurs by `blur` mm in plane. Quantum noise has a standard deviation of about `sigma` HU in a slim body
    and more where the beam passes more tissue; it is correlated in plane, as the kernel makes it. `streaks` HU fan out
    from the densest bone of a slice.
    """
    dense = np.clip(signal, -1000, 1500)
    for axis in (-1, -2):
        dense = gaussian_filter1d(dense, blur / pixel, axis=axis, truncate=3)
    tissue = np.clip(dense / 1000 + 1, 0, 2)  # in units of water
    thick = tissue
    for axis in (-1, -2):
        thick = uniform_filter1d(thick, max(3, round(130 / pixel)), axis=axis, mode="constant")
    noise = rng.standard_normal(signal.shape, dtype=np.float32)
    for axis in (-1, -2):
        noise = gaussian_filter1d(noise, 0.7, axis=axis, truncate=3)
    noise *= np.float32(sigma / 0.4)  # of the white noise, that share is left
    dense += noise * np.exp(1.6 * thick - 0.8)

    depth, rows, columns = signal.shape
    bone = np.clip(signal - 300, 0, 900)
    amount = bone.sum((1, 2)) * np.float32(pixel**2)  # HU mm2 of each slice
    weight = np.maximum(bone.sum((1, 2)), 1)
    y0 = (bone.sum(2) * np.arange(rows, dtype=np.float32)).sum(1) / weight
    x0 = (bone.sum(1) * np.arange(columns, dtype=np.float32)).sum(1) / weight
    y = np.arange(rows, dtype=np.float32)[None, :, None] - y0[:, None, None]
    x = np.arange(columns, dtype=np.float32)[None, None, :] - x0[:, None, None]
    fan = gaussian_filter1d(rng.standard_normal((depth, RAYS), dtype=np.float32), 1.5, axis=1, mode="wrap")
    angle = np.arctan2(y, x) * np.float32(RAYS / (2 * np.pi))
    rays = np.take_along_axis(fan, (angle.astype(np.int16) % RAYS).reshape(depth, -1).astype(np.intp), 1)
    strength = streaks * 2.3 * np.clip(amount / 4e5, 0, 1.5)[:, None, None]
    dense += rays.reshape(signal.shape) * strength * np.exp(-np.hypot(x, y) * np.float32(pixel / 90))
    return np.clip(np.rint(dense), -1024, 3071).astype(np.int16)


def place(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume as nibabel wants it, (X, Y, Z), its axes along `codes` (such as "LPS"), and its affine.

    `array` (Z, Y, X) and `affine`, voxel (x, y, z) -> world, have axes along right, anterior and superior.
    """
    order = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return apply_orientation(array.T, order), affine @ inv_ornt_aff(order, array.shape[::-1])


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write `array` (X, Y, Z[, T]) in mm, compressed where the name ends in .gz.

    The same array gives the same bytes: there is no time stamp in the gzip header.
    """
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, compresslevel=1, mtime=0) if path.suffix == ".gz" else content)
