"""Training in one stage on labelled and unlabelled images together, the same for 2D slices and for 3D patches.

A method of this kind is a `Cotrained` (its settings, its networks) with a `CotrainingWork` that says what the
unlabelled half of a batch is for. Batches, supervised loss, optimiser, schedule, ramp, averaged teacher, second network
and step counter are here. Settings and schedules are those of the SSL4MIS benchmark (github.com/HiLab-git/SSL4MIS), on
which the semi-supervised papers build.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation
from medlib.data.batches import ShuffledRows, Slices, TrainingData
from medlib.data.cases import DatasetInfo
from medlib.data.patches import Patches
from medlib.data.prepare import Preparation, VolumeProtocol
from medlib.losses.segmentation import supervised_loss
from medlib.methods.base import Method, Stage, Streams, Work, check_choices, check_range, check_whole
from medlib.nets import UNet, ssl4mis_unet, ssl4mis_unet_3d, ssl4mis_vnet

STRIDE = 16  # of all networks here: four halvings
NETWORKS_3D = {"unet": ssl4mis_unet_3d, "vnet": ssl4mis_vnet}
OPTIMIZERS = ("sgd", "adamw")


# ---- what a batch is


class ImageSource(Protocol):
    """Where the images of a batch come from, augmented; rows are what `ShuffledRows` draws."""

    labelled: Tensor  # (N,) bool, on the device

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, *space) float32 and labels (B, *space) int64 of ``rows`` (B,)."""


class AugmentedSlices:
    """Slices, each with a warp of its own; a row is a slice. Space is (S, S)."""

    def __init__(self, slices: Slices, augmentation: GeometricAugmentation, streams: Streams):
        self.slices, self.augmentation, self.streams = slices, augmentation, streams
        self.labelled = slices.labelled

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.slices.batch(rows)
        warp = self.augmentation.draw(len(images), images.shape[-1], self.streams.own("augment"))
        return warp.images(images), warp.labels(labels)


class MirroredPatches:
    """Random patches of volumes, mirrored in plane at random; a row is a volume. Space is (D, H, W).

    Args:
        foreground: share of a labelled volume's patches that is centred on an organ, see `Patches.batch`.
        mirror: probability to mirror each of the two axes in plane.
    """

    def __init__(self, patches: Patches, foreground: float, mirror: float, streams: Streams):
        self.patches, self.foreground, self.mirror, self.streams = patches, foreground, mirror, streams
        self.labelled = patches.labelled

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.patches.batch(rows, self.streams.own("patches"), self.foreground)
        augment = self.streams.own("augment")
        for axis in (-2, -1):
            mirrored = torch.rand(len(rows), generator=augment, device=augment.device) < self.mirror
            images = torch.where(mirrored.view(-1, 1, 1, 1, 1), images.flip(axis), images)
            labels = torch.where(mirrored.view(-1, 1, 1, 1), labels.flip(axis), labels)
        return images, labels


# ---- schedules and teachers


def ramp_up(done: Tensor, steps: int) -> Tensor:
    """exp(-5 (1 - t/T)^2) of t = ``done`` (0-d) steps and T = ``steps``, from 0.0067 to 1, and 1 from then on.

    Source: Laine and Aila, ICLR 2017; without a wait for the device.
    """
    return torch.exp(-5 * (1 - done / steps).clamp(min=0).square())


class Teacher(nn.Module):
    """A copy of a network that follows it without gradient: weights and buffers, theta' <- a theta' + (1 - a) theta.

    a = min(1 - 1/(n + 1), ``decay``) at update n = 0, 1, ..., so that it starts as the plain mean of what it has seen
    (SSL4MIS). Its buffers change by this alone: passes through it leave batch-norm statistics as they are. Counters,
    which have no mean, are copied.

    Args:
        noisy: in training it keeps dropout and the statistics of the batch (SSL4MIS); else it is in eval mode always.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float, noisy: bool):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay, self.noisy = decay, noisy
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        for layer in self.network.modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                layer.momentum = 0.0

    def train(self, mode: bool = True) -> "Teacher":
        super().train(mode)
        self.network.train(mode and self.noisy)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C, *space) of images (B, 1, *space)."""
        return self.network(images).softmax(dim=1)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """One update towards ``network``, the one it was copied from."""
        step = (1 / (self.updates + 1)).clamp(min=1 - self.decay)
        mine, theirs = ([*module.parameters(), *module.buffers()] for module in (self.network, network))
        for averaged, current in zip(mine, theirs, strict=True):
            if averaged.is_floating_point():
                averaged.lerp_(current, step.to(averaged.dtype))
            else:
                averaged.copy_(current)
        self.updates += 1


# ---- the method and its stage


@dataclass(frozen=True, kw_only=True)
class Cotrained(Method):
    """The settings that all methods trained in this way share; defaults are those of SSL4MIS for ACDC.

    Attributes:
        image_size, spacing: of the slices; SSL4MIS resizes the whole field of view to 256 px.
        patch: None trains on slices, (z, y, x) in voxels on patches of that size, and predicts volumes with it.
        voxel_spacing: of volumes, (z, y, x) in mm; None: that of the data set's own 3D protocol.
        network: of 3D methods, "unet" or "vnet"; in 2D there is the U-Net alone.
        width: channels at full resolution.
        steps: optimiser steps, T.
        batch_size: images a step, half of them labelled: 24 slices, or 4 patches, in SSL4MIS.
        optimizer: "sgd" (SSL4MIS), or "adamw" with weight decay of its own: a few hundred steps that SGD needs to see
            the smallest of many organs at all. Give it a learning rate of its own too, some 0.003.
        momentum: of SGD; of AdamW the first beta.
        power: of the learning rate lr (1 - t/T)^power.
        dice_weight, cross_entropy_weight: of the supervised loss.
        ramp_steps: steps in which the weight of the other terms grows as exp(-5 (1 - t/T)^2); None: all steps.
        foreground: share of a labelled volume's patches that is centred on an organ (3D).
        mirror: probability to mirror each axis in plane (3D).
        augmentation: of slices (2D).
    """

    image_size: int = 256
    spacing: float | None = None
    patch: tuple[int, int, int] | None = None  # a setting here, a property in the base
    voxel_spacing: tuple[float, float, float] | None = None
    network: str = "unet"
    width: int = 16

    steps: int = 30_000
    batch_size: int = 24
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    dice_weight: float = 0.5
    cross_entropy_weight: float = 0.5
    ramp_steps: int | None = None

    foreground: float = 1 / 3
    mirror: float = 0.5
    augmentation: GeometricAugmentation = field(default_factory=GeometricAugmentation)

    # laptop: of 0.01, 0.03 and 0.1 the learning rate with which 600 steps of the supervised baseline validate best
    # (ACDC, 3 patients, seed 0: 0.46, 0.59, 0.54; data/results/acdc_learning_rate has the records and their commands);
    # all methods here share it. 12 slices a step instead of 8 take half as long again, for a Dice within the spread of
    # seeds (0.59 and 0.56)
    scales: ClassVar = {
        "ci": dict(image_size=32, spacing=7.5, width=4, steps=6, batch_size=4),
        "laptop": dict(image_size=80, spacing=3.0, steps=600, batch_size=8, learning_rate=0.03),
        "paper": {},
    }
    unlabelled: ClassVar[bool] = True  # whether it looks at unlabelled images
    in_3d: ClassVar[bool] = True  # whether it can be trained on patches

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % STRIDE:
            raise ValueError(f"image_size must be a multiple of {STRIDE} (four poolings), got {self.image_size}")
        self._check_3d()
        check_choices(self, {"optimizer": OPTIMIZERS})
        check_whole(self, "width", "steps")
        check_whole(self, "batch_size", lowest=2)
        if self.batch_size % 2:
            raise ValueError(f"batch_size must be even, half of it labelled, got {self.batch_size}")
        if self.ramp_steps is not None:
            check_whole(self, "ramp_steps")
        check_range(self, "learning_rate", "power", lowest=0, open_ended=True)
        check_range(self, "weight_decay", "dice_weight", "cross_entropy_weight", lowest=0)
        if not self.dice_weight + self.cross_entropy_weight > 0:
            raise ValueError("dice_weight and cross_entropy_weight are both 0: nothing is learnt from labels")
        check_range(self, "foreground", "mirror", lowest=0, highest=1)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def _check_3d(self) -> None:
        if self.network not in NETWORKS_3D:
            raise ValueError(f"network must be one of {', '.join(NETWORKS_3D)}, got {self.network!r}")
        if self.patch is None:
            if self.network != "unet":
                raise ValueError(f"network={self.network!r} is 3D: give a patch, or take network='unet'")
            if self.voxel_spacing is not None:
                raise ValueError("voxel_spacing is for 3D: give a patch, or the spacing of slices as spacing")
            return
        if not self.in_3d:
            raise ValueError(f"{self.name} is 2D here: leave patch out, got {self.patch}")
        sides = self.patch
        if not (isinstance(sides, tuple) and len(sides) == 3 and all(type(n) is int and n > 0 for n in sides)):
            raise ValueError(f"patch must be (z, y, x) in whole voxels or None, got {sides!r}")
        if any(n % STRIDE for n in sides) or math.prod(sides) == STRIDE**3:
            raise ValueError(
                f"patch must be multiples of {STRIDE} (four halvings), one of them larger than that, got {sides}"
            )
        mm = self.voxel_spacing
        if mm is not None and not (
            isinstance(mm, tuple) and len(mm) == 3 and all(type(n) in (int, float) and 0 < n < math.inf for n in mm)
        ):
            raise ValueError(f"voxel_spacing must be (z, y, x) in mm or None, got {mm!r}")

    # what differs between methods

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> "CotrainingWork":
        """What one step computes."""
        return CotrainingWork(self, networks, data, streams)

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the terms of `CotrainingWork.terms`, at the end of the ramp."""
        return {}

    # what does not

    def protocol(self, info: DatasetInfo) -> Preparation:
        if self.patch is None:
            return super().protocol(info)
        return VolumeProtocol(self.voxel_spacing or info.volume_spacing, window=info.window)

    def source(self, data: TrainingData, streams: Streams) -> ImageSource:
        """The training images on the streams' device."""
        if self.patch is None:
            return AugmentedSlices(data.slices(streams.device), self.augmentation, streams)
        patches = data.patches(streams.device, self.patch)
        return MirroredPatches(patches, self.foreground, self.mirror, streams)

    def new_unet(self, classes: int) -> UNet:
        """A network of these settings; its initial weights come from the surrounding `medlib.nets.seeded_init`."""
        build = ssl4mis_unet if self.patch is None else NETWORKS_3D[self.network]
        return build(classes, self.width)

    def networks(self, classes: int) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": self.new_unet(classes)})

    def new_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Of these parameters, by ``optimizer``, ``learning_rate``, ``momentum`` and ``weight_decay``."""
        shared: dict[str, Any] = dict(lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, betas=(self.momentum, 0.999), **shared)
        return torch.optim.SGD(parameters, momentum=self.momentum, **shared)

    def stages(self, data: TrainingData) -> list[Stage]:
        return [Cotraining(name="cotrain", steps=self.steps, uses_labels=True, method=self)]

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return networks["unet"](images).softmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class Cotraining(Stage):
    """The one stage of a `Cotrained` method. All settings of ``method`` are part of its identity, its name too."""

    method: Cotrained

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return self.method.work(networks, data, streams)

    def describe(self) -> dict[str, Any]:
        fields = super().describe()
        return {**fields, "method": {"name": self.method.name, **dataclasses.asdict(self.method)}}


class CotrainingWork(Work):
    """A batch of labelled and unlabelled images, and the supervised loss; subclasses add `terms`.

    A split in which every image is labelled has no unlabelled half; neither has a method that does not look at it. The
    loss is then the supervised one.
    """

    done: Tensor  # steps taken, on the device
    labels: Tensor  # (labelled, *space) int64 of the batch under way, for `terms` that use them

    def __init__(self, method: Cotrained, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__()
        self.method, self.streams, self.networks = method, streams, networks
        self.source = method.source(data, streams)
        halves = {"labelled": self.source.labelled}
        if method.unlabelled and not bool(self.source.labelled.all()):
            halves["unlabelled"] = ~self.source.labelled
        self.samplers = {
            half: ShuffledRows(
                member.nonzero().squeeze(1),
                method.batch_size // 2,
                streams["sample" if half == "labelled" else "sample unlabelled"],
                streams.rank,
                streams.world,
            )
            for half, member in halves.items()
        }
        self.register_buffer("done", torch.zeros((), dtype=torch.long))
        self.optimizer = method.new_optimizer(self.networks.parameters())
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, method.steps, method.power)

    @property
    def unet(self) -> UNet:
        """The network that predicts."""
        return cast(UNet, self.networks["unet"])

    # what differs between methods

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, Any]:
        """What the networks see of unlabelled images (B, 1, *space), and what they shall predict from it."""
        return unlabelled, None

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        """Logits (B, C, *space) of everything that predicts from images (B, 1, *space), the first few ``labelled``."""
        return [self.unet(images)]

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss on the labelled images, with which each of the outputs begins; by default the sum over outputs."""
        method = self.method
        losses = [
            supervised_loss(logits[: len(labels)], labels, method.dice_weight, method.cross_entropy_weight)
            for logits in outputs
        ]
        return torch.stack(losses).sum()

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        """Losses that need no label, by name, each with a weight in the method's ``weights``.

        Args:
            outputs: of `outputs`, for all images.
            images: (B, 1, *space), all that the networks saw.
            labelled: how many of them, the first, are labelled.
            targets: of `prepare`.
        """
        return {}

    def ramp_of(self, term: str) -> Tensor:
        """The present height, 0-d, of the ramp on the weight of one term; by default all share `ramp`."""
        return self.ramp()

    # what does not

    def ramp(self) -> Tensor:
        """The present height, 0-d, of the ramp on the weights."""
        return ramp_up(self.done, self.method.ramp_steps or self.method.steps)

    def draw(self) -> dict[str, Tensor]:
        images, labels = self.source.batch(self.samplers["labelled"].draw())
        batch = {"images": images, "labels": labels}
        if "unlabelled" in self.samplers:
            batch["unlabelled"], _ = self.source.batch(self.samplers["unlabelled"].draw())
        return batch

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, unlabelled: Tensor | None = None
    ) -> dict[str, Tensor]:
        labelled, targets = len(images), None
        if unlabelled is not None:
            unlabelled, targets = self.prepare(unlabelled)
            images = torch.cat([images, unlabelled])
        outputs = self.outputs(images, labelled)
        supervised = self.supervised(outputs, labels)
        total, terms = supervised, {}
        if unlabelled is not None:
            self.labels = labels
            terms = self.terms(outputs, images, labelled, targets)
            for name, term in terms.items():
                total = total + self.ramp_of(name) * self.method.weights[name] * term
        return {"total": total, "supervised": supervised, **terms}

    def after_step(self) -> None:
        self.done += 1


# ---- what several methods add


@dataclass(frozen=True, kw_only=True)
class Consistency(Cotrained):
    """A method with one term for the unlabelled images.

    Attributes:
        consistency_weight: of that term at the end of the ramp.
    """

    consistency_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "consistency_weight", lowest=0)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"consistency": self.consistency_weight}


@dataclass(frozen=True, kw_only=True)
class Taught(Consistency):
    """A method with a teacher that is the running mean of the network.

    Attributes:
        ema: decay a of the mean, see `Teacher`.
        noisy_teacher: the teacher keeps dropout and batch statistics, as in SSL4MIS; False puts it in eval mode.
    """

    ema: float = 0.99
    noisy_teacher: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")


class TaughtWork(CotrainingWork):
    """Has a `Teacher` that follows the network that predicts, one update a step."""

    teacher: Teacher

    def __init__(self, method: Taught, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(method, networks, data, streams)
        self.teacher = Teacher(self.unet, method.ema, method.noisy_teacher)

    def noisy(self, images: Tensor, deviation: float) -> Tensor:
        """Images plus Gaussian noise of that standard deviation, cut at twice of it."""
        generator = self.streams.own("noise")
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return images + deviation * noise.clamp(-2, 2)

    def after_step(self) -> None:
        self.teacher.follow(self.unet)
        super().after_step()


class TwoNetworks(CotrainingWork):
    """Both predict from the same images; the supervised loss is the sum of both."""

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        return [self.unet(images), self.networks["second"](images)]
