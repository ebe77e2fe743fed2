"""GCL with both of its stages: global contrast of the encoder, local contrast of the decoder (arXiv 2006.10511)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation
from medlib.data.batches import TrainingData
from medlib.losses.gcl import global_partition_loss, region_contrastive_loss
from medlib.methods.base import Stage, Streams, Work, register
from medlib.methods.baselines import Partitions
from medlib.methods.pretraining import (
    ContrastivePretraining,
    PretrainThenFinetune,
    SliceContrast,
    TwoViews,
    cosine_schedule,
    unet_of,
)
from medlib.nets import DenseProjectionHead

SPOTS = [(u / 2, v / 2) for u in range(3) for v in range(3)] + [(u / 4, v / 4) for u in (1, 3) for v in (1, 3)]
"""Where the 13 regions of a map lie, in parts of its height and width: corners, edges and centre, and between them."""

REGION = 3
"""Side of a region in cells; its vector holds the features of all of them."""


class _GlobalPartitions(Partitions):
    term = "global"

    def loss(self, features: Tensor, part: Tensor) -> Tensor:
        return global_partition_loss(features, part, self.temperature)


@dataclass(frozen=True, kw_only=True)
class LocalPretraining(Stage):
    """Train the first blocks of the decoder on a frozen encoder: regions of a slice are told from one another.

    Both views of a slice have the same warp and a brightness and contrast of their own: x -> contrast x + brightness.

    Attributes:
        blocks: decoder blocks that are trained.
        brightness: drawn from U(-brightness, brightness), in standard deviations of the z-scored scan.
        contrast: drawn from U(1 - contrast, 1 + contrast).
    """

    blocks: int
    temperature: float
    brightness: float
    contrast: float
    batch_size: int
    learning_rate: float
    weight_decay: float
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _LocalPretraining(self, networks, data, streams)


class _LocalPretraining(TwoViews):
    def __init__(self, stage: LocalPretraining, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(stage, data, streams)
        unet = unet_of(networks)
        self.encoder, self.blocks, self.head = unet.encoder, unet.decoder.levels[: stage.blocks], networks["local_head"]
        self.encoder.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            [*self.blocks.parameters(), *self.head.parameters()],
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        self.schedule = cosine_schedule(self.optimizer, stage.steps)

    def train(self, mode: bool = True) -> "_LocalPretraining":
        super().train(mode)
        self.encoder.eval()  # frozen: its batch-norm statistics, too
        return self

    def draw(self) -> dict[str, Tensor]:
        rows, images, (warp, _) = self.views()
        warped, stream = warp.images(images), self.streams.own("augment")

        def uniform(low: float, high: float) -> Tensor:
            draw = torch.rand(len(rows), 1, 1, 1, generator=stream, device=stream.device)
            return low + (high - low) * draw

        stage = self.stage
        first, second = (
            warped * uniform(1 - stage.contrast, 1 + stage.contrast) + uniform(-stage.brightness, stage.brightness)
            for _ in range(2)
        )
        return {"first": first, "second": second}

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        with torch.no_grad():
            features = self.encoder(torch.cat([first, second]))
        maps = features[-1]
        for block, skip in zip(self.blocks, features[-2::-1], strict=False):  # the first blocks, with their skips
            maps = block(maps, skip)
        one, other = map(self.gather, regions(self.head(maps)).chunk(2))
        loss = region_contrastive_loss(one, other, self.stage.temperature)
        return {"total": loss, "local": loss}


def regions(maps: Tensor) -> Tensor:
    """The regions of ``maps`` (B, D, h, w) at `SPOTS`: vectors (B, 13, D * REGION * REGION)."""
    height, width = (side - REGION for side in maps.shape[2:])
    if min(height, width) < 0:
        raise ValueError(f"a map must hold a region of {REGION} x {REGION} cells, got {tuple(maps.shape)}")
    corners = [(int(u * height), int(v * width)) for u, v in SPOTS]
    return torch.stack([maps[:, :, i : i + REGION, j : j + REGION].flatten(1) for i, j in corners], dim=1)


@register("gcl_local", title="GCL (global and local)")
@dataclass(frozen=True, kw_only=True)
class GlobalAndLocalContrast(PretrainThenFinetune):
    """Chaitanya et al. 2020: G^D trains the encoder, L^R the decoder on the frozen encoder, then both are fine-tuned.

    Of `gcl`, which is what PCL's code makes of it, it has neither the denominator nor the single stage. Network, views
    of the global stage, optimiser of the global stage and batches (slices at random, not one of each partition of each
    volume) are those that all methods share here. The two stages share ``pretrain_steps``, half each.

    Attributes:
        temperature: 0.1, paper.
        partitions: S = 4, paper.
        blocks: l = 3 decoder blocks in the local stage, paper.
        brightness, contrast_range: change of intensity between the views of the local stage, as in their code.
        local_learning_rate: Adam at 1e-3, paper.
    """

    frozen: bool = False
    temperature: float = 0.1
    partitions: int = 4
    blocks: int = 3
    brightness: float = 0.3
    contrast_range: float = 0.3
    local_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.blocks <= 4:
            raise ValueError(f"blocks must be 1 to 4, the decoder has no more; got {self.blocks}")

    def contrast_settings(self) -> dict[str, Any]:
        return dict(temperature=self.temperature, partitions=self.partitions)

    def contrast(self) -> SliceContrast:
        return _GlobalPartitions(**self.contrast_settings())

    def networks(self, classes: int) -> nn.ModuleDict:
        networks = super().networks(classes)
        channels = self.width * 2 ** (4 - self.blocks)  # of the map that the last trained block makes
        networks["local_head"] = DenseProjectionHead(channels, channels)
        return networks

    def stages(self, data: TrainingData) -> list[Stage]:
        pretraining, finetuning = super().stages(data)
        assert isinstance(pretraining, ContrastivePretraining)
        local = LocalPretraining(
            name="local",
            uses_labels=False,
            everything=self.transductive,
            steps=max(1, pretraining.steps // 2),
            blocks=self.blocks,
            temperature=self.temperature,
            brightness=self.brightness,
            contrast=self.contrast_range,
            batch_size=self.pretrain_batch,
            learning_rate=self.local_learning_rate,
            weight_decay=self.weight_decay,
            augmentation=self.augmentation,
        )
        first = max(1, pretraining.steps - local.steps)
        return [dataclasses.replace(pretraining, steps=first), local, finetuning]
