"""Drawing with signed distances: a shape is a distance in mm (negative inside), painting is anti-aliased.

Everything lives on a `Grid` in mm. A pixel that a contour cuts is covered in part, as in a scanner.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

Array = NDArray[np.floating[Any]]  # float32 throughout; a plain float mixes in without widening it
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Grid:
    """Pixel centres of a slice in mm: `x` (1, W) grows to the right, `y` (H, 1) downwards, `pixel` is their step."""

    x: Array
    y: Array
    pixel: float

    @classmethod
    def centred(cls, height: int, width: int, pixel: float) -> "Grid":
        """A grid of (height, width) pixels whose centre is the origin."""
        x = (np.arange(width, dtype=np.float32) - (width - 1) / 2) * pixel
        y = (np.arange(height, dtype=np.float32) - (height - 1) / 2) * pixel
        return cls(x[None, :], y[:, None], pixel)

    def window(self, x: float, y: float, radius: float) -> Window:
        """The index window that holds every pixel within `radius` mm of (x, y); empty when all lie outside."""
        return _span(self.y[:, 0], y, radius), _span(self.x[0], x, radius)

    def crop(self, window: Window) -> "Grid":
        """The same coordinates inside `window`."""
        rows, columns = window
        return Grid(self.x[:, columns], self.y[rows], self.pixel)


def _span(centres: Array, middle: float, radius: float) -> slice:
    first, last = np.searchsorted(centres, (middle - radius, middle + radius))
    return slice(int(first), int(last))


def rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates in a frame turned by `angle` (radian, from x towards y)."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def ellipse_distance(x: Array, y: Array, a: Array | float, b: Array | float) -> Array:
    """Distance in mm to the ellipse with half axes a, b (mm, > 0): exact for a circle, first order near any outline."""
    u, v = x / a, y / b
    rho = np.sqrt(u * u + v * v) + np.float32(1e-6)
    slope = np.sqrt((u / a) ** 2 + (v / b) ** 2) / rho + np.float32(1e-6)
    return (rho - 1) / slope


def coverage(distance: Array, width: float) -> Array:
    """Share of a pixel of `width` mm inside a contour at `distance` mm: 1 inside, 0 outside, linear in between."""
    return np.clip(0.5 - distance / width, 0, 1)


def rim(distance: Array, width: float) -> Array:
    """Share of a pixel of `width` mm that a contour line passes through: 1 on the contour, 0 a pixel away."""
    return np.clip(1 - np.abs(distance) / width, 0, 1)


def paint(signal: Array, cover: Array, value: Array | float) -> None:
    """Lay `value` over `signal` in place where `cover` is 1, mixed where it is between."""
    signal += cover * (value - signal)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """A random field of unit variance whose structures are about `scale` pixels wide (in the last two axes)."""
    step = max(1, int(scale / 2))  # coarse noise is drawn small and enlarged
    small = (*shape[:-2], -(-shape[-2] // step) + 3, -(-shape[-1] // step) + 3)
    noise = rng.standard_normal(small, dtype=np.float32)
    sigma = scale / step / 2
    noise = gaussian_filter(noise, (*[0] * (len(shape) - 2), sigma, sigma), mode="wrap", truncate=3)
    if step > 1:
        noise = zoom(noise, (*[1] * (len(shape) - 2), step, step), order=1)
    noise = noise[..., : shape[-2], : shape[-1]]
    return (noise - noise.mean()) / noise.std()


@dataclass(frozen=True)
class Pose:
    """Where the origin of a part lies on the grid (mm) and how far the part is turned (radian, from x towards y)."""

    x: float
    y: float
    angle: float

    def inside(self, grid: Grid) -> tuple[Array, Array]:
        """The part's own coordinates of every pixel of `grid`, both (H, W)."""
        return rotate(grid.x - self.x, grid.y - self.y, self.angle)

    def outside(self, x: float, y: float) -> tuple[float, float]:
        """Where the part's point (x, y) lies on the grid."""
        cos, sin = float(np.cos(self.angle)), float(np.sin(self.angle))
        return self.x + x * cos - y * sin, self.y + x * sin + y * cos


@dataclass(frozen=True)
class Ellipsoid:
    """A body of nested shells in mm: `layers` are (depth below the surface, signal), painted from outside to inside."""

    centre: tuple[float, ...]  # x, y, z
    axes: tuple[float, ...]  # half axes along x, y, z before the turn
    angle: float  # in-plane turn, radian
    layers: tuple[tuple[float, float], ...]

    def paint(self, signal: Array, grid: Grid, pose: Pose, z: float, mask: Array | None = None) -> None:
        """Paint the section at height `z` onto `signal` (H, W) in place; `mask` (H, W) in [0, 1] limits it."""
        a, b, c = self.axes
        section = 1 - ((z - self.centre[2]) / c) ** 2
        if section < 0.02:
            return
        a, b = a * section**0.5, b * section**0.5
        here = pose.outside(self.centre[0], self.centre[1])
        window = grid.window(here[0], here[1], max(a, b) + grid.pixel - min(0, self.layers[0][0]))
        part = signal[window]
        if part.size == 0:
            return
        x, y = Pose(here[0], here[1], pose.angle + self.angle).inside(grid.crop(window))
        distance = ellipse_distance(x, y, a, b)
        for depth, value in self.layers:
            cover = coverage(distance + depth, grid.pixel)
            paint(part, cover if mask is None else cover * mask[window], value)
