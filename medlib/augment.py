"""Geometric augmentation: batched, on the device, one interpolation, replayable on images, labels and predictions.

A `Warp` is a sampling grid for a whole batch. It is drawn once and can then be applied to images (bilinear), to labels
(nearest) and to predictions (bilinear, differentiable), which is what equivariance losses need. kornia does the
geometry; the random parameters are drawn here because kornia's own random modules draw from PyTorch's global state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_affine_matrix2d
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
        return F.grid_sample(images, self.grid.to(images.dtype), mode="bilinear", align_corners=False)

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
        for name in ("mirror", "deform"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability in [0, 1], got {getattr(self, name)}")
        if not 0 < self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(f"scale must enclose 1, got {self.scale}")

    def draw(self, batch: int, side: int, generator: torch.Generator) -> Warp:
        """Draw one warp for each of ``batch`` square images of ``side`` px, on the generator's device."""
        device = generator.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

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
