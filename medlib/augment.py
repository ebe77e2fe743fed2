"""Augmentation: batched, on the device, one interpolation, replayable on images, labels and predictions.

A `Warp` is a sampling grid for a whole batch. It is drawn once and can then be applied to images (bilinear), to labels
(nearest) and to predictions (bilinear, differentiable), which is what equivariance losses need. `CutMix` is replayed in
the same way. kornia does the geometry; the random parameters are drawn here because kornia's own random modules draw
from PyTorch's global state.

`GeometricAugmentation` makes the weak view that all methods train on, `StrongAugmentation` what a student gets on top
of it, `ThinPlateAugmentation` the warp of an equivariance loss.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, gaussian_blur2d, get_gaussian_kernel1d
from kornia.geometry.transform import get_affine_matrix2d
from scipy.interpolate import RBFInterpolator
from torch import Tensor

REFERENCE_SIDE = 352  # px: the image side at which PCL and CORAL state their elastic deformation


@dataclass(frozen=True)
class Warp:
    """A deformation of a batch of slices: ``grid`` (B, H, W, 2), where each output pixel looks in the input.

    Coordinates are (x, y) with -1 and 1 at the outer edges of the border pixels (``align_corners=False``).
    """

    grid: Tensor

    def images(self, images: Tensor) -> Tensor:
        """Warp images (B, C, H, W), bilinear; what comes from outside is 0 (the mean, after z-scoring)."""
        exact = torch.promote_types(images.dtype, torch.float32)
        moved = F.grid_sample(images.to(exact), self.grid.to(exact), mode="bilinear", align_corners=False)
        return moved.to(images.dtype)

    def predictions(self, maps: Tensor) -> Tensor:
        """Warp logits or probabilities (B, C, H, W), bilinear, differentiable; outside pixels are 0, see `inside`."""
        return self.images(maps)

    def labels(self, labels: Tensor, outside: int = 0) -> Tensor:
        """Warp labels (B, H, W) int, nearest neighbour; pixels from outside become ``outside`` (0: background)."""
        moved = F.grid_sample((labels - outside).float().unsqueeze(1), self.grid, mode="nearest", align_corners=False)
        return moved.squeeze(1).round().to(labels.dtype) + outside

    def inside(self) -> Tensor:
        """(B, H, W) bool: the pixels whose source lies in the image."""
        return (self.grid.abs() <= 1).all(dim=-1)


def _exact(draw: Callable[[Any, int, int, torch.Generator], Warp]) -> Callable[[Any, int, int, torch.Generator], Warp]:
    """Decorate a ``draw``: also under autocast places are float32, as bfloat16 knows them to a 256th only."""

    @functools.wraps(draw)
    def drawn(self: Any, batch: int, side: int, generator: torch.Generator) -> Warp:
        with torch.autocast(generator.device.type, enabled=False):
            return draw(self, batch, side, generator)

    return drawn


@dataclass(frozen=True, kw_only=True)
class GeometricAugmentation:
    """Mirror, elastic deformation, rotation and isotropic scaling, as in the code of PCL and CORAL.

    Attributes:
        mirror: probability to mirror each of the two axes.
        deform: probability of elastic deformation, rotation and scaling together.
        rotation: largest angle in degrees, drawn from U(-rotation, rotation).
        scale: zoom range; with probability 1/2 from (scale[0], 1), else from (1, scale[1]); above 1 shows more.
        elastic_sigma: width range of the Gaussian that smooths the displacement noise, in parts of the image side.
        elastic_alpha: range of the factor on the smoothed noise, in parts of the image side.

    The defaults are the references' 14-17 px and 100-350 px at 352 px. Smoothing U(-1, 1) noise by a Gaussian of
    sigma px leaves a standard deviation of about 0.163/sigma, so the displacements have one of 1 to 4 px there.
    """

    mirror: float = 0.5
    deform: float = 0.67
    rotation: float = 180.0
    scale: tuple[float, float] = (0.7, 1.3)
    elastic_sigma: tuple[float, float] = (14 / REFERENCE_SIDE, 17 / REFERENCE_SIDE)
    elastic_alpha: tuple[float, float] = (100 / REFERENCE_SIDE, 350 / REFERENCE_SIDE)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_probabilities(self, "mirror", "deform")
        if not 0 < self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(f"scale must enclose 1, got {self.scale}")

    @_exact
    def draw(self, batch: int, side: int, generator: torch.Generator) -> Warp:
        """Draw one warp for each of ``batch`` square images of ``side`` px, on the generator's device."""
        device, uniform = generator.device, _uniform(generator)
        deformed = (uniform(0, 1, batch) < self.deform).float()
        zoom = torch.where(
            uniform(0, 1, batch) < 0.5, uniform(self.scale[0], 1, batch), uniform(1, self.scale[1], batch)
        )
        zoom = 1 + deformed * (zoom - 1)
        angle = deformed * uniform(-self.rotation, self.rotation, batch)
        flip = 1 - 2 * (uniform(0, 1, batch, 2) < self.mirror).float()  # (B, 2): -1 mirrors x, y

        zero = torch.zeros(batch, 2, device=device)
        matrix = get_affine_matrix2d(zero, zero, zoom.unsqueeze(1) * flip, angle)[:, :2]  # about the centre
        grid = F.affine_grid(matrix, [batch, 1, side, side], align_corners=False)

        sigma = uniform(*self.elastic_sigma, batch, 1).expand(-1, 2) * side
        width = 2 * int(3 * self.elastic_sigma[1] * side) + 1
        smooth = gaussian_blur2d(uniform(-1, 1, batch, 2, side, side), (width, width), sigma, border_type="constant")
        # smooth * alpha is the displacement in px, whatever the side; (side / REFERENCE_SIDE) makes it the same part of
        # the image that it is in the references, (2 / side) takes it from px to grid coordinates.
        alpha = uniform(*self.elastic_alpha, batch, 1, 1, 1) * side * deformed.view(-1, 1, 1, 1)
        shift = smooth * alpha * (side / REFERENCE_SIDE) * (2 / side)
        return Warp(grid + shift.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class CutMix:
    """Images with a rectangle of the next image of the batch: ``pasted`` (B, H, W) bool, the pixels of the next one."""

    pasted: Tensor

    @classmethod
    def draw(cls, batch: int, side: int, generator: torch.Generator, area: float = 0.5) -> "CutMix":
        """A rectangle of that part of the image, of random shape and place, in each of ``batch`` images.

        Its width is drawn from U(area, 1) of the side. Source: French et al. 2020 (arXiv 1906.01916), the code of MONA.
        """
        if not 0 < area < 1:
            raise ValueError(f"area must lie in (0, 1), got {area}")
        uniform = _uniform(generator)
        width = uniform(area, 1, batch)
        size = torch.stack([area / width, width], dim=1)  # (B, 2): height and width in parts of the side
        first = uniform(0, 1, batch, 2) * (1 - size)
        centres = (torch.arange(side, device=generator.device) + 0.5) / side
        inside = (centres >= first[..., None]) & (centres < (first + size)[..., None])  # (B, 2, side)
        return cls(inside[:, 0, :, None] & inside[:, 1, None, :])

    def images(self, images: Tensor) -> Tensor:
        """Mix images, or predictions, (B, C, H, W)."""
        return torch.where(self.pasted[:, None], images.roll(-1, dims=0), images)

    def labels(self, labels: Tensor) -> Tensor:
        """Mix labels (B, H, W) in the same way."""
        return torch.where(self.pasted, labels.roll(-1, dims=0), labels)


@dataclass(frozen=True, kw_only=True)
class PhotometricAugmentation:
    """Brightness and contrast (x -> contrast x + brightness) and Gaussian blur, each with a draw of its own an image.

    Attributes:
        probability: of a change of brightness and contrast, and of the blur.
        brightness: drawn from U(-brightness, brightness), in standard deviations of the z-scored scan.
        contrast: drawn from U(1 - contrast, 1 + contrast).
        blur: range of the standard deviation of the Gaussian, in px.

    The defaults are those of MONA's code, which has a factor on images in [0, 1] where we add a brightness.
    """

    probability: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    blur: tuple[float, float] = (0.15, 1.15)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_probabilities(self, "probability")
        if not self.brightness >= 0:
            raise ValueError(f"brightness must be at least 0, got {self.brightness}")
        if not 0 <= self.contrast < 1:
            raise ValueError(f"contrast must lie in [0, 1), got {self.contrast}")
        if not 0 < self.blur[0] <= self.blur[1]:
            raise ValueError(f"blur must be a range of positive px, got {self.blur}")

    def images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images (B, 1, H, W)."""
        uniform, each = _uniform(generator), (len(images), 1, 1, 1)
        brightness = uniform(-self.brightness, self.brightness, *each)
        contrast = uniform(1 - self.contrast, 1 + self.contrast, *each)
        changed = torch.where(uniform(0, 1, *each) < self.probability, images * contrast + brightness, images)
        sigma = uniform(*self.blur, len(images), 1).to(images.dtype)
        blurred = _blur(changed, sigma, width=2 * int(3 * self.blur[1]) + 1)
        return torch.where(uniform(0, 1, *each) < self.probability, blurred, changed)


@dataclass(frozen=True, kw_only=True)
class DiffeomorphicAugmentation:
    """Smooth warps that never fold: a random velocity field, integrated by scaling and squaring.

    Attributes:
        probability: of a warp, for each image.
        cells: side of the grid on which velocities are drawn, then smoothed by a Gaussian of one cell.
        shift: standard deviation of the velocity along an axis, in parts of the image side.
        squarings: n of the 2^n small steps of the integration.

    The defaults give what MONA's code does at 256 px: shifts of 1.3 px on average.
    """

    probability: float = 0.5
    cells: int = 32
    shift: float = 1 / 256
    squarings: int = 8

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_probabilities(self, "probability")
        if self.cells < 2 or self.squarings < 1 or not self.shift >= 0:
            raise ValueError(
                f"cells must be at least 2, squarings at least 1 and shift at least 0; "
                f"got {self.cells}, {self.squarings} and {self.shift}"
            )

    @_exact
    def draw(self, batch: int, side: int, generator: torch.Generator) -> Warp:
        """Draw one warp for each of ``batch`` square images of ``side`` px, on the generator's device."""
        device = generator.device
        chosen = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < self.probability
        noise = torch.randn(batch, 2, self.cells, self.cells, generator=generator, device=device)
        velocity = _blur(noise, torch.ones_like(noise[:, :1, 0, 0]), width=7)
        velocity = velocity / velocity.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        velocity = F.interpolate(velocity, size=(side, side), mode="bilinear", align_corners=False)
        identity = _identity_grid(batch, side, device)
        step = velocity * chosen * (2 * self.shift / 2**self.squarings)  # (B, 2, H, W), in grid coordinates
        for _ in range(self.squarings):  # twice the way: from where the first half leads, the second half
            where = identity + step.permute(0, 2, 3, 1)
            step = step + F.grid_sample(step, where, padding_mode="border", align_corners=False)
        return Warp(identity + step.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class StrongView:
    """What was drawn of the geometry of a strong view: a mixture with the next image, then a warp."""

    mix: CutMix
    warp: Warp

    def images(self, images: Tensor) -> Tensor:
        """Move images, or predictions, (B, C, H, W)."""
        return self.warp.images(self.mix.images(images))

    def labels(self, labels: Tensor, outside: int = 0) -> Tensor:
        """Move labels (B, H, W) int in the same way; pixels from outside become ``outside``."""
        return self.warp.labels(self.mix.labels(labels), outside)


@dataclass(frozen=True, kw_only=True)
class StrongAugmentation:
    """CutMix, a diffeomorphic warp, brightness, contrast and blur, on top of a weak view. Source: MONA section IV-B.

    Attributes:
        area: part of an image that CutMix takes from the next one.
    """

    area: float = 0.5
    photometric: PhotometricAugmentation = field(default_factory=PhotometricAugmentation)
    diffeomorphic: DiffeomorphicAugmentation = field(default_factory=DiffeomorphicAugmentation)

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not 0 < self.area < 1:
            raise ValueError(f"area must lie in (0, 1), got {self.area}")

    def draw(self, batch: int, side: int, generator: torch.Generator) -> StrongView:
        """The geometry for ``batch`` square images of ``side`` px; `photometric` changes their intensities."""
        mix = CutMix.draw(batch, side, generator, self.area)
        return StrongView(mix, self.diffeomorphic.draw(batch, side, generator))


@dataclass(frozen=True, kw_only=True)
class ThinPlateAugmentation:
    """A thin-plate spline through a few jittered points, then mirror, rotation, scaling and shift.

    Attributes:
        points: control points along each side.
        jitter: range of their displacement, +- this in parts of half the side.
        mirror: probability to mirror left and right.
        rotation: largest angle in degrees, drawn from U(-rotation, rotation).
        scale: range of the zoom; above 1 shows more.
        shift: largest shift along each axis, in parts of half the side.

    The defaults are those of MONA's code.
    """

    points: int = 5
    jitter: float = 0.01
    mirror: float = 0.5
    rotation: float = 60.0
    scale: tuple[float, float] = (1 / 1.2, 1 / 0.8)
    shift: float = 0.1

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_probabilities(self, "mirror")
        if self.points < 2:
            raise ValueError(f"points must be at least 2, got {self.points}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a range of positive numbers, got {self.scale}")

    @_exact
    def draw(self, batch: int, side: int, generator: torch.Generator) -> Warp:
        """Draw one warp for each of ``batch`` square images of ``side`` px, on the generator's device."""
        device, uniform = generator.device, _uniform(generator)
        zoom = uniform(*self.scale, batch, 1).expand(-1, 2)
        flip = torch.ones(batch, 2, device=device)
        flip[:, 0] -= 2 * (uniform(0, 1, batch) < self.mirror).float()
        angle = uniform(-self.rotation, self.rotation, batch)
        zero = torch.zeros(batch, 2, device=device)
        matrix = get_affine_matrix2d(zero, zero, zoom * flip, angle)[:, :2]  # about the centre
        matrix = torch.cat([matrix[:, :, :2], uniform(-self.shift, self.shift, batch, 2, 1)], dim=2)
        grid = F.affine_grid(matrix, [batch, 1, side, side], align_corners=False)
        moves = uniform(-self.jitter, self.jitter, batch, self.points**2, 2)
        bend = _thin_plate_basis(side, self.points, device) @ moves  # (B, H * W, 2)
        return Warp(grid + bend.view(batch, side, side, 2))


@functools.cache
def _thin_plate_basis(side: int, points: int, device: torch.device) -> Tensor:
    """(side * side, points ** 2): how far each pixel follows each control point of a thin-plate spline.

    A spline is linear in where its points go, so one matrix makes every warp. The points span [-1, 1].
    """
    control = np.stack(np.meshgrid(*[np.linspace(-1, 1, points)] * 2, indexing="xy"), axis=-1).reshape(-1, 2)
    pixels = _identity_grid(1, side, torch.device("cpu")).reshape(-1, 2).numpy()
    spline = RBFInterpolator(control, np.eye(len(control)), kernel="thin_plate_spline")
    return torch.from_numpy(spline(pixels)).float().to(device)


def _blur(maps: Tensor, sigma: Tensor, width: int) -> Tensor:
    """Gaussian blur of (B, C, H, W), ``sigma`` (B, 1) cells and ``width`` cells wide; the border is repeated.

    The two halves of kornia's ``gaussian_blur2d``, which between them looks at sigma and waits for the device.
    """
    kernel = get_gaussian_kernel1d(width, sigma)
    return filter2d_separable(maps, kernel, kernel, border_type="replicate")


def _identity_grid(batch: int, side: int, device: torch.device) -> Tensor:
    """(B, side, side, 2): where each pixel is."""
    matrix = torch.eye(2, 3, device=device).expand(batch, -1, -1)
    return F.affine_grid(matrix, [batch, 1, side, side], align_corners=False)


def _uniform(generator: torch.Generator) -> Callable[..., Tensor]:
    """``uniform(low, high, *shape)``: draws on the generator's device."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)

    return uniform


def _check_numbers(settings: Any) -> None:
    """ValueError unless each number is finite, and whole where its default is; a range is two of them, in order."""

    def finite(value: object) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)

    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(entry.default, tuple):
            if not (
                isinstance(value, Sequence) and len(value) == 2 and all(map(finite, value)) and value[0] <= value[1]
            ):
                raise ValueError(f"{entry.name} must be a range of two finite numbers, (low, high), got {value!r}")
        elif isinstance(entry.default, int) and type(value) is not int:
            raise ValueError(f"{entry.name} must be a whole number, got {value!r}")
        elif isinstance(entry.default, float) and not finite(value):
            raise ValueError(f"{entry.name} must be a finite number, got {value!r}")


def _check_probabilities(settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name} is a probability in [0, 1], got {getattr(settings, name)}")
