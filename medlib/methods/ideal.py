"""IDEAL: dense local pre-training, then fine-tuning with two decoders that teach each other (arXiv 2210.15075)."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation, Warp
from medlib.banks import FeatureBank
from medlib.data.batches import TrainingData
from medlib.losses.contrastive import COLDEST
from medlib.losses.ideal import (
    cross_consistency_loss,
    dense_correspondence,
    distinct_match_fraction,
    geometric_correspondence,
    local_contrastive_loss,
)
from medlib.losses.segmentation import cross_entropy_loss
from medlib.methods.base import Method, Stage, Streams, Work, check_choices, check_range, register
from medlib.methods.cotraining import ramp_up
from medlib.methods.pretraining import TwoViews, cosine_schedule, stage_length
from medlib.methods.semisupervised import LabelledAndUnlabelled, branch_probabilities, branched_of, mean_of_branches
from medlib.nets import DenseProjectionHead, ProjectionHead, branched_resnet, branched_unet

CHOICES = {
    "encoder": ("resnet50", "unet"),
    "head": ("dense", "global"),
    "match": ("features", "projections", "geometric"),
    "negatives": ("cells", "pooled"),
}


@dataclass(frozen=True, kw_only=True)
class DensePretraining(Stage):
    """Train encoder and head so that matching cells of two views of a slice are told from the cells of other slices.

    Attributes are those of `Ideal` that shape this stage, under the same names where they have one there.
    """

    head: str
    projection_dim: int
    match: str
    temperature: float
    negatives: str
    queue: int
    ema: float
    global_weight: float
    warmup_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _DensePretraining(self, networks, data, streams)


class _DensePretraining(TwoViews):
    done: Tensor

    def __init__(self, stage: DensePretraining, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(stage, data, streams)
        trained = {"encoder": branched_of(networks).encoder, "head": networks["head"]}
        if "global_head" in networks:
            trained["global_head"] = networks["global_head"]
        self.query = nn.ModuleDict(trained)
        parameters = list(self.query.parameters())
        self.key = copy.deepcopy(self.query).requires_grad_(False) if stage.ema else None
        if stage.queue:
            self.queue, self.queue_rows = FeatureBank(stage.queue, stage.projection_dim), FeatureBank(stage.queue, 1)
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # steps taken
        self.optimizer = torch.optim.Adam(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay)
        self.schedule = cosine_schedule(self.optimizer, stage.steps)

    def draw(self) -> dict[str, Tensor]:
        rows, images, warps = self.views()
        first, second = (warp.images(images) for warp in warps)
        batch = {"first": first, "second": second, "rows": rows}
        if self.stage.match == "geometric":
            batch["first_places"], batch["second_places"] = (warp.grid.movedim(-1, 1) for warp in warps)
        return batch

    def forward(  # type: ignore[override]
        self,
        first: Tensor,
        second: Tensor,
        rows: Tensor,
        first_places: Tensor | None = None,
        second_places: Tensor | None = None,
    ) -> dict[str, Tensor]:
        stage = self.stage
        if self.key is None:
            features = self.query["encoder"](torch.cat([first, second]))[-1]
            q, k = _projections(self.query, features)
            query_features, key_features = features.chunk(2)
        else:
            query_features = self.query["encoder"](first)[-1]
            (q,) = _projections(self.query, query_features, parts=1)
            with torch.no_grad():
                key_features = self.key["encoder"](second)[-1]
                (k,) = _projections(self.key, key_features, parts=1)
        match = _match(stage.match, query_features, key_features, q["head"], k["head"], first_places, second_places)

        q, k = ({name: self.gather(part) for name, part in side.items()} for side in (q, k))
        match, rows = self.gather(match), self.gather(rows)
        local = local_contrastive_loss(
            q["head"], k["head"], match, stage.temperature, images=rows, negatives=stage.negatives, **self._queued(rows)
        )
        terms = {"local": local}
        total = local
        if stage.global_weight:
            nothing_to_choose = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
            terms["global"] = local_contrastive_loss(
                q["global_head"], k["global_head"], nothing_to_choose, stage.temperature, images=rows
            )
            total = local * (self.done >= stage.warmup_steps) + stage.global_weight * terms["global"]
        if stage.queue:
            self._seen = k["head"].detach().flatten(2).mean(dim=2), rows
        return {"total": total, **terms, "distinct": distinct_match_fraction(match)}

    def _queued(self, rows: Tensor) -> dict[str, Tensor]:
        """The queue, and for each of ``rows`` (B,) which entries are there and of another slice."""
        if not self.stage.queue:
            return {}
        other = self.queue_rows.rows[:, 0] != rows[:, None]  # (B, K)
        return {"queue": self.queue.rows, "queue_valid": other & self.queue.valid()}

    def after_step(self) -> None:
        self.done += 1
        if self.stage.queue:
            pooled, rows = self._seen
            self.queue.push(pooled)
            self.queue_rows.push(rows[:, None])
        if self.key is not None:
            with torch.no_grad():
                for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
                    key.lerp_(query, 1 - self.stage.ema)


def _projections(networks: nn.ModuleDict, features: Tensor, parts: int = 2) -> list[dict[str, Tensor]]:
    """Projections (B, D, h, w) of every head of ``networks`` for each of the ``parts`` that ``features`` holds.

    A global head's single vector is a grid of one cell: with it, eq. 2 becomes eq. 1.
    """
    projected = {}
    for name, head in networks.items():
        if name != "encoder":
            grid = head(features)
            projected[name] = grid if grid.ndim == 4 else grid[:, :, None, None]
    return [{name: grid.chunk(parts)[part] for name, grid in projected.items()} for part in range(parts)]


def _match(
    match: str,
    query_features: Tensor,
    key_features: Tensor,
    query: Tensor,
    key: Tensor,
    query_places: Tensor | None,
    key_places: Tensor | None,
) -> Tensor:
    """The correspondence (B, h*w) between projections ``query`` and ``key`` (B, D, h, w), by the rule ``match``.

    Places (B, 2, S, S): where the pixels of a view look in the slice, x and y in [-1, 1].
    """
    if query.shape[2:] == (1, 1):  # one cell: nothing to choose
        return torch.zeros(len(query), 1, dtype=torch.long, device=query.device)
    if match == "geometric":
        assert query_places is not None and key_places is not None
        cells = (query.shape[2], query.shape[3])
        return geometric_correspondence(*(F.adaptive_avg_pool2d(p, cells) for p in (query_places, key_places)))
    return dense_correspondence(*((query, key) if match == "projections" else (query_features, key_features)))


@dataclass(frozen=True, kw_only=True)
class CrossConsistencyFinetuning(Stage):
    """Train the encoder and all decoders on the labels, and each of two decoders on the other's decisions.

    Attributes:
        batch_size: labelled slices a step, and as many unlabelled ones.
        consistency_weight: of the unlabelled part of eq. 3; with 0, no unlabelled slice is drawn.
        ramp_steps: steps in which that weight grows as exp(-5 (1 - t/T)^2); 0: all of it from the first step.
        confidence: least probability of a pseudo-label that counts.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    consistency_weight: float
    ramp_steps: int
    confidence: float
    augmentation: GeometricAugmentation

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return _CrossConsistency(self, networks, data, streams)


class _CrossConsistency(LabelledAndUnlabelled):
    done: Tensor

    def __init__(
        self, stage: CrossConsistencyFinetuning, networks: nn.ModuleDict, data: TrainingData, streams: Streams
    ):
        unet = branched_of(networks)
        super().__init__(stage, data, streams, unlabelled=stage.consistency_weight > 0 and len(unet.decoders) == 2)
        self.unet = unet
        self.register_buffer("done", torch.zeros((), dtype=torch.long))  # steps taken
        self.optimizer = torch.optim.Adam(unet.parameters(), lr=stage.learning_rate, weight_decay=stage.weight_decay)
        self.schedule = cosine_schedule(self.optimizer, stage.steps)

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, unlabelled: Tensor | None = None
    ) -> dict[str, Tensor]:
        branches = self.unet(images if unlabelled is None else torch.cat([images, unlabelled]))
        labelled = [logits[: len(images)] for logits in branches]
        if len(branches) == 1:
            supervised = cross_entropy_loss(labelled[0], labels)
        else:
            supervised = cross_consistency_loss(labelled[0], labelled[1], labels)
        if unlabelled is None:
            return {"total": supervised, "cross_entropy": supervised}
        first, second = (logits[len(images) :] for logits in branches)
        consistency = cross_consistency_loss(first, second, confidence=self.stage.confidence)
        weight = self.stage.consistency_weight * (
            ramp_up(self.done, self.stage.ramp_steps) if self.stage.ramp_steps else 1
        )
        return {"total": supervised + weight * consistency, "cross_entropy": supervised, "consistency": consistency}

    def after_step(self) -> None:
        self.done += 1


@register("ideal", title="IDEAL")
@dataclass(frozen=True, kw_only=True)
class Ideal(Method):
    """IDEAL, eq. 2 and eq. 3. No code was released, so where the paper is silent the choice is a setting.

    Ablations: ``head="global"``, ``match``, ``decoders=1``, ``consistency_weight=0``, ``pretraining=False``.

    Attributes:
        image_size, spacing: 192 px of 1.36719 mm, those of Chaitanya et al. for ACDC, on which the paper builds; its
            own are not stated. Intensities are z-scored as for all methods here.
        encoder: "resnet50" (section 3.1) from random weights, or "unet", the encoder that the other methods have.
        width: channels of the "unet" encoder at full resolution; "resnet50" has its own.
        head: "dense", 1x1 convolutions (section 2.2), or "global", pooling and fully connected layers, its rival (a)
            in figure 1; both have the same number of parameters.
        projection_dim: length of a projection; 128 in DenseCL and in Chaitanya et al., not stated.
        match: where the matching cell is found. "features": cosine of the encoder's output; "projections": cosine of
            the head's output; "geometric": the known warps of both views. The paper says "extracted correspondence";
            DenseCL, whose words it uses, takes the features.
        temperature: tau of eq. 2, 0.2 as in DenseCL; not stated.
        negatives: "cells", all key cells of the other slices in the batch, or "pooled", one mean vector of each.
        queue: length of a queue of pooled keys of earlier batches, more negatives (DenseCL); 0, as here, is none.
        ema: momentum of a key branch that follows the query branch (0.999 in DenseCL); 0, as here, is one shared
            branch: the paper draws E and G in both views and criticises moving averages for fine-tuning only.
        global_weight: weight of eq. 1 through a global head of its own, beside eq. 2. 0: section 2.2 removes "the
            entire global pooling and MLP part".
        warmup_steps: for so many steps only the global term trains, while matches of random features mean nothing.
        pretraining: False starts fine-tuning from random weights.
        pretrain_steps, pretrain_batch: 10,000 and 12, those of Chaitanya et al.; not stated.
        pretrain_learning_rate, finetune_learning_rate: Adam at 1e-5 (section 3.1), here with a cosine to 0: the paper
            calls it "initial" and names no schedule.
        weight_decay: 0, Adam's default; not stated.
        transductive: pre-train on the images of validation and test patients too. False here; the paper pre-trains on
            training and validation images, and keeps the test set for the end.
        decoders: 2, transposed convolution and bilinear interpolation (section 2.3), or 1, the first of them, which has
            nobody to be consistent with.
        consistency_weight: of eq. 3's unlabelled part; the paper adds it with weight 1.
        ramp_steps: fine-tuning steps in which that weight grows as exp(-5 (1 - t/T)^2) (Laine and Aila, ICLR 2017). 0,
            as in the paper, is no ramp: two untrained decoders then teach each other from the first step.
        confidence: least probability of a pseudo-label that counts, in [0, 1); 0, as in the paper, is no threshold.
        finetune_steps, finetune_batch: 10,000 and 20, those of Chaitanya et al., half of the batch labelled and half
            not: ``finetune_batch`` counts the labelled half.
    """

    image_size: int = 192
    spacing: float | None = 1.36719
    encoder: Literal["resnet50", "unet"] = "resnet50"
    width: int = 48
    head: Literal["dense", "global"] = "dense"
    projection_dim: int = 128
    match: Literal["features", "projections", "geometric"] = "features"
    temperature: float = 0.2
    negatives: Literal["cells", "pooled"] = "cells"
    queue: int = 0
    ema: float = 0.0
    global_weight: float = 0.0
    warmup_steps: int = 0

    pretraining: bool = True
    pretrain_epochs: int = 100
    pretrain_steps: int | None = 10_000
    pretrain_batch: int = 12
    pretrain_learning_rate: float = 1e-5
    weight_decay: float = 0.0
    transductive: bool = False

    decoders: int = 2
    consistency_weight: float = 1.0
    ramp_steps: int = 0
    confidence: float = 0.0
    finetune_epochs: int = 100
    finetune_steps: int | None = 10_000
    finetune_batch: int = 10
    finetune_learning_rate: float = 1e-5

    augmentation: GeometricAugmentation = field(default_factory=GeometricAugmentation)

    # laptop: slices, encoder and lengths are those that the two-stage methods have there, so that only the method
    # differs. With hundreds of steps instead of thousands, 1e-5 trains nothing; fine-tuning has the rate all share.
    scales: ClassVar = {
        "ci": dict(
            image_size=32, spacing=7.5, encoder="unet", width=4, projection_dim=16, pretrain_steps=6, pretrain_batch=8,
            pretrain_learning_rate=1e-3, finetune_steps=6, finetune_batch=4, finetune_learning_rate=2e-3,
        ),
        "laptop": dict(
            image_size=80, spacing=3.0, encoder="unet", width=16, pretrain_steps=800, pretrain_batch=16,
            pretrain_learning_rate=1e-3, finetune_steps=600, finetune_batch=5, finetune_learning_rate=2e-3,
        ),
        "paper": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        if self.decoders not in (1, 2):
            raise ValueError(f"decoders must be 1 or 2, got {self.decoders}")
        for name in ("image_size", "width", "projection_dim", "finetune_batch", "pretrain_epochs", "finetune_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pretrain_steps", "finetune_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a whole number from 1 or None, got {value!r}")
        if self.pretrain_batch < 2:
            raise ValueError(
                f"pretrain_batch must be at least 2: negatives are other slices; got {self.pretrain_batch}"
            )
        stride = 32 if self.encoder == "resnet50" else 16
        if self.image_size % stride:
            raise ValueError(f"image_size must be a multiple of {stride} for {self.encoder}, got {self.image_size}")
        if self.spacing is not None and not 0 < self.spacing < math.inf:
            raise ValueError(f"spacing must be positive (mm) or None, got {self.spacing}")
        if not isinstance(self.augmentation, GeometricAugmentation):
            raise ValueError(f"augmentation must be a GeometricAugmentation, got {self.augmentation!r}")
        check_range(self, "temperature", lowest=COLDEST)
        for name in ("pretrain_learning_rate", "finetune_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("queue", "global_weight", "warmup_steps", "consistency_weight", "ramp_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("ema", "confidence"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.warmup_steps and not self.global_weight:
            raise ValueError("warmup_steps trains the global term alone: give it a global_weight above 0")

    def networks(self, classes: int) -> nn.ModuleDict:
        if self.encoder == "resnet50":
            unet, channels = branched_resnet(classes, self.decoders), 2048
        else:
            unet, channels = branched_unet(classes, self.width, self.decoders), 16 * self.width
        networks = nn.ModuleDict({"unet": unet})
        if self.pretraining:
            head = DenseProjectionHead if self.head == "dense" else ProjectionHead
            networks["head"] = head(channels, self.projection_dim)
            if self.global_weight:
                networks["global_head"] = ProjectionHead(channels, self.projection_dim)
        return networks

    def stages(self, data: TrainingData) -> list[Stage]:
        slices = data.slices("cpu", everything=self.transductive)
        labelled = int(slices.labelled.sum())
        finetuning = CrossConsistencyFinetuning(
            name="finetune",
            uses_labels=True,
            steps=stage_length(self.finetune_steps, self.finetune_epochs, labelled, self.finetune_batch),
            batch_size=self.finetune_batch,
            learning_rate=self.finetune_learning_rate,
            weight_decay=self.weight_decay,
            consistency_weight=self.consistency_weight,
            ramp_steps=self.ramp_steps,
            confidence=self.confidence,
            augmentation=self.augmentation,
        )
        if not self.pretraining:
            return [finetuning]
        settings: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "head",
                "projection_dim",
                "match",
                "temperature",
                "negatives",
                "queue",
                "ema",
                "global_weight",
                "warmup_steps",
            )
        }
        pretraining = DensePretraining(
            name="pretrain",
            uses_labels=False,
            everything=self.transductive,
            steps=stage_length(self.pretrain_steps, self.pretrain_epochs, len(slices), self.pretrain_batch),
            batch_size=self.pretrain_batch,
            learning_rate=self.pretrain_learning_rate,
            weight_decay=self.weight_decay,
            augmentation=self.augmentation,
            **settings,
        )
        return [pretraining, finetuning]

    def branches(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (decoders, B, C, S, S) of images (B, 1, S, S) by each decoder, networks in eval mode."""
        return branch_probabilities(networks, images)

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        return mean_of_branches(networks, images)

    def cells(self, networks: nn.ModuleDict, images: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output (B, C, h, w) for images (B, 1, S, S), and the head's output (B, D, h, w).

        A global head has one cell, h = w = 1. ValueError: the method has no head, because it did not pre-train.
        """
        if "head" not in networks:
            raise ValueError("there are no projections without a head: pretraining=False has none")
        features = branched_of(networks).encoder(images)[-1]
        grid = networks["head"](features)
        return features, grid if grid.ndim == 4 else grid[:, :, None, None]

    def correspond(self, networks: nn.ModuleDict, first: Tensor, second: Tensor, warps: tuple[Warp, Warp]) -> Tensor:
        """The match (B, h*w) that pre-training would take between two views (B, 1, S, S) drawn with ``warps``."""
        (query_features, query), (key_features, key) = (self.cells(networks, view) for view in (first, second))
        places = (warp.grid.movedim(-1, 1) for warp in warps)
        return _match(self.match, query_features, key_features, query, key, *places)

    def embed(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 1, S, S): the mean over cells of the head's output, or without a head of
        the encoder's."""
        if "head" not in networks:
            return branched_of(networks).encoder(images)[-1].flatten(2).mean(dim=2)
        return self.cells(networks, images)[1].flatten(2).mean(dim=2)
