"""MONA: pre-training in two branches, then fine-tuning by three principles (TPAMI 2024, arXiv 2209.13476)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from medlib.augment import ThinPlateAugmentation, Warp
from medlib.banks import ClassBanks, FeatureBank
from medlib.data.batches import TrainingData
from medlib.losses.consistency import pseudo_label_loss
from medlib.losses.contrastive import COLDEST, unit_vectors
from medlib.losses.dvcl import voxel_entropy
from medlib.losses.mona import (
    anatomical_contrastive_loss,
    class_means,
    class_relation_distribution,
    equivariance_loss,
    nearest_neighbor_loss,
    released_contrast_masks,
    sample_features,
    sample_negative_classes,
    sample_negatives,
    sample_pixels,
    sample_queries,
)
from medlib.methods.base import Stage, Streams, check_range, check_whole, register
from medlib.methods.cotraining import Cotrained, Cotraining, CotrainingWork
from medlib.methods.glcon import Pretraining, TwoBranches, TwoBranchWork, logits_and_maps
from medlib.nets import UNet

LEFT_OUT = -1  # the label of a pixel that no loss looks at


@dataclass(frozen=True)
class Queries:
    """Pixels of each class, drawn as queries: all (C, Q), except ``valid`` (C,), False for a class without any.

    ``image``, ``y``, ``x`` say where; ``probability`` is that of the pixel's own class, ``hard`` whether it is at most
    the threshold.
    """

    image: Tensor
    y: Tensor
    x: Tensor
    probability: Tensor
    hard: Tensor
    valid: Tensor


@dataclass(frozen=True)
class PseudoLabels:
    """What the teacher says of the unlabelled images, in the student's view of them.

    ``labels`` (B, H, W) int64, -1 for pixels from outside; ``confidence`` (B, H, W); ``bottleneck`` the teacher's
    coarsest maps of what it saw.
    """

    labels: Tensor
    confidence: Tensor
    bottleneck: Tensor


@register("mona", title="MONA")
@dataclass(frozen=True, kw_only=True)
class Mona(TwoBranches):
    """Section III-B, without ramps: supervised + 0.01 contrast + equivariance + pseudo-labels + nearest neighbours.

    Rows of the paper's tables as settings. Table III: "Vanilla" is ``finetuning=False``, pre-training alone; the others
    set ``tailness``, ``consistency`` and ``diversity``. Table V: ``framework``, the upper half with
    ``finetuning=False``; ``mona_moco`` and so on are MONA with another default. Table VI: all of both. Table IV:
    ``student_view`` and ``teacher_view``. With the three principles off, fine-tuning has labels and pseudo-labels,
    a control that the paper lacks; ``framework="none"`` fine-tunes random weights.

    ``variant="paper"`` follows the text, ``variant="released"`` sets the switches that say "released" below and those
    of `TwoBranches`: in that code the nearest-neighbour loss has no gradient, the contrast takes its negatives from the
    class itself, the local windows are scrambled, and the teacher's heads learn.

    Attributes:
        dice_weight, cross_entropy_weight: an "equal combination" (section III-A); 0.5 each as in the authors' earlier
            code, 1 each in the released one.
        steps: of fine-tuning, 30,000 as in the code (200 epochs in the paper, 44,000 steps on ACDC).
        ramp_steps: None, as here: all weights are constant.
        finetuning: False ends after pre-training.
        tailness: the contrastive loss of eq. 3-5; consistency: the equivariance loss of eq. 6; diversity: the
            nearest-neighbour loss.
        pseudo_labels: the unsupervised cross-entropy.
        contrast_weight, equivariance_weight, pseudo_weight, neighbor_weight: lambda_1 to lambda_4 of it: 0.01, 1, 1
            and 1 (section IV-B).
        threshold: delta = 0.97 (section IV-B): a query of at most this probability is hard, and a pseudo-label of at
            least this one is sure.
        contrast_confidence: pseudo-labels below it take no part in the contrast; 0.7 in ReCo, on which it rests.
        queries, keys: pixels a class, 256 and 512 (section IV-B).
        hard_share: of the queries; 1 as in ReCo, not stated.
        contrast_temperature: tau = 0.5 of eq. 3 (section IV-B).
        representation_dim: m = 512 of the representation head (section IV-H), which is linear: 1x1 convolutions of
            all decoder maps, up-sampled. It is applied to the sampled pixels only.
        class_bank: entries of each class in the bank from which negatives come; its size is not stated. It takes
            ``queries`` pixels of each class a step. 0 draws negatives from the batch, as ReCo does.
        teacher_keys: keys are the teacher's features, as in the code; False: the student's, as in ReCo.
        warp: T of eq. 6; brightness, contrast and blur are drawn anew, too.
        released_contrast: released: `released_contrast_masks` draws the pixels, of the class itself.
        one_way: released: eq. 6 from the warped prediction to the other alone, on confident foreground.
        swapped_roles: released: the student picks the neighbours, and the teacher is measured.
        unwarped_labels: released: pseudo-labels stay where they are when the image is deformed.
        nesterov: momentum of fine-tuning in the released code.
    """

    variant: str = "paper"
    finetuning: bool = True
    tailness: bool = True
    consistency: bool = True
    diversity: bool = True
    pseudo_labels: bool = True

    contrast_weight: float = 0.01
    equivariance_weight: float = 1.0
    pseudo_weight: float = 1.0
    neighbor_weight: float = 1.0

    threshold: float = 0.97
    contrast_confidence: float = 0.7
    queries: int = 256
    keys: int = 512
    hard_share: float = 1.0
    contrast_temperature: float = 0.5
    representation_dim: int = 512
    class_bank: int = 4096
    teacher_keys: bool = False
    warp: ThinPlateAugmentation = dataclasses.field(default_factory=ThinPlateAugmentation)

    released_contrast: bool = False
    one_way: bool = False
    swapped_roles: bool = False
    unwarped_labels: bool = False
    nesterov: bool = False

    in_3d: ClassVar[bool] = False
    scales: ClassVar = {
        "ci": dict(
            image_size=32, spacing=7.5, width=4, steps=6, pretrain_steps=6, batch_size=4, projection_dim=16, queue=8,
            window=8, window_cells=4, representation_dim=16, queries=8, keys=16, class_bank=32,
        ),
        "laptop": dict(
            **Cotrained.scales["laptop"], pretrain_steps=400, projection_dim=128, queue=40, window=20, window_cells=4,
            representation_dim=128,
        ),
        "paper": {},
    }  # fmt: skip
    variants: ClassVar = {
        "paper": {},
        "released": dict(
            dice_weight=1.0, cross_entropy_weight=1.0, noisy_teacher=True, teacher_temperature=0.1, local_grid=7,
            teacher_gradient=True, scrambled_fragments=True, released_contrast=True, teacher_keys=True, one_way=True,
            swapped_roles=True, unwarped_labels=True, nesterov=True,
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(
            self, "contrast_weight", "equivariance_weight", "pseudo_weight", "neighbor_weight", "hard_share", lowest=0
        )
        check_range(self, "threshold", "contrast_confidence", "hard_share", lowest=0, highest=1)
        check_range(self, "contrast_temperature", lowest=COLDEST)
        check_whole(self, "queries", "keys", "representation_dim")
        check_whole(self, "class_bank", lowest=0)
        if self.framework == "none" and not self.finetuning:
            raise ValueError("framework='none' with finetuning=False trains nothing")
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov is of optimizer='sgd', got {self.optimizer!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.released_contrast and not self.class_bank:
            raise ValueError("released_contrast takes its negatives from a class_bank: give it entries")

    @property
    def weights(self) -> Mapping[str, float]:
        every = {
            "contrast": (self.tailness, self.contrast_weight),
            "equivariance": (self.consistency, self.equivariance_weight),
            "pseudo": (self.pseudo_labels, self.pseudo_weight),
            "neighbor": (self.diversity, self.neighbor_weight),
        }
        return {name: weight for name, (used, weight) in every.items() if used}

    def networks(self, classes: int) -> nn.ModuleDict:
        networks = super().networks(classes)
        # All maps of the decoder, 16 w to w channels; linear, so that the head of a mean is the mean of the head.
        networks["representation"] = nn.Linear(31 * self.width, self.representation_dim)
        return networks

    def stages(self, data: TrainingData) -> list[Stage]:
        stages: list[Stage] = []
        if self.framework != "none":
            first = dataclasses.replace(self, steps=self.pretrain_steps)
            stages.append(Pretraining(name="pretrain", steps=self.pretrain_steps, uses_labels=True, method=first))
        if self.finetuning:
            stages.append(Cotraining(name="finetune", steps=self.steps, uses_labels=True, method=self))
        return stages

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Finetuning(self, networks, data, streams)

    # what a step computes, for looking at it

    def embed(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        """Embeddings (B, d) of images (B, 1, S, S): the projection head's raw output."""
        unet = networks["unet"]
        assert isinstance(unet, UNet)
        return networks["head"](unet.encoder(images)[-1])

    def relation(self, networks: nn.ModuleDict, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where negatives of each class come from (C, C), see `class_relation_distribution`; present classes (C,)."""
        logits, *maps = logits_and_maps(networks["unet"], images)
        means, present = class_means(maps, labels, logits.shape[1])
        return class_relation_distribution(networks["representation"](means), present), present

    def draw_queries(
        self, networks: nn.ModuleDict, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Queries:
        """The query pixels that a step would draw from images (B, 1, S, S) with labels (B, S, S), -1 for none."""
        probabilities = self.predict(networks, images)
        index, valid = sample_queries(
            labels, probabilities, generator, self.queries, self.threshold, hard_share=self.hard_share
        )
        height, width = labels.shape[1:]
        own = probabilities.gather(1, labels.clamp(min=0)[:, None]).flatten()[index]
        return Queries(
            image=index // (height * width),
            y=index // width % height,
            x=index % width,
            probability=own,
            hard=own <= self.threshold,
            valid=valid,
        )

    def equivariance(self, networks: nn.ModuleDict, images: Tensor, warp: Warp) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides of eq. 6 for a warp: warped predictions, predictions of warped images, where both are defined.

        Probabilities (B, C, S, S) twice, and (B, S, S) bool.
        """
        logits = networks["unet"](images)
        second = self.predict(networks, warp.images(images))
        return warp.predictions(logits).softmax(dim=1), second, warp.inside()

    def nearest(self, networks: nn.ModuleDict, images: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """For images (B, 1, S, S) the ``neighbors`` nearest of the bank's images (M, 1, S, S): rows (B, k), cosines.

        In training the bank holds the teacher's embeddings of the last ``queue`` images.
        """
        first, entries = (unit_vectors(self.embed(networks, each)) for each in (images, bank))
        nearest = (first @ entries.T).topk(min(self.neighbors, len(bank)), dim=1)
        return nearest.indices, nearest.values


class _Finetuning(TwoBranchWork):
    method: Mona

    def __init__(self, method: Mona, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        trained = ["unet"]
        trained += ["representation"] if method.tailness else []
        trained += ["head", "predictor"] if method.diversity else []
        super().__init__(method, networks, data, streams, trained, ("unet", "head", "representation"))
        if method.nesterov:
            self.optimizer.param_groups[0]["nesterov"] = True
        if method.tailness and method.class_bank:
            parts = {"feature": (method.representation_dim,)}
            self.class_banks = ClassBanks(data.classes, method.class_bank, parts)
        if method.diversity:
            self.bank = FeatureBank(method.queue, method.projection_dim)

    def ramp(self) -> Tensor:
        if self.method.ramp_steps is None:
            return torch.ones((), device=self.done.device)
        return super().ramp()

    # views

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, PseudoLabels]:
        """The student's view of unlabelled images, and the teacher's labels for it.

        A weak teacher looks before the images are mixed and deformed, and its labels move with them. A strong one looks
        at the result, with intensities of its own.
        """
        method = self.method
        view = None
        if method.student_view == "strong":
            view = method.strong.draw(len(unlabelled), unlabelled.shape[-1], self.streams.own("strong"))
        moved = unlabelled if view is None else view.images(unlabelled)
        weak = method.teacher_view == "weak"
        logits, bottleneck, *_ = self.taught(unlabelled if weak else self.retouched(moved, "strong"))
        confidence, labels = logits.softmax(dim=1).max(dim=1)
        if view is not None and weak:
            if method.unwarped_labels:
                confidence, labels = view.mix.labels(confidence), view.mix.labels(labels)
            else:
                confidence = view.images(confidence[:, None])[:, 0]
                labels = view.labels(labels, outside=LEFT_OUT)
        if view is not None and not method.unwarped_labels:
            labels = torch.where(view.warp.inside(), labels, LEFT_OUT)
        return self.retouched(moved, method.student_view), PseudoLabels(labels, confidence, bottleneck)

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        """The logits, then the feature maps of the decoder, coarsest first."""
        return logits_and_maps(self.unet, images)

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return super().supervised(outputs[:1], labels)

    def terms(
        self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: PseudoLabels
    ) -> dict[str, Tensor]:
        method = self.method
        logits, *maps = outputs
        labels = torch.cat([self.labels, targets.labels])
        confidence = torch.cat([torch.ones_like(self.labels, dtype=targets.confidence.dtype), targets.confidence])
        terms = {}
        if method.pseudo_labels:
            terms["pseudo"] = pseudo_label_loss(logits[labelled:], targets.labels, targets.confidence, method.threshold)
        if method.tailness and method.released_contrast:
            terms["contrast"] = self._released_contrast(images, logits, maps, labels, labelled)
        elif method.tailness:
            sure = torch.where(confidence >= method.contrast_confidence, labels, LEFT_OUT)
            terms["contrast"] = self._contrast(images, logits, maps, sure)
        if method.consistency:
            terms["equivariance"] = self._equivariance(
                images, logits, (labels > 0) & (confidence >= method.contrast_confidence)
            )
        if method.diversity:
            terms["neighbor"] = self._neighbor(maps[0], images[:labelled], targets.bottleneck)
        return terms

    # tailness

    def _key_side(self, images: Tensor, maps: list[Tensor]) -> tuple[list[Tensor], nn.Module]:
        """The maps and the head that make the keys."""
        if self.method.teacher_keys:
            return self.taught(images)[1:], self.teacher.network.get_submodule("representation")
        return [level.detach() for level in maps], self.networks["representation"]

    def _contrast(self, images: Tensor, logits: Tensor, maps: list[Tensor], labels: Tensor) -> Tensor:
        """Eq. 3-5 for labels (B, H, W), true and pseudo, -1 for pixels left out."""
        method, stream, classes = self.method, self.streams.own("pixels"), logits.shape[1]
        size = (labels.shape[1], labels.shape[2])
        probabilities = logits.detach().softmax(dim=1)
        queries, valid = sample_queries(
            labels, probabilities, stream, method.queries, method.threshold, method.hard_share
        )
        with torch.no_grad():
            key_maps, head = self._key_side(images, maps)
            means, present = class_means(key_maps, labels, classes)
            positives = head(means)
            if method.class_bank:
                members = labels.flatten() == torch.arange(classes, device=labels.device)[:, None]
                self._remember(key_maps, head, members, size)
                present = present & (self.class_banks.pushed > 0)
            relation = class_relation_distribution(positives, present)
            if method.class_bank:
                drawn, _ = self.class_banks.sample(method.keys, stream)
                source = sample_negative_classes(relation, method.keys, stream)  # (C, K)
                keys = drawn["feature"][source, torch.arange(method.keys, device=source.device)]
            else:
                index, _ = sample_negatives(labels, relation, stream, method.keys)
                keys = head(sample_features(key_maps, index, size))
        valid = valid & ~(relation <= 0).all(dim=1)  # NaN is no reason to leave a class out
        rows = self.networks["representation"](sample_features(maps, queries, size))  # (C, Q, D)
        return anatomical_contrastive_loss(rows, positives, keys, method.contrast_temperature, valid)

    def _released_contrast(
        self, images: Tensor, logits: Tensor, maps: list[Tensor], labels: Tensor, labelled: int
    ) -> Tensor:
        """The same loss on the pixels of the released code, whose negatives have the class of the query.

        Its banks start with a row of zeros; here an empty bank hands out such rows.
        """
        method, stream = self.method, self.streams.own("pixels")
        size = (labels.shape[1], labels.shape[2])
        given = torch.arange(len(labels), device=labels.device) < labelled
        percent = 20 * max(0.0, 1 - self.schedule.last_epoch / method.steps)  # the host's own count of steps
        with torch.no_grad():
            entropy = voxel_entropy(logits.softmax(dim=1))
            taught, *_ = self.taught(images)
            anchors, near, negatives = released_contrast_masks(labels, taught.softmax(dim=1), entropy, given, percent)
            key_maps, head = self._key_side(images, maps)
            kept = near.any(dim=0).view_as(labels)
            means, present = class_means(key_maps, torch.where(kept, labels, LEFT_OUT), logits.shape[1])
            self._remember(key_maps, head, negatives, size)
            keys = self.class_banks.sample(method.keys, stream)[0]["feature"]
            queries, valid = sample_pixels(anchors, method.queries, stream)
            positives = head(means)
        rows = self.networks["representation"](sample_features(maps, queries, size))
        return anatomical_contrastive_loss(rows, positives, keys, method.contrast_temperature, valid & present)

    def _remember(self, maps: list[Tensor], head: nn.Module, members: Tensor, size: tuple[int, int]) -> None:
        """Draw what the banks take after this step from the (C, N) pixels ``members``."""
        index, valid = sample_pixels(members, self.method.queries, self.streams.own("pixels"))
        self._keys = head(sample_features(maps, index, size)), valid[:, None].expand_as(index)

    # consistency and diversity

    def _equivariance(self, images: Tensor, logits: Tensor, foreground: Tensor) -> Tensor:
        """Eq. 6 for the images that the student saw; the released code keeps confident ``foreground`` (B, H, W)."""
        method = self.method
        warp = method.warp.draw(len(images), images.shape[-1], self.streams.own("warp"))
        second = self.unet(warp.images(self.retouched(images, "strong")))
        mask: Tensor = warp.inside()
        if method.one_way:
            mask = warp.images(foreground[:, None].to(images.dtype))[:, 0]
        return equivariance_loss(
            warp.predictions(logits), second, mask, one_way=method.one_way, per_image=method.one_way
        )

    def _neighbor(self, bottleneck: Tensor, labelled: Tensor, taught: Tensor) -> Tensor:
        """Of the student's ``bottleneck`` of all images; the teacher saw the unlabelled ones in `prepare`."""
        method = self.method
        student = self.networks["predictor"](self.networks["head"](bottleneck))
        with torch.no_grad():
            own = self.teacher.network.get_submodule("unet.encoder")(labelled)[-1]
            teacher = self.gather(self.teacher.network.get_submodule("head")(torch.cat([own, taught])))
        self._embeddings = teacher
        return nearest_neighbor_loss(
            self.gather(student), teacher, self.bank.rows, method.neighbors,
            valid=self.bank.valid(), swapped_roles=method.swapped_roles,
        )  # fmt: skip

    def after_step(self) -> None:
        super().after_step()
        if "unlabelled" not in self.samplers:
            return
        if self.method.diversity:
            self.bank.push(self._embeddings)
        if self.method.tailness and self.method.class_bank:
            features, valid = (self.gather(part.transpose(0, 1)).transpose(0, 1) for part in self._keys)
            self.class_banks.push(valid, feature=features)


@register("mona_moco", title="MONA on MoCo v2")
@dataclass(frozen=True, kw_only=True)
class MonaOnMoco(Mona):
    """MONA with another first stage: a row of Table V."""

    framework: str = "moco"


@register("mona_knn_moco", title="MONA on kNN-MoCo")
@dataclass(frozen=True, kw_only=True)
class MonaOnKnnMoco(Mona):
    """MONA with another first stage: a row of Table V."""

    framework: str = "knn_moco"


@register("mona_simclr", title="MONA on SimCLR")
@dataclass(frozen=True, kw_only=True)
class MonaOnSimclr(Mona):
    """MONA with another first stage: a row of Table V."""

    framework: str = "simclr"


@register("mona_byol", title="MONA on BYOL")
@dataclass(frozen=True, kw_only=True)
class MonaOnByol(Mona):
    """MONA with another first stage: a row of Table V."""

    framework: str = "byol"


@register("mona_isd", title="MONA on ISD")
@dataclass(frozen=True, kw_only=True)
class MonaOnIsd(Mona):
    """MONA with another first stage: a row of Table V."""

    framework: str = "isd"
