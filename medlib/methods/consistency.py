"""Semi-supervised baselines that share one floor: mean teacher, UA-MT, ICT, CPS, deep co-training, URPC, CCT, entropy.

Each takes the unlabelled half of a batch to its own use; all else is `medlib.methods.cotraining`, so that what differs
between two of them is their idea. The consistency weight 0.1 with its ramp over all steps is that of SSL4MIS where a
class does not say otherwise. The losses are in `medlib.losses.consistency`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlib.data.batches import TrainingData
from medlib.losses.consistency import (
    cotraining_agreement_loss,
    cotraining_diversity_loss,
    cross_pseudo_supervision_loss,
    entropy_minimization_loss,
    interpolation_consistency_loss,
    mean_teacher_loss,
    mixed,
    perturbed_decoders_loss,
    pyramid_consistency_loss,
    uncertainty_aware_loss,
    uncertainty_threshold,
)
from medlib.losses.dvcl import voxel_entropy
from medlib.methods.base import Streams, check_range, check_whole, register
from medlib.methods.cotraining import (
    Consistency,
    Cotrained,
    CotrainingWork,
    Taught,
    TaughtWork,
    TwoNetworks,
    ramp_up,
)
from medlib.nets import BranchedUNet, Decoder, ssl4mis_unet


@register("labelled_only", title="labelled images only")
@dataclass(frozen=True, kw_only=True)
class LabelledOnly(Cotrained):
    """The supervised baseline of this floor: the labelled half of every batch and nothing else.

    On a split in which every patient is labelled it is the upper bound of the papers' tables, at half the batch size.
    """

    unlabelled: ClassVar[bool] = False


# ---- one network


@register("entropy_minimization", title="entropy minimisation")
@dataclass(frozen=True, kw_only=True)
class EntropyMinimization(Consistency):
    """The network shall be sure of its predictions (Grandvalet and Bengio 2004; ADVENT, CVPR 2019)."""

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Entropy(self, networks, data, streams)


class _Entropy(CotrainingWork):
    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        return {"consistency": entropy_minimization_loss(outputs[0][labelled:])}


# ---- an averaged teacher


@register("mean_teacher", title="mean teacher")
@dataclass(frozen=True, kw_only=True)
class MeanTeacher(Taught):
    """The network predicts what its running mean predicts from the image plus noise (Tarvainen and Valpola, 2017).

    On the unlabelled images, as in SSL4MIS; the paper compares both on the labelled ones too.

    Attributes:
        noise: standard deviation of the noise in the unit of the prepared images, cut at twice of it; 0.1 in SSL4MIS.
    """

    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "noise", lowest=0)

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _MeanTeacher(self, networks, data, streams)


class _MeanTeacher(TaughtWork):
    method: MeanTeacher

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, Any]:
        return unlabelled, self.teacher(self.noisy(unlabelled, self.method.noise))

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        return {"consistency": mean_teacher_loss(outputs[0][labelled:], targets)}


@register("ua_mt", title="UA-MT")
@dataclass(frozen=True, kw_only=True)
class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Mean teacher at the pixels of which several noisy passes of the teacher make it certain (Yu et al., MICCAI 2019).

    The entropy of the mean of ``passes`` passes must lie below a threshold that rises from 3/4 of its largest value to
    all of it, along the ramp over all steps.

    Attributes:
        passes: T of the paper.
        noisy_teacher: True as in the paper, where the passes differ by dropout as well as by noise.
    """

    passes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "passes", lowest=2)

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _UncertaintyAware(self, networks, data, streams)


class _UncertaintyAware(_MeanTeacher):
    method: UncertaintyAwareMeanTeacher

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, Any]:
        unlabelled, target = super().prepare(unlabelled)
        mean = torch.zeros_like(target, dtype=torch.float32)
        for _ in range(self.method.passes):  # one after the other: the memory of one pass
            mean += self.teacher(self.noisy(unlabelled, self.method.noise)) / self.method.passes
        return unlabelled, (target, voxel_entropy(mean))

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        target, uncertainty = targets
        threshold = uncertainty_threshold(ramp_up(self.done, self.method.steps), target.shape[1])
        return {"consistency": uncertainty_aware_loss(outputs[0][labelled:], target, uncertainty, threshold)}


@register("ict", title="ICT (interpolation consistency)")
@dataclass(frozen=True, kw_only=True)
class InterpolationConsistency(Taught):
    """At a mixture of two unlabelled images the network predicts the mixture of what the teacher predicts from each.

    Source: Verma et al., IJCAI 2019. The share of the first image is Beta(alpha, alpha) for each pair.

    Attributes:
        alpha: 0.2 in SSL4MIS; the paper searches 0.1 to 1.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", lowest=0, open_ended=True)

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Interpolation(self, networks, data, streams)


def beta_shares(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """``count`` draws of Beta(alpha, alpha), float32 in [0, 1], on the generator's device."""
    both = torch.full((count, 2), alpha, device=generator.device)
    # what torch.distributions.Beta samples with, which itself draws from the global state
    return torch._sample_dirichlet(both, generator=generator)[:, 0]


class _Interpolation(TaughtWork):
    method: InterpolationConsistency

    def prepare(self, unlabelled: Tensor) -> tuple[Tensor, Any]:
        share = beta_shares(self.method.alpha, len(unlabelled), self.streams.own("mixture"))
        first = self.teacher(unlabelled)
        # the rows of a batch are in random order: the next one is as good a partner as any
        return mixed(unlabelled, unlabelled.roll(1, dims=0), share), (first, first.roll(1, dims=0), share)

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        return {"consistency": interpolation_consistency_loss(outputs[0][labelled:], *targets)}


# ---- two networks


@register("cps", title="CPS (cross pseudo-supervision)")
@dataclass(frozen=True, kw_only=True)
class CrossPseudoSupervision(Consistency):
    """Two networks with initial weights of their own, each learning the other's decisions (Chen et al., CVPR 2021).

    The paper's weight is 1.5 from the first step (on natural images); here it is SSL4MIS's, with its ramp. The first
    network predicts.

    Attributes:
        on_labelled: compare them on the labelled images too, L_cps = L_cps^l + L_cps^u as in the paper; SSL4MIS has the
            second term only.
    """

    on_labelled: bool = True

    def networks(self, classes: int) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": self.new_unet(classes), "second": self.new_unet(classes)})

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _CrossSupervision(self, networks, data, streams)


class _CrossSupervision(TwoNetworks):
    method: CrossPseudoSupervision

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        first, second = outputs
        loss = cross_pseudo_supervision_loss(first[labelled:], second[labelled:])
        if self.method.on_labelled:
            loss = loss + cross_pseudo_supervision_loss(first[:labelled], second[:labelled])
        return {"consistency": loss}


@register("deep_cotraining", title="deep co-training")
@dataclass(frozen=True, kw_only=True)
class DeepCotraining(Cotrained):
    """Two networks that agree on unlabelled images and are not fooled by the same examples (Qiao et al., ECCV 2018).

    An adversarial example of a network is the image plus ``epsilon`` times the sign of the gradient of its
    cross-entropy with its own decision (FGSM). Agreement is asked on unlabelled images, diversity on all, as in the
    paper. The first network predicts.

    Attributes:
        agreement_weight: 10, lambda_cot of the paper.
        diversity_weight: 0.5, lambda_dif of the paper.
        epsilon: in the unit of the prepared images; 0.02 for natural images in [0, 1], by the paper's authors.
    """

    agreement_weight: float = 10.0
    diversity_weight: float = 0.5
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "agreement_weight", "diversity_weight", lowest=0)
        check_range(self, "epsilon", lowest=0, open_ended=True)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"agreement": self.agreement_weight, "diversity": self.diversity_weight}

    def networks(self, classes: int) -> nn.ModuleDict:
        return nn.ModuleDict({"unet": self.new_unet(classes), "second": self.new_unet(classes)})

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _DeepCotraining(self, networks, data, streams)


def adversarial(logits: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """FGSM on images (B, 1, *space), of which ``logits`` (B, C, *space) were computed with gradient, by their argmax.

    The graph of ``logits`` is kept; no parameter gets a gradient.
    """
    loss = F.cross_entropy(logits.float(), logits.argmax(dim=1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    return images.detach() + epsilon * gradient.sign()


class _DeepCotraining(TwoNetworks):
    method: DeepCotraining

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        return super().outputs(images.requires_grad_(), labelled)  # for the adversarial examples

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        first, second = outputs
        fooling_first, fooling_second = (adversarial(logits, images, self.method.epsilon) for logits in outputs)
        diversity = cotraining_diversity_loss(
            first, second, self.unet(fooling_second), self.networks["second"](fooling_first)
        )
        return {
            "agreement": cotraining_agreement_loss(first[labelled:], second[labelled:]),
            "diversity": diversity,
        }


# ---- one encoder, several predictions


def feature_noise(features: Tensor, generator: torch.Generator, span: float = 0.3) -> Tensor:
    """F-Noise of CCT: features (B, D, h, w) times 1 + U(-span, span), drawn for each entry."""
    noise = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
    return features * (1 + span * (2 * noise - 1))


def feature_dropout(features: Tensor, generator: torch.Generator, low: float = 0.6, high: float = 0.9) -> Tensor:
    """F-Drop of CCT: features (B, D, h, w) without the cells that are most active.

    A cell's activity is its mean over channels; those at or above U(low, high) times the largest of the image, one draw
    an image, are set to 0.
    """
    activity = features.mean(dim=1, keepdim=True)  # (B, 1, h, w)
    share = torch.rand(len(features), 1, 1, 1, generator=generator, device=features.device, dtype=features.dtype)
    threshold = (low + (high - low) * share) * activity.amax(dim=(2, 3), keepdim=True)
    return features * (activity < threshold)


def channel_dropout(features: Tensor, generator: torch.Generator, rate: float = 0.5) -> Tensor:
    """DropOut of CCT: whole channels of features (B, D, h, w) set to 0, the others scaled to the same mean."""
    kept = torch.rand(*features.shape[:2], 1, 1, generator=generator, device=features.device) >= rate
    return features * kept / (1 - rate)


@register("urpc", title="URPC")
@dataclass(frozen=True, kw_only=True)
class PyramidConsistency(Consistency):
    """Predictions from four levels of the decoder are drawn to their mean (Luo et al., MICCAI 2021). 2D.

    The coarser predictions are made from features with channels dropped and noise, as the paper has it, and
    interpolated to full resolution. The supervised loss is the mean over levels; the finest one predicts.
    """

    in_3d: ClassVar[bool] = False

    def networks(self, classes: int) -> nn.ModuleDict:
        unet = self.new_unet(classes)
        widths = [self.width * 2**level for level in (3, 2, 1)]  # of the decoder's maps, coarsest first
        heads = [nn.Conv2d(width, classes, kernel_size=3, padding=1) for width in widths]
        return nn.ModuleDict({"unet": unet, "coarse": nn.ModuleList(heads)})

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Pyramid(self, networks, data, streams)


class _Pyramid(CotrainingWork):
    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        *coarse, fine = self.unet.decoder(self.unet.encoder(images))
        outputs = [self.unet.classifier(fine)]
        generator = self.streams.own("perturbation")
        for head, features in zip(cast(nn.ModuleList, self.networks["coarse"]), coarse, strict=True):
            logits = head(feature_noise(channel_dropout(features, generator), generator))
            outputs.append(F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False))
        return outputs

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return super().supervised(outputs, labels) / len(outputs)

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        return {"consistency": pyramid_consistency_loss(torch.stack([logits[labelled:] for logits in outputs]))}


PERTURBATIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = feature_noise, feature_dropout, channel_dropout
"""What the auxiliary decoders of CCT see of each feature map: those three of its seven that SSL4MIS has."""


@register("cct", title="CCT (cross-consistency training)")
@dataclass(frozen=True, kw_only=True)
class CrossConsistency(Consistency):
    """Auxiliary decoders, each behind a perturbation of the features, are drawn to the main one (Ouali et al., 2020).

    They see unlabelled images only, as in the paper. The encoder's maps of all levels are perturbed, as in SSL4MIS,
    since the skips of a U-Net would carry the image around its bottleneck. 2D.
    """

    in_3d: ClassVar[bool] = False

    def networks(self, classes: int) -> nn.ModuleDict:
        main = ssl4mis_unet(classes, self.width)
        others = [ssl4mis_unet(classes, self.width) for _ in PERTURBATIONS]
        unets = [main, *others]
        decoders = [unet.decoder for unet in unets if isinstance(unet.decoder, Decoder)]
        branched = BranchedUNet(main.encoder, decoders, [unet.classifier for unet in unets], stride=main.stride)
        return nn.ModuleDict({"unet": branched})

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _PerturbedDecoders(self, networks, data, streams)

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        unet = cast(BranchedUNet, networks["unet"])
        return _branch(unet, 0, unet.encoder(images)).softmax(dim=1)


def _branch(unet: BranchedUNet, number: int, features: Sequence[Tensor]) -> Tensor:
    """Logits of one decoder from the encoder's maps."""
    return unet.classifiers[number](unet.decoders[number](features)[-1])


class _PerturbedDecoders(CotrainingWork):
    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        """The main decoder's logits of all images, then those of the others, of the unlabelled ones."""
        unet, generator = cast(BranchedUNet, self.unet), self.streams.own("perturbation")
        features = unet.encoder(images)
        unlabelled = [level[labelled:] for level in features]
        outputs = [_branch(unet, 0, features)]
        if len(unlabelled[0]):
            for number, perturb in enumerate(PERTURBATIONS, start=1):
                outputs.append(_branch(unet, number, [perturb(level, generator) for level in unlabelled]))
        return outputs

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return super().supervised(outputs[:1], labels)

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        main, *auxiliary = outputs
        target = main[labelled:].softmax(dim=1)
        return {"consistency": perturbed_decoders_loss(torch.stack(auxiliary), target)}
