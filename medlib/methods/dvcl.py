"""DVCL: two 3D networks that teach each other, and what their uncertain voxels can learn from neighbours (ICCV 2025).

Cross pseudo-supervision, a contrast of reliable voxels (HqCL) and the distance-aware loss of unreliable ones. Batches,
supervised loss and optimiser are those of `medlib.methods.cotraining`, the losses those of `medlib.losses.dvcl`. No
code was released, so where the paper is silent the choice is a setting. All of it works on slices too (``patch=None``).
What it argues against is `medlib.methods.u2pl`.

A step waits for nothing on the device: what is drawn has a fixed size, and masks say what of it is there. Feature heads
see the sampled voxels alone: a perceptron of each voxel gives the same before and after the sampling, and the features
of a whole batch of patches would not fit beside the network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from medlib.banks import ClassBanks, FeatureBank
from medlib.data.batches import TrainingData
from medlib.losses.consistency import cross_pseudo_supervision_loss
from medlib.losses.contrastive import COLDEST, info_nce_loss, nt_xent_loss, unit_vectors
from medlib.losses.dvcl import (
    distance_aware_loss,
    entropy_from_logits,
    high_quality_contrastive_loss,
    nearest_and_farthest,
    nnclr_loss,
    partition_neighbors,
    select_by_entropy,
    similarity_affinity,
    snclr_loss,
)
from medlib.methods.base import Streams, check_choices, check_range, check_whole, register
from medlib.methods.cotraining import Cotrained, CotrainingWork
from medlib.methods.sampling import spread_by_class, spread_sample, voxels_of
from medlib.nets import UNet, pixel_head

NETWORKS = ("unet", "second")
HEADS = ("head", "second_head")

CHOICES = {
    "loss": ("log_likelihood", "info_nce", "simclr", "nnclr", "snclr"),
    "affinity": ("nps", "snclr", "equal"),
    "partition": ("none", "jensen", "exact"),
    "reduction": ("sum", "mean"),
    "banks": ("shared", "per_network"),
    "pools": ("joint", "per_network"),
    "threshold": ("unlabelled", "all"),
    "without_negatives": ("skip", "other_classes"),
    "class_mean": ("present", "all"),
    "second_weights": ("xavier", "kaiming"),
    "predicts": ("first", "second", "mean"),
}


# ---- sampling voxels


def sample_unreliable(unreliable: Tensor, count: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """``count`` different voxels of a mask (N,) bool, N >= 2 ``count``: positions (count,), and which are unreliable.

    Only where there are fewer than ``count`` do others fill up: they may be neighbours or outsiders, never queries.
    """
    chosen, new = spread_sample(unreliable, count, start)
    total = unreliable.sum()
    reach = (~unreliable).cumsum(0)
    number = torch.arange(count, device=unreliable.device) - total
    others = torch.searchsorted(reach, (number.clamp(min=0) * reach[-1]) // count + 1).clamp(max=len(reach) - 1)
    return torch.where(new, chosen, others), new


class CandidateQueue(FeatureBank):
    """A `FeatureBank` of which the host knows how many rows it holds, so that a search sees those and no others."""

    def __init__(self, capacity: int, dim: int):
        super().__init__(capacity, dim)
        self._count = 0
        self.register_load_state_dict_post_hook(lambda queue, _: queue._recount())

    def _recount(self) -> None:
        self._count = min(int(self.pushed), self.capacity)

    def push(self, features: Tensor) -> None:
        super().push(features)
        self._count = min(self._count + len(features), self.capacity)

    def held(self) -> Tensor:
        """The rows (n, D) pushed so far and not yet dropped, n <= capacity, in no particular order."""
        return self.rows[: self._count]


# ---- DVCL


class Neighborhoods(NamedTuple):
    """Of each of Q queries in a pool: the rows (Q, K) nearest and (Q, K') farthest, affinity (Q, K), inlier (Q,)."""

    neighbors: Tensor
    outsiders: Tensor
    affinity: Tensor
    inlier: Tensor


class Voxels(NamedTuple):
    """P voxels of some images, what a network makes of them, and the neighbourhoods of Q of them.

    ``features`` (P, d); ``probabilities`` (P, C); ``classes`` (P,) int64, the true ones, -1 where unknown; ``entropy``
    (P,) in nats; ``places`` (P, 4) int64: image, z, y, x (slices: image, y, x); ``reliable`` (P,) bool, the unreliable
    ones first. ``queries`` (Q,), ``neighbors`` (Q, K) and ``outsiders`` (Q, K') are rows of these; ``affinity`` (Q, K);
    ``inlier`` (Q,) bool.
    """

    features: Tensor
    probabilities: Tensor
    classes: Tensor
    entropy: Tensor
    places: Tensor
    reliable: Tensor
    queries: Tensor
    neighbors: Tensor
    outsiders: Tensor
    affinity: Tensor
    inlier: Tensor


@register("dvcl", title="DVCL")
@dataclass(frozen=True, kw_only=True)
class Dvcl(Cotrained):
    """CPS, eq. 1-2, with HqCL on reliable voxels, eq. 7-10, and the distance-aware loss on unreliable ones, eq. 11-19.

    The total, eq. 3, is L_sup + lambda_u(t) L_cps + lambda_c (L_hqcl + beta L_dvcl).

    Table 2, from its first row to its last: ``hqcl=False, dvcl=False`` (CPS); ``dvcl=False``;
    ``affinity="equal", qds=False``; ``qds=False`` (NPS); the defaults. Table 3 has no QDS, so with ``qds=False``:
    ``loss="info_nce"``, ``"simclr"``, ``"nnclr"``; ``affinity="equal"`` (log-likelihood); ``loss="snclr"``;
    ``affinity="snclr"``; the default (NPS).

    Sources: P the paper, S stored reviews of an earlier manuscript of it, G the code of GuidedNet by the same first
    author, U the code of U2PL, on which HqCL builds; all else is our choice.

    Attributes:
        patch: 64 x 128 x 128 (G).
        steps, batch_size: 20,000 and 4 + 4 patches (G).
        learning_rate: 0.1 (G); it also serves the few hundred steps of a laptop.
        ramp_steps: of lambda_u; the ramp of G ends at 30,000, beyond the last step, and moves every 150 steps.
        consistency_weight: lambda_u (P).
        on_labelled: CPS on the labelled images too; eq. 2 has the unlabelled ones alone, G both.
        second_weights: initial weights of the second network: "xavier" (G) or "kaiming", as the first.
        predicts: "first" network, as CPS here; "second"; or "mean" of both probabilities. Not stated.

        hqcl, dvcl: whether the two contrastive losses are there.
        contrastive_weight: lambda_c (P).
        beta: of L_dvcl within it (P).
        warmup_steps: for so many steps lambda_c is 0; the paper states none.
        feature_dim: d of the feature heads, two linear layers (as wide inside); not stated.
        alpha: a voxel is unreliable above mean + alpha standard deviations of the entropy (P).
        threshold: mean and deviation over the "unlabelled" voxels of the batch (pseudo-labels are theirs), or "all".

        anchors, negatives: M of each class and N of each anchor (P, U). A batch with fewer anchors repeats them.
        temperature: sigma (P).
        bank: anchors that are kept of each class; their mean is the centre P_c. U has 30,000.
        banks: "shared" by both networks, the union of section 3.3, or "per_network", as their spaces are not aligned.
        normalised_centre: the mean is of unit vectors, as all comparisons are cosines; False takes them as they are.
        negative_bank: false positives that are kept of each class; 0 has those of the batch alone, as eq. 9, of which
            there are soon none: few labelled images are learnt by heart.
        without_negatives: a class without false positives is left out ("skip"), or compares with anchors of the
            "other_classes".
        class_mean: over the classes "present" or over "all" (1/C as printed, absent ones counting 0).

        neighbors, outsiders: K and K' (S: the best of 5, 10, 15, 20 each).
        wide: U of QDS; 5 K, as the paper says "significantly larger".
        ordinary: r of NPS (P); NRC, its model, has 0.1.
        affinity: "nps", eq. 14; "snclr", by similarity; or "equal", 1 for all.
        qds: leave outliers out of the queries, eq. 15.
        pool: unreliable voxels a step and network. Where there are fewer, reliable ones fill up, never as queries.
        queries: of both networks together.
        pools: neighbours are sought in the "joint" pool of both networks (U_R is a union), or "per_network".
        queue: candidates of earlier steps beside the pool (section 3.4 has queues, without a size).
        loss: "log_likelihood", eq. 18-19, or a rival of Table 3. The paper does not say what their pairs are: here the
            features that the two networks have of one voxel, with the queue as negatives of InfoNCE and as the support
            of NNCLR and SNCLR.
        rival_temperature: of those, as in their papers.
        partition: the third term of eq. 17: "none", as eq. 18 drops it, "jensen" or "exact".
        reduction: eq. 18 has the "sum" over neighbours and over outsiders; "mean" divides each by their number.
        detach_partners: the gradient flows to queries alone.
    """

    patch: tuple[int, int, int] | None = (64, 128, 128)
    steps: int = 20_000
    batch_size: int = 8
    learning_rate: float = 0.1
    ramp_steps: int | None = 30_000
    consistency_weight: float = 0.1
    on_labelled: bool = False
    second_weights: Literal["xavier", "kaiming"] = "xavier"
    predicts: Literal["first", "second", "mean"] = "first"

    hqcl: bool = True
    dvcl: bool = True
    contrastive_weight: float = 0.1
    beta: float = 0.3
    warmup_steps: int = 0
    feature_dim: int = 64
    alpha: float = 0.5
    threshold: Literal["unlabelled", "all"] = "unlabelled"

    anchors: int = 256
    negatives: int = 50
    temperature: float = 1.0
    bank: int = 4096
    banks: Literal["shared", "per_network"] = "shared"
    normalised_centre: bool = True
    negative_bank: int = 1024
    without_negatives: Literal["skip", "other_classes"] = "skip"
    class_mean: Literal["present", "all"] = "present"

    neighbors: int = 10
    outsiders: int = 15
    wide: int = 50
    ordinary: float = 0.5
    affinity: Literal["nps", "snclr", "equal"] = "nps"
    qds: bool = True
    pool: int = 4096
    queries: int = 1024
    pools: Literal["joint", "per_network"] = "joint"
    queue: int = 8192
    loss: Literal["log_likelihood", "info_nce", "simclr", "nnclr", "snclr"] = "log_likelihood"
    rival_temperature: float = 0.1
    partition: Literal["none", "jensen", "exact"] = "none"
    reduction: Literal["sum", "mean"] = "sum"
    detach_partners: bool = True

    # laptop: for scans of about 40 voxels a side (the hippocampus), or an abdomen with a coarse ``voxel_spacing``
    scales: ClassVar = {
        "ci": dict(
            patch=(16, 32, 32), width=4, steps=6, batch_size=4, ramp_steps=9, feature_dim=8, anchors=16, negatives=8,
            bank=64, negative_bank=32, pool=64, queries=32, queue=128,
        ),
        "laptop": dict(
            patch=(32, 32, 32), width=8, steps=400, batch_size=4, ramp_steps=600, feature_dim=32, anchors=64, bank=1024,
            negative_bank=256, pool=256, queries=256, queue=512,
        ),
        "paper": {},
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, CHOICES)
        check_whole(self, "feature_dim", "anchors", "negatives", "bank", "neighbors", "wide", "pool", "queries")
        check_whole(self, "outsiders", "negative_bank", "queue", "warmup_steps", lowest=0)
        check_range(self, "consistency_weight", "contrastive_weight", "beta", lowest=0)
        check_range(self, "temperature", "rival_temperature", lowest=COLDEST)
        check_range(self, "ordinary", lowest=0, highest=1)
        check_range(self, "alpha", lowest=-10, highest=10)
        drawn = self.pool * (2 if self.pools == "joint" else 1)
        for name in ("neighbors", "outsiders"):
            if getattr(self, name) >= drawn:
                raise ValueError(f"{name} must be below the {drawn} voxels of a pool, got {getattr(self, name)}")
        if self.queries > 2 * self.pool:
            raise ValueError(f"queries must be at most the {2 * self.pool} voxels of both pools, got {self.queries}")
        if self.queries % 2 and self.pools == "per_network":
            raise ValueError(f"queries must be even, half of them of each network, got {self.queries}")
        if not self.queue and self.loss in ("info_nce", "nnclr"):
            raise ValueError(f"queue=0 leaves {self.loss} nothing to compare with: give it entries")

    @property
    def weights(self) -> Mapping[str, float]:
        weights = {"consistency": self.consistency_weight}
        if self.hqcl:
            weights["hqcl"] = self.contrastive_weight
        if self.dvcl:
            weights["dvcl"] = self.contrastive_weight * self.beta
        return weights

    def networks(self, classes: int) -> nn.ModuleDict:
        """Two networks and, where a contrastive loss needs them, two feature heads."""
        networks = nn.ModuleDict({name: self.new_unet(classes) for name in NETWORKS})
        if self.second_weights == "xavier":
            for layer in networks["second"].modules():
                if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                    nn.init.xavier_normal_(layer.weight)
        if self.hqcl or self.dvcl:
            for name in HEADS:
                networks[name] = pixel_head(self.width, self.feature_dim)
        return networks

    def work(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> CotrainingWork:
        return _Dvcl(self, networks, data, streams)

    def predict(self, networks: nn.ModuleDict, images: Tensor) -> Tensor:
        chosen = {"first": NETWORKS[:1], "second": NETWORKS[1:], "mean": NETWORKS}[self.predicts]
        return torch.stack([networks[name](images).softmax(dim=1) for name in chosen]).mean(dim=0)

    def neighborhoods(self, features: Tensor, queries: Tensor) -> Neighborhoods:
        """Of ``queries`` (Q,) int64 in the pool ``features`` (P, d), by these settings (eq. 12-15)."""
        neighbors, outsiders = nearest_and_farthest(features, queries, self.neighbors, self.outsiders)
        affinity = torch.ones(neighbors.shape, device=features.device)
        inlier = torch.ones_like(queries, dtype=torch.bool)
        if self.affinity == "nps" or self.qds:
            partitioned, inlying = partition_neighbors(features, queries, neighbors, self.wide, self.ordinary)
            affinity = partitioned if self.affinity == "nps" else affinity
            inlier = inlying if self.qds else inlier
        if self.affinity == "snclr":
            affinity = similarity_affinity(features, queries, neighbors)
        return Neighborhoods(neighbors, outsiders, affinity, inlier)

    @torch.no_grad()
    def voxels(self, networks: nn.ModuleDict, images: Tensor, labels: Tensor, generator: torch.Generator) -> Voxels:
        """What the first network makes of ``pool`` unreliable and ``pool`` reliable voxels, for looking at.

        ``images`` (B, 1, *space), of at least 2 ``pool`` voxels, share one threshold; ``labels`` (B, *space) int64.
        Queries are among the unreliable voxels, and so are their neighbours and outsiders, without the queue of
        training. The networks should be in eval mode.
        """
        self.check_pool(images)
        if labels.shape != (len(images), *images.shape[2:]):
            raise ValueError(f"labels must be those of images {tuple(images.shape)}, got {tuple(labels.shape)}")
        if "head" not in networks:
            raise ValueError("hqcl=False and dvcl=False leave the networks without features: switch one of them on")
        unet = cast(UNet, networks["unet"])
        maps = unet.maps(images)[-1]
        logits = unet.classifier(maps)
        entropy = entropy_from_logits(logits).flatten()
        reliable, unreliable = select_by_entropy(entropy, self.alpha)
        starts = torch.rand(2, generator=generator, device=images.device)
        sampled = [sample_unreliable(mask, self.pool, starts[i]) for i, mask in enumerate((unreliable, reliable))]
        voxels = torch.cat([places for places, _ in sampled])
        queries = torch.randperm(self.pool, generator=generator, device=images.device)[: self.queries]
        queries = queries[sampled[0][1][queries]]
        features = networks["head"](voxels_of(maps, voxels))
        where = torch.unravel_index(voxels, labels.shape)
        return Voxels(
            features,
            voxels_of(logits, voxels).softmax(dim=1),
            labels.flatten()[voxels],
            entropy[voxels],
            torch.stack(where, dim=1),
            reliable[voxels],
            queries,
            *self.neighborhoods(features[: self.pool], queries),
        )

    def check_pool(self, images: Tensor) -> None:
        """ValueError unless unlabelled images (B, 1, *space) have voxels enough for the pool of a network."""
        if images.numel() < 2 * self.pool:
            raise ValueError(f"pool must be at most half of the {images.numel()} voxels of the images, got {self.pool}")


class _Dvcl(CotrainingWork):
    method: Dvcl

    def __init__(self, method: Dvcl, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__(method, networks, data, streams)
        self.classes = data.classes
        if method.hqcl:
            parts = {"feature": (method.feature_dim,)}
            self.anchor_banks = nn.ModuleList(ClassBanks(self.classes, method.bank, parts) for _ in self._of("banks"))
            capacity = method.negative_bank or method.negatives
            self.wrong_banks = nn.ModuleList(ClassBanks(self.classes, capacity, parts) for _ in self._of("banks"))
        if method.dvcl and method.queue:
            groups = self._of("pools")
            capacity, dim = -(-method.queue // len(groups)), method.feature_dim + self.classes
            self.queues = nn.ModuleList(CandidateQueue(capacity, dim) for _ in groups)

    def _of(self, setting: str) -> tuple[tuple[int, ...], ...]:
        """The networks that share a bank, or a pool: all of them, or each for itself."""
        return ((0,), (1,)) if getattr(self.method, setting) == "per_network" else ((0, 1),)

    def outputs(self, images: Tensor, labelled: int) -> Sequence[Tensor]:
        """Logits of both networks, then the maps (B, width, *space) that their classifiers and heads read."""
        unets = [cast(UNet, self.networks[name]) for name in NETWORKS]
        maps = [unet.maps(images)[-1] for unet in unets]
        return [*(unet.classifier(features) for unet, features in zip(unets, maps, strict=True)), *maps]

    def supervised(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        return super().supervised(outputs[:2], labels)

    def ramp_of(self, term: str) -> Tensor:
        return self.ramp() if term == "consistency" else (self.done >= self.method.warmup_steps).float()

    def terms(self, outputs: Sequence[Tensor], images: Tensor, labelled: int, targets: Any) -> dict[str, Tensor]:
        method, (first, second) = self.method, outputs[:2]
        consistency = cross_pseudo_supervision_loss(first[labelled:], second[labelled:])
        if method.on_labelled:
            consistency = consistency + cross_pseudo_supervision_loss(first[:labelled], second[:labelled])
        terms = {"consistency": consistency}
        if not (method.hqcl or method.dvcl):
            return terms
        self.logits, self.maps = outputs[:2], outputs[2:]
        reliable, unreliable = zip(*(self._select(logits.detach(), labelled) for logits in self.logits), strict=True)
        if method.hqcl:
            losses = [self._high_quality(*group, reliable) for group in enumerate(self._of("banks"))]
            terms["hqcl"] = torch.stack(losses).mean()
        if method.dvcl:
            method.check_pool(images[labelled:])
            losses = [self._distance_aware(*group, unreliable) for group in enumerate(self._of("pools"))]
            terms["dvcl"] = torch.stack(losses).mean()
        del self.logits, self.maps
        return terms

    def _select(self, logits: Tensor, labelled: int) -> tuple[Tensor, Tensor]:
        """Masks (Bu * V,) of the reliable and of the unreliable voxels of the unlabelled images."""
        every = self.method.threshold == "all"
        entropy = entropy_from_logits(logits if every else logits[labelled:])
        reliable, unreliable = select_by_entropy(entropy, self.method.alpha)
        skipped = labelled if every else 0
        return reliable[skipped:].flatten(), unreliable[skipped:].flatten()

    def _starts(self, count: int) -> Tensor:
        generator = self.streams.own("voxels")
        return torch.rand(count, generator=generator, device=generator.device)

    def _features(self, networks: Sequence[int], which: Tensor, places: Tensor) -> Tensor:
        """Features (n, d) that network number ``which`` (n,) of ``networks`` has at ``places`` (n,) of the batch."""
        rows = [self.networks[HEADS[i]](voxels_of(self.maps[i], places)) for i in networks]
        return torch.stack(rows)[which, torch.arange(len(places), device=places.device)]

    # reliable voxels

    def _high_quality(self, number: int, networks: Sequence[int], reliable: Sequence[Tensor]) -> Tensor:
        """HqCL of ``networks``, which share the banks of that ``number``; masks (Bu * V,) of both."""
        method = self.method
        anchor_bank, wrong_bank = (cast(ClassBanks, banks[number]) for banks in (self.anchor_banks, self.wrong_banks))
        with torch.no_grad():
            classes = [self._right_and_wrong(self.logits[i], reliable[i]) for i in networks]
            right, wrong = (torch.cat(maps) for maps in zip(*classes, strict=True))
        anchors, new = self._draw(networks, right, method.anchors)
        with torch.no_grad():
            false_positives, truly = self._draw(networks, wrong, method.negatives)
            if not method.negative_bank:
                wrong_bank.pushed.zero_()
            wrong_bank.push(truly, feature=false_positives)
            kept = unit_vectors(anchors.detach().flatten(0, 1)).view(anchors.shape)
            anchor_bank.push(new, feature=kept if method.normalised_centre else anchors)
            centres = class_centres(anchor_bank)
            negatives, there = self._negatives(anchor_bank, wrong_bank)
        present = new[:, 0] & there  # (C,)
        losses = [
            high_quality_contrastive_loss(anchors[c], centres[c], negatives[c], method.temperature)
            for c in range(self.classes)
        ]
        total = torch.where(present, torch.stack(losses), 0).sum()
        return total / (self.classes if method.class_mean == "all" else present.sum().clamp(min=1))

    def _right_and_wrong(self, logits: Tensor, reliable: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each voxel that is an anchor (B * V,), eq. 7, and of each false positive (Bl * V,); else -1."""
        decision, truth = logits.argmax(dim=1).flatten(1), self.labels.flatten(1)  # (B, V), (Bl, V)
        known, guessed = decision[: len(truth)], decision[len(truth) :]
        right = torch.cat([known.where(known == truth, -1).flatten(), guessed.flatten().where(reliable, -1)])
        return right, known.where((known != truth) & (truth >= 0), -1).flatten()

    def _draw(self, networks: Sequence[int], classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """``count`` features of each class (C, count, d), and which are new; ``classes``, network after network."""
        positions, new = spread_by_class(classes, count, self._starts(self.classes))
        size = len(classes) // len(networks)
        features = self._features(networks, positions.flatten() // size, positions.flatten() % size)
        return features.unflatten(0, positions.shape), new

    def _negatives(self, anchor_bank: ClassBanks, wrong_bank: ClassBanks) -> tuple[Tensor, Tensor]:
        """Negatives (C, M, N, d) of the anchors, and the classes (C,) that have some."""
        method, generator = self.method, self.streams.own("voxels")
        count = method.anchors * method.negatives
        entries, filled = wrong_bank.sample(count, generator)
        negatives, there = entries["feature"], filled[:, 0]
        if method.without_negatives == "other_classes":
            entries, filled = anchor_bank.sample(count, generator)
            # to each draw another class that has anchors: by chance, with no weight on the class itself
            allowed = filled[:, 0] & ~torch.eye(self.classes, dtype=torch.bool, device=filled.device)  # (C, C)
            chance = torch.rand(self.classes, count, self.classes, generator=generator, device=filled.device)
            other = chance.masked_fill(~allowed[:, None], -1).argmax(dim=2)  # (C, count)
            instead = entries["feature"][other, torch.arange(count, device=other.device)]
            negatives = torch.where(there[:, None, None], negatives, instead)
            there = there | allowed.any(dim=1)
        return negatives.unflatten(1, (method.anchors, method.negatives)), there

    # unreliable voxels

    def _distance_aware(self, number: int, networks: Sequence[int], unreliable: Sequence[Tensor]) -> Tensor:
        """The loss of the unreliable voxels of ``networks``, which share pool and queue; masks (Bu * V,) of both."""
        method, generator = self.method, self.streams.own("voxels")
        starts = self._starts(len(networks))
        drawn = [sample_unreliable(unreliable[i], method.pool, starts[n]) for n, i in enumerate(networks)]
        labelled = self.labels.numel()
        places = [voxels + labelled for voxels, _ in drawn]
        keep = torch.cat([truly for _, truly in drawn])
        which = torch.arange(len(networks), device=keep.device).repeat_interleave(method.pool)
        with torch.no_grad():
            features = self._features(networks, which, torch.cat(places))
        logits = [voxels_of(self.logits[i], p) for i, p in zip(networks, places, strict=True)]
        probabilities = torch.cat(logits).float().softmax(dim=1)

        count = method.queries // (2 if method.pools == "per_network" else 1)
        queries = torch.randperm(len(features), generator=generator, device=features.device)[:count]
        queue = cast(CandidateQueue, self.queues[number]) if method.queue else None
        earlier = queue.held() if queue is not None else features.new_zeros(0, features.shape[1] + self.classes)
        past_features, past_probabilities = earlier.split([features.shape[1], self.classes], dim=1)
        if method.loss == "log_likelihood":
            candidates = torch.cat([features.float(), past_features])
            near = method.neighborhoods(candidates, queries)
            loss = distance_aware_loss(
                torch.cat([probabilities, past_probabilities]), queries, near.neighbors, near.outsiders, near.affinity,
                near.inlier & keep[queries], partition=method.partition, reduction=method.reduction,
                detach_partners=method.detach_partners,
            )  # fmt: skip
        else:
            loss = self._rival(which[queries] + networks[0], torch.cat(places)[queries], past_features)
        if queue is not None:
            queue.push(torch.cat([features.float(), probabilities.detach()], dim=1))
        return loss

    def _rival(self, which: Tensor, places: Tensor, past: Tensor) -> Tensor:
        """A loss of Table 3 on voxels of the networks ``which`` (Q,); the other network's features are their views."""
        temperature = self.method.rival_temperature
        views = [self._features((0, 1), network, places) for network in (which, 1 - which)]
        if self.method.loss == "simclr":
            return nt_xent_loss(views[0], views[1], temperature)
        losses = []
        for first, second in (views, views[::-1]):
            if self.method.loss == "info_nce":
                losses.append(info_nce_loss(first, second, past, temperature))
            elif self.method.loss == "nnclr":
                losses.append(nnclr_loss(first, second, past, temperature))
            else:
                candidates = torch.cat([second.detach().float(), past])
                own = torch.arange(len(second), device=second.device)
                near, _ = nearest_and_farthest(candidates, own, self.method.neighbors, 0)
                losses.append(snclr_loss(first, second, candidates[near], temperature))
        return torch.stack(losses).mean()


def class_centres(bank: ClassBanks) -> Tensor:
    """The mean (C, d) of the "feature" entries of each class, eq. 8; 0 of an empty one."""
    valid = bank.valid()[..., None]  # (C, capacity, 1)
    return (bank["feature"] * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
