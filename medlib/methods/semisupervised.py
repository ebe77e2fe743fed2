"""Fine-tuning that also uses the unlabelled slices: self-training and mutual consistency, two rivals of IDEAL."""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation, Warp
from medlib.data.batches import ShuffledRows, TrainingData
from medlib.losses.contrastive import COLDEST
from medlib.losses.mcnet import mutual_consistency_loss
from medlib.losses.segmentation import cross_entropy_loss, dice_loss
from medlib.methods.base import Stage, Streams, Work, check_range, register
from medlib.methods.cotraining import ramp_up
from medlib.methods.pretraining import PretrainThenFinetune, SupervisedFinetuning, cosine_schedule, unet_of
from medlib.nets import BranchedUNet, branched_unet


def branched_of(networks: nn.ModuleDict) -> BranchedUNet:
    """The segmentation network of a method with several decoders."""
    return cast(BranchedUNet, networks["unet"])


def mean_of_branches(networks: nn.ModuleDict, images: Tensor) -> Tensor:
    """Mean over the decoders of their class probabilities, (B, C, S, S)."""
    return branch_probabilities(networks, images).mean(dim=0)


def branch_probabilities(networks: nn.ModuleDict, images: Tensor) -> Tensor:
    """Class probabilities (branches, B, C, S, S) of images (B, 1, S, S), decoder by decoder."""
    return torch.stack([logits.softmax(dim=1) for logits in branched_of(networks)(images)])


class LabelledAndUnlabelled(Work):
    """Draws as many unlabelled slices as labelled ones, each half from a stream of its own.

    Args:
        stage: any stage with a ``batch_size`` (of each half) and an ``augmentation``.
        unlabelled: False leaves the second half out; so does a split in which every slice is labelled.
    """

    def __init__(self, stage: Any, data: TrainingData, streams: Streams, unlabelled: bool = True):
        super().__init__()
        self.stage, self.streams = stage, streams
        self.slices = data.slices(streams.device)
        halves = {"labelled": self.slices.labelled}
        if unlabelled and not bool(self.slices.labelled.all()):
            halves["unlabelled"] = ~self.slices.labelled
        self.samplers = {
            half: ShuffledRows(
                member.nonzero().squeeze(1),
                stage.batch_size,
                streams["sample" if half == "labelled" else "sample unlabelled"],
                streams.rank,
                streams.world,
            )
            for half, member in halves.items()
        }

    def warp(self, images: Tensor) -> Warp:
        """A warp for each of the images (B, 1, S, S)."""
        return self.stage.augmentation.draw(len(images), images.shape[-1], self.streams.own("augment"))

    def draw(self) -> dict[str, Tensor]:
        images, labels = self.slices.batch(self.samplers["labelled"].draw())
        warp = self.warp(images)
        batch = {"images": warp.images(images), "labels": warp.labels(labels)}
        if "unlabelled" in self.samplers:
            images, _ = self.slices.batch(self.samplers["unlabelled"].draw())
            batch["unlabelled"] = self.warp(images).images(images)
        return batch


@dataclass(frozen=True, kw_only=True)
class PseudoLabelFinetuning(Stage):
    """Go on training with labels, and with the network's own decisions as labels of the unlabelled slices.

    The decisions are made once, by the network that the stage begins with.

    Attributes:
        batch_size: labelled slices a step, and as many with pseudo-labels.
    """

    batch_size: int
    learning_rate: float
    floor: float
    weight_decay: float
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _PseudoLabels(self, networks, data, streams)


class _PseudoLabels(LabelledAndUnlabelled):
    def __init__(self, stage: PseudoLabelFinetuning, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(stage, data, streams)
        self.unet = unet_of(networks)
        self.decisions = self._decide()
        self.optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay
        )
        self.schedule = cosine_schedule(self.optimizer, stage.steps, floor=min(stage.floor, stage.learning_rate))

    @torch.no_grad()
    def _decide(self) -> Tensor:
        """Labels (N, S, S) of all slices: the given ones, elsewhere the class the network holds most likely."""
        decisions = self.slices.labels.clone()
        training = self.unet.training
        self.unet.eval()
        for rows in (~self.slices.labelled).nonzero().squeeze(1).split(32):
            images, _ = self.slices.batch(rows)
            decisions[rows] = self.unet(images).argmax(dim=1).to(decisions.dtype)
        self.unet.train(training)
        return decisions

    def draw(self) -> dict[str, Tensor]:
        rows = torch.cat([sampler.draw() for sampler in self.samplers.values()])
        images, _ = self.slices.batch(rows)
        warp = self.warp(images)
        return {"images": warp.images(images), "labels": warp.labels(self.decisions[rows].long())}

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits, half = self.unet(images), len(images) // len(self.samplers)
        given = cross_entropy_loss(logits[:half], labels[:half])
        pseudo = cross_entropy_loss(logits[half:], labels[half:])
        return {"total": given + pseudo, "cross_entropy": given, "pseudo": pseudo}


@register("self_training", title="self-training")
@dataclass(frozen=True, kw_only=True)
class SelfTraining(PretrainThenFinetune):
    """Train on the labels, label the rest with the result, train on both; ``rounds`` times (Bai et al., MICCAI 2017).

    The labelled and the pseudo-labelled slices have the same weight in the loss, as in the paper's sum of both
    log-likelihoods, and each makes half of a batch. Its conditional random field, which smooths the pseudo-labels, is
    left out, as IDEAL's table does not say whether it had one. All rounds together take the steps that fine-tuning
    takes elsewhere: ``finetune_steps`` is their sum.

    Attributes:
        rounds: how often the pseudo-labels are made anew; our choice.
    """

    frozen: bool = False
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.frozen:
            raise ValueError("self_training starts from random weights: a frozen encoder would never learn")

    def stages(self, data: TrainingData) -> list[Stage]:
        (supervised,) = super().stages(data)
        assert isinstance(supervised, SupervisedFinetuning)
        steps = max(1, supervised.steps // (self.rounds + 1))
        rounds: list[Stage] = [
            PseudoLabelFinetuning(
                name=f"round {number}",
                uses_labels=True,
                steps=steps,
                batch_size=self.finetune_batch,
                learning_rate=self.finetune_learning_rate,
                floor=self.finetune_floor,
                weight_decay=self.weight_decay,
                augmentation=self.augmentation,
            )
            for number in range(1, self.rounds + 1)
        ]
        first = max(1, supervised.steps - self.rounds * steps)
        return [dataclasses.replace(supervised, steps=first), *rounds]


@dataclass(frozen=True, kw_only=True)
class MutualConsistencyTraining(Stage):
    """Train both decoders on the labels and on each other's sharpened probabilities.

    Attributes:
        batch_size: labelled slices a step, and as many unlabelled ones.
        dice_weight: of the two Dice losses on labelled slices.
        consistency_weight: of the mutual consistency at the end of its ramp exp(-5 (1 - t/T)^2).
        sharpening: temperature of the sharpening.
    """

    batch_size: int
    learning_rate: float
    floor: float
    weight_decay: float
    dice_weight: float
    consistency_weight: float
    sharpening: float
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _MutualConsistency(self, networks, data, streams)


class _MutualConsistency(LabelledAndUnlabelled):
    done: Tensor

    def __init__(self, stage: MutualConsistencyTraining, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(stage, data, streams)
        self.unet = branched_of(networks)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # steps taken
        self.optimizer = torch.optim.Adam(
            self.unet.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay
        )
        self.schedule = cosine_schedule(self.optimizer, stage.steps, floor=min(stage.floor, stage.learning_rate))

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, unlabelled: Tensor | None = None
    ) -> dict[str, Tensor]:
        both = images if unlabelled is None else torch.cat([images, unlabelled])
        first, second = self.unet(both)
        dice = dice_loss(first[: len(images)], labels) + dice_loss(second[: len(images)], labels)
        consistency = mutual_consistency_loss(first, second, self.stage.sharpening)
        ramp = ramp_up(self.done, self.stage.steps)
        total = self.stage.dice_weight * dice + self.stage.consistency_weight * ramp * consistency
        return {"total": total, "dice": dice, "consistency": consistency}

    def after_step(self) -> None:
        self.done += 1


@register("mutual_consistency", title="MC-Net (mutual consistency)")
@dataclass(frozen=True, kw_only=True)
class MutualConsistency(PretrainThenFinetune):
    """MC-Net (arXiv 2103.02911): two decoders, each drawn to the other's sharpened probabilities; no pre-training.

    Optimiser and schedule are those that all methods share here, not MC-Net's SGD. The prediction is the mean of both.

    Attributes:
        dice_weight: 0.5, beta of the authors' code; the paper's loss on labels is Dice alone.
        consistency_weight: 0.1 at the end of the ramp, as in paper and code.
        sharpening: T = 0.1 of the sharpening, as in paper and code.
    """

    frozen: bool = False
    dice_weight: float = 0.5
    consistency_weight: float = 0.1
    sharpening: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "dice_weight", "consistency_weight", lowest=0, open_ended=True)
        check_range(self, "sharpening", lowest=COLDEST)
        if self.frozen:
            raise ValueError("mutual_consistency starts from random weights: a frozen encoder would never learn")

    def networks(self, classes: int) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": branched_unet(classes, self.width)})

    def stages(self, data: TrainingData) -> list[Stage]:
        (supervised,) = super().stages(data)
        training = MutualConsistencyTraining(
            name="cotrain",
            uses_labels=True,
            steps=supervised.steps,
            batch_size=self.finetune_batch,
            learning_rate=self.finetune_learning_rate,
            floor=self.finetune_floor,
            weight_decay=self.weight_decay,
            dice_weight=self.dice_weight,
            consistency_weight=self.consistency_weight,
            sharpening=self.sharpening,
            augmentation=self.augmentation,
        )
        return [training]

    def branches(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (2, B, C, S, S) of each decoder, networks in eval mode."""
        return branch_probabilities(networks, images)

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return mean_of_branches(networks, images)
