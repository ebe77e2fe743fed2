"""Telling images apart, as MONA's rivals in pre-training do: MoCo v2 and kNN-MoCo with a queue, BYOL without one.

An image is a class of its own: the embedding of one view shall be that of the other. SimCLR, which takes its negatives
from the batch, is `medlib.losses.contrastive.nt_xent_loss`; ISD and GLCon, which compare relations, are
`medlib.losses.mona.instance_discrimination_loss`.

``query`` and ``prediction`` (B, D) are the student's, ``positive`` and ``target`` (B, D) the teacher's of the other
view: only the student gets a gradient. With an empty batch a loss is 0 and still attached to its first argument.
"""

import math

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

NEIGHBOR_WEIGHT = 0.4
"""Of the neighbours' part in the loss of kNN-MoCo, as in its paper."""


def queue_contrastive_loss_by_definition(
    query: Tensor, positive: Tensor, entries: Tensor, temperature: float = 0.2, neighbors: int = 0
) -> float:
    """MoCo and kNN-MoCo as they are written, query by query. ``entries`` (K, D): the filled slots of the queue."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return torch.cosine_similarity(a, b, dim=0).item()

    first, further = [], []
    for q, p in zip(query, positive, strict=True):
        scores = [math.exp(cosine(q, k) / temperature) for k in [p, *entries]]
        first.append(-math.log(scores[0] / sum(scores)))
        nearness = [cosine(p, k) for k in entries]
        nearest = sorted(range(len(entries)), key=nearness.__getitem__, reverse=True)[:neighbors]
        further += [-math.log(scores[1 + j] / sum(scores)) for j in nearest]
    loss = sum(first) / len(first)
    return loss + NEIGHBOR_WEIGHT * sum(further) / len(further) if further else loss


@full_precision
def queue_contrastive_loss(
    query: Tensor, positive: Tensor, queue: Tensor, temperature: float = 0.2, *, valid: Tensor, neighbors: int = 0
) -> Tensor:
    """MoCo: each query names its positive among it and the entries of a queue (K, D); cosine, mean over the queries.

    ``valid`` (K,) bool leaves slots out that nothing was pushed to, whatever they hold. With ``neighbors`` the entries
    that are nearest to the positive are positives, too: `NEIGHBOR_WEIGHT` times the mean of their cross-entropies is
    added (kNN-MoCo).
    Source: MoCo (He et al., CVPR 2020), eq. 1, with the temperature of MoCo v2; kNN-MoCo (arXiv 2106.05967).
    """
    check_shapes(query=(query, "BD"), positive=(positive, "BD"), queue=(queue, "KD"))
    check_shapes(queue=(queue, "KD"), valid=(valid, "K"))
    check_mask(valid=valid)
    check_temperature(temperature)
    if neighbors:
        check_counts(neighbors=neighbors)
    if len(query) == 0:
        return (query * 0).sum()
    queue = unit_vectors(torch.where(valid[:, None], queue.detach(), 0))
    query, positive = unit_vectors(query), unit_vectors(positive.detach())
    similarity = torch.cat([(query * positive).sum(dim=1, keepdim=True), query @ queue.T], dim=1) / temperature
    lowest = torch.finfo(similarity.dtype).min / 4
    candidates = torch.cat([valid.new_ones(1), valid])
    log_share = similarity.masked_fill(~candidates, lowest).log_softmax(dim=1)  # (B, 1 + K)
    loss = -log_share[:, 0].mean()
    if neighbors:
        nearness = (positive @ queue.T).masked_fill(~valid, -torch.inf)
        nearest = nearness.topk(min(neighbors, len(queue)), dim=1).indices  # (B, k)
        kept = valid[nearest]
        terms = -log_share[:, 1:].gather(1, nearest).masked_fill(~kept, 0)
        loss = loss + NEIGHBOR_WEIGHT * terms.sum() / kept.sum().clamp(min=1)
    return loss


@full_precision
def prediction_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL: 2 - 2 cos between a prediction and the teacher's embedding, in [0, 4]; mean over B.

    Source: BYOL (Grill et al., NeurIPS 2020), eq. 2: the squared distance of the unit vectors.
    """
    check_shapes(prediction=(prediction, "BD"), target=(target, "BD"))
    if len(prediction) == 0:
        return (prediction * 0).sum()
    return 2 - 2 * (unit_vectors(prediction) * unit_vectors(target.detach())).sum(dim=1).mean()
