"""DVCL: distance-aware voxel-wise contrastive learning (Zhao et al., ICCV 2025).

A voxel is reliable when the entropy of its class probabilities p is low (eq. 4-6). Reliable voxels of class c gather
around their centre and keep away from voxels wrongly taken for c (eq. 10). Unreliable voxels have no class to trust,
but they have neighbours: nearest and farthest rows r of a pool of unreliable voxels (eq. 12). Each query m agrees with
its K neighbours n and disagrees with its K' outsiders k (eq. 18-19):

    loss(m) = - sum_n A_mn p_m . p_n + sum_k p_m . p_k

A_mn is 1 where m is also among the K nearest of n, else r (eq. 13-14); m is no query when none of its neighbours has it
among their U nearest (eq. 15). Features r choose the partners, probabilities p take the loss.

**Which row is nearer** never depends on a rounding error. Directions r / |r| are rounded to multiples of 2^-26, the
precision of a float32; then every product and every sum of a cosine is exact in float64, in any order, on any device
and for any size of block, and cos(m, n) = cos(n, m). Cosines that agree to a multiple of 2^-30 are a tie, and of rows
that tie, the one with the lower number comes first, among the nearest and among the farthest. Cosine and row number
fit together into one float64, so that a search orders single numbers and every order is unique.

What is defined by a formula stands here twice: as the equation, slow and literal (``..._by_definition``), and as the
form that is trained. No official code exists; where the paper is silent, the docstring says what we read into it.
The comparison losses of its Table 3 that are not in `medlib.losses.contrastive` come last, with the complementary-label
loss of U2PL that the paper argues against.
"""

import math
from typing import Any, Literal, NamedTuple

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

DIRECTION = 2.0**-26
"""Entries of a direction are multiples of this; a sum of products then has at most 53 bits, and float64 has 53."""

TIE = 2.0**-30
"""Cosines are compared as multiples of this, about 1e-9."""

UNIT = DIRECTION**2 / TIE
"""A cosine of two directions in whole numbers of `DIRECTION`, times this, is in whole numbers of `TIE`."""

LARGEST_POOL = 2**22
"""A row number takes 22 bits below those of the cosine, so a pool has at most 4,194,304 rows."""

ROWS, BLOCK = 256, 1024
"""Rows and columns of the matrix of cosines that are in work at a time: two megabytes stay in a processor's cache."""

UNDERFLOW = -1000.0
"""exp of this is 0 in float32 and in float64: logits that far below the largest have probability 0."""


# --- which voxels are reliable (eq. 4-6) -----------------------------------------------------------------------------


def voxel_entropy_by_definition(probabilities: Tensor) -> Tensor:
    """DVCL eq. 4 as it is written, with 0 log 0 = 0. Same argument and value as `voxel_entropy`."""
    p = probabilities.movedim(1, -1)  # (B, ..., C)
    e = [sum(-p_c * math.log(p_c) for p_c in p_ij if p_c > 0) for p_ij in p.flatten(0, -2).tolist()]
    return torch.tensor(e, dtype=p.dtype).view(p.shape[:-1])


@full_precision
def voxel_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each voxel's class probabilities, in nats, in [0, log C]; exactly 0 where one class has them all.

    ``probabilities`` (B, C, ...) -> (B, ...). The gradient is finite at probability 0. From logits, take
    `entropy_from_logits`: it needs a fraction of the memory. Source: DVCL eq. 4.
    """
    _check_classes(probabilities=probabilities)
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp(min=tiny).log()).sum(dim=1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """`voxel_entropy` of softmax(logits) without the probabilities: ``logits`` (B, C, ...) -> (B, ...), in nats.

    With d_c = z_c - max z it is log S - T / S, S = sum_c exp(d_c) and T = sum_c d_c exp(d_c): two running sums over the
    classes, so the working memory is a few (B, ...) maps rather than three of (B, C, ...). At least float32 inside.
    """
    _check_classes(logits=logits)
    entropy: Tensor = _Entropy.apply(logits)
    return entropy


class _Entropy(torch.autograd.Function):
    """`entropy_from_logits`. The gradient is -p_c (log p_c + entropy); p is made again, class by class, in backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        largest = logits.amax(dim=1).to(torch.promote_types(logits.dtype, torch.float32))
        total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
        for logit in logits.unbind(dim=1):
            below = (logit - largest).clamp_(min=UNDERFLOW)
            share = below.exp()
            total += share
            weighted.addcmul_(share, below)
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(logits, largest, log_total, entropy)
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        logits, largest, log_total, entropy = ctx.saved_tensors
        to_logits = torch.empty_like(logits)
        for c, logit in enumerate(logits.unbind(dim=1)):
            log_probability = (logit - largest).clamp_(min=UNDERFLOW) - log_total
            to_logits[:, c] = -gradient * log_probability.exp() * (log_probability + entropy)
        return to_logits


def entropy_selection_by_definition(probabilities: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """DVCL eq. 5-6 as they are written, with e = tau reliable. Same arguments and value as `entropy_selection`."""
    e = voxel_entropy_by_definition(probabilities)
    every = e.flatten().tolist()
    e_at = sum(every) / len(every)
    e_st = math.sqrt(sum((e_ij - e_at) ** 2 for e_ij in every) / len(every))
    tau = e_at + alpha * e_st
    return e <= tau, e > tau


def entropy_selection(probabilities: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Masks of the reliable and of the unreliable voxels: (B, C, ...) -> two (B, ...) bool; every voxel is in one.

    Reliable is entropy <= mean + ``alpha`` * standard deviation (population) over the whole tensor: hand over the
    voxels that are to share a threshold, in the paper the unlabelled ones of one network. The paper calls the deviation
    a variance and leaves equality to neither side. Where more than 1 / (1 + alpha^2) of all voxels have the largest
    entropy (80 % at 0.5), the threshold exceeds it and none is unreliable. Source: DVCL eq. 5-6.
    """
    return select_by_entropy(voxel_entropy(probabilities.detach()), alpha)


def select_by_entropy(entropy: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """`entropy_selection` of entropies that are already there, of any shape: for `entropy_from_logits`.

    The threshold stays on the device: running sums, no sort, nothing waits for it.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    entropy = entropy.detach().to(torch.promote_types(entropy.dtype, torch.float32))
    if entropy.numel() == 0:  # there is no mean
        return torch.zeros_like(entropy, dtype=torch.bool), torch.zeros_like(entropy, dtype=torch.bool)
    deviation, mean = torch.std_mean(entropy, correction=0)  # Welford's running sums: exactly 0 where all are alike
    threshold = mean + alpha * deviation
    return entropy <= threshold, entropy > threshold


# --- reliable voxels (eq. 10) ----------------------------------------------------------------------------------------


def high_quality_contrastive_loss_by_definition(
    anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float = 1.0
) -> Tensor:
    """DVCL eq. 10 as it is written, for at least one anchor. Same arguments and value as the loss below."""
    r, P_c, sigma = anchors, positive, temperature
    M, N = negatives.shape[:2]

    def Phi(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.cosine_similarity(a, b, dim=0) / sigma)

    terms = []
    for m in range(M):
        among = Phi(r[m], P_c) + sum(Phi(r[m], negatives[m, n]) for n in range(N))
        terms.append(torch.log(Phi(r[m], P_c) / among))
    return -torch.stack(terms).sum() / M


@full_precision
def high_quality_contrastive_loss(
    anchors: Tensor, positive: Tensor, negatives: Tensor, temperature: float = 1.0
) -> Tensor:
    """HqCL of one class: each anchor names the class centre among that and its negatives. Mean over the M anchors.

    ``anchors`` (M, D), the reliable features of the class; ``positive`` (D,), its centre; ``negatives`` (M, N, D),
    features of voxels wrongly taken for the class, N for each anchor; cosine. Gradient flows to all three: detach a
    bank or its mean before the call. Without anchors or negatives it is 0. It cannot vanish: at the paper's
    temperature 1 and N = 50 it lies between log(1 + 50 e^-2) = 2.05 and log(1 + 50 e^2) = 5.91.
    Source: DVCL eq. 10, M = 256.
    """
    check_shapes(anchors=(anchors, "MD"), positive=(positive, "D"), negatives=(negatives, "MND"))
    check_temperature(temperature)
    unit = unit_vectors(anchors)
    to_centre = unit @ unit_vectors(positive[None])[0]  # (M,)
    to_negatives = torch.einsum("md,mnd->mn", unit, unit_vectors(negatives.flatten(0, 1)).view(negatives.shape))
    similarity = torch.cat([to_centre[:, None], to_negatives], dim=1) / temperature  # (M, 1 + N)
    return (similarity.logsumexp(dim=1) - similarity[:, 0]).sum() / max(len(anchors), 1)


# --- neighbours and outsiders (eq. 12-15) ----------------------------------------------------------------------------


def nearest_and_farthest_by_definition(features: Tensor, queries: Tensor, k: int, k_far: int) -> tuple[Tensor, Tensor]:
    """DVCL eq. 12 as it is written, ties by row number. Same arguments and value as `nearest_and_farthest`."""
    cos = _cosines_by_definition(features)

    def others(m: int, sign: int) -> list[int]:
        return sorted((n for n in range(len(features)) if n != m), key=lambda n: (sign * cos[m][n], n))

    C = [others(m, -1)[:k] for m in queries.tolist()]
    D = [others(m, +1)[:k_far] for m in queries.tolist()]
    Q = len(queries)
    return torch.tensor(C, dtype=torch.int64).view(Q, k), torch.tensor(D, dtype=torch.int64).view(Q, k_far)


def neighbor_affinity_by_definition(
    features: Tensor, queries: Tensor, neighbors: Tensor, ordinary: float = 0.5
) -> Tensor:
    """DVCL eq. 13-14 as they are written. Same arguments and value as `neighbor_affinity`."""
    K = neighbors.shape[1]
    C, _ = nearest_and_farthest_by_definition(features, torch.arange(len(features)), K, 0)
    A = [[1.0 if m in C[n].tolist() else ordinary for n in C_m] for m, C_m in _pairs(queries, neighbors)]
    return torch.tensor(A, dtype=torch.promote_types(features.dtype, torch.float32)).view(neighbors.shape)


def inlier_queries_by_definition(features: Tensor, queries: Tensor, neighbors: Tensor, wide: int) -> Tensor:
    """DVCL eq. 15 as it is written. Same arguments and value as `inlier_queries`."""
    U = min(wide, len(features) - 1)
    C, _ = nearest_and_farthest_by_definition(features, torch.arange(len(features)), U, 0)
    E = [{n for n in C_m if m in C[n].tolist()} for m, C_m in _pairs(queries, neighbors)]
    return torch.tensor([len(E_m) >= 1 for E_m in E], dtype=torch.bool)


def _pairs(queries: Tensor, neighbors: Tensor) -> list[tuple[int, list[int]]]:
    return list(zip(queries.tolist(), neighbors.tolist(), strict=True))


def _cosines_by_definition(features: Tensor) -> list[list[int]]:
    """cos(r_m, r_n) of all rows, in whole numbers of `TIE`: integer arithmetic on rounded directions."""
    length = features.double().norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, features.double() / length, 0)
    rows = [[round(x / DIRECTION) for x in row] for row in unit.tolist()]
    return [[round(sum(a * b for a, b in zip(m, n, strict=True)) * DIRECTION**2 / TIE) for n in rows] for m in rows]


@torch.no_grad()
def nearest_and_farthest(
    features: Tensor, queries: Tensor, k: int, k_far: int, *, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Row numbers of the ``k`` nearest and the ``k_far`` farthest rows of each query, by cosine, without the query.

    ``features`` (P, D), the pool; ``queries`` (Q,) int64, rows of it -> (Q, k) nearest first and (Q, k_far) farthest
    first. Ties: see the module's docstring. A row without a direction (zeros, or not finite) has cosine 0 with all.
    With k + k_far > P - 1 a row can be on both sides; k or k_far above P - 1 is an error.

    One matrix product for each ``block`` of the pool serves both sides, and a running top-K keeps what is needed of it:
    exact, and O(Q (k + k_far + block)) memory (less: `ROWS` queries at a time). Source: DVCL eq. 12.
    """
    pool = _search_space(features, queries, block=block)
    for name, value in (("k", k), ("k_far", k_far)):
        if value < 0 or (value >= len(features) and len(queries) > 0):
            raise ValueError(f"{name} must be from 0 to P - 1 for a pool of P = {len(features)} rows, got {value}")
    near, far = [queries.new_empty(0, k)], [queries.new_empty(0, k_far)]
    if len(queries) == 0:
        return near[0], far[0]
    for some in queries.split(ROWS):
        nearest, farthest = _extremes(pool, some.to(pool.device), k, k_far, block)
        near.append(nearest.to(queries.device))
        far.append(farthest.to(queries.device))
    return torch.cat(near), torch.cat(far)


@torch.no_grad()
def reverse_rank(features: Tensor, queries: Tensor, neighbors: Tensor, *, block: int = BLOCK) -> Tensor:
    """How many other rows are nearer to each neighbour than its query is: (Q, k) int64, 0 where none is.

    Query m is among the s nearest of neighbour n exactly where the rank is below s, so one search answers eq. 13 for
    s = K and eq. 15 for s = U. Arguments as for `neighbor_affinity`. The threshold of row n is its cosine with m: what
    exceeds it is counted, block by block, and neither the P x P matrix nor any order is built. Where a neighbour is its
    own query (which `nearest_and_farthest` never returns) the rank is P: nobody is its own neighbour.
    """
    pool = _search_space(features, queries, neighbors, block=block)
    if neighbors.numel() == 0:
        return neighbors.clone()
    n, order = neighbors.to(pool.device).flatten().sort(stable=True)  # one row's pairs in a run: one product per row
    m = queries.to(pool.device)[:, None].expand(neighbors.shape).flatten()[order]
    ranks = []
    for n_some, m_some in zip(n.split(ROWS), m.split(ROWS), strict=True):
        rows, row = _distinct(n_some)
        threshold = _key((pool[n_some] * pool[m_some] * UNIT).sum(dim=1), m_some)
        nearer = torch.zeros_like(
            threshold
        )  # counts: whole numbers are exact in float64, and quicker to add than bools
        for start in range(0, len(pool), block):
            number = torch.arange(start, min(start + block, len(pool)), device=pool.device)
            keys = _key(pool[rows] * UNIT @ pool[start : start + block].T, number)  # (rows, block)
            nearer += keys[row].gt_(threshold[:, None]).sum(dim=1)
        own = _key((pool[n_some] * pool[n_some] * UNIT).sum(dim=1), n_some)
        nearer -= own.gt_(threshold)  # row n itself
        ranks.append(torch.where(n_some == m_some, len(pool), nearer.long()))
    unsorted = torch.empty_like(order)
    unsorted[order] = torch.cat(ranks)
    return unsorted.view(neighbors.shape).to(neighbors.device)


def neighbor_affinity(
    features: Tensor, queries: Tensor, neighbors: Tensor, ordinary: float = 0.5, *, block: int = BLOCK
) -> Tensor:
    """NPS: 1 where the query is also among the k nearest of its neighbour, else ``ordinary`` (r): (Q, k) float.

    ``features`` (P, D), the pool; ``queries`` (Q,) and ``neighbors`` (Q, k) int64, rows of it, as
    `nearest_and_farthest` returns them; k says how many nearest the neighbour has, too. Source: DVCL eq. 13-14.
    """
    check_shapes(queries=(queries, "Q"), neighbors=(neighbors, "QK"))
    _check_fraction(ordinary=ordinary)
    relevant = reverse_rank(features, queries, neighbors, block=block) < neighbors.shape[1]
    return _affinity(relevant, ordinary, features)


def inlier_queries(features: Tensor, queries: Tensor, neighbors: Tensor, wide: int, *, block: int = BLOCK) -> Tensor:
    """QDS: True where some neighbour has the query among its ``wide`` (U) nearest, else an outlier: (Q,) bool.

    Other arguments as for `neighbor_affinity`. Every query is an inlier when ``wide`` is the size of the pool, and with
    U >= K every query with a mutual neighbour is. Source: DVCL eq. 15, "U significantly larger than K".
    """
    check_counts(wide=wide)
    return (reverse_rank(features, queries, neighbors, block=block) < wide).any(dim=1)


def partition_neighbors(
    features: Tensor, queries: Tensor, neighbors: Tensor, wide: int, ordinary: float = 0.5, *, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """`neighbor_affinity` (Q, k) and `inlier_queries` (Q,) from one search instead of two."""
    check_shapes(queries=(queries, "Q"), neighbors=(neighbors, "QK"))
    _check_fraction(ordinary=ordinary)
    check_counts(wide=wide)
    rank = reverse_rank(features, queries, neighbors, block=block)
    return _affinity(rank < neighbors.shape[1], ordinary, features), (rank < wide).any(dim=1)


def _affinity(relevant: Tensor, ordinary: float, features: Tensor) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return torch.full(relevant.shape, ordinary, dtype=dtype, device=features.device).masked_fill(relevant, 1)


def _distinct(sorted_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without repetition, and where in them each of ``sorted_rows`` (n,) stands.

    On a GPU the host would have to wait for their number: there repetitions stay, and are computed again.
    """
    if sorted_rows.device.type == "cpu":
        return torch.unique_consecutive(sorted_rows, return_inverse=True)
    return sorted_rows, torch.arange(len(sorted_rows), device=sorted_rows.device)


def _search_space(features: Tensor, queries: Tensor, neighbors: Tensor | None = None, *, block: int) -> Tensor:
    """The directions of all rows (P, D) as whole numbers of `DIRECTION`, in float64. A row without one is 0."""
    check_shapes(features=(features, "PD"), queries=(queries, "Q"))
    _check_indices(queries=queries)
    if neighbors is not None:
        check_shapes(queries=(queries, "Q"), neighbors=(neighbors, "QK"))
        _check_indices(neighbors=neighbors)
    if len(features) > LARGEST_POOL:
        raise ValueError(f"a pool has at most {LARGEST_POOL} rows, features has {len(features)}: search a sample")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    features = features.detach()
    if features.device.type == "mps":  # it has no float64; the machines that have it share memory with their CPU
        features = features.cpu()
    return (unit_vectors(features.double()).nan_to_num(nan=0) / DIRECTION).round()


def _key(cosine: Tensor, number: Tensor) -> Tensor:
    """Cosines in multiples of `TIE` and row numbers as one float64: a larger key is nearer. Overwrites ``cosine``.

    The whole part orders by cosine; a fraction of number / `LARGEST_POOL` taken off lets the lower number of a tie win.
    """
    return cosine.round_().sub_(number / LARGEST_POOL)


def _extremes(pool: Tensor, queries: Tensor, k: int, k_far: int, block: int) -> tuple[Tensor, Tensor]:
    """The rows (Q, k) with the largest and (Q, k_far) with the smallest cosines of the queries, themselves left out."""
    rows = pool[queries] * UNIT
    near = far = pool.new_empty(len(queries), 0)
    for start in range(0, len(pool), block):
        number = torch.arange(start, min(start + block, len(pool)), device=pool.device)
        keys = _key(rows @ pool[start : start + block].T, number)  # (Q, block)
        near = _merge(near, keys, k + 1, largest=True)  # one more: the query itself is among them, or is not missed
        if k_far > 0:
            far = _merge(far, keys.add_(2 * number / LARGEST_POOL), k_far + 1, largest=False)
    nearest = ((near.ceil() - near) * LARGEST_POOL).long()
    farthest = ((far - far.floor()) * LARGEST_POOL).long()
    return _without(nearest, queries, k), _without(farthest, queries, k_far)


def _merge(best: Tensor, keys: Tensor, count: int, largest: bool) -> Tensor:
    """The ``count`` best keys of each row among those so far and a block of new ones, best first."""
    new = keys.topk(min(count, keys.shape[1]), largest=largest).values
    both = torch.cat([best, new], dim=1)
    return both.topk(min(count, both.shape[1]), largest=largest).values


def _without(found: Tensor, query: Tensor, count: int) -> Tensor:
    """The first ``count`` of each row of ``found`` (Q, count + 1) that are not the row's query."""
    themselves_last = (found == query[:, None]).int().argsort(dim=1, stable=True)
    return found.gather(1, themselves_last[:, :count])


# --- unreliable voxels (eq. 16-19) -----------------------------------------------------------------------------------


def distance_aware_loss_by_definition(
    probabilities: Tensor,
    queries: Tensor,
    neighbors: Tensor,
    outsiders: Tensor,
    affinity: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """DVCL eq. 18-19 as they are written, without the constant, for at least one kept query.

    Same arguments and value as `distance_aware_loss` with its defaults, partners detached.
    """
    p, A = probabilities, affinity
    psi = []
    for i, m in enumerate(queries.tolist()):
        if keep is None or keep[i]:
            cluster = sum(A[i, j] * torch.dot(p[m], p[n].detach()) for j, n in enumerate(neighbors[i].tolist()))
            separate = sum(torch.dot(p[m], p[k].detach()) for k in outsiders[i].tolist())
            psi.append(p.new_zeros(()) - cluster + separate)
    return torch.stack(psi).sum() / len(psi)


@full_precision
def distance_aware_loss(
    probabilities: Tensor,
    queries: Tensor,
    neighbors: Tensor,
    outsiders: Tensor,
    affinity: Tensor,
    keep: Tensor | None = None,
    *,
    partition: Literal["none", "jensen", "exact"] = "none",
    reduction: Literal["sum", "mean"] = "sum",
    detach_partners: bool = True,
) -> Tensor:
    """DVCL: a query predicts what its neighbours do and not what its outsiders do. Mean over the kept queries.

    ``probabilities`` (P, C) of the pool; ``queries`` (Q,), ``neighbors`` (Q, k) and ``outsiders`` (Q, k_far) int64,
    rows of it; ``affinity`` (Q, k); ``keep`` (Q,) bool, all by default. Each query's term

        - sum_n A_mn p_m . p_n + sum_k p_m . p_k

    lies in [-k, k_far]. Eq. 19 divides by the whole pool; only kept queries have a term, so we divide by their number.
    Gradient flows to the queries; partners are constants, as in AaD (arXiv 2205.04183) and as queue entries must be,
    unless ``detach_partners`` is False. The search for them chooses by features and takes no gradient.

    ``partition``: eq. 17 has a third term, (k - k_far) log Z_m with Z_m = sum_q exp(p_m . p_q) over the pool. "none"
    drops it, as eq. 18 does; "jensen" has log P + mean_q p_m . p_q in place of log Z_m; "exact" is eq. 17, at O(Q P)
    memory. ``reduction`` "mean" divides the two sums by k and by k_far; then the partition's factor is 1 - 1 and it
    vanishes by itself. Source: DVCL eq. 17-19.
    """
    check_shapes(probabilities=(probabilities, "PC"), queries=(queries, "Q"), neighbors=(neighbors, "QK"),
                 outsiders=(outsiders, "QL"), affinity=(affinity, "QK"))  # fmt: skip
    _check_indices(queries=queries, neighbors=neighbors, outsiders=outsiders)
    _check_choice(partition, ("none", "jensen", "exact"), "partition")
    _check_choice(reduction, ("sum", "mean"), "reduction")
    k, k_far = neighbors.shape[1], outsiders.shape[1]
    near_weight, far_weight = (1.0, 1.0) if reduction == "sum" else (1 / max(k, 1), 1 / max(k_far, 1))

    query = probabilities[queries]  # (Q, C)
    partners = probabilities.detach() if detach_partners else probabilities
    pull = torch.einsum("qk,qkc->qc", affinity.detach(), partners[neighbors])
    push = partners[outsiders].sum(dim=1)  # (Q, C)
    terms = (query * (far_weight * push - near_weight * pull)).sum(dim=1)  # (Q,)
    factor = near_weight * k - far_weight * k_far
    if partition == "jensen" and len(partners) > 0:
        terms = terms + factor * (math.log(len(partners)) + query @ partners.mean(dim=0))
    elif partition == "exact" and len(partners) > 0:
        terms = terms + factor * (query @ partners.T).logsumexp(dim=1)

    if keep is None:
        return terms.sum() / max(len(terms), 1)
    check_shapes(queries=(queries, "Q"), keep=(keep, "Q"))
    check_mask(keep=keep)
    return terms.masked_fill(~keep, 0).sum() / keep.sum().clamp(min=1)


class BoundChain(NamedTuple):
    """The lines of eq. 18 for each query, (Q,) each."""

    exact: Tensor
    """psi, line 2: with (K - K') log Z_m, Z_m = sum_q exp(p_m . p_q) over the pool."""

    jensen: Tensor
    """Line 3: log Z_m replaced by log|U| + mean_q p_m . p_q. Not smaller than psi when K <= K'."""

    printed: Tensor
    """Line 4, the paper's bound: log Z_m replaced by log|U| + 1. Not smaller than psi when K >= K'."""

    corrected: Tensor
    """A bound for every K and K': `printed` when K >= K', else log|U| in place of log Z_m."""


@torch.no_grad()
def bound_chain(
    probabilities: Tensor, queries: Tensor, neighbors: Tensor, outsiders: Tensor, affinity: Tensor
) -> BoundChain:
    """The four lines of eq. 18 as numbers, to see for which K and K' each is the bound it claims to be. No gradient.

    Arguments as for `distance_aware_loss`; rows of ``probabilities`` are non-negative and sum to 1. With
    x_q = p_m . p_q in [0, 1], log|U| + mean x <= log Z <= log|U| + 1 (Jensen on the left, x <= 1 on the right). Times
    K - K' the left one is the paper's first step, which needs K <= K', and its second step needs K >= K': the chain
    holds as printed only for K = K', where all its lines are psi. For K < K' the last line is below psi, no bound at
    all. No constant has a gradient, so `distance_aware_loss` minimises the corrected bound whatever K and K'.
    """
    check_shapes(probabilities=(probabilities, "PC"), queries=(queries, "Q"), neighbors=(neighbors, "QK"),
                 outsiders=(outsiders, "QL"), affinity=(affinity, "QK"))  # fmt: skip
    _check_indices(queries=queries, neighbors=neighbors, outsiders=outsiders)
    p = probabilities.to(torch.promote_types(probabilities.dtype, torch.float64))
    x = p[queries] @ p.T  # (Q, P)
    cluster = (affinity.to(p.dtype) * x.gather(1, neighbors)).sum(dim=1)
    separate = x.gather(1, outsiders).sum(dim=1)
    dvcl = separate - cluster
    log_pool = math.log(max(len(p), 1))
    factor = neighbors.shape[1] - outsiders.shape[1]
    return BoundChain(
        exact=dvcl + factor * x.logsumexp(dim=1),
        jensen=dvcl + factor * (log_pool + x.mean(dim=1)),
        printed=dvcl + factor * (log_pool + 1),
        corrected=dvcl + factor * (log_pool + (1 if factor >= 0 else 0)),
    )


def bound_chain_by_definition(
    probabilities: Tensor, queries: Tensor, neighbors: Tensor, outsiders: Tensor, affinity: Tensor
) -> BoundChain:
    """DVCL eq. 16-18 as they are written. Same arguments and values as `bound_chain`."""
    p, A = probabilities.double(), affinity
    U_R, K, K_far = range(len(p)), neighbors.shape[1], outsiders.shape[1]
    lines = []
    for i, m in enumerate(queries.tolist()):
        C, D = neighbors[i].tolist(), outsiders[i].tolist()

        def dot(n: int, m: int = m) -> float:
            return float(torch.dot(p[m], p[n]))

        Z = sum(math.exp(dot(q)) for q in U_R)
        N_C = math.prod(math.exp(float(A[i, j]) * dot(n)) / Z for j, n in enumerate(C))  # eq. 16
        N_D = math.prod(math.exp(dot(k)) / Z for k in D)
        shared = -sum(float(A[i, j]) * dot(n) for j, n in enumerate(C)) + sum(dot(k) for k in D)
        log_U, mean = math.log(len(U_R)), sum(dot(q) for q in U_R) / len(U_R)
        psi = -math.log(N_C / N_D)  # eq. 17
        bounds = [log_U + mean, log_U + 1, log_U + (0 if K_far > K else 1)]  # each in place of log Z
        lines.append([psi, *(shared + (K - K_far) * bound for bound in bounds)])
    return BoundChain(*torch.tensor(lines, dtype=torch.float64).T)


# --- what Table 3 compares with, and complementary labels ------------------------------------------------------------


def similarity_affinity(features: Tensor, queries: Tensor, neighbors: Tensor) -> Tensor:
    """SNCLR's weights in place of NPS: softmax over each query's k neighbours of their cosine, times k. (Q, k) float.

    The row "Log-likelihood + SNCLR" of DVCL's Table 3; give it to `distance_aware_loss` as the affinity, and ones for
    the row "Log-likelihood". Arguments as for `neighbor_affinity`. Times k, so that the weights are 1 on average and
    the two rows pull alike; the paper gives no scale. No gradient. Source: Ge et al. 2023, arXiv 2303.17142.
    """
    check_shapes(features=(features, "PD"), queries=(queries, "Q"), neighbors=(neighbors, "QK"))
    _check_indices(queries=queries, neighbors=neighbors)
    unit = unit_vectors(features.detach().to(torch.promote_types(features.dtype, torch.float32)))
    cosine = (unit[queries][:, None] * unit[neighbors]).sum(dim=2)  # (Q, k)
    return cosine.softmax(dim=1) * neighbors.shape[1]


@full_precision
def nnclr_loss(first: Tensor, second: Tensor, support: Tensor, temperature: float = 0.1) -> Tensor:
    """NNCLR: the support entry nearest to a first view names its second view among the B. Mean over the B pairs.

    ``first`` (B, D) and ``second`` (B, D), row by row two views; ``support`` (S, D), features of earlier steps; cosine.
    Gradient flows to ``second`` only: the nearest entry replaces the first view, and is a constant. Call it the other
    way round as well and add. Without support it is 0. Source: Dwibedi et al. 2021, arXiv 2104.14548, eq. 2.
    """
    check_shapes(first=(first, "BD"), second=(second, "BD"), support=(support, "SD"))
    check_temperature(temperature)
    if len(support) == 0:
        return (second * 0).sum()
    support = unit_vectors(support.detach())
    nearest = support[(unit_vectors(first.detach()) @ support.T).argmax(dim=1)] if len(first) > 0 else first.detach()
    similarity = nearest @ unit_vectors(second).T / temperature  # (B, B)
    return (similarity.logsumexp(dim=1) - similarity.diagonal()).sum() / max(len(second), 1)


@full_precision
def snclr_loss(query: Tensor, positive: Tensor, neighbors: Tensor, temperature: float = 0.1) -> Tensor:
    """SNCLR: each query names its positive and, each as much as it is alike, the positive's k neighbours.

    ``query`` (B, D) and ``positive`` (B, D), row by row a pair; ``neighbors`` (B, k, D), of each positive; cosine. With
    P over all B (1 + k) positives and neighbours, a softmax of cos / temperature, and weights w = softmax over the
    query's own k neighbours of cos, detached, it is the mean over queries of -log P(positive) - sum_k w_k log P(k).
    Gradient flows to all three: detach a bank before the call. It follows the released code (without its factor of
    2 temperature). Source: Ge et al. 2023, arXiv 2303.17142.
    """
    check_shapes(query=(query, "BD"), positive=(positive, "BD"), neighbors=(neighbors, "BKD"))
    check_temperature(temperature)
    B, k, D = neighbors.shape
    query = unit_vectors(query)
    keys = torch.cat([unit_vectors(positive)[:, None], unit_vectors(neighbors.reshape(B * k, D)).view(B, k, D)], dim=1)
    own = torch.einsum("bd,bkd->bk", query, keys)  # (B, 1 + k), the query's positive first
    weights = torch.cat([torch.ones_like(own[:, :1]), own[:, 1:].detach().softmax(dim=1)], dim=1)
    everyone = (query @ keys.flatten(0, 1).T / temperature).logsumexp(dim=1, keepdim=True)  # (B, 1)
    return (weights * (everyone - own / temperature)).sum() / max(B, 1)


def complementary_labels(probabilities: Tensor, low_rank: int = 3, high_rank: int = 20) -> Tensor:
    """The classes a voxel is least likely to have: those of rank low_rank <= rank < high_rank, (P, C) bool.

    ``probabilities`` (P, C); rank 0 is the likeliest class, and of classes that tie the lower one comes first. U2PL's
    3 and 20 are for 21 classes: with C <= 3 no class is complementary. Source: U2PL, arXiv 2203.03884, section 3.3.
    """
    check_shapes(probabilities=(probabilities, "PC"))
    if not 0 <= low_rank <= high_rank:
        raise ValueError(f"expected 0 <= low_rank <= high_rank, got {low_rank} and {high_rank}")
    order = probabilities.detach().argsort(dim=1, descending=True, stable=True)  # (P, C): the class at each rank
    rank = order.argsort(dim=1)
    return (rank >= low_rank) & (rank < high_rank)


@full_precision
def complementary_label_loss(
    anchors: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    unreliable: Tensor,
    complementary: Tensor,
    temperature: float = 0.5,
) -> Tensor:
    """U2PL: unreliable voxels are the negatives of the classes that they are least likely to have.

    ``anchors`` (M, D), reliable features, and their classes ``labels`` (M,) int64; ``prototypes`` (C, D);
    ``unreliable`` (P, D) and their ``complementary`` labels (P, C) bool; cosine. An anchor of class c names prototype c
    among that and all unreliable voxels whose complementary labels hold c (U2PL draws 50 of them: hand over a sample).
    Mean over the anchors of a class, then over the classes with an anchor and a negative; 0 when there is none.

    Gradient flows to anchors, prototypes and unreliable voxels. U2PL detaches the last two; left attached, they are
    pushed away from the classes they exclude, wherever that leads: what DVCL's Figure 1a shows.
    Source: U2PL, arXiv 2203.03884, section 3.3.
    """
    check_shapes(anchors=(anchors, "MD"), labels=(labels, "M"), prototypes=(prototypes, "CD"),
                 unreliable=(unreliable, "PD"), complementary=(complementary, "PC"))  # fmt: skip
    _check_indices(labels=labels)
    check_mask(complementary=complementary)
    check_temperature(temperature)
    unit, prototypes = unit_vectors(anchors), unit_vectors(prototypes)
    to_centre = (unit * prototypes[labels]).sum(dim=1, keepdim=True) / temperature  # (M, 1)
    negative = complementary.T[labels]  # (M, P)
    to_unreliable = (unit @ unit_vectors(unreliable).T / temperature).masked_fill(~negative, -math.inf)
    terms = (torch.cat([to_centre, to_unreliable], dim=1).logsumexp(dim=1, keepdim=True) - to_centre)[:, 0]

    compared = negative.any(dim=1)  # (M,)
    count = torch.zeros(len(prototypes), dtype=terms.dtype, device=terms.device)
    count = count.index_add(0, labels, compared.to(terms.dtype))  # anchors of each class
    share = torch.where(compared, 1 / count[labels].clamp(min=1), 0)
    return (terms * share).sum() / (count > 0).sum().clamp(min=1)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_classes(**expected: Tensor) -> None:
    for name, tensor in expected.items():
        if tensor.ndim < 2 or tensor.shape[1] < 1:
            raise ValueError(f"{name} must be (B, C, ...) with at least one class, got {tuple(tensor.shape)}")


def _check_indices(**expected: Tensor) -> None:
    for name, tensor in expected.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")


def _check_choice(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_fraction(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
