"""IDEAL: dense local contrast and cross-consistency (arXiv 2210.15075, sections 2.2 and 2.3).

An image is a grid of cells, the h x w positions of the encoder's last map. Two losses train on cells and pixels:

- local contrast (eq. 2): a cell of one view names the matching cell of the other view among the cells of other images.
  The other cells of its own image are nobody's negative: they may show the same tissue.
- cross-consistency (eq. 3): two decoders learn the labels where there are some, and each other's where there are none.

The paper says that the match is "extracted correspondence across views" and leaves open how. We follow DenseCL (arXiv
2011.09157), whose wording it is close to: the cell of the other view with the largest cosine, without gradient. Its
temperature 0.2 is also the default here, because IDEAL names none.

Each equation stands here twice: slow and literal (``..._by_definition``), and as the form that is trained.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medlib.losses.consistency import check_confidence, cross_pseudo_supervision_loss
from medlib.losses.contrastive import check_mask, check_shapes, check_temperature, full_precision, unit_vectors
from medlib.losses.segmentation import cross_entropy_loss

CHUNK = 2**22
"""Similarities that exist at one time: rows of a batch go through the loss in chunks of this many (16 MB each)."""

NO_MATCH = -1
"""In a correspondence: this cell has no partner in the other view and is left out."""

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


def dense_correspondence_by_definition(query: Tensor, key: Tensor) -> Tensor:
    """For each cell i of each query map, argmax_j cos(q_i, k_j). Same arguments and value as `dense_correspondence`."""
    q, k = query.flatten(2), key.flatten(2)  # (B, C, h w)
    B, _, S = q.shape
    match = torch.zeros(B, S, dtype=torch.long)
    for b in range(B):
        for i in range(S):
            cosines = [torch.cosine_similarity(q[b, :, i], k[b, :, j], dim=0).item() for j in range(S)]
            match[b, i] = cosines.index(max(cosines))  # the first of equals
    return match


def local_contrastive_loss_by_definition(
    query: Tensor, key: Tensor, correspondence: Tensor, temperature: float = 0.2
) -> Tensor:
    """IDEAL eq. 2 as it is written. Same arguments and value as `local_contrastive_loss` without its options."""
    q, k, c, tau = query.flatten(2), key.flatten(2), correspondence, temperature  # q, k: (B, D, h w)
    B, _, S = q.shape  # S = Dh Dw

    def e(b: int, i: int, a: int, j: int) -> Tensor:
        return torch.exp(torch.cosine_similarity(q[b, :, i], k[a, :, j], dim=0) / tau)

    terms = []
    for b in range(B):
        for i in range(S):
            if c[b, i] == NO_MATCH:
                continue
            k_plus = e(b, i, b, int(c[b, i]))  # one cell of the other view of the same image
            k_minus = sum(e(b, i, a, j) for a in range(B) if a != b for j in range(S))  # all cells of other images
            terms.append(-torch.log(k_plus / (k_plus + k_minus)))
    return torch.stack(terms).mean()


def cross_consistency_loss_by_definition(
    first_logits: Tensor, second_logits: Tensor, labels: Tensor | None = None
) -> Tensor:
    """IDEAL eq. 3 as it is written. Same arguments and value as `cross_consistency_loss`."""
    p1, p2 = first_logits.softmax(dim=1), second_logits.softmax(dim=1)
    B, _, H, W = p1.shape

    def CE(p: Tensor, y: Tensor) -> Tensor:
        pixels = [(b, i, j) for b in range(B) for i in range(H) for j in range(W) if y[b, i, j] != -1]
        return -torch.stack([torch.log(p[b, y[b, i, j], i, j]) for b, i, j in pixels]).mean()

    if labels is not None:
        return CE(p1, labels) + CE(p2, labels)
    y1, y2 = p1.argmax(dim=1), p2.argmax(dim=1)
    return CE(p1, y2) + CE(p2, y1)


@torch.no_grad()
def dense_correspondence(query: Tensor, key: Tensor) -> Tensor:
    """For each cell of ``query`` (B, C, h, w), the cell of the same image in ``key`` (B, C, h, w) with the largest cos.

    Returns (B, h*w) int64, cells counted row by row; several query cells may share a match; of equals it is the first,
    so a cell without direction (all channels 0) matches cell 0. Computed in at least float32 and without gradient, one
    image at a time: O((h w)^2) memory. Source: DenseCL section 3.2, our reading of IDEAL section 2.2.
    """
    check_shapes(query=(query, "BChw"), key=(key, "BChw"))
    if query.numel() == 0:
        raise ValueError(f"there is no cell to match: query {tuple(query.shape)}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        pairs = zip(query.to(dtype), key.to(dtype), strict=True)
        cosines = ((unit_vectors(q.flatten(1).T), unit_vectors(k.flatten(1).T)) for q, k in pairs)  # (h w, C) each
        return torch.stack([(q @ k.T).argmax(dim=1) for q, k in cosines])


@torch.no_grad()
def geometric_correspondence(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """The match by geometry: the key cell that looks nearest to where the query cell looks in the image itself.

    ``query_positions``, ``key_positions`` (B, 2, h, w): x and y of the point of the unwarped image that a cell of the
    view shows, -1 and 1 at the image's edges. Returns (B, h*w) int64 as `dense_correspondence`, with `NO_MATCH` where
    the query cell lies outside the image, or the nearest key cell is farther than the width of an unwarped cell,
    2 / max(h, w): the other view does not show that place.
    """
    check_shapes(query_positions=(query_positions, "B2hw"), key_positions=(key_positions, "B2hw"))
    if query_positions.numel() == 0 or query_positions.shape[1] != 2:
        raise ValueError(f"positions must be (B, 2, h, w), got {tuple(query_positions.shape)}")
    reach = 2 / max(query_positions.shape[2:])
    matches = []
    for q, k in zip(query_positions.flatten(2).mT.double(), key_positions.flatten(2).mT.double(), strict=True):
        nearest, match = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)  # (h w,)
        shown = (q.abs() <= 1).all(dim=1) & (nearest <= reach)
        matches.append(match.masked_fill(~shown, NO_MATCH))
    return torch.stack(matches)


def distinct_match_fraction(correspondence: Tensor) -> Tensor:
    """How many different key cells are matched, in parts of the cells that have a match; mean over images, 0-d float.

    ``correspondence`` (B, S) int; cells with `NO_MATCH` count nowhere. 1 where no two cells share a match, 1/S where
    all share one: features that have collapsed. Matches drawn at random give about 1 - 1/e = 0.63.
    """
    check_shapes(correspondence=(correspondence, "BS"))
    _check_correspondence(correspondence, *correspondence.shape)
    matched = correspondence >= 0  # (B, S)
    slot = correspondence.long().masked_fill(~matched, correspondence.shape[1])  # no match: to an extra column
    hit = torch.zeros(len(slot), slot.shape[1] + 1, device=slot.device).scatter_(1, slot, 1)[:, :-1]
    cells = matched.sum(dim=1)
    return (hit.sum(dim=1) / cells.clamp(min=1)).sum() / (cells > 0).sum().clamp(min=1)


@full_precision
def local_contrastive_loss(
    query: Tensor,
    key: Tensor,
    correspondence: Tensor,
    temperature: float = 0.2,
    *,
    images: Tensor | None = None,
    negatives: Literal["cells", "pooled"] = "cells",
    queue: Tensor | None = None,
    queue_valid: Tensor | None = None,
) -> Tensor:
    """L_loc: each query cell names its match among that match and the key cells of all other images of the batch.

    ``query`` (B, D, h, w) and ``key`` (B, D, h, w), the projections of two views, cosine; ``correspondence`` (B, h*w)
    int, the matched key cell of the same image, or `NO_MATCH`. With s(i, j) = cos(q_i, k_j) / temperature,

        term(i) = log(exp s(i, match of i) + sum_{j in other images} exp s(i, j)) - s(i, match of i)

    and the mean over all cells of all images that have a match. Other cells of the same image are never negatives. One
    image has no negatives: B = 1 raises ``ValueError``. Gradient flows to query and key: detach a momentum key before.

    Options, none of them in the paper:
        images: (B,) int, which image a row shows, where a batch may hold one twice: its two rows are then not each
            other's negatives. An image without any negative adds a loss of 0.
        negatives: "pooled" takes one negative from each other image, the mean of its key cells (DenseCL).
        queue: (K, D) keys of earlier batches, negatives in addition. ``queue_valid`` (B, K) bool says which of them
            may be a negative of which image: not the empty slots, and not the image itself of an epoch ago.

    The (B h w)^2 similarities are never held at once: rows go in chunks, and in the backward pass each chunk is
    computed again. One copy of that table takes 1 GB for a batch of 32 at 22 x 22 cells. Source: IDEAL eq. 2; with
    1 x 1 cells it is eq. 1.
    """
    check_shapes(query=(query, "BDhw"), key=(key, "BDhw"))
    check_temperature(temperature)
    batch, _, height, width = query.shape
    cells = height * width
    _check_correspondence(correspondence, batch, cells)
    if negatives not in ("cells", "pooled"):
        raise ValueError(f"negatives must be 'cells' or 'pooled', got {negatives!r}")
    if (queue is None) != (queue_valid is None):
        raise ValueError("queue and queue_valid belong together: give both or neither")
    if queue is not None and queue_valid is not None:
        check_shapes(query=(query, "BDhw"), queue=(queue, "KD"), queue_valid=(queue_valid, "BK"))
        check_mask(queue_valid=queue_valid)
    if images is not None:
        check_shapes(query=(query, "BDhw"), images=(images, "B"))
        if images.is_floating_point():  # NaN would make an image its own negative
            raise ValueError(f"images must be of an integer type, got {images.dtype}")
    if batch == 1:
        raise ValueError("a batch of one image has no negatives: local_contrastive_loss needs B >= 2")
    if query.numel() == 0:
        return (query * 0).sum() + (key * 0).sum()

    row = torch.arange(batch, device=query.device)
    q, k = _unit_cells(query), _unit_cells(key)  # (B S, D)
    matched = (correspondence >= 0).flatten()  # (B S,)
    positive = (q * k[(row[:, None] * cells + correspondence.clamp(min=0)).flatten()]).sum(dim=1) / temperature

    # the pooled key by parts: a sum of the largest floats before the division would be infinite
    columns = k if negatives == "cells" else unit_vectors((key / cells).flatten(2).sum(dim=2))  # (M, D)
    shown = row if images is None else images
    allowed = shown[:, None] != shown.repeat_interleave(len(columns) // batch)  # (B, M)
    if queue is not None and queue_valid is not None:
        columns, allowed = torch.cat([columns, unit_vectors(queue)]), torch.cat([allowed, queue_valid], dim=1)

    others = _logsumexp_in_chunks(q / temperature, columns, allowed, row.repeat_interleave(cells))  # (B S,)
    terms = torch.logaddexp(torch.zeros_like(others), others - positive)
    return terms.masked_fill(~matched, 0).sum() / matched.sum().clamp(min=1)


def _unit_cells(maps: Tensor) -> Tensor:
    """Maps (B, D, h, w) as unit vectors (B h w, D), image by image, row by row."""
    return unit_vectors(maps.flatten(2).mT.flatten(0, 1))


def _check_correspondence(correspondence: Tensor, batch: int, cells: int) -> None:
    wanted = f"a tensor (B, h*w) = ({batch}, {cells}) of a signed integer type"
    if not isinstance(correspondence, Tensor):
        raise ValueError(f"correspondence must be {wanted}, got a {type(correspondence).__name__}")
    # a mask would be read as cells 0 and 1, and without a sign `NO_MATCH` is cell 255
    if correspondence.shape != (batch, cells) or correspondence.dtype not in SIGNED:
        got = f"{tuple(correspondence.shape)} {correspondence.dtype}"
        raise ValueError(f"correspondence must be {wanted}, got {got}")
    if correspondence.device.type != "cpu" or not correspondence.numel():
        return  # to look would be to wait for the device, which refuses an index out of range by itself
    if not NO_MATCH <= int(correspondence.min()) <= int(correspondence.max()) < cells:
        raise ValueError(
            f"correspondence must hold cells 0 to {cells - 1} or {NO_MATCH}, got {correspondence.unique().tolist()}"
        )


def _logsumexp_in_chunks(rows: Tensor, columns: Tensor, allowed: Tensor, image: Tensor) -> Tensor:
    """logsumexp over the allowed columns m of <rows_n, columns_m>, (N,).

    ``rows`` (N, D), ``columns`` (M, D); ``allowed`` (B, M) bool says which columns the rows of an image see, ``image``
    (N,) whose row it is.
    """
    never = torch.finfo(rows.dtype).min / 4  # not -inf: where no column is allowed, its gradient would be NaN

    def chunk(some: Tensor, of: Tensor, columns: Tensor) -> Tensor:
        return (some @ columns.T).masked_fill(~allowed[of], never).logsumexp(dim=1)

    size = max(1, CHUNK // len(columns))
    if len(rows) <= size:
        return chunk(rows, image, columns)
    parts = [
        checkpoint(chunk, some, of, columns, use_reentrant=False, preserve_rng_state=False)
        for some, of in zip(rows.split(size), image.split(size), strict=True)
    ]
    return torch.cat(parts)


@full_precision
def cross_consistency_loss(
    first_logits: Tensor, second_logits: Tensor, labels: Tensor | None = None, *, confidence: float = 0.0
) -> Tensor:
    """L_SSF: two branches learn the labels, or where there are none each learns the other's decision.

    ``first_logits`` and ``second_logits`` (B, K, H, W) of the same pixels; ``labels`` (B, H, W) int, -1 is not looked
    at, or None. With CE the mean over pixels of -log softmax(logits)[y],

        labelled    CE(p1, m) + CE(p2, m)
        unlabelled  CE(p1, y2) + CE(p2, y1),  y = argmax of the other branch, without gradient: CPS

    The paper draws sigmoids "thresholded to one-hot", which leaves pixels without any class; softmax and argmax do not.
    A decision with a probability below ``confidence``, in [0, 1), is not looked at: 0, as in the paper, takes all.
    Source: IDEAL eq. 3.
    """
    check_shapes(first_logits=(first_logits, "BKHW"), second_logits=(second_logits, "BKHW"))
    check_confidence(confidence)
    if labels is None:
        return cross_pseudo_supervision_loss(first_logits, second_logits, confidence)
    return cross_entropy_loss(first_logits, labels) + cross_entropy_loss(second_logits, labels)
