"""Contrastive losses that more than one paper uses: InfoNCE, SimCLR, positional and partition contrast.

All of them ask one question of an anchor i: among the candidates k, which one is its positive a? The similarity
s_ik = cos(h_i, h_k) / temperature is a score, a softmax over the candidates makes it a probability, and the loss is the
cross-entropy of naming the positive:

    loss(i, a) = log sum_{k in candidates(i)} exp(s_ik) - s_ia

They differ only in who is a positive and who is a candidate: two boolean masks. `_contrast` is that formula, and the
public functions below it draw the masks.
"""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import ParamSpec

import torch
from torch import Tensor

TIE = 1e-6
"""Two distances between positions that differ by less than this are equal.

Positions are fractions z / Z, and floats cannot tell that 3/10 - 2/10 is 2/10 - 1/10: without a tolerance, the last bit
of a subtraction decides who is a positive."""

SHORTEST = 1e-12
"""A vector with no entry above this has no direction: its cosine with anything is 0, and it gets no gradient."""

COLDEST = 1e-6
"""The lowest temperature. Already here a cosine / temperature in float32 moves in steps of 0.06; far below, from about
3e-39 on, it overflows."""

P = ParamSpec("P")


def full_precision(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a loss so that it computes in the type of its first argument, and in float32 where that is narrower.

    The other floating tensors follow the first: a float64 position does not drag a float32 loss to float64. Autocast is
    switched off inside, because an exponential of a cosine / 0.1 has no room for the three digits of bfloat16.
    """
    signature = inspect.signature(loss)

    @functools.wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given = signature.bind(*args, **kwargs)
        first = next(iter(given.arguments.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        for name, value in given.arguments.items():
            if isinstance(value, Tensor) and (value.is_floating_point() or value is first):
                given.arguments[name] = value.to(dtype)
        with torch.autocast(first.device.type, enabled=False):
            return loss(*given.args, **given.kwargs)

    return computed


def check_shapes(**expected: tuple[Tensor, str]) -> None:
    """Raise ``ValueError`` unless every tensor has the axes its letters name, and one letter means one size.

    ``check_shapes(features=(features, "ND"), positions=(positions, "N"))`` wants a matrix, and a vector as long as the
    matrix is high.
    """
    sizes: dict[str, int] = {}
    fits = all(
        tensor.ndim == len(axes) and all(sizes.setdefault(a, n) == n for a, n in zip(axes, tensor.shape, strict=True))
        for tensor, axes in expected.values()
    )
    if not fits:
        wanted = ", ".join(f"{name} ({', '.join(axes)})" for name, (_, axes) in expected.items())
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (tensor, _) in expected.items())
        raise ValueError(f"expected {wanted}; got {got}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise ``ValueError`` unless the temperature is a finite number from `COLDEST` up."""
    if not isinstance(temperature, Real | Tensor) or not COLDEST <= temperature < math.inf:
        raise ValueError(f"{name} must be at least {COLDEST} and finite, got {temperature!r}")


def check_mask(**masks: Tensor) -> None:
    """Raise ``ValueError`` unless every mask is bool."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {mask.dtype}: compare with a threshold first")


def check_counts(**counts: int) -> None:
    """Raise ``ValueError`` unless every count is a whole number from 1 up."""
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise ValueError(f"{name} must be a whole number, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def unit_vectors(vectors: Tensor) -> Tensor:
    """The rows of ``vectors`` (N, D) at length 1; a row without a direction (see `SHORTEST`) becomes 0.

    Dividing by the largest entry first keeps the squares in range: entries of 1e30 neither overflow nor lose their
    gradient. A unit vector does not depend on that factor, so it can be held constant in the backward pass.
    """
    if vectors.numel() == 0:
        return vectors * 1
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    scaled = torch.where(largest <= SHORTEST, 0, vectors / largest.clamp(min=SHORTEST))  # NaN stays NaN: never hidden
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp(min=1)


def position_distances(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """|p_i - p_j| (N, N) of positions (N,), without gradient: positions are given, not learned."""
    positions = positions.detach().to(dtype)
    return (positions[:, None] - positions[None, :]).abs()


def _contrast(similarity: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Mean over anchors that have a positive, of the mean over their positives a, of logsumexp_k s_ik - s_ia.

    ``similarity`` (A, K), already divided by the temperature; ``positives`` and ``candidates`` (A, K) bool.
    """
    everyone = similarity.masked_fill(~candidates, -math.inf).logsumexp(dim=1, keepdim=True)  # (A, 1)
    terms = (everyone - similarity).masked_fill(~positives, 0)  # (A, K)
    count = positives.sum(dim=1)  # (A,)
    per_anchor = terms.sum(dim=1) / count.clamp(min=1)
    return per_anchor.sum() / (count > 0).sum().clamp(min=1)


def _contrast_within(features: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """`_contrast` of a batch (N, D) with itself: nobody is a candidate for itself. ``positives`` (N, N)."""
    unit = unit_vectors(features)
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    return _contrast(unit @ unit.T / temperature, positives & others, others)


@full_precision
def info_nce_loss(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE: each query names its positive among that positive and all negatives. Mean over the B queries.

    ``query`` (B, D) and ``positive`` (B, D), row by row a pair; ``negatives`` (K, D), shared by all queries; cosine.
    Gradient flows to all three: detach a momentum key or a bank before the call. Without negatives (K = 0) the positive
    is the only candidate and the loss is 0. Source: van den Oord et al. 2018, arXiv 1807.03748, eq. 4.
    """
    check_shapes(query=(query, "BD"), positive=(positive, "BD"), negatives=(negatives, "KD"))
    check_temperature(temperature)
    query, positive, negatives = unit_vectors(query), unit_vectors(positive), unit_vectors(negatives)
    similarity = torch.cat([(query * positive).sum(dim=1, keepdim=True), query @ negatives.T], dim=1)  # (B, 1 + K)
    candidates = torch.ones_like(similarity, dtype=torch.bool)
    positives = torch.zeros_like(candidates)
    positives[:, 0] = True
    return _contrast(similarity / temperature, positives, candidates)


@full_precision
def nt_xent_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR: each of the 2B views names the other view of its image among the 2B - 1 others. Mean over the views.

    ``first`` (B, D) and ``second`` (B, D), row by row two views of one image; cosine. It is the partition loss with
    every image a partition of its own. Source: Chen et al. 2020, arXiv 2002.05709, eq. 1.
    """
    check_shapes(first=(first, "BD"), second=(second, "BD"))
    image = torch.arange(len(first), device=first.device).repeat(2)  # (2B,)
    return partition_contrastive_loss(torch.cat([first, second]), image, temperature)


@full_precision
def partition_contrastive_loss(features: Tensor, partitions: Tensor, temperature: float = 0.1) -> Tensor:
    """The positives of a slice are the other slices of its partition. Mean over the slices that have a positive.

    ``features`` (N, D), cosine; ``partitions`` (N,) int, for example the quarter of the volume that a slice lies in:
    the positives of the global loss of Chaitanya et al. 2020 (GCL, arXiv 2006.10511). Their denominator leaves out the
    anchor's other positives; here, as in PCL and SimCLR, it holds every other row.
    """
    check_shapes(features=(features, "ND"), partitions=(partitions, "N"))
    check_temperature(temperature)
    return _contrast_within(features, partitions[:, None] == partitions[None, :], temperature)


@full_precision
def positional_contrastive_loss(
    features: Tensor, positions: Tensor, threshold: float, temperature: float = 0.1
) -> Tensor:
    """PCL: the positives of a slice are the others closer than ``threshold``. Mean over slices that have a positive.

    ``features`` (N, D), cosine; ``positions`` (N,) in [0, 1]; a distance that equals the threshold up to `TIE` is not
    below it. The paper sums over anchors; we take the mean, so that the value does not grow with the batch.
    Source: Zeng et al. 2021, arXiv 2106.09157; CORAL (arXiv 2511.11276) eq. 2.
    """
    check_shapes(features=(features, "ND"), positions=(positions, "N"))
    check_temperature(temperature)
    near = position_distances(positions, features.dtype) < _below(threshold)
    return _contrast_within(features, near, temperature)


def positional_contrastive_loss_by_definition(
    features: Tensor, positions: Tensor, threshold: float, temperature: float = 0.1
) -> Tensor:
    """CORAL eq. 2 as it is written, for at least one positive pair. Same arguments and value as the loss above."""
    h, p, delta, tau = features, positions, threshold, temperature
    N = len(h)

    def e(i: int, j: int) -> Tensor:
        return torch.exp(torch.cosine_similarity(h[i], h[j], dim=0) / tau)

    per_anchor = []
    for i in range(N):
        A = [j for j in range(N) if j != i and abs(p[i] - p[j]) < _below(delta)]  # the positives of i
        if A:
            everyone = torch.stack([e(i, k) for k in range(N) if k != i]).sum()
            per_anchor.append(-torch.stack([torch.log(e(i, a) / everyone) for a in A]).mean())
    return torch.stack(per_anchor).mean()


def _below(threshold: float) -> float:
    """The threshold less the tolerance, so that 'strictly below' means the same for 8/20 - 1/20 as for 7/20."""
    return threshold - min(TIE, threshold / 2)
