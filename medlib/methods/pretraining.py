"""The two-stage recipe of PCL and CORAL: contrast slices without labels, then fine-tune a U-Net on a few patients."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation, Warp
from medlib.data.batches import ShuffledRows, TrainingData
from medlib.losses.contrastive import COLDEST
from medlib.losses.segmentation import cross_entropy_loss
from medlib.methods.base import Method, Stage, Streams, Work, check_range
from medlib.nets import ProjectionHead, UNet, coral_unet


class SliceContrast(nn.Module, ABC):
    """A loss on two views of a batch of slices: the part in which the pre-training methods differ."""

    @abstractmethod
    def forward(
        self, first: Tensor, second: Tensor, positions: Tensor, index: Tensor, depth: Tensor
    ) -> dict[str, Tensor]:
        """Named terms, ``total`` among them.

        Args:
            first, second: (B, D) embeddings of the two views, raw head outputs; row i shows slice i.
            positions: (B,) float, slice position in (0, 1].
            index, depth: (B,) int, the slice's index in its volume and that volume's number of slices.
        """


def unet_of(networks: nn.ModuleDict) -> UNet:
    """The segmentation network of a two-stage method."""
    return cast(UNet, networks["unet"])


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, floor: float = 0.0
) -> torch.optim.lr_scheduler.LRScheduler:
    """lr_t = floor + (lr_0 - floor)/2 (1 + cos(pi t/T)), t counted in steps, without warm-up."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1), eta_min=floor)


@dataclass(frozen=True, kw_only=True)
class ContrastivePretraining(Stage):
    """Train encoder and projection head so that embeddings of slices follow the networks' ``contrast`` loss.

    Attributes:
        contrast: settings of that loss; they are part of the stage's identity.
        batch_size: slices a step; each is seen in two views, so the loss has 2 ``batch_size`` rows.
        separate_views: pass the two views through the encoder one after the other (each has its own batch statistics).
    """

    contrast: dict[str, Any]
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    separate_views: bool
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _Pretraining(self, networks, data, streams)


class TwoViews(Work):
    """Draws all slices in turn, with or without a label, and each in two views: two warps of its own.

    Args:
        stage: any stage with a ``batch_size`` and an ``augmentation``.
    """

    def __init__(self, stage: Any, data: TrainingData, streams: Streams):
        super().__init__()
        self.stage, self.streams = stage, streams
        self.slices = data.slices(streams.device, everything=stage.everything)
        rows = torch.arange(len(self.slices), device=self.slices.images.device)
        self.samplers = {"slices": ShuffledRows(rows, stage.batch_size, streams["sample"], streams.rank, streams.world)}

    def views(self) -> tuple[Tensor, Tensor, tuple[Warp, Warp]]:
        """The next rows (B,), their images (B, 1, S, S) and a warp for each of the two views."""
        rows = self.samplers["slices"].draw()
        images, _ = self.slices.batch(rows)
        first, second = (
            self.stage.augmentation.draw(len(rows), images.shape[-1], self.streams.own("augment")) for _ in range(2)
        )
        return rows, images, (first, second)


class _Pretraining(TwoViews):
    def __init__(self, stage: ContrastivePretraining, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(stage, data, streams)
        self.encoder, self.head, self.contrast = unet_of(networks).encoder, networks["head"], networks["contrast"]
        # The learnable direction of CORAL is in the same parameter group as the network, as in the released code.
        self.optimizer = torch.optim.SGD(
            self.parameters(), lr=stage.learning_rate, momentum=stage.momentum, weight_decay=stage.weight_decay
        )
        self.schedule = cosine_schedule(self.optimizer, stage.steps)

    def draw(self) -> dict[str, Tensor]:
        rows, images, (first, second) = self.views()
        where = {name: getattr(self.slices, name)[rows] for name in ("positions", "index", "depth")}
        return {"first": first.images(images), "second": second.images(images), **where}

    def forward(self, first: Tensor, second: Tensor, **where: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        if self.stage.separate_views:
            embeddings = [self.head(self.encoder(view)[-1]) for view in (first, second)]
        else:
            embeddings = self.head(self.encoder(torch.cat([first, second]))[-1]).chunk(2)
        return self.contrast(*map(self.gather, embeddings), **{name: self.gather(part) for name, part in where.items()})


@dataclass(frozen=True, kw_only=True)
class SupervisedFinetuning(Stage):
    """Train the U-Net on the labelled slices with cross-entropy.

    Attributes:
        frozen: leave the encoder as it is, its batch-norm statistics too.
        floor: the learning rate at the end of the cosine.
    """

    batch_size: int
    learning_rate: float
    floor: float
    weight_decay: float
    frozen: bool
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _Finetuning(self, networks, data, streams)


class _Finetuning(Work):
    def __init__(self, stage: SupervisedFinetuning, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__()
        self.stage, self.streams = stage, streams
        self.slices = data.slices(streams.device)
        self.unet = unet_of(networks)
        self.unet.encoder.requires_grad_(not stage.frozen)
        rows = self.slices.labelled.nonzero().squeeze(1)
        self.samplers = {
            "labelled": ShuffledRows(rows, stage.batch_size, streams["sample"], streams.rank, streams.world)
        }
        self.optimizer = torch.optim.Adam(
            [parameter for parameter in self.unet.parameters() if parameter.requires_grad],
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
        )
        self.schedule = cosine_schedule(self.optimizer, stage.steps, floor=min(stage.floor, stage.learning_rate))

    def train(self, mode: bool = True) -> "_Finetuning":
        super().train(mode)
        if self.stage.frozen:
            self.unet.encoder.eval()  # a frozen encoder whose batch-norm statistics still move is not frozen
        return self

    def draw(self) -> dict[str, Tensor]:
        images, labels = self.slices.batch(self.samplers["labelled"].draw())
        warp = self.stage.augmentation.draw(len(images), images.shape[-1], self.streams.own("augment"))
        return {"images": warp.images(images), "labels": warp.labels(labels)}

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        loss = cross_entropy_loss(self.unet(images), labels)
        return {"total": loss, "cross_entropy": loss}


def stage_length(steps: int | None, epochs: int, rows: int, batch: int) -> int:
    """Optimiser steps of a stage: ``steps`` where given, else ``epochs`` through ``rows`` rows, ``batch`` at a time."""
    return steps if steps is not None else epochs * max(1, rows // batch)


@dataclass(frozen=True, kw_only=True)
class PretrainThenFinetune(Method):
    """The settings that all two-stage methods share; defaults are those of CORAL (section 3.2) and its code for ACDC.

    Attributes:
        width: channels of the U-Net at full resolution; 48 for ACDC in the code of PCL, which CORAL uses.
        projection_dim: d, the length of an embedding; 512 in the code.
        pretrain_epochs, pretrain_steps: length of the first stage; steps, where given, overrule epochs.
        pretrain_batch: slices a step, each in two views.
        transductive: pre-train on the images of validation and test patients too, as the papers do ("on the entire
            dataset"). False here, so that no test image is seen before it is tested on.
        frozen: fine-tune the decoder only (the paper) or everything (the released code).
        finetune_floor: learning rate at the end of fine-tuning; 1e-6 is the code's default.
    """

    image_size: int = 352
    spacing: float | None = 1.25
    width: int = 48
    projection_dim: int = 512

    pretrain_epochs: int = 300
    pretrain_steps: int | None = None
    pretrain_batch: int = 32
    pretrain_learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-5
    separate_views: bool = False
    transductive: bool = False

    frozen: bool = True
    finetune_epochs: int = 100
    finetune_steps: int | None = None
    finetune_batch: int = 5
    finetune_learning_rate: float = 5e-5
    finetune_floor: float = 1e-6

    augmentation: GeometricAugmentation = field(default_factory=GeometricAugmentation)

    # laptop: with hundreds of steps instead of thousands, fine-tuning at 5e-5 leaves every network untrained. 2e-3 was
    # chosen for the supervised baseline on ACDC's validation patients (of 1e-3, 2e-3, 3e-3, 5e-3, 1e-2); all share it.
    # Pre-training at 0.1 collapses this small network within 40 steps: all embeddings point one way, PCL stays at its
    # value for equal embeddings, log(2 * batch - 1). At 0.01 to 0.03 PCL rests there for 200 to 300 steps before it
    # moves, so 400 steps were too few. 0.02 and 800 steps were chosen by the pre-training loss of PCL, without a label.
    scales: ClassVar = {
        "ci": dict(
            image_size=32, spacing=7.5, width=4, projection_dim=16, pretrain_steps=6, pretrain_batch=8,
            pretrain_learning_rate=0.03, finetune_steps=6, finetune_batch=4, finetune_learning_rate=2e-3,
        ),
        "laptop": dict(
            image_size=80, spacing=3.0, width=16, projection_dim=128, pretrain_steps=800, pretrain_batch=16,
            pretrain_learning_rate=0.02, finetune_steps=600, finetune_learning_rate=2e-3,
        ),
        "paper": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("image_size", "width", "projection_dim", "pretrain_batch", "finetune_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pretrain_steps", "finetune_steps", "pretrain_epochs", "finetune_epochs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        if not isinstance(self.frozen, bool):
            raise ValueError(f"frozen must be True or False, got {self.frozen!r}")
        if self.image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16 (four poolings), got {self.image_size}")
        for name in ("pretrain_learning_rate", "finetune_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_range(self, "weight_decay", lowest=0)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if hasattr(self, "temperature"):
            check_range(self, "temperature", lowest=COLDEST)

    def contrast(self) -> SliceContrast:
        """A new pre-training loss; its initial weights, if any, come from the surrounding `medlib.nets.seeded_init`."""
        raise ValueError(f"{self.name} does not pre-train")

    def contrast_settings(self) -> dict[str, Any] | None:
        """What of the settings defines that loss, part of the pre-training's identity; None: no pre-training."""
        return None

    def networks(self, classes: int) -> nn.ModuleDict:
        unet = coral_unet(classes, self.width)
        networks = nn.ModuleDict({"unet": unet})
        if self.contrast_settings() is not None:
            networks["head"] = ProjectionHead(16 * self.width, self.projection_dim)
            networks["contrast"] = self.contrast()
        return networks

    def stages(self, data: TrainingData) -> list[Stage]:
        slices = data.slices("cpu", everything=self.transductive)

        finetuning = SupervisedFinetuning(
            name="finetune",
            uses_labels=True,
            steps=stage_length(
                self.finetune_steps, self.finetune_epochs, int(slices.labelled.sum()), self.finetune_batch
            ),
            batch_size=self.finetune_batch,
            learning_rate=self.finetune_learning_rate,
            floor=self.finetune_floor,
            weight_decay=self.weight_decay,
            frozen=self.frozen,
            augmentation=self.augmentation,
        )
        contrast = self.contrast_settings()
        if contrast is None:
            return [finetuning]
        pretraining = ContrastivePretraining(
            name="pretrain",
            uses_labels=False,
            everything=self.transductive,
            steps=stage_length(self.pretrain_steps, self.pretrain_epochs, len(slices), self.pretrain_batch),
            contrast={"method": self.name, **contrast},
            batch_size=self.pretrain_batch,
            learning_rate=self.pretrain_learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            separate_views=self.separate_views,
            augmentation=self.augmentation,
        )
        return [pretraining, finetuning]

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return unet_of(networks)(images).softmax(dim=1)

    def embed(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 1, S, S): the head's raw output, or the pooled bottleneck without a head."""
        bottleneck = unet_of(networks).encoder(images)[-1]
        return networks["head"](bottleneck) if "head" in networks else bottleneck.flatten(2).mean(dim=2)
