"""Drawing volumes: solids given by a signed distance in mm (negative inside), painted in order with soft borders.

Frames of reference. An *anatomy* is a list of `Solid` in the body's own frame: mm, x to the patient's right, y to the
front, z up (the axes of a NIfTI world, RAS+). A `Stack` says where the voxels of a volume (Z, Y, X) lie in that frame:
spacing, tilt and size of the body in it, and a smooth `Warp` that bends everything alike, so that neighbours stay
neighbours and one organ stays one piece. Distances are first-order near the surface, which is where they are used.

Volumes are drawn in slabs of slices: the working memory is that of a slab, whatever the size of the volume.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from medlib.data.phantoms.shapes import Array, coverage, paint

SLAB = 1_500_000  # voxels that are drawn at a time
LABEL_SHARE = 0.42  # share of a voxel inside an organ from which on it is labelled: thin organs stay in one piece
FAR = 1e4  # mm; the extent of what has no bounds
REACH = 6.0  # mm around a tube within which its distance is needed: for fat and for rounded creases

Point = tuple[float, float, float]
Box = tuple[Point, Point]  # lowest and highest corner
Vector = Sequence[float] | NDArray[Any]  # x, y, z
Curve = Sequence[Vector] | NDArray[Any]  # (N, 3)


@dataclass(frozen=True)
class Block:
    """Voxels in the body's frame: `x`, `y`, `z` (D, H, W) in mm and `width`, the edge of a cube of a voxel's volume."""

    x: Array
    y: Array
    z: Array
    width: float

    def crop(self, window: tuple[slice, ...]) -> "Block":
        """The same coordinates inside `window`."""
        return Block(self.x[window], self.y[window], self.z[window], self.width)


Distance = Callable[[Block], Array]


def corners(low: Vector, high: Vector) -> Box:
    """The box between two corners."""
    return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))


# ------------------------------------------------------------------------------------------------------ distances
def turn(about_x: float = 0.0, about_y: float = 0.0, about_z: float = 0.0) -> np.ndarray:
    """Rotation (3, 3) by these angles in degrees, first about x, then y, then z."""
    a, b, c = np.radians((about_x, about_y, about_z))
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


def local(block: Block, centre: Vector, frame: np.ndarray | None = None) -> tuple[Array, Array, Array]:
    """Coordinates relative to `centre`, along the columns of `frame` (3, 3; the body's own axes when None)."""
    x, y, z = (grid - np.float32(shift) for grid, shift in zip((block.x, block.y, block.z), centre, strict=True))
    if frame is None:
        return x, y, z
    u, v, w = (np.float32(c[0]) * x + np.float32(c[1]) * y + np.float32(c[2]) * z for c in np.asarray(frame).T)
    return u, v, w


def ellipsoid(centre: Vector, axes: Vector, frame: np.ndarray | None = None) -> Distance:
    """Distance to the ellipsoid with half `axes` (mm) along the columns of `frame`."""
    weights = [np.float32(1 / axis) for axis in axes]

    def distance(block: Block) -> Array:
        scaled = [grid * weight for grid, weight in zip(local(block, centre, frame), weights, strict=True)]
        rho = np.sqrt(sum(part * part for part in scaled)) + np.float32(1e-6)
        slope = np.sqrt(sum((part * weight) ** 2 for part, weight in zip(scaled, weights, strict=True))) / rho
        return (rho - 1) / (slope + np.float32(1e-6))

    return distance


@dataclass(frozen=True)
class Tube:
    """Straight pieces between `points` (N, 3), mm, with a radius at each. The distance is `FAR` well outside."""

    points: np.ndarray
    radii: np.ndarray

    @classmethod
    def through(cls, points: Curve, radii: Vector | float, samples: int = 4) -> "Tube":
        """The curve through `points`, drawn with `samples` pieces between two of them."""
        path = np.asarray(points, float)
        sizes = np.broadcast_to(np.asarray(radii, float), len(path))
        knots = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
        at = np.interp(np.linspace(0, len(path) - 1, (len(path) - 1) * samples + 1), np.arange(len(path)), knots)
        curve = make_interp_spline(knots, path, k=min(3, len(path) - 1))(at)
        return cls(curve, np.interp(at, knots, sizes))

    def box(self, margin: float = 0.0) -> Box:
        """The box around the tube, `margin` mm wider."""
        reach = self.radii[:, None] + margin
        return corners((self.points - reach).min(0), (self.points + reach).max(0))

    def __call__(self, block: Block) -> Array:
        nearest = np.full(block.x.shape, np.float32(FAR))
        reach = float(self.radii.max()) + REACH + 2 * block.width
        axes = ((block.z, 2, (1, 2)), (block.y, 1, (0, 2)), (block.x, 0, (0, 1)))
        spans = [(grid.min(rest) - reach, grid.max(rest) + reach, world) for grid, world, rest in axes]
        for start, end, first, last in zip(self.points, self.points[1:], self.radii, self.radii[1:], strict=False):
            low, high = np.minimum(start, end), np.maximum(start, end)
            near = [np.flatnonzero((least < high[world]) & (most > low[world])) for least, most, world in spans]
            if not all(map(len, near)):
                continue
            window = tuple(slice(index[0], index[-1] + 1) for index in near)
            x, y, z = local(block.crop(window), start)
            step = (end - start).astype(np.float32)
            along = np.clip((x * step[0] + y * step[1] + z * step[2]) / np.float32(step @ step), 0, 1)
            x -= along * step[0]
            y -= along * step[1]
            z -= along * step[2]
            away = np.sqrt(x * x + y * y + z * z) - (np.float32(first) + along * np.float32(last - first))
            np.minimum(nearest[window], away, out=nearest[window])
        return nearest


def union(first: Array, second: Array, round_off: float) -> Array:
    """Distance to what lies in either, the crease between them filled over `round_off` mm."""
    mix = np.clip(0.5 + 0.5 * (second - first) / np.float32(round_off), 0, 1)
    return second + (first - second) * mix - np.float32(round_off) * mix * (1 - mix)


def common(first: Array, second: Array, round_off: float) -> Array:
    """Distance to what lies in both, the edge between them rounded over `round_off` mm."""
    return -union(-first, -second, round_off)


# ---------------------------------------------------------------------------------------------- random smooth fields
def _spline_weights(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First control point (N,) and the weights (4, N) of the uniform cubic B-spline at `positions` (in knots)."""
    first = np.floor(positions).astype(int)
    t = positions - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first, weights.astype(np.float32)


@dataclass(frozen=True)
class Field:
    """A random field of unit variance that changes over about `knot` mm: a cubic B-spline over random controls."""

    control: Array  # (nz, ny, nx)
    knot: float

    @classmethod
    def draw(cls, rng: np.random.Generator, extent: Sequence[float], knot: float) -> "Field":
        """A field over [0, extent] mm along z, y, x."""
        shape = [int(np.ceil(length / knot)) + 4 for length in extent]
        # white controls lose this factor of their variance per axis: the integral of the squared B-spline
        return cls(rng.standard_normal(shape, dtype=np.float32) / np.float32((151 / 315) ** 1.5), knot)

    def at(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> Array:
        """Values (Z, Y, X) on the lattice of the three lists of positions in mm."""
        values = self.control
        for axis, positions in enumerate((z, y, x)):
            first, weights = _spline_weights(np.asarray(positions, float) / self.knot)
            spread = [1, 1, 1]
            spread[axis] = -1
            control = values
            values = control.take(first, axis) * weights[0].reshape(spread)
            for k in range(1, 4):
                values += control.take(first + k, axis) * weights[k].reshape(spread)
        return values


# ------------------------------------------------------------------------------------------------------- the volume
@dataclass(frozen=True)
class Stack:
    """The voxels of a volume: `shape` (Z, Y, X), `spacing` (z, y, x) mm, `affine` (4, 4) voxel (x, y, z) -> world.

    `centre` is the world point where the body's origin lies, `size` (x, y, z) what the body's mm are stretched by.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: np.ndarray
    centre: Point
    size: Point

    @classmethod
    def around(
        cls, shape: Sequence[int], spacing: Sequence[float], middle: Point, size: Point, tilt: np.ndarray, world: Point
    ) -> "Stack":
        """A stack whose middle voxel shows the body's point `middle`; `tilt` (3, 3) turns the stack, not the body."""
        affine = np.eye(4)
        affine[:3, :3] = tilt * np.asarray(spacing)[::-1]
        place = np.multiply(middle, size) + world
        affine[:3, 3] = place - affine[:3, :3] @ ((np.array(shape)[::-1] - 1) / 2)
        z, y, x = (int(count) for count in shape)
        thick, high, wide = (float(step) for step in spacing)
        return cls((z, y, x), (thick, high, wide), affine, world, size)

    @property
    def extent(self) -> tuple[float, ...]:
        """Length along z, y, x in mm."""
        return tuple(count * step for count, step in zip(self.shape, self.spacing, strict=True))

    def to_body(self) -> np.ndarray:
        """Voxel (x, y, z) to the body's frame before the warp, (3, 4)."""
        shifted = self.affine[:3].copy()
        shifted[:, 3] -= self.centre
        return shifted / np.asarray(self.size)[:, None]

    def slabs(self) -> Iterator[slice]:
        """The slices of each slab."""
        depth = max(1, SLAB // (self.shape[1] * self.shape[2]))
        for start in range(0, self.shape[0], depth):
            yield slice(start, min(start + depth, self.shape[0]))

    def lattice(self, slab: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of the slices of `slab`, of the rows and of the columns, in mm from the first voxel."""
        z, y, x = (np.arange(count) * step for count, step in zip(self.shape, self.spacing, strict=True))
        return z[slab], y, x


@dataclass(frozen=True)
class Warp:
    """Displacement along x, y, z: `amplitude` mm (standard deviation) times a smooth field each."""

    fields: tuple[Field, Field, Field]
    amplitude: float

    @classmethod
    def draw(cls, rng: np.random.Generator, stack: Stack, knot: float, amplitude: float) -> "Warp":
        """A warp over `stack` that changes over about `knot` mm. Amplitudes under a tenth of `knot` never fold."""
        x, y, z = (Field.draw(rng, stack.extent, knot) for _ in range(3))
        return cls((x, y, z), amplitude)

    def at(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> list[Array]:
        """Displacements (3 of (Z, Y, X)) in mm, cut at 2.5 standard deviations."""
        return [np.clip(field.at(z, y, x), -2.5, 2.5) * np.float32(self.amplitude) for field in self.fields]


@dataclass(frozen=True)
class Solid:
    """One part of an anatomy: where it is, how it looks and what it is called.

    `layers` are (depth below the surface in mm, signal), painted from outside to inside. `label` is an organ's name,
    None for a part that is no organ (it takes the place of what was there), "" for one inside an organ that stays
    what it is called (a vessel in the liver). `within` names an organ outside of which nothing is painted.
    """

    distance: Distance
    box: Box
    layers: tuple[tuple[float, float], ...]
    label: str | None = None
    within: str = ""
    softness: float = 0.0  # mm over which the border is blurred, beyond what a voxel blurs


EVERYWHERE: Box = ((-FAR, -FAR, -FAR), (FAR, FAR, FAR))


def around(centre: Vector, reach: Vector | float) -> Box:
    """The box of half edges `reach` around `centre`."""
    return corners(np.subtract(centre, reach), np.add(centre, reach))


def draw_slab(
    solids: Sequence[Solid], organs: Sequence[str], stack: Stack, warp: Warp, slab: slice, background: float
) -> tuple[Array, np.ndarray]:
    """Signal float32 and labels uint8 (D, Y, X) of the slices of `slab`; label i + 1 is `organs[i]`, 0 the rest."""
    to_body = stack.to_body()
    columns = to_body.astype(np.float32)
    z, y, x = (np.arange(count, dtype=np.float32) for count in stack.shape)
    grids = []
    for row, shift in zip(columns, warp.at(*stack.lattice(slab)), strict=True):
        shift += (row[2] * z[slab] + row[3])[:, None, None] + (row[1] * y)[:, None] + row[0] * x
        grids.append(shift)
    block = Block(grids[0], grids[1], grids[2], float(np.prod(stack.spacing) ** (1 / 3)))
    signal = np.full(block.x.shape, np.float32(background))
    labels = np.zeros(block.x.shape, np.uint8)
    number = {name: index + 1 for index, name in enumerate(organs)}
    for solid in solids:
        margin = 2.5 * warp.amplitude + block.width + solid.softness
        window = _window(solid.box, to_body, margin, signal.shape, slab.start)
        part = block.crop(window)
        if part.x.size == 0:
            continue
        distance = solid.distance(part)
        if solid.within:
            inside = labels[window] == number[solid.within]
        elif distance.min() > block.width:
            continue
        for depth, value in solid.layers:
            cover = coverage(distance + np.float32(depth), block.width + solid.softness)
            paint(signal[window], cover * inside if solid.within else cover, value)
        if solid.label != "":
            core = distance < (0.5 - LABEL_SHARE) * block.width
            if solid.within:
                core &= inside
            labels[window][core] = number.get(solid.label or "", 0)
    return signal, labels


def _window(
    box: Box, to_body: np.ndarray, margin: float, shape: Sequence[int], start: int
) -> tuple[slice, slice, slice]:
    """The voxels (z, y, x) of a slab of `shape` beginning at slice `start` that may lie in `box`."""
    ends = np.array([np.subtract(box[0], margin), np.add(box[1], margin)])
    points = np.array(np.meshgrid(*ends.T)).reshape(3, -1)
    voxels = np.linalg.solve(to_body[:, :3], points - to_body[:, 3:])
    voxels[2] -= start
    low = np.clip(np.floor(voxels.min(1)), 0, np.array(shape)[::-1]).astype(int)
    high = np.clip(np.ceil(voxels.max(1)) + 1, 0, np.array(shape)[::-1]).astype(int)
    x, y, z = (slice(int(first), int(last)) for first, last in zip(low, high, strict=True))
    return z, y, x
