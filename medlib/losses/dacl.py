"""DACL: density-aware contrastive learning (arXiv 2412.19871).

The features of a class form a cluster. A feature whose nearest neighbours are far lies in a sparse region of it: there
the network is unsure. DACL pulls these features towards the centre of the dense ones and away from other classes:

- density (eq. 3-5): the mean cosine of a feature and its k nearest neighbours, averaged over several k;
- anchors (eq. 6): the features of the batch with the lowest density; the centre (eq. 7-8): the mean of the densest
  features, half from the batch and half from a bank;
- weights (eq. 9): an anchor nearer the centre counts more; the loss (eq. 10): InfoNCE of anchors, centre and negatives.

There is no released code, and eight equations do not say what they mean. We read them so, and where the other reading
can be trained it is a setting:

1. eq. 2 divides by the sum of T without its class: the sum of T_n, or v_n would not be a mean.
2. eq. 3 lets a feature of the pool be a neighbour of itself: the pool is what the caller passes. With the bank alone,
   as in DGCL (Wang et al. 2023), which DACL adapts, nobody is.
3. eq. 4-5 reuse N (classes) and n (class) for the number of scales.
4. eq. 6 writes argmin for 'the N_q lowest', and eq. 7 writes one union: the text takes half of the keys from each side.
5. eq. 9 leaves the axis of the softmax open, and the centre is one vector: it can only be the anchors. gamma is not
   given: ours makes the mean weight 1 (``scale``).
6. eq. 10 has w_i inside the logarithm, where log w_i is a constant: no gradient, and not what Claim 1 needs. Ours
   stands outside (``weight_inside``).
7. eq. 10 has no positive in its denominator, so that it is not bounded below. Ours has one (``include_positive``).
8. eq. 10 sums over thousands of anchors, which lambda = 0.1 cannot balance. Ours is a mean over the anchors of a class,
   then over classes (``reduction``).

Every function takes one class, (Q, D), or all classes at once, (C, Q, D). Classes do not have equally many rows, so the
second form comes with masks (C, Q) of the rows that are there; waiting for no count, it stays on the device.

Each loss stands here twice: as the equation, slow and literal (``..._by_definition``), and as the form that is trained.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from medlib.losses.contrastive import (
    check_counts,
    check_mask,
    check_shapes,
    check_temperature,
    full_precision,
    unit_vectors,
)

BLOCK = 2**21
"""Similarities that `feature_density` holds at a time: 8 MB in float32, which a processor's cache can keep."""


def class_prototypes_by_definition(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """DACL eq. 2 as it is meant, over images (B, D, H, W). Same arguments and values as `class_prototypes`."""
    j, T = features, masks
    B, D, H, W = j.shape
    N = T.shape[1]
    v = j.new_zeros(B, N, D)
    present = torch.zeros(B, N, dtype=torch.bool)
    for b in range(B):
        for n in range(N):
            inside = [j[b, :, y, x] for y in range(H) for x in range(W) if T[b, n, y, x]]
            if inside:
                v[b, n], present[b, n] = sum(inside) / len(inside), True
    return v, present


def feature_density_by_definition(features: Tensor, pool: Tensor, neighbors: Sequence[int] = (8, 16, 32)) -> Tensor:
    """DACL eq. 3-5 as they are written, for one class. Same arguments and value as `feature_density`."""
    d = []
    for v in features:
        similarity = sorted((torch.cosine_similarity(v, r, dim=0) for r in pool), reverse=True)
        d_i = [torch.stack(similarity[:k]).mean() for k in neighbors]  # eq. 3, one per scale
        d.append(torch.stack(d_i).mean())  # eq. 5
    return torch.stack(d)


def positiveness_weights_by_definition(anchors: Tensor, center: Tensor) -> Tensor:
    """DACL eq. 9 for one class, with gamma = 1 / N_q. Same arguments and value as `positiveness_weights`."""
    N_q = len(anchors)
    e = [torch.exp(torch.cosine_similarity(m_i, center, dim=0)) for m_i in anchors]
    gamma = 1 / N_q
    return torch.stack([e_i / sum(e) / gamma for e_i in e]).detach()


def soft_density_guided_loss_by_definition(
    anchors: Tensor,
    center: Tensor,
    negatives: Tensor,
    weights: Tensor,
    temperature: float = 0.4,
    include_positive: bool = True,
    weight_inside: bool = False,
) -> Tensor:
    """DACL eq. 10 for one class, mean over its anchors. Same arguments and value as `soft_density_guided_loss`.

    As printed: ``include_positive=False, weight_inside=True``.
    """
    tau = temperature

    def e(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.cosine_similarity(a, b, dim=0) / tau)

    terms = []
    for m_i, w_i in zip(anchors, weights.detach(), strict=True):
        positive = e(m_i, center)
        everyone = sum(e(m_i, p) for p in negatives) + (positive if include_positive else 0)
        if weight_inside:
            terms.append(-torch.log(w_i * positive / everyone))
        else:
            terms.append(-w_i * torch.log(positive / everyone))
    return torch.stack(terms).mean()


def class_prototypes(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The mean feature of each class in each image, and whether the class is there.

    ``features`` (B, D, H, W), or (B, D, Z, H, W) for volumes; ``masks`` (B, N, ...) bool with the same space: the
    pixels that count for class n, T_n = 1(M_n > phi) in the paper (phi is not given; 0.5 keeps the classes apart). A
    pixel in no mask may hold anything. Returns prototypes (B, N, D), 0 where the class is absent, and present (B, N)
    bool. Source: DACL eq. 2.
    """
    space = "ZHW" if features.ndim == 5 else "HW"
    check_shapes(features=(features, "BD" + space), masks=(masks, "BN" + space))
    check_mask(masks=masks)
    return _masked_means(_inside(features, masks), masks), masks.flatten(2).any(dim=2)


def _inside(features: Tensor, masks: Tensor) -> Tensor:
    """``features`` (B, D, ...), 0 at the pixels that lie in none of the ``masks`` (B, N, ...)."""
    return torch.where(masks.any(dim=1, keepdim=True), features, 0)


@full_precision
def _masked_means(features: Tensor, masks: Tensor) -> Tensor:
    inside = masks.flatten(2).to(features.dtype)  # (B, N, S)
    share = inside / inside.sum(dim=2, keepdim=True).clamp(min=1)  # of each pixel: a sum of features could overflow
    return share @ features.flatten(2).transpose(1, 2)  # (B, N, S) x (B, S, D)


@full_precision
def feature_density(
    features: Tensor, pool: Tensor, neighbors: Sequence[int] = (8, 16, 32), valid: Tensor | None = None
) -> Tensor:
    """How dense the pool is around each feature: mean cosine of its k nearest, averaged over the scales k. In [-1, 1].

    ``features`` (M, D) and ``pool`` (P, D) of one class, or (C, M, D) and (C, P, D) of all; ``valid`` (P,) or (C, P)
    bool: the rows of the pool that are there, by default all; the others may hold anything. A scale larger than the
    pool takes the whole pool; against an empty one the density is 0. A feature that lies in the pool is its own nearest
    neighbour. Returns (M,) or (C, M).

    One search at the largest scale serves all: with the neighbours in order, the mean at each scale is a running mean,
    read there. Rows go in blocks (`BLOCK`), so the M x P table is never there at once.
    Source: DACL eq. 3-5. The paper gives no scales; 8, 16 and 32 are those of DGCL (Wang et al. 2023).
    """
    one = features.ndim != 3
    classes = "" if one else "C"
    check_shapes(features=(features, classes + "MD"), pool=(pool, classes + "PD"))
    scales = list(neighbors) if isinstance(neighbors, Iterable) else []
    if not scales or any(not isinstance(k, Integral) or k < 1 for k in scales):
        raise ValueError(f"neighbors must be one or more whole numbers from 1 up, got {neighbors!r}")
    valid = _mask(valid, pool)
    if one:
        features, pool, valid = features[None], pool[None], valid[None]

    features = _units(features)
    by_column = _units(torch.where(valid[..., None], pool, 0)).transpose(1, 2).contiguous()  # (C, D, P)
    there = valid.sum(dim=1)  # (C,): rows of each pool
    absent = ~valid[:, None]  # (C, 1, P)
    rows = max(1, BLOCK // max(1, absent.numel()))
    density = []
    for block in features.split(rows, dim=1):
        similarity = (block @ by_column).masked_fill_(absent, -math.inf)  # (C, rows, P)
        density.append(_multi_scale_mean(_largest(similarity, max(scales)), there, scales))
    together = torch.cat(density, dim=1)
    return together[0] if one else together


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest of each row (C, M, P), in falling order; all of a row shorter than k.

    A top-k costs several times more on long rows, so the columns compete in groups of 4 first: if one of the k largest
    lay outside the k groups with the largest maxima, each of these would hold a larger one. The result is the same.
    """
    groups = rows.shape[2] // 4
    if groups < 2 * k:
        return rows.topk(min(k, rows.shape[2]), dim=2).values
    grouped = rows[:, :, : 4 * groups].unflatten(2, (4, groups))  # (C, M, 4, G)
    best = grouped.detach().amax(dim=2).topk(k, dim=2, sorted=False).indices  # (C, M, k)
    candidates = grouped.gather(3, best[:, :, None].expand(-1, -1, 4, -1)).flatten(2)  # (C, M, 4 k)
    return torch.cat([candidates, rows[:, :, 4 * groups :]], dim=2).topk(k, dim=2).values


def _multi_scale_mean(largest: Tensor, there: Tensor, neighbors: list[int]) -> Tensor:
    """Mean over the scales k of the mean of the first min(k, there) of ``largest`` (C, M, K). ``there`` (C,)."""
    if largest.shape[2] == 0:
        return largest.sum(dim=2)  # an empty pool
    missing = torch.arange(largest.shape[2], device=largest.device) >= there[:, None]  # (C, K)
    totals = largest.masked_fill(missing[:, None], 0).cumsum(dim=2)  # (C, M, K)
    scales = torch.stack([there.clamp(1, k) for k in neighbors], dim=1)  # (C, S): rows that a scale takes
    at_scales = totals.gather(2, (scales - 1)[:, None].expand(-1, totals.shape[1], -1))  # (C, M, S)
    return (at_scales / scales[:, None]).mean(dim=2)


@full_precision
def positiveness_weights(
    anchors: Tensor, center: Tensor, valid: Tensor | None = None, scale: Literal["mean", "max", "sum"] = "mean"
) -> Tensor:
    """How much each anchor counts: the softmax over the anchors of their cosine with the centre. Detached.

    ``anchors`` (Q, D) and ``center`` (D,) of one class, or (C, Q, D) and (C, D) of all; ``valid`` (Q,) or (C, Q) bool.
    ``scale`` is what gamma in eq. 9 makes 1: the mean weight (gamma = 1 / Q, so the loss keeps its size), the largest,
    or the sum (gamma = 1, the bare softmax). Without a temperature in eq. 9, no weight is more than e^2 = 7.4 times
    another. Returns (Q,) or (C, Q), 0 where not valid. Source: DACL eq. 9, after SNCLR (arXiv 2303.17142).
    """
    one = anchors.ndim != 3
    classes = "" if one else "C"
    check_shapes(anchors=(anchors, classes + "QD"), center=(center, classes + "D"))
    if scale not in ("mean", "max", "sum"):
        raise ValueError(f"scale must be 'mean', 'max' or 'sum', got {scale!r}")
    valid = _mask(valid, anchors)
    if one:
        anchors, center, valid = anchors[None], center[None], valid[None]
    cosine = (_units(anchors.detach()) * unit_vectors(center.detach())[:, None]).sum(dim=2)  # (C, Q)
    weights = cosine.masked_fill(~valid, -math.inf).softmax(dim=1).masked_fill(~valid, 0)
    if scale == "mean":
        weights = weights * valid.sum(dim=1, keepdim=True)
    elif scale == "max" and weights.shape[1]:
        largest = weights.amax(dim=1, keepdim=True)
        weights = weights / torch.where(largest > 0, largest, 1)
    return weights[0] if one else weights


@full_precision
def soft_density_guided_loss(
    anchors: Tensor,
    center: Tensor,
    negatives: Tensor,
    weights: Tensor,
    temperature: float = 0.4,
    include_positive: bool = True,
    *,
    weight_inside: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    valid: Tensor | None = None,
    negative_valid: Tensor | None = None,
) -> Tensor:
    """Each anchor names the centre of its class among that centre and the negatives; w_i says how much that counts.

    One class: ``anchors`` (Q, D), ``center`` (D,), ``negatives`` (K, D), ``weights`` (Q,), 0 or more. All classes: each
    with a C in front, and the masks ``valid`` (C, Q) and ``negative_valid`` (C, K); what they leave out may hold
    anything, and so may the centre of a class that is left out. Cosine. With s = cos / temperature,

        term(i) = w_i (log(exp s_i,center + sum_k exp s_ik) - s_i,center)

    and the result is the mean over the anchors of a class, then over the classes that have an anchor and a negative.
    ``include_positive=False`` drops the first exponential, ``weight_inside=True`` adds -log w_i instead of multiplying,
    ``reduction="sum"`` adds all terms up: all three together are eq. 10 as printed.

    The gradient flows to anchors, centre and negatives (the paper's keys are detached: `take_rows`), never to the
    weights. Source: DACL eq. 10, after SupCon (arXiv 2004.11362).
    """
    one = anchors.ndim != 3
    c = "" if one else "C"
    check_shapes(
        anchors=(anchors, c + "QD"),
        center=(center, c + "D"),
        negatives=(negatives, c + "KD"),
        weights=(weights, c + "Q"),
    )
    check_temperature(temperature)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating point, got {weights.dtype}")
    valid, negative_valid = _mask(valid, anchors), _mask(negative_valid, negatives, "negative_valid")
    if one:
        anchors, center, negatives, weights = anchors[None], center[None], negatives[None], weights[None]
        valid, negative_valid = valid[None], negative_valid[None]
    valid = valid & negative_valid.any(dim=1, keepdim=True)  # without a negative there is nothing to compare

    anchors, negatives = torch.where(valid[..., None], anchors, 0), torch.where(negative_valid[..., None], negatives, 0)
    center = torch.where(valid.any(dim=1, keepdim=True), center, 0)
    anchors, center, negatives = _units(anchors), unit_vectors(center), _units(negatives)
    to_center = (anchors * center[:, None]).sum(dim=2, keepdim=True) / temperature  # (C, Q, 1)
    to_negatives = anchors @ negatives.transpose(1, 2) / temperature  # (C, Q, K)
    everyone = to_negatives.masked_fill(~negative_valid[:, None], -math.inf)
    if include_positive:
        everyone = torch.cat([to_center, everyone], dim=2)  # (C, Q, 1 + K)
    terms = (everyone.logsumexp(dim=2) - to_center[:, :, 0]).masked_fill(~valid, 0)  # (C, Q)

    weights = weights.detach().masked_fill(~valid, 1)
    log_weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    terms = terms - log_weights if weight_inside else terms * weights
    return terms.sum() if reduction == "sum" else _mean_of_classes(terms, valid)


def claim_1(similarities: Tensor, weights: Tensor, weight_inside: bool = False) -> tuple[Tensor, Tensor]:
    """Claim 1 in numbers: what the weighted loss asks of the anchors' shares, and the least it can be.

    ``similarities`` (Q,): the anchors' scores, any numbers; their softmax is the share s_i of each, so that the shares
    add up to 1. ``weights`` (Q,), above 0. Returns two 0-d tensors, objective and bound:

        outside: -sum_i w_i log s_i   >=   -sum_i w_i log(w_i / W),  W = sum_k w_k,  equal at s_i = w_i / W
        inside:  -sum_i log(w_i s_i)  >=   Q log Q - sum_i log w_i,                  equal at s_i = 1 / Q

    The first line is Gibbs' inequality: the gap is W times the divergence KL(w / W || s). So the optimum that the paper
    claims belongs to weights outside the logarithm; inside, the optimum does not know them. The paper prints no proof.
    """
    check_shapes(similarities=(similarities, "Q"), weights=(weights, "Q"))
    log_shares, log_weights = similarities.log_softmax(dim=0), weights.log()
    if weight_inside:
        return -(log_weights + log_shares).sum(), len(weights) * math.log(max(1, len(weights))) - log_weights.sum()
    return -(weights * log_shares).sum(), -(weights * (log_weights - weights.sum().log())).sum()


# --- who takes part --------------------------------------------------------------------------------------------------


def sample_per_class(labels: Tensor, classes: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to ``count`` random rows of each class: index (classes, count) int64 into the labels, and valid, alike, bool.

    ``labels`` (M,) int; what is not in 0..classes-1, such as a pixel whose prediction is not sure, is nobody's. Without
    replacement; a class with fewer rows gives all it has. ``generator`` lives on the device of the labels.
    """
    check_shapes(labels=(labels, "M"))
    check_counts(classes=classes, count=count)
    if labels.is_floating_point():
        raise ValueError(f"labels must be of an integer type, got {labels.dtype}")
    labels = torch.where((labels >= 0) & (labels < classes), labels, classes).long()
    shuffled = torch.rand(len(labels), generator=generator, device=labels.device).argsort()
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # (M,): class after class, at random within each
    sizes = torch.zeros(classes + 1, dtype=torch.long, device=labels.device)
    sizes = sizes.scatter_add_(0, labels, torch.ones_like(labels))[:classes]
    place = torch.arange(count, device=labels.device)  # (count,)
    valid = place < sizes[:, None]
    index = (sizes.cumsum(0) - sizes)[:, None] + place  # (classes, count): where a class begins, and on
    if len(labels) == 0:
        return torch.zeros_like(index), valid
    return by_class[index.clamp(max=len(labels) - 1)].masked_fill(~valid, 0), valid


def sparsest(density: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` rows of lowest density: index (..., Q) int64, Q = min(count, M), and chosen, alike, bool.

    ``density`` and ``valid`` (..., M). Where fewer rows are valid, all are chosen; a density of NaN ranks last among
    them. The anchors M^n. Source: DACL eq. 6.
    """
    check_counts(count=count)
    check_mask(valid=valid)
    if density.shape != valid.shape:
        raise ValueError(f"expected density and valid of one shape; got {tuple(density.shape)}, {tuple(valid.shape)}")
    highest = torch.finfo(density.dtype).max
    ranked = density.detach().nan_to_num(nan=highest, posinf=highest, neginf=-math.inf).masked_fill(~valid, math.inf)
    index = ranked.topk(min(count, density.shape[-1]), dim=-1, largest=False).indices
    return index, valid.gather(-1, index)


def densest(density: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` rows of highest density, as `sparsest`: keys P^{n,+}, from batch or bank. Source: DACL eq. 7."""
    return sparsest(-density, valid, count)


def take_rows(features: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` (C, Q) of ``features`` (C, M, D): (C, Q, D). Keys and negatives: detach what you pass."""
    check_shapes(features=(features, "CMD"), index=(index, "CQ"))
    return features.gather(1, index[:, :, None].expand(-1, -1, features.shape[2]))


def dense_center(keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the keys of each class, detached, and whether it has any: (C, D), 0 without keys, and (C,) bool.

    ``keys`` (C, K, D): what `densest` chose in the batch and, beside it, in the bank; ``valid`` (C, K) bool. Long rows
    weigh more: pass unit vectors, as the density is measured on. Source: DACL eq. 8.
    """
    check_shapes(keys=(keys, "CKD"), valid=(valid, "CK"))
    check_mask(valid=valid)
    keys = keys.detach().masked_fill(~valid[:, :, None], 0)
    return _masked_means(keys.transpose(1, 2), valid[:, None])[:, 0], valid.any(dim=1)


def other_class_rows(features: Tensor, valid: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each class ``count`` random rows of the other classes, detached: negatives (C, K, D) and valid (C, K) bool.

    ``features`` (C, Q, D) and ``valid`` (C, Q): the anchors, as the paper says, or random pixels, as DGCL has it. Drawn
    without replacement; where fewer are there, all. K = min(count, (C - 1) Q). Source: DACL, 'Negative Key Sampling'.
    """
    check_shapes(features=(features, "CQD"), valid=(valid, "CQ"))
    check_counts(count=count)
    check_mask(valid=valid)
    classes, rows, _ = features.shape
    draw = torch.rand(
        classes, classes, rows, generator=generator, device=features.device
    )  # who draws, from whom, which
    own = torch.eye(classes, dtype=torch.bool, device=features.device)[:, :, None]
    draw = draw.masked_fill(own | ~valid, -1).flatten(1)  # (C, C Q)
    best = draw.topk(min(count, max(0, classes - 1) * rows), dim=1)
    return features.detach().flatten(0, 1)[best.indices], best.values >= 0


def gaussian_ramp(step: int, total: int, peak: float = 0.1, delay: int = 1000) -> float:
    """The weight of the loss at a step: peak * exp(-5 (1 - step / total)^2), 0 before ``delay``.

    From ``total`` on it is ``peak``. Where the paper's delay ends (step 1,000 of 30,000) it would be 0.0009: the pause
    is there to fill the bank. Source: DACL eq. 1 and 'Implementation Details'.
    """
    if total < 1:
        raise ValueError(f"total must be at least 1 step, got {total}")
    return 0.0 if step < delay else peak * math.exp(-5 * (1 - min(step / total, 1)) ** 2)


# --- the losses of Table 3 -------------------------------------------------------------------------------------------


def class_mean_contrastive_loss_by_definition(
    features: Tensor, labels: Tensor, means: Tensor, temperature: float = 0.1
) -> Tensor:
    """The formula of `class_mean_contrastive_loss` as loops. Same arguments and value."""
    per_class = []
    for c in range(len(means)):
        terms = []
        for z in features[labels == c]:
            e = [torch.exp(torch.cosine_similarity(z, mean, dim=0) / temperature) for mean in means]
            terms.append(-torch.log(e[c] / sum(e)))
        if terms:
            per_class.append(torch.stack(terms).mean())
    return torch.stack(per_class).mean()


@full_precision
def class_mean_contrastive_loss(
    features: Tensor, labels: Tensor, means: Tensor, temperature: float = 0.1, present: Tensor | None = None
) -> Tensor:
    """PLCT of Table 3 (pixel-wise): each pixel names the mean feature of its class among the means of all classes.

    ``features`` (M, D), cosine; ``labels`` (M,) int, labels or pseudo-labels, -1 for nobody's; ``means`` (N, D);
    ``present`` (N,) bool: the classes that have a mean, by default all. Mean over the pixels of a class, then over
    the present classes that have pixels. What the other pixels and means hold does not matter. With fewer than two
    means there is nothing to compare.
    Source: Chaitanya et al. 2023 (arXiv 2112.09645).
    """
    check_shapes(features=(features, "MD"), labels=(labels, "M"), means=(means, "ND"))
    check_temperature(temperature)
    present = _mask(present, means, "present")
    mine = (labels[:, None] == torch.arange(len(means), device=labels.device)) & present  # (M, N)
    features = torch.where(mine.any(dim=1, keepdim=True), features, 0)
    means = torch.where(present[:, None], means, 0)
    similarity = unit_vectors(features) @ unit_vectors(means).T / temperature  # (M, N)
    everyone = similarity.masked_fill(~present, -math.inf).logsumexp(dim=1, keepdim=True)
    return _mean_of_classes((everyone - similarity).masked_fill(~mine, 0).T, mine.T)


def intra_class_variation_loss_by_definition(first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
    """The formula of `intra_class_variation_loss` as loops, over images (B, D, H, W). Same arguments and value."""

    def variation(features: Tensor) -> list[Tensor]:
        prototypes, _ = class_prototypes_by_definition(features, masks)
        return [
            torch.cosine_similarity(features[b, :, y, x], prototypes[b, n], dim=0)
            for b, n, y, x in masks.nonzero().tolist()
        ]

    pairs = zip(variation(first), variation(second.detach()), strict=True)
    return torch.stack([(one - other) ** 2 for one, other in pairs]).mean()


@full_precision
def intra_class_variation_loss(first: Tensor, second: Tensor, masks: Tensor) -> Tensor:
    """IFVD of Table 3 (class-wise): each pixel lies as far from its class prototype as in the other network.

    ``first`` (B, D, ...) learns from ``second`` (B, E, ...), which is detached: E may differ from D; ``masks``
    (B, N, ...) bool, the pixels of each class, with H, W or Z, H, W behind. Prototypes are those of each image
    (`class_prototypes`), the distance is the cosine, and the loss the mean squared difference over the pixels of all
    masks; a pixel in none may hold anything. In [0, 4].
    Source: Wang et al. 2020, 'Intra-class feature variation distillation', ECCV.
    """
    space = "ZHW" if first.ndim == 5 else "HW"
    check_shapes(first=(first, "BD" + space), second=(second, "BE" + space), masks=(masks, "BN" + space))
    check_mask(masks=masks)

    def variation(features: Tensor) -> Tensor:
        features = _inside(features, masks)
        prototypes = _units(_masked_means(features, masks))  # (B, N, D)
        return prototypes @ _units(features.flatten(2).transpose(1, 2)).transpose(1, 2)  # (B, N, S)

    inside = masks.flatten(2)
    squares = (variation(first) - variation(second.detach())).masked_fill(~inside, 0) ** 2
    return squares.sum() / inside.sum().clamp(min=1)


# --- shared by the above ---------------------------------------------------------------------------------------------


def _mean_of_classes(terms: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid ``terms`` (C, Q) of a class, then over the classes that have any; invalid terms are 0."""
    count = valid.sum(dim=1)
    return (terms.sum(dim=1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def _units(vectors: Tensor) -> Tensor:
    """`unit_vectors` along the last axis of (C, Q, D)."""
    return unit_vectors(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])


def _mask(valid: Tensor | None, rows: Tensor, name: str = "valid") -> Tensor:
    """``valid`` for ``rows`` (..., D), checked; all of them by default."""
    if valid is None:
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    check_mask(**{name: valid})
    if valid.shape != rows.shape[:-1]:
        raise ValueError(f"{name} must have the shape {tuple(rows.shape[:-1])} of its rows, got {tuple(valid.shape)}")
    return valid
