"""GCL: global and local contrast of Chaitanya et al. (NeurIPS 2020, arXiv 2006.10511), the method IDEAL builds on.

- global, strategy G^D: slices of the same part of any volume are positives, and nobody's negatives;
- local, strategy L^R: a region of a slice names the same region under another change of intensity among the other
  regions of that slice. Where IDEAL takes its negatives from other images, this loss takes them from the same one.
"""

import torch
from torch import Tensor

from medlib.losses.contrastive import check_shapes, check_temperature, full_precision, nt_xent_loss, unit_vectors


def global_partition_loss_by_definition(features: Tensor, partitions: Tensor, temperature: float = 0.1) -> Tensor:
    """G^D pair by pair, for at least one positive pair. Same arguments and value as `global_partition_loss`."""
    z, s, tau = features, partitions, temperature
    N = len(z)

    def e(i: int, j: int) -> Tensor:
        return torch.exp(torch.cosine_similarity(z[i], z[j], dim=0) / tau)

    per_anchor = []
    for i in range(N):
        others = sum(e(i, k) for k in range(N) if s[k] != s[i])  # the negatives: slices of other partitions only
        terms = [-torch.log(e(i, j) / (e(i, j) + others)) for j in range(N) if j != i and s[j] == s[i]]
        if terms:
            per_anchor.append(torch.stack(terms).mean())
    return torch.stack(per_anchor).mean()


@full_precision
def global_partition_loss(features: Tensor, partitions: Tensor, temperature: float = 0.1) -> Tensor:
    """G^D: each slice names another one of its partition among that one and all slices of other partitions.

    ``features`` (N, D), cosine; ``partitions`` (N,) int. Mean over the anchors that have a positive, of the mean over
    their positives. `medlib.losses.contrastive.partition_contrastive_loss` has the same positives, but its denominator
    holds the anchor's other positives, too. Source: Chaitanya et al. 2020, eq. 1 with the sets of G^D.
    """
    check_shapes(features=(features, "ND"), partitions=(partitions, "N"))
    check_temperature(temperature)
    unit = unit_vectors(features)
    similarity = unit @ unit.T / temperature  # (N, N)
    same = partitions[:, None] == partitions[None, :]
    positives = same & ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    never = torch.finfo(features.dtype).min / 4  # not -inf: a slice without negatives would get a gradient of NaN
    others = similarity.masked_fill(same, never).logsumexp(dim=1, keepdim=True) if len(features) else similarity
    terms = (torch.logaddexp(similarity, others) - similarity).masked_fill(~positives, 0)
    count = positives.sum(dim=1)
    return (terms.sum(dim=1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def region_contrastive_loss_by_definition(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """The local loss L^R region by region. Same arguments and value as `region_contrastive_loss`."""
    tau = temperature
    B, A, _ = first.shape
    terms = []
    for b in range(B):
        for f, g in ((first[b], second[b]), (second[b], first[b])):  # both directions
            for u in range(A):

                def e(v: Tensor, u: int = u, f: Tensor = f) -> Tensor:
                    return torch.exp(torch.cosine_similarity(f[u], v, dim=0) / tau)

                others = sum(e(f[v]) + e(g[v]) for v in range(A) if v != u)  # other regions, of both views
                terms.append(-torch.log(e(g[u]) / (e(g[u]) + others)))
    return torch.stack(terms).mean()


@full_precision
def region_contrastive_loss(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """L^R: a region names itself in the other view among all other regions of the same slice, in both views.

    ``first``, ``second`` (B, A, D): A regions of B slices in two views that differ in intensity only, so that region u
    of one is region u of the other; cosine. Mean over slices, regions and both directions. It is SimCLR's loss inside
    each slice. Source: Chaitanya et al. 2020, eq. 2-3; negatives from both views as in their code, which takes five
    neighbouring regions where the paper's sum takes all.
    """
    check_shapes(first=(first, "BAD"), second=(second, "BAD"))
    check_temperature(temperature)
    if first.numel() == 0:
        return (first * 0).sum() + (second * 0).sum()
    return torch.stack([nt_xent_loss(f, g, temperature) for f, g in zip(first, second, strict=True)]).mean()
