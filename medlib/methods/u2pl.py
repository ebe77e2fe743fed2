"""U2PL: what DVCL argues against, negatives by the classes that an uncertain voxel is least likely to have (CVPR 2022).

The loss is `medlib.losses.dvcl.complementary_label_loss`; batches, teacher and optimiser are those of
`medlib.methods.cotraining`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlib.banks import ClassBanks
from medlib.data.batches import TrainingData
from medlib.losses.contrastive import COLDEST
from medlib.losses.dvcl import complementary_label_loss, complementary_labels, entropy_from_logits
from medlib.methods.base import Streams, check_range, check_whole, register
from medlib.methods.cotraining import CotrainingWork, Taught, TaughtWork, Teacher
from medlib.methods.sampling import spread_by_class, spread_sample, voxels_of
from medlib.nets import UNet, pixel_head


@register("u2pl", title="U2PL")
@dataclass(frozen=True, kw_only=True)
class U2pl(Taught):
    """A teacher's uncertain voxels are negatives of the classes they are least likely to have (Wang et al., CVPR 2022).

    The student learns the teacher's certain decisions, and its reliable features are drawn to the mean of their class
    and away from labelled and uncertain voxels that are surely of another one (their complementary labels). Without the
    CutMix of its code, as no method of this floor has strong augmentation; a ramp stands for its epoch of labels alone.

    Attributes:
        patch, steps, batch_size, learning_rate: as `medlib.methods.dvcl.Dvcl` has them.
        consistency_weight: of the teacher's certain decisions, eta, 1 in its code.
        drop: the share of voxels, by the teacher's entropy, that are uncertain at the start, 0.2; falls to 0 linearly.
        contrastive_weight: lambda_c, 0.1 in its code.
        anchors, negatives: 256 of each class, 50 of each class for its anchors.
        confidence: anchors have at least this probability of their class, delta_p.
        temperature: 0.5.
        low_rank, high_rank: an uncertain voxel is a negative of the classes that rank from low to below high in its
            probabilities; a labelled one of the wrong classes that rank below low. 3 and 20 are for 21 classes: with
            few classes take a low rank below their number.
        bank: negatives that are kept of each class; 30,000 in its code, 50,000 of the background.
        pool: labelled and as many uncertain voxels that are offered to the bank each step; its code has all.
        feature_dim: of the feature head; 256 in its code.
    """

    patch: tuple[int, int, int] | None = (64, 128, 128)
    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 0.1
    consistency_weight: float = 1.0
    drop: float = 0.2
    contrastive_weight: float = 0.1
    anchors: int = 256
    negatives: int = 50
    confidence: float = 0.3
    temperature: float = 0.5
    low_rank: int = 3
    high_rank: int = 20
    bank: int = 30_000
    pool: int = 4096
    feature_dim: int = 256

    scales: ClassVar = {
        "ci": dict(
            patch=(16, 32, 32), width=4, steps=6, batch_size=4, feature_dim=8, anchors=16, negatives=8, bank=64, pool=32
        ),
        "laptop": dict(
            patch=(32, 32, 32), width=8, steps=400, batch_size=4, feature_dim=32, anchors=64, bank=1024, pool=256
        ),
        "paper": {},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "anchors", "negatives", "bank", "pool", "feature_dim")
        check_range(self, "contrastive_weight", lowest=0)
        check_range(self, "drop", "confidence", lowest=0, highest=1)
        check_range(self, "temperature", lowest=COLDEST)
        check_whole(self, "low_rank", "high_rank", lowest=0)
        if self.low_rank >= self.high_rank:
            raise ValueError(f"low_rank must be below high_rank={self.high_rank}, got {self.low_rank}")

    @property
    def weights(self) -> Mapping[str, float]:
        return {"consistency": self.consistency_weight, "complementary": self.contrastive_weight}

    def networks(self, classes: int) -> nn.ModuleDict:
        if self.low_rank >= classes:
            raise ValueError(
                f"low_rank={self.low_rank} leaves none of {classes} classes complementary: take it below {classes}"
            )
        return nn.ModuleDict({"unet": self.new_unet(classes), "head": pixel_head(self.width, self.feature_dim)})

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _U2pl(self, networks, data, streams)


class _U2pl(TaughtWork):
    method: U2pl

    def __init__(self, method: U2pl, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(method, networks, data, streams)
        self.classes = data.classes
        self.head_teacher = Teacher(self.networks["head"], method.ema, method.noisy_teacher)
        self.bank = ClassBanks(self.classes, method.bank, {"feature": (method.feature_dim,)})

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        maps = self.unet.maps(images)[-1]
        return [self.unet.classifier(maps), maps]

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return super().supervised(outputs[:1], labels)

    def ramp_of(self, term: str) -> Tensor:
        return self.ramp() if term == "consistency" else torch.ones_like(self.ramp())

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        logits, maps = outputs
        with torch.no_grad():
            teacher = cast(UNet, self.teacher.network)
            teacher_maps = teacher.maps(images)[-1]
            teacher_logits = teacher.classifier(teacher_maps).float()
            certain = self._certain(entropy_from_logits(teacher_logits[labelled:]))
        pseudo = teacher_logits[labelled:].argmax(dim=1)
        wrong = F.cross_entropy(logits[labelled:].float(), pseudo, reduction="none") * certain
        return {
            "consistency": wrong.sum() / certain.sum().clamp(min=1),
            "complementary": self._complementary(maps, teacher_maps, teacher_logits, certain.flatten(), labelled),
        }

    def _certain(self, entropy: Tensor) -> Tensor:
        """The voxels whose entropy is not among the share that is dropped at this step."""
        method = self.method
        kept = 1 - method.drop * (1 - self.done / method.steps).clamp(min=0)
        rank = (kept * (entropy.numel() - 1)).round().long()
        return entropy <= entropy.flatten().sort().values.gather(0, rank.view(1))

    def _complementary(
        self, maps: Tensor, teacher_maps: Tensor, teacher_logits: Tensor, certain: Tensor, labelled: int
    ) -> Tensor:
        method, generator = self.method, self.streams.own("voxels")
        starts = torch.rand(self.classes + 2, generator=generator, device=generator.device)
        with torch.no_grad():
            likeliest = teacher_logits.argmax(dim=1).flatten()
            truth = torch.cat([self.labels.flatten(), likeliest[self.labels.numel() :].where(certain, -1)])
            chance = teacher_logits.softmax(dim=1).flatten(2).movedim(1, 2).flatten(0, 1)  # (B * V, C)
            sure = chance.gather(1, truth.clamp(min=0)[:, None])[:, 0] > method.confidence
            places, new = spread_by_class(truth.where(sure, -1), method.anchors, starts[:-2])
            features = self.head_teacher.network(voxels_of(teacher_maps, places.flatten())).unflatten(0, places.shape)
            weights = new[..., None]
            prototypes = (features * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            self._remember(teacher_maps, chance, certain, starts[-2:])
            entries, there = self.bank.sample(method.negatives, generator)
        anchors = self.networks["head"](voxels_of(maps, places.flatten()))
        own = torch.arange(self.classes, device=places.device)
        # each class has negatives of its own: entry n of class c is complementary to c alone
        of = own.repeat_interleave(method.negatives)  # (C * N,)
        compared = (of[:, None] == own) & there.flatten()[:, None] & new[:, 0]  # (C * N, C)
        return complementary_label_loss(
            anchors, own.repeat_interleave(method.anchors), prototypes, entries["feature"].flatten(0, 1), compared,
            method.temperature,
        )  # fmt: skip

    def _remember(self, teacher_maps: Tensor, chance: Tensor, certain: Tensor, starts: Tensor) -> None:
        """Push labelled and uncertain voxels into the banks of the classes whose negatives they are."""
        method = self.method
        labels = self.labels.flatten()
        known, known_new = spread_sample(labels >= 0, method.pool, starts[0])
        unknown, unknown_new = spread_sample(~certain, method.pool, starts[1])
        places = torch.cat([known, unknown + len(labels)])
        probable = complementary_labels(chance[known], 0, method.low_rank)
        is_true = labels[known][:, None] == torch.arange(self.classes, device=labels.device)
        unlikely = complementary_labels(chance[places[len(known) :]], method.low_rank, method.high_rank)
        negative = torch.cat([probable & ~is_true & known_new[:, None], unlikely & unknown_new[:, None]])
        features = self.head_teacher.network(voxels_of(teacher_maps, places))
        self.bank.push(negative.T, feature=features.expand(self.classes, *features.shape))

    def after_step(self) -> None:
        self.head_teacher.follow(self.networks["head"])
        super().after_step()
