"""DACL: co-training, and features in sparse regions pulled to the dense centre of their class (arXiv 2412.19871)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from medlib.banks import ClassBanks
from medlib.data.batches import TrainingData
from medlib.losses.consistency import cross_pseudo_supervision_loss
from medlib.losses.contrastive import COLDEST, unit_vectors
from medlib.losses.dacl import (
    class_mean_contrastive_loss,
    class_prototypes,
    dense_center,
    densest,
    feature_density,
    intra_class_variation_loss,
    other_class_rows,
    positiveness_weights,
    sample_per_class,
    soft_density_guided_loss,
    sparsest,
    take_rows,
)
from medlib.methods.base import Streams, check_choices, check_range, check_whole, register
from medlib.methods.cotraining import Cotrained, CotrainingWork
from medlib.nets import UNet, pixel_head

NOBODY = -1  # the class of a pixel whose prediction is not sure
LEVELS = 5  # of all networks of this kind
CHOICES = {
    "contrast": ("density", "plain", "infonce", "class_means", "variation", "none"),
    "granularity": ("pixel", "prototype"),
    "density_pool": ("bank", "bank and batch"),
    "negatives_from": ("anchors", "pixels"),
    "weight_scale": ("mean", "max", "sum"),
    "reduction": ("mean", "sum"),
    "predicts": ("first", "mean"),
}
SAMPLED = ("density", "plain", "infonce", "class_means")
"""The contrasts that sample pixels and project them; the others have no projection head."""


class Pixels(NamedTuple):
    """Sampled pixels as the contrastive term sees them, on the device of the images.

    ``features`` (M, D), unit length; ``classes`` (M,), labels or decisions; ``density`` (M,) in [-1, 1]; ``places``
    (M, 3) int64: image, row, column, or (M, 4) with the plane before the row; ``anchor`` and ``dense`` (M,) bool: the
    sparse ones that are pulled, and the keys whose mean is the centre of the class.
    """

    features: Tensor
    classes: Tensor
    density: Tensor
    places: Tensor
    anchor: Tensor
    dense: Tensor


class Rows(NamedTuple):
    """Unit features (C, N, D) of N pixels, or prototypes, of each contrasted class; ``valid`` (C, N): those there.

    ``pixel`` (C, N): numbers of the pixels, image after image; None for prototypes.
    """

    units: Tensor
    valid: Tensor
    pixel: Tensor | None


class Roles(NamedTuple):
    """Rows by number (C, Q) and whether there is one (C, Q) bool: the anchors, and the keys from the batch."""

    anchors: Tensor
    anchors_valid: Tensor
    keys: Tensor
    keys_valid: Tensor


@register("dacl", title="DACL")
@dataclass(frozen=True, kw_only=True)
class Dacl(Cotrained):
    """DACL, eq. 1-10, on 2D slices (ACDC) or 3D patches. No code was released: where the paper is silent or its
    equations do not say what they mean (`medlib.losses.dacl` lists eight places), the choice is a setting.

    Each row of Table 2 by the settings that differ from the defaults:

        I    CPS                   contrast="none"
        II   + plain contrast      contrast="plain"
        III  + density             neighbors=(16,), bank=0, positiveness=False
        IV   + scales              bank=0, positiveness=False
        V    + bank                positiveness=False
        VI   + weights             (the defaults)

    Row I is CPS with this paper's constant weight 1; ``cps`` is CPS with the weight and ramp of SSL4MIS, and
    ``labelled_only`` the supervised network. Table 3 has ``contrast="infonce"`` and ``"class_means"`` (PLCT) among the
    pixel-wise losses, ``"variation"`` (IFVD) and ``granularity="prototype"`` among the class-wise ones. As in the
    paper, slices of ACDC take the 2D U-Net (Table 1 says V-Net, but its numbers are those of the 2D protocol), and
    Synapse ``patch=(64, 128, 128), network="vnet", width=32, batch_size=4``, those of DHC.

    Attributes:
        cross_weight: lambda_cross of eq. 1; 1 from the first step on.
        contrast_weight: lambda_CL of eq. 1 at the end of its ramp, 0.1 exp(-5 (1 - t/T)^2).
        delay: steps in which lambda_CL is 0 while the bank fills: 1,000 of 30,000 ('Implementation Details'). The
            scales keep this share of the steps.
        contrast: "density", DACL's; "plain", the same loss with random anchors and random keys of the batch, without
            weights (row II); "infonce", one random pixel of the class in place of its centre; "class_means", the mean
            of each class among those of all; "variation", features vary within a class as in the other network;
            "none". Settings of density, bank and weights concern "density" alone.
        granularity: "pixel", or "prototype", the mean of a class in an image (eq. 2). The text mixes both; Table 3 has
            both, and its pixel-wise numbers are those of Tables 1 and 2. Of "density" alone.
        level: of the network at which the head reads its map: 0 is that of full resolution before the classifier, 4 the
            bottleneck. The paper says "encoder", but writes W x H, the size of the image: 0, as in DGCL.
        projection_dim: D, not stated; two layers of that width, as in DGCL (64 for 16 channels; it has 256 for 256).
        samples: random pixels per class and network that are projected, V_n; DGCL's cap. The paper has no cap.
        threshold: phi of eq. 2, above which a decision on an unlabelled image counts; not stated, "insensitive".
        neighbors: the scales k of eq. 4; not stated. 8, 16 and 32 are DGCL's; row III takes the one in the middle.
        density_pool: where neighbours are looked for. "bank": 'based on the corresponding memory bank'; "bank and
            batch": eq. 3, where a pixel is its own neighbour. Without a bank it is the batch.
        bank: entries per class, L; 1,000 is the best of figure 5b. 0: none.
        bank_push: random pixels per class, network and step that enter it; not stated. With 64, it holds some 8 steps.
        shared_bank: one bank for both networks ('extract embeddings using two segmentation models'), or one for each:
            their feature spaces are not aligned.
        anchors, keys, negatives: N_q, N_p+ (half from the batch, half from the bank) and N_p-.
        negatives_from: "anchors" of the other classes (the paper), or any of their sampled "pixels" (DGCL).
        positiveness: the weights of eq. 9; False weighs all anchors alike.
        weight_scale: what gamma of eq. 9, not stated, makes 1: the "mean" weight, the "max" or the "sum".
        weight_inside: w inside the logarithm as printed, where it has no gradient; else outside, as Claim 1 needs.
        include_positive: the positive in the denominator, as in SupCon and DGCL; False as printed.
        reduction: "mean" over anchors, then over classes, or the "sum" as printed, thousands of times larger.
        temperature: tau of eq. 10.
        background: contrast the background too; False as in DGCL, since its pixels are most and of many kinds.
        predicts: the "first" network, as for all methods of two networks here, or the "mean" of both; not stated.
    """

    cross_weight: float = 1.0
    contrast_weight: float = 0.1
    delay: int = 1000
    contrast: Literal["density", "plain", "infonce", "class_means", "variation", "none"] = "density"
    granularity: Literal["pixel", "prototype"] = "pixel"
    level: int = 0
    projection_dim: int = 64
    samples: int = 10_000
    threshold: float = 0.5

    neighbors: tuple[int, ...] = (8, 16, 32)
    density_pool: Literal["bank", "bank and batch"] = "bank"
    bank: int = 1000
    bank_push: int = 64
    shared_bank: bool = True

    anchors: int = 256
    keys: int = 512
    negatives: int = 512
    negatives_from: Literal["anchors", "pixels"] = "anchors"
    positiveness: bool = True
    weight_scale: Literal["mean", "max", "sum"] = "mean"
    weight_inside: bool = False
    include_positive: bool = True
    reduction: Literal["mean", "sum"] = "mean"
    temperature: float = 0.4
    background: bool = False
    predicts: Literal["first", "mean"] = "first"

    # laptop: a batch has a twentieth of the paper's pixels, so anchors and keys are fewer, or all would be both.
    scales: ClassVar = {
        "ci": dict(
            **Cotrained.scales["ci"], delay=1, projection_dim=8, samples=64, bank=32, bank_push=8, anchors=8, keys=16,
            negatives=16,
        ),
        "laptop": dict(
            **Cotrained.scales["laptop"], delay=20, samples=1024, anchors=64, keys=128, negatives=128,
        ),
        "paper": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, CHOICES)
        check_range(self, "cross_weight", "contrast_weight", lowest=0)
        check_whole(self, "projection_dim", "samples", "bank_push", "anchors", "negatives")
        check_whole(self, "delay", "level", "bank", lowest=0)
        if self.delay >= self.steps and self.contrast != "none":
            raise ValueError(f"delay={self.delay} of steps={self.steps}: the contrast would never begin")
        check_whole(self, "keys", lowest=2)
        if self.keys % 2:
            raise ValueError(f"keys must be even, half of them from the bank, got {self.keys}")
        if self.level >= LEVELS:
            raise ValueError(f"level must be below {LEVELS}, got {self.level}")
        check_range(self, "threshold", lowest=0, highest=1)
        check_range(self, "temperature", lowest=COLDEST)
        scales = self.neighbors
        if not (isinstance(scales, tuple) and scales and all(type(k) is int and k > 0 for k in scales)):
            raise ValueError(f"neighbors must be whole numbers from 1, such as (8, 16, 32), got {scales!r}")
        if self.granularity == "prototype" and self.contrast != "density":
            raise ValueError(f"granularity='prototype' is for contrast='density', got contrast={self.contrast!r}")

    @property
    def weights(self) -> Mapping[str, float]:
        cross = {"cross": self.cross_weight}
        return cross if self.contrast == "none" else {**cross, "contrast": self.contrast_weight}

    @property
    def first_class(self) -> int:
        """The first class that is contrasted."""
        return 0 if self.background else 1

    def networks(self, classes: int) -> nn.ModuleDict:
        networks = nn.ModuleDict({"unet": self.new_unet(classes), "second": self.new_unet(classes)})
        if self.contrast in SAMPLED:
            if classes - self.first_class < 2:
                raise ValueError(
                    f"contrast={self.contrast!r} needs two classes to tell apart, and beside the background there is "
                    f"{classes - 1}: set background to true"
                )
            channels = self.width * 2**self.level
            networks["head"] = pixel_head(channels, self.projection_dim)
            networks["second_head"] = pixel_head(channels, self.projection_dim)
        return networks

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Dacl(self, networks, data, streams)

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        first = super().predict(networks, images)
        if self.predicts == "first":
            return first
        return (first + networks["second"](images).softmax(dim=1)) / 2

    # what one step does, piece by piece

    def class_ids(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The class (B, *space) of each pixel: ``labels`` of the first images, then decisions surer than `threshold`.

        ``logits`` (B, C, *space); ``labels`` (L, *space), L <= B. `NOBODY` where a decision is not sure. T_n of eq. 2.
        """
        probability, decision = logits[len(labels) :].detach().float().softmax(dim=1).max(dim=1)
        return torch.cat([labels, decision.masked_fill(probability <= self.threshold, NOBODY)])

    def at_level(self, ids: Tensor) -> Tensor:
        """``ids`` (B, *space) at the centres of the cells of the map at `level`."""
        cell = 2**self.level
        middle = slice(cell // 2, None, cell)
        return ids[(slice(None), *[middle] * (ids.ndim - 1))]

    def rows(self, features: Tensor, head: nn.Module, ids: Tensor, classes: int, generator: torch.Generator) -> Rows:
        """Sampled and projected features of the contrasted classes. ``features`` (B, channels, *cells), of `level`.

        ``ids`` (B, *cells); ``classes`` of the data set. Pixels are sampled first, and only they are projected.
        """
        ids, count = ids - self.first_class, classes - self.first_class
        last = features.movedim(1, -1)  # (B, *cells, channels)
        index = None
        if self.granularity == "prototype":
            names = torch.arange(count, device=ids.device).view(-1, *[1] * (ids.ndim - 1))
            projected, valid = class_prototypes(head(last).movedim(-1, 1), ids[:, None] == names)  # (B, N, D), (B, N)
            projected, valid = projected.transpose(0, 1), valid.T
        else:
            index, valid = sample_per_class(ids.flatten(), count, self.samples, generator)  # (C, N)
            projected = head(last.flatten(0, -2)[index])
        units = unit_vectors(projected.float().flatten(0, 1)).unflatten(0, projected.shape[:2])
        return Rows(units, valid, index)

    def density(self, rows: Rows, bank: ClassBanks | None) -> Tensor:
        """Density (C, N) of each row, against the bank or, where there is none, the rows themselves."""
        pool, valid = rows.units.detach(), rows.valid
        if bank is not None:
            held, there = bank["feature"], bank.valid()
            both = self.density_pool == "bank and batch"
            pool, valid = (torch.cat([held, pool], 1), torch.cat([there, valid], 1)) if both else (held, there)
        return feature_density(rows.units.detach(), pool, self.neighbors, valid)

    def roles(self, rows: Rows, density: Tensor | None, generator: torch.Generator) -> Roles:
        """Anchors and keys of the batch: the sparsest and the densest rows; without ``density``, random ones."""
        if density is None:
            shuffled = [torch.rand(rows.valid.shape, generator=generator, device=rows.valid.device) for _ in range(2)]
        else:
            shuffled = [density, density]
        keys = 1 if self.contrast == "infonce" else self.keys // 2
        return Roles(*sparsest(shuffled[0], rows.valid, self.anchors), *densest(shuffled[1], rows.valid, keys))

    def contrastive_loss(self, rows: Rows, roles: Roles, bank: ClassBanks | None, generator: torch.Generator) -> Tensor:
        """Eq. 8 to 10 for the rows of one network. A class without an anchor, a key or a negative does not count."""
        keys, keys_valid = take_rows(rows.units.detach(), roles.keys), roles.keys_valid
        if bank is not None:
            index, valid = densest(bank["density"], bank.valid(), self.keys // 2)
            keys = torch.cat([keys, take_rows(bank["feature"], index)], dim=1)
            keys_valid = torch.cat([keys_valid, valid], dim=1)
        center, has_center = dense_center(keys, keys_valid)
        anchors = take_rows(rows.units, roles.anchors)
        anchors_valid = roles.anchors_valid & has_center[:, None]
        if self.negatives_from == "anchors":
            negatives, negatives_valid = other_class_rows(anchors, roles.anchors_valid, self.negatives, generator)
        else:
            negatives, negatives_valid = other_class_rows(rows.units, rows.valid, self.negatives, generator)
        if self.positiveness and self.contrast == "density":
            weights = positiveness_weights(anchors, center, anchors_valid, self.weight_scale)
        else:
            weights = torch.ones_like(anchors_valid, dtype=anchors.dtype)
        return soft_density_guided_loss(
            anchors,
            center,
            negatives,
            weights,
            self.temperature,
            self.include_positive,
            weight_inside=self.weight_inside,
            reduction=self.reduction,
            valid=anchors_valid,
            negative_valid=negatives_valid,
        )

    # to look at

    @torch.no_grad()
    def pixels(
        self,
        networks: nn.ModuleDict,
        images: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        bank: ClassBanks | None = None,
    ) -> Pixels:
        """What the first network's contrastive term sees of ``images`` (B, 1, *space), networks in eval mode.

        ``labels`` (B, *space) int64, -1 for nobody's; None takes the network's own decisions, as on unlabelled images.
        Density is measured against ``bank``, by default against the sampled pixels themselves, as in a step without a
        bank. ValueError: there is no head or there are no pixels, because of `contrast` or `granularity`.
        """
        if "head" not in networks or self.granularity != "pixel":
            raise ValueError(
                f"no pixels are projected with contrast={self.contrast!r} and granularity={self.granularity!r}"
            )
        unet = cast(UNet, networks["unet"])
        maps = unet.maps(images)
        logits = unet.classifier(maps[-1])
        ids = self.class_ids(logits, images.new_zeros(0, *images.shape[2:]).long() if labels is None else labels)
        ids = self.at_level(ids)
        rows = self.rows(maps[-1 - self.level], networks["head"], ids, logits.shape[1], generator)
        density = self.density(rows, bank)
        roles = self.roles(rows, density if self.contrast == "density" else None, generator)
        anchor, dense = torch.zeros_like(rows.valid), torch.zeros_like(rows.valid)
        anchor.scatter_(1, roles.anchors, roles.anchors_valid)
        dense.scatter_(1, roles.keys, roles.keys_valid)

        valid = rows.valid
        index = cast(Tensor, rows.pixel)[valid]
        image, *cells = torch.unravel_index(index, ids.shape)
        cell = 2**self.level
        places = torch.stack([image, *(part * cell + cell // 2 for part in cells)], dim=1)
        classes = ids.flatten()[index]
        return Pixels(rows.units[valid], classes, density[valid], places, anchor[valid], dense[valid])


class _Dacl(CotrainingWork):
    method: Dacl

    def __init__(self, method: Dacl, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(method, networks, data, streams)
        self.classes = data.classes
        self.banks = nn.ModuleList()
        if method.contrast == "density" and method.bank:
            parts: dict[str, tuple[int, ...]] = {"feature": (method.projection_dim,), "density": ()}
            for _ in range(1 if method.shared_bank else 2):
                self.banks.append(ClassBanks(data.classes - method.first_class, method.bank, parts))
        self._new: list[dict[str, Tensor]] = []  # of each network, what enters the bank after this step

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        unets = [cast(UNet, self.networks[name]) for name in ("unet", "second")]
        maps = [unet.maps(images) for unet in unets]
        self._maps = [levels[-1 - self.method.level] for levels in maps]
        return [unet.classifier(levels[-1]) for unet, levels in zip(unets, maps, strict=True)]

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        method, maps = self.method, self._maps
        self._maps = []  # else they would be kept until the next step
        terms = {"cross": cross_pseudo_supervision_loss(outputs[0], outputs[1])}
        if method.contrast == "none":
            return terms
        ids = [method.at_level(method.class_ids(logits, self.labels)) for logits in outputs]
        if method.contrast == "variation":
            terms["contrast"] = self._variation(maps, ids)
        else:
            both = zip(maps, ids, ("head", "second_head"), strict=True)
            terms["contrast"] = torch.stack([self._contrast(n, *one) for n, one in enumerate(both)]).sum()
        return terms

    def _variation(self, maps: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
        """Each network learns from the other, at the pixels of its own classes."""
        names = torch.arange(self.method.first_class, self.classes, device=ids[0].device)
        masks = [own[:, None] == names.view(-1, *[1] * (own.ndim - 1)) for own in ids]
        first, second = maps
        return intra_class_variation_loss(first, second, masks[0]) + intra_class_variation_loss(second, first, masks[1])

    def _contrast(self, number: int, features: Tensor, ids: Tensor, head: str) -> Tensor:
        """The contrastive term of one network."""
        method, generator = self.method, self.streams.own("contrast")
        rows = method.rows(features, self.networks[head], ids, self.classes, generator)
        if method.contrast == "class_means":
            means, present = dense_center(rows.units, rows.valid)
            names = torch.arange(len(means), device=ids.device)[:, None].masked_fill(~rows.valid, NOBODY)  # (C, N)
            return class_mean_contrastive_loss(
                rows.units.flatten(0, 1), names.flatten(), means, method.temperature, present
            )
        bank = self.bank(number)
        density = method.density(rows, bank) if method.contrast == "density" else None
        if bank is not None and density is not None:  # pixels are in random order, those that are there first
            pushed = slice(method.bank_push)
            new = {"valid": rows.valid, "feature": rows.units.detach(), "density": density}
            self._new.append({name: part[:, pushed] for name, part in new.items()})
        return method.contrastive_loss(rows, method.roles(rows, density, generator), bank, generator)

    def bank(self, network: int) -> ClassBanks | None:
        """The bank of the first (0) or the second (1) network."""
        if not self.banks:
            return None
        return cast(ClassBanks, self.banks[network % len(self.banks)])

    def ramp_of(self, term: str) -> Tensor:
        if term == "cross":
            return torch.ones_like(self.ramp())
        return self.ramp() * (self.done >= self.method.delay)

    def after_step(self) -> None:
        for number, new in enumerate(self._new):
            cast(ClassBanks, self.bank(number)).push(**new)
        self._new = []
        super().after_step()
