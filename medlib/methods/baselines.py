"""What a method has to beat: no pre-training, a random frozen encoder, and the slice contrasts before CORAL."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medlib.losses.contrastive import nt_xent_loss, partition_contrastive_loss, positional_contrastive_loss
from medlib.methods.base import register
from medlib.methods.pretraining import PretrainThenFinetune, SliceContrast


@register("supervised", title="supervised only")
@dataclass(frozen=True, kw_only=True)
class Supervised(PretrainThenFinetune):
    """The same U-Net and the same fine-tuning from random weights, all of them trained."""

    frozen: bool = False


@register("random_encoder", title="random frozen encoder")
@dataclass(frozen=True, kw_only=True)
class RandomEncoder(PretrainThenFinetune):
    """The decoder trained on top of an encoder that has learnt nothing: the zero of every frozen-encoder result."""

    frozen: bool = True


class Partitions(SliceContrast):
    """Contrast of slices by the part of the volume that they lie in; subclasses have another ``term`` and `loss`."""

    term = "partition"

    def __init__(self, temperature: float, partitions: int):
        super().__init__()
        self.temperature, self.partitions = temperature, partitions

    def loss(self, features: Tensor, part: Tensor) -> Tensor:
        """Of features (N, D) of both views in the parts (N,)."""
        return partition_contrastive_loss(features, part, temperature=self.temperature)

    def forward(
        self, first: Tensor, second: Tensor, positions: Tensor, index: Tensor, depth: Tensor
    ) -> dict[str, Tensor]:
        part = slice_partition(index, depth, self.partitions).repeat(2)
        loss = self.loss(torch.cat([first, second]), part)
        return {"total": loss, self.term: loss}


def slice_partition(index: Tensor, depth: Tensor, partitions: int = 4) -> Tensor:
    """The partition (N,) of slice ``index`` in a volume of ``depth`` slices: min(index // round(Z/4), 3).

    As in the code of PCL, rounding halves up; a volume of fewer slices than half the partitions counts one a slice.
    """
    size = ((2 * depth + partitions) // (2 * partitions)).clamp(min=1)
    return (index // size).clamp(max=partitions - 1)


@register("gcl", title="GCL (partitions)")
@dataclass(frozen=True, kw_only=True)
class PartitionContrast(PretrainThenFinetune):
    """Slices of the same quarter of any volume are positives: what PCL's code calls GCL.

    Not Chaitanya's global loss, whose denominator drops same-partition samples (NeurIPS 2020).
    """

    temperature: float = 0.1
    partitions: int = 4

    def contrast_settings(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, partitions=self.partitions)

    def contrast(self) -> SliceContrast:
        return Partitions(**self.contrast_settings())


class _Positions(SliceContrast):
    def __init__(self, temperature: float, threshold: float):
        super().__init__()
        self.temperature, self.threshold = temperature, threshold

    def forward(
        self, first: Tensor, second: Tensor, positions: Tensor, index: Tensor, depth: Tensor
    ) -> dict[str, Tensor]:
        loss = positional_contrastive_loss(
            torch.cat([first, second]), positions.repeat(2), self.threshold, temperature=self.temperature
        )
        return {"total": loss, "positional": loss}


@register("pcl", title="PCL")
@dataclass(frozen=True, kw_only=True)
class PositionalContrast(PretrainThenFinetune):
    """PCL (CORAL eq. 2): slices nearer than ``threshold`` are positives, all others negatives.

    Attributes:
        threshold: delta in parts of the volume; 0.35 for ACDC and 0.1 for CHD in its code.
    """

    temperature: float = 0.1
    threshold: float = 0.35

    def contrast_settings(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, threshold=self.threshold)

    def contrast(self) -> SliceContrast:
        return _Positions(**self.contrast_settings())


class _Views(SliceContrast):
    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(
        self, first: Tensor, second: Tensor, positions: Tensor, index: Tensor, depth: Tensor
    ) -> dict[str, Tensor]:
        loss = nt_xent_loss(first, second, self.temperature)
        return {"total": loss, "nt_xent": loss}


@register("simclr", title="SimCLR")
@dataclass(frozen=True, kw_only=True)
class ViewContrast(PretrainThenFinetune):
    """SimCLR: the only positive of a slice is its other view."""

    temperature: float = 0.1

    def contrast_settings(self) -> dict[str, Any]:
        return dict(temperature=self.temperature)

    def contrast(self) -> SliceContrast:
        return _Views(**self.contrast_settings())
