"""CORAL: relational and ordinal anatomical learning (arXiv 2511.11276, section 2).

Slices of a heart lie on a line from apex to base. Two losses bring that line into the features h_i of slices at
positions p_i in [0, 1]:

- relational (eq. 3-4): seen from any slice, the slice nearer in position is nearer in feature space;
- ordinal (eq. 5): going up in position means going one way, the same for all patients, in feature space.

Where the paper is silent, we follow what its authors' code does, and say so: the relational loss is a mean over pairs
(the paper writes a sum, which at its learning rate of 0.1 would be 4000 times larger), and the two augmented views of a
slice are two rows with one position.

Each loss stands here twice: as the equation, slow and literal (``..._by_definition``), and as the form that is trained.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from medlib.losses.contrastive import (
    SHORTEST,
    TIE,
    check_shapes,
    check_temperature,
    full_precision,
    position_distances,
    unit_vectors,
)


def relational_loss_by_definition(
    features: Tensor, positions: Tensor, temperature: float = 0.1, soft_weight: float = 0.0
) -> Tensor:
    """CORAL eq. 3-4 as they are written, for at least two slices. Same arguments and value as `relational_loss`."""
    h, p, tau = features, positions, temperature
    N = len(h)

    def d(i: int, j: int) -> Tensor:
        return abs(p[i] - p[j])

    def e(i: int, j: int) -> Tensor:
        return torch.exp(torch.cosine_similarity(h[i], h[j], dim=0) / tau)

    terms = []
    for i in range(N):
        for j in range(N):
            if j == i:
                continue
            N_r = [k for k in range(N) if k != i and d(i, k) > d(i, j) - TIE]  # eq. 3: as far as j, or farther
            term = -torch.log(e(i, j) / sum(e(i, k) for k in N_r))  # eq. 4
            weight = torch.sigmoid(soft_weight * d(i, j)) if soft_weight > 0 else 1
            terms.append(weight * term)
    return torch.stack(terms).mean()


def ordinal_loss_by_definition(features: Tensor, positions: Tensor, direction: Tensor) -> Tensor:
    """CORAL eq. 5 as it is written, for at least one ordered pair. Same arguments and value as `ordinal_loss`."""
    h, p, c_anat = features, positions, direction
    N = len(h)
    cosines = []
    for i in range(N):
        for j in range(N):
            step = h[j] - h[i]
            if p[j] > p[i] and step.norm() > resolution(h):
                v_ij = step / step.norm()
                cosines.append(torch.dot(v_ij, c_anat / c_anat.norm()))
    return -torch.stack(cosines).mean()


@full_precision
def relational_loss(features: Tensor, positions: Tensor, temperature: float = 0.1, soft_weight: float = 0.0) -> Tensor:
    """RAL: seen from i, slice j should look nearer than every slice at least as far. Mean over ordered pairs i != j.

    ``features`` (N, D), cosine; ``positions`` (N,) in [0, 1]. With s_ik = cos(h_i, h_k) / temperature,

        term(i, j) = logsumexp_{k in N_r(i, j)} s_ik - s_ij,   N_r(i, j) = {k != i : |p_i - p_k| >= |p_i - p_j|}

    and >= forgives `TIE`: k belongs when |p_i - p_k| > |p_i - p_j| - 1e-6. So j itself is always in, and so is whoever
    ties with j. With ``soft_weight`` k > 0 (absent from the paper; the authors' code has k = 1) each term is multiplied
    by sigmoid(k |p_i - p_j|), which favours distant pairs; the divisor stays the number of pairs.

    The gradient flows to the features only. The N x N x N table of eq. 3 is never built: with row i sorted by distance,
    N_r(i, j) is a tail of the row, and all tails come from one cumulative sum. O(N^2 log N) time, O(N^2) memory.
    Source: CORAL eq. 3-4, after Rank-N-Contrast (arXiv 2210.01189).
    """
    check_shapes(features=(features, "ND"), positions=(positions, "N"))
    check_temperature(temperature)
    _check_not_negative(soft_weight=soft_weight)
    if len(features) < 2:
        return (features * 0).sum()

    unit = unit_vectors(features)
    similarity = unit @ unit.T / temperature  # (N, N)
    distance = position_distances(positions, features.dtype).fill_diagonal_(-1)  # i itself sorts first in its row ...
    distance, order = distance.sort(dim=1)
    distance, order = distance[:, 1:].contiguous(), order[:, 1:]  # ... and is dropped: (N, N - 1), nearest first
    similarity = similarity.gather(1, order)

    first = torch.searchsorted(distance, distance - TIE, right=True)  # where the tail N_r(i, j) begins: ties included
    farther = _tail_logsumexp(similarity, largest=1 / temperature).gather(1, first)  # logsumexp over N_r(i, j)
    terms = farther - similarity
    if soft_weight > 0:
        terms = terms * torch.sigmoid(soft_weight * distance)
    return terms.mean()


def _tail_logsumexp(rows: Tensor, largest: float) -> Tensor:
    """logsumexp of each entry and all after it in its row. Entries lie in [-largest, largest]."""
    if largest <= 60:  # exp(60) is far inside the range of float32, and the plain sum is five times faster
        return rows.exp().flip(1).cumsum(1).flip(1).log()
    return rows.flip(1).logcumsumexp(1).flip(1)


@full_precision
def ordinal_loss(features: Tensor, positions: Tensor, direction: Tensor) -> Tensor:
    """OAL: minus the cosine between the step h_j - h_i and one direction c. Mean over pairs with p_j > p_i.

    ``features`` (N, D), raw, of any length: only the step is normalised; ``positions`` (N,) in [0, 1]; ``direction``
    (D,), of any length but 0. In [-1, 1]: -1 when every step up points along c. The pairs run across volumes, which is
    what aligns patients. Positions count as equal only when they are the same number, as the fractions 2/6 and 3/9 are;
    such a pair has no order and is not compared. A pair whose features coincide (see `resolution`) has no direction: it
    is left out of the sum and of the count.

    The gradient flows to the features and to the direction. The N x N x D table of steps is never built:
    <h_j - h_i, c> = a_j - a_i with a = h c. O(N^2) memory. Source: CORAL eq. 5.
    """
    check_shapes(features=(features, "ND"), positions=(positions, "N"), direction=(direction, "D"))
    if len(features) < 2:
        return (features * 0).sum() + (direction * 0).sum()

    features = features / features.detach().abs().amax().clamp(min=SHORTEST)  # only steps' directions matter: any scale
    closest = resolution(features)
    features = features - features.detach().mean(dim=0)  # and any origin: this one keeps the digits of a_j - a_i
    along = features @ unit_vectors(direction[None])[0]  # a: (N,)
    length = _PairwiseDistance.apply(features)  # ||h_j - h_i||: (N, N)

    positions = positions.detach()
    pairs = (positions[None, :] > positions[:, None]) & ~(length.detach() <= closest)  # (i, j); NaN is never hidden
    cosine = (along[None, :] - along[:, None]) / length.masked_fill(~pairs, 1)
    return -cosine.masked_fill(~pairs, 0).sum() / pairs.sum().clamp(min=1)


def resolution(features: Tensor) -> Tensor:
    """The distance below which two rows of ``features`` (N, D) coincide: four rounding errors of the longest row."""
    return 4 * torch.finfo(features.dtype).eps * torch.linalg.vector_norm(features.detach(), dim=1).amax()


class _PairwiseDistance(torch.autograd.Function):
    """||h_i - h_j|| (N, N) of the rows of h (N, D): exact for near rows, O(N^2) memory forward and backward.

    The common short cut, ||h_i||^2 + ||h_j||^2 - 2 <h_i, h_j>, subtracts squares and loses near rows to rounding, so
    the lengths are measured on differences. The gradient is linear in h and can take the matrix product:
    sum_j w_ij (h_i - h_j) = (sum_j w_ij) h_i - (w h)_i.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        length = torch.cdist(h, h, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(h, length)
        return length

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, length = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            w = torch.where(length > 0, gradient / length, 0)
            w = w + w.T
            return w.sum(dim=1, keepdim=True) * h - w @ h


class CoralLoss(nn.Module):
    """CORAL eq. 6: the relational plus the ordinal loss, and the direction c_anat that the ordinal loss learns.

    ``direction`` (dim,) is a parameter: hand it to the optimiser, in the same group as the network, with the same
    learning rate and weight decay. The paper says "initialised randomly"; the authors' code draws N(0, 1) per entry,
    and so do we. The length matters although the loss divides it out: the gradient of a cosine shrinks with it (it is
    about 22.6 for dim = 512), so the direction turns slowly at first. ``generator`` is the stream the draw comes from;
    without one, every `CoralLoss` of a size starts with the same direction. The global random state is not touched.

    Paper: weights 1 and 1, ``soft_weight`` 0. The authors' code: ``soft_weight`` 1. Ablations: a weight of 0 switches a
    term off; its value is still returned, to watch.
    """

    def __init__(
        self,
        dim: int,
        temperature: float = 0.1,
        relational_weight: float = 1.0,
        ordinal_weight: float = 1.0,
        soft_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        _check_not_negative(relational_weight=relational_weight, ordinal_weight=ordinal_weight, soft_weight=soft_weight)
        self.temperature = temperature
        self.relational_weight = relational_weight
        self.ordinal_weight = ordinal_weight
        self.soft_weight = soft_weight
        generator = generator or torch.Generator().manual_seed(0)
        self.direction = nn.Parameter(torch.randn(dim, generator=generator, device=generator.device))

    def forward(self, features: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """``features`` (N, dim) and ``positions`` (N,) -> 0-d ``total``, ``relational``, ``ordinal`` (unweighted)."""
        relational = relational_loss(features, positions, self.temperature, self.soft_weight)
        ordinal = ordinal_loss(features, positions, self.direction)
        total = self.relational_weight * relational + self.ordinal_weight * ordinal
        return {"total": total, "relational": relational, "ordinal": ordinal}


def _check_not_negative(**weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")
