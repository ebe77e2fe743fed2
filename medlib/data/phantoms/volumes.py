"""From the parts of an anatomy to a scan on disk: where the voxels lie, what the scanner adds, how it is stored.

Releases hold volumes in several orientations, some oblique, and every header says so truthfully: a reader that goes by
the affine finds the same anatomy in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medlib.data.phantoms.acquisition import coil_field, ct_scan, place, scan, write_nifti
from medlib.data.phantoms.shapes import Array, Grid, smooth_noise
from medlib.data.phantoms.short_axis import Range
from medlib.data.phantoms.solids import Field, Solid, Stack, Warp, draw_slab, turn

CODES = ("RAS", "LPS", "LAS")  # axes of the arrays on disk
OBLIQUE = 0.25  # share of the scans that are tilted
SIZES = ("small", "full")


@dataclass(frozen=True)
class Geometry:
    """What a kind of scan covers, and its voxels.

    `low` to `high` is what it shows of the body along z, in mm of the body's frame; both vary by up to `slack` mm.
    `pixels` is the in-plane matrix, `pixel` and `thickness` the voxel's sides in mm.
    """

    low: float
    high: float
    pixels: int
    pixel: Range
    thickness: Range
    slack: float = 8.0

    def scaled(self, size: float) -> "Geometry":
        """The same matrix over a body of that `size`: a child's scan has smaller voxels."""
        pixel, thickness = (Range(size * sides.low, size * sides.high) for sides in (self.pixel, self.thickness))
        return replace(self, pixel=pixel, thickness=thickness)

    def draw(self, rng: np.random.Generator, front: float, size: tuple[float, float, float]) -> Stack:
        """A stack over a body stretched by `size` whose middle lies `front` mm in front of the body's origin."""
        low, high = self.low + rng.uniform(-1, 1) * self.slack, self.high + rng.uniform(-1, 1) * self.slack
        pixel, thickness = round(self.pixel.draw(rng), 4), round(self.thickness.draw(rng), 2)
        depth = max(8, round((high - low) * size[2] / thickness))
        middle = (float(rng.normal(0, 4)), front + float(rng.normal(0, 4)), (low + high) / 2)
        angles = rng.uniform(-7, 7, 3) * (rng.random() < OBLIQUE)
        x, y, z = (float(shift) for shift in rng.normal(0, 40, 3))
        shape, spacing = (depth, self.pixels, self.pixels), (thickness, pixel, pixel)
        return Stack.around(shape, spacing, middle, size, turn(*angles), (x, y, z))


@dataclass(frozen=True)
class Scan:
    """A drawn scan: `image` int16 and `labels` uint8, both (Z, Y, X), voxel (x, y, z) -> world `affine` (RAS+)."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    codes: str  # the orientation it is stored in


def draw_size(rng: np.random.Generator, mean: float = 1.0) -> tuple[float, float, float]:
    """How large a patient is along x, y, z, as a factor."""
    x, y, z = mean * (1 + 0.045 * np.clip(rng.normal(0, 1, 3), -2, 2))
    return float(x), float(y), float(z)


def take(
    rng: np.random.Generator,
    solids: Sequence[Solid],
    parts: Sequence[str],
    stack: Stack,
    warp: Warp,
    modality: str,
    background: float,
) -> Scan:
    """Scan the anatomy `solids`; label i + 1 is `parts[i]`, `background` the signal where no part is.

    modality: "CT" (signals in HU) or "MR" (about 0 to 1).
    """
    texture = Field.draw(rng, stack.extent, 9.0)
    pixel = stack.spacing[1]
    ct = modality == "CT"
    sigma, streaks, blur = rng.uniform(7, 16), rng.uniform(3, 12), rng.uniform(0.35, 0.6) * pixel + 0.3
    gain, rician = rng.uniform(250, 900), rng.uniform(0.02, 0.045)
    field = _coils(rng, stack)
    image, labels = np.empty(stack.shape, np.int16), np.empty(stack.shape, np.uint8)
    for slab in stack.slabs():
        signal, labels[slab] = draw_slab(solids, parts, stack, warp, slab, background)
        grain = texture.at(*stack.lattice(slab))
        if ct:  # strands in fat, little in solid tissue, none in gas
            grain *= np.where(signal < -300, 0, np.where(signal < -30, np.float32(12), np.float32(4)))
            signal += grain
            image[slab] = ct_scan(signal, rng, pixel=pixel, sigma=sigma, blur=blur, streaks=streaks)
        else:
            signal *= 1 + np.float32(0.045) * grain
            image[slab] = scan(signal, rng, field=field, sigma=rician, gain=gain, blur=0.5)
    return Scan(image, labels, stack.affine, str(rng.choice(CODES)))


def _coils(rng: np.random.Generator, stack: Stack) -> Array:
    """What the receive coils make brighter and darker, (H, W): the same in every slice."""
    grid = Grid.centred(stack.shape[1], stack.shape[2], stack.spacing[1])
    width = max(grid.x.max(), grid.y.max()) * 2
    ripple = rng.uniform(0.04, 0.12) * smooth_noise(rng, stack.shape[1:], max(4, 0.35 * width / grid.pixel))
    return coil_field(grid, width * rng.uniform(1.2, 3.0), rng.uniform(-np.pi, np.pi), ripple)


def save(scan: Scan, image: Path, label: Path | None, values: np.ndarray) -> None:
    """Write a scan and, unless `label` is None, its labels; `values[i]` is what the release stores for label i."""
    for path, array in ((image, scan.image), (label, values[scan.labels])):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(path, *place(array, scan.affine, scan.codes))
