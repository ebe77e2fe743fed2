"""MONA: global-local instance discrimination and anatomical contrastive reconstruction (TPAMI 2024).

Pre-training compares two views of an image by how they relate to K mined views (eq. 1-2), once for whole images and
once for each of 36 local windows. Fine-tuning rests on three principles, each with a loss:

- tailness (eq. 3-5): every class, rare or not, sends as many pixels (queries) to meet their class mean (positive key)
  and to leave pixels of other classes (negative keys), which come more often from the classes that look alike;
- consistency (eq. 6): warping the image and warping the prediction should give the same;
- diversity (section III-B, no number): an embedding should be near the neighbours of its other view.

The released code does something else in several places. What a loss can do about it is an argument, named after what it
does and off by default: ``teacher_gradient``, ``scrambled_fragments``, ``one_way``, ``per_image``, ``swapped_roles``;
and `released_contrast_masks` draws its pixels.

Around the losses stand the samplers. They are pure functions of tensors and a ``torch.Generator``, loop over no pixel,
and return a fixed number of rows with a mask of what is valid, so that no step waits for the device. A pixel is a flat
index (b * H + y) * W + x. The order of a step: `sample_queries` and `class_means`, `class_relation_distribution`,
`sample_negatives`, `sample_features` at those pixels only, the head on those rows, `anatomical_contrastive_loss`.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medlib.losses.contrastive import (
    SHORTEST,
    check_counts,
    check_mask,
    check_shapes,
    check_temperature,
    full_precision,
    unit_vectors,
)

# --- the equations as they are written -------------------------------------------------------------------------------


def instance_discrimination_loss_by_definition(
    student: Tensor, teacher: Tensor, mined: Tensor, student_temperature: float = 0.1, teacher_temperature: float = 0.01
) -> Tensor:
    """MONA eq. 1-2 as they are written, for float64. Same arguments and value as `instance_discrimination_loss`."""
    u, v, w = student, teacher.detach(), mined.detach()
    B, K = len(u), len(w)

    def s(x: Tensor, tau: float) -> Tensor:  # eq. 1
        e = torch.stack([torch.exp(torch.cosine_similarity(x, w[j], dim=0) / tau) for j in range(K)])
        return torch.log(e / e.sum())

    divergences = []
    for i in range(B):
        s_theta, s_xi = s(u[i], student_temperature), s(v[i], teacher_temperature)
        divergences.append((torch.exp(s_xi) * (s_xi - s_theta)).sum())  # eq. 2
    return torch.stack(divergences).mean()


def class_relation_distribution_by_definition(prototypes: Tensor) -> Tensor:
    """The softmax of the graph G below MONA eq. 4, as it is written. Value of `class_relation_distribution`."""
    C = len(prototypes)
    rows = []
    for c in range(C):
        G = [torch.dot(prototypes[c], prototypes[v]) for v in range(C)]
        e = torch.stack([torch.exp(G[v]) if v != c else torch.zeros_like(G[v]) for v in range(C)])
        rows.append(e / e.sum())
    return torch.stack(rows)


def anatomical_contrastive_loss_by_definition(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """MONA eq. 3 as it is written, with means for its sums. Same arguments as `anatomical_contrastive_loss`."""
    tau = temperature

    def e(r: Tensor, k: Tensor) -> Tensor:
        return torch.exp(torch.cosine_similarity(r, k, dim=0) / tau)

    per_class = []
    for c in range(len(queries)):
        if valid is not None and not valid[c]:
            continue
        terms = []
        for r_q in queries[c]:
            positive = e(r_q, positives[c])
            terms.append(-torch.log(positive / (positive + sum(e(r_q, r_k) for r_k in negatives[c]))))
        per_class.append(torch.stack(terms).mean())
    return torch.stack(per_class).mean()


def equivariance_loss_by_definition(first_logits: Tensor, second_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """MONA eq. 6 as it is written, with a mean over pixels for its sum. Same arguments as `equivariance_loss`."""
    B, _, H, W = first_logits.shape

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * torch.log(p / q)).sum()

    divergences, weights = [], []
    for b in range(B):
        for y in range(H):
            for x in range(W):
                p, q = first_logits[b, :, y, x].softmax(dim=0), second_logits[b, :, y, x].softmax(dim=0)
                divergences.append(kl(p, q) + kl(q, p))
                weights.append(1.0 if mask is None else float(mask[b, y, x]))
    return torch.stack([w * d for w, d in zip(weights, divergences, strict=True)]).sum() / sum(weights)


def nearest_neighbor_loss_by_definition(student: Tensor, teacher: Tensor, bank: Tensor, k: int = 5) -> Tensor:
    """The nearest-neighbour loss of MONA section III-B, in a loop. Same arguments and value as below."""
    u_g, v_g, entries = student, teacher, bank
    distances = []
    for u, v in zip(u_g, v_g, strict=True):
        nearest = sorted(entries, key=lambda entry: -float(torch.cosine_similarity(v, entry, dim=0)))[:k]
        distances += [-torch.cosine_similarity(u, entry, dim=0) for entry in nearest]
    return torch.stack(distances).mean()


# --- pre-training: instance discrimination ---------------------------------------------------------------------------


@full_precision
def instance_discrimination_loss(
    student: Tensor,
    teacher: Tensor,
    mined: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.01,
    *,
    valid: Tensor | None = None,
    teacher_gradient: bool = False,
) -> Tensor:
    """Both views should relate to the mined views alike: KL(teacher || student), in nats, mean over the B images.

    ``student`` (B, D), the student's predictions u; ``teacher`` (B, D), the teacher's embeddings v' of the other views;
    ``mined`` (K, D), the teacher's embeddings w of other images; cosine. ``valid`` (K,) bool leaves slots of a bank out
    that nothing was pushed to, whatever they hold. With fewer than two mined views there is nothing to compare. Only
    the student gets a gradient. The paper writes the arguments of KL the other way round; the sharper teacher is the
    target, as in ISD.

    ``teacher_gradient=True`` (the released code) leaves the target attached, so that the teacher's head is pulled
    towards the student. Source: MONA eq. 1-2, after ISD (arXiv 2012.09259).
    """
    check_shapes(student=(student, "BD"), teacher=(teacher, "BD"), mined=(mined, "KD"))
    if valid is not None:
        check_shapes(mined=(mined, "KD"), valid=(valid, "K"))
        check_mask(valid=valid)
    check_temperature(student_temperature, "student_temperature")
    check_temperature(teacher_temperature, "teacher_temperature")
    target = teacher if teacher_gradient else teacher.detach()
    return _relation_divergence(
        student[None], target[None], mined.detach()[None], student_temperature, teacher_temperature, valid
    )


@full_precision
def local_instance_discrimination_loss(
    student: Tensor,
    teacher: Tensor,
    mined: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.01,
    *,
    valid: Tensor | None = None,
    teacher_gradient: bool = False,
    scrambled_fragments: bool = False,
) -> Tensor:
    """`instance_discrimination_loss` at each of P places of the image, mean over the places.

    ``student`` and ``teacher`` (P, B, D), what `local_windows` returns; ``mined`` (P, K, D): a window meets the windows
    at its place in K other images; ``valid`` (K,) bool.

    ``scrambled_fragments=True`` (the released code) reshapes where it means to transpose: a row is P consecutive
    numbers of the flattened windows, across features and images. There K must be a multiple of B, and ``valid`` is not
    defined. Source: MONA section III-A.
    """
    check_shapes(student=(student, "PBD"), teacher=(teacher, "PBD"), mined=(mined, "PKD"))
    if valid is not None:
        check_shapes(mined=(mined, "PKD"), valid=(valid, "K"))
        check_mask(valid=valid)
    check_temperature(student_temperature, "student_temperature")
    check_temperature(teacher_temperature, "teacher_temperature")
    target, mined = teacher if teacher_gradient else teacher.detach(), mined.detach()
    if scrambled_fragments:
        (places, batch, _), slots = student.shape, mined.shape[1]
        if valid is not None or slots % max(batch, 1):
            raise ValueError(
                f"scrambled_fragments needs a full bank of whole batches: K a multiple of B and no valid; "
                f"got K = {slots}, B = {batch}"
            )
        batches = mined.unflatten(1, (slots // max(batch, 1), batch)).transpose(0, 1)  # (K / B, P, B, D)
        student, target, mined = (x.reshape(1, -1, places) for x in (student, target, batches))
    return _relation_divergence(student, target, mined, student_temperature, teacher_temperature, valid)


def _relation_divergence(
    student: Tensor, target: Tensor, mined: Tensor, student_temperature: float, teacher_temperature: float,
    valid: Tensor | None,
) -> Tensor:  # fmt: skip
    """Mean KL(target || student) of (P, B, D) rows by their relations to (P, K, D)."""
    if valid is not None:
        mined = torch.where(valid[:, None], mined, 0)
    mined = _unit(mined).transpose(1, 2)  # (P, D, K)

    def log_relation(rows: Tensor, temperature: float) -> Tensor:
        similarity = _unit(rows) @ mined / temperature  # (P, B, K)
        if valid is not None:  # a finite stand-in for -inf: inf - inf would reach the gradient
            similarity = similarity.masked_fill(~valid, torch.finfo(similarity.dtype).min / 4)
        return similarity.log_softmax(dim=2)

    student_log, target_log = log_relation(student, student_temperature), log_relation(target, teacher_temperature)
    terms = target_log.exp() * (target_log - student_log)  # (P, B, K)
    if valid is not None:
        terms = terms.masked_fill(~valid, 0)
    return terms.sum() / max(student.shape[0] * student.shape[1], 1)


def local_windows(
    maps: Tensor,
    head: Callable[[Tensor], Tensor] | None = None,
    *,
    grid: int = 6,
    size: int = 64,
    stride: int = 32,
    cells: int = 8,
) -> Tensor:
    """The local embeddings of GLCon: ``grid`` x ``grid`` windows of (B, C, H, W) maps -> (P, B, D), P = grid ** 2.

    Window (i, j), number i * grid + j, starts at pixel (i * stride, j * stride), is ``size`` px wide and is averaged
    over ``cells`` x ``cells`` cells; D = channels * cells ** 2. Windows share their cells: the map is pooled once, once
    goes through the ``head`` (any pointwise module, such as 1x1 convolutions with whatever between them; the same
    result as a head on each window), and the windows are views of it. The defaults are the paper's 36 windows of 64 px
    in 256 px images (the released code has grid=7). ``size`` and ``stride`` are multiples of a cell, size / cells px.
    Source: MONA sections III-A and IV-B.
    """
    check_shapes(maps=(maps, "BCHW"))
    if min(grid, size, stride, cells) < 1 or size % cells or stride % (size // cells):
        raise ValueError(
            f"grid, size, stride and cells are at least 1, and size and stride are multiples of size / cells; "
            f"got {grid}, {size}, {stride} and {cells}"
        )
    side, cell = (grid - 1) * stride + size, size // cells
    if min(maps.shape[2:]) < side:
        raise ValueError(f"{grid} windows of {size} px, {stride} px apart, need {side} px; got {tuple(maps.shape)}")
    pooled = F.avg_pool2d(maps[:, :, :side, :side], cell)
    if head is not None:
        pooled = head(pooled)
    windows = pooled.unfold(2, cells, stride // cell).unfold(3, cells, stride // cell)  # (B, C, grid, grid, cell, cell)
    return windows.permute(2, 3, 0, 1, 4, 5).reshape(grid * grid, len(maps), pooled.shape[1] * cells**2)


# --- tailness: the anatomical contrastive loss -----------------------------------------------------------------------


@full_precision
def class_relation_distribution(prototypes: Tensor, valid: Tensor | None = None) -> Tensor:
    """Where the negatives of class c come from: row c (C, C) is the softmax over v != c of <prototype_c, prototype_v>.

    ``prototypes`` (C, D), the class means, raw: longer vectors make a sharper choice. The diagonal is 0, every other
    row sums to 1. ``valid`` (C,) bool: a class that is not there has a row and a column of zeros; a class that is alone
    has a row of zeros. The paper's softmax has no temperature; ReCo's cosine / 0.5 is this function of unit vectors
    times sqrt(2). Source: MONA below eq. 4, after ReCo (arXiv 2104.04465).
    """
    check_shapes(prototypes=(prototypes, "CD"))
    if valid is not None:
        check_shapes(prototypes=(prototypes, "CD"), valid=(valid, "C"))
        check_mask(valid=valid)
    if prototypes.numel() == 0:
        return prototypes @ prototypes.T
    others = ~torch.eye(len(prototypes), dtype=torch.bool, device=prototypes.device)  # (C, C)
    if valid is not None:
        prototypes = torch.where(valid[:, None], prototypes, 0)
        others = others & valid[:, None] & valid[None, :]

    # A dot product of entries near 1e30 overflows. In units of the largest entry it does not, and what is multiplied
    # back afterwards is only the distance from the row's largest, which may as well be very large as infinite.
    largest = prototypes.detach().abs().amax().clamp(min=SHORTEST)
    relation = (prototypes / largest) @ (prototypes / largest).T  # (C, C)
    highest = relation.detach().masked_fill(~others, -math.inf).amax(dim=1, keepdim=True)
    below = (relation - torch.where(highest > -math.inf, highest, 0)).masked_fill(~others, 0)
    weight = (below * largest.clamp(max=1e15) ** 2).exp().masked_fill(~others, 0)
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=1)  # the largest weight is 1: the clamp is for no others


@full_precision
def anatomical_contrastive_loss(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """ACF: each query names its class mean among that mean and K negatives. Mean over queries, then over classes.

    ``queries`` (C, Q, D); ``positives`` (C, D), the class means; ``negatives`` (C, K, D), shared by a class's queries;
    cosine. ``valid`` (C,) bool: the other classes count for nothing, whatever their rows hold. Gradient flows to all
    three: detach what comes from a teacher or a bank before the call. With K = 0 the loss is 0.

    The paper sums, over all classes that are there; we take means, so that its weight 0.01 does not depend on how many
    classes and queries there are. Its dot products are cosines here, as in ReCo and in the released code. A negative
    row of zeros (with which the released banks start) has cosine 0 to every query. Source: MONA eq. 3.
    """
    check_shapes(queries=(queries, "CQD"), positives=(positives, "CD"), negatives=(negatives, "CKD"))
    check_temperature(temperature)
    if valid is not None:
        check_shapes(queries=(queries, "CQD"), valid=(valid, "C"))
        check_mask(valid=valid)
        queries, negatives = (torch.where(valid[:, None, None], x, 0) for x in (queries, negatives))
        positives = torch.where(valid[:, None], positives, 0)
    unit = _unit(queries)
    positive = (unit @ _unit(positives)[:, :, None]).squeeze(2) / temperature  # (C, Q)
    negative = unit @ _unit(negatives).transpose(1, 2) / temperature  # (C, Q, K)
    terms = torch.logaddexp(positive, negative.logsumexp(dim=2)) - positive
    per_class = terms.sum(dim=1) / max(queries.shape[1], 1)  # (C,)
    if valid is None:
        return per_class.sum() / max(len(per_class), 1)
    return per_class.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


# --- consistency and diversity ---------------------------------------------------------------------------------------


@full_precision
def equivariance_loss(
    first_logits: Tensor,
    second_logits: Tensor,
    mask: Tensor | None = None,
    *,
    one_way: bool = False,
    per_image: bool = False,
) -> Tensor:
    """The warped prediction and the prediction of the warped image: KL both ways, summed, in nats, mean over pixels.

    ``first_logits`` and ``second_logits`` (B, C, H, W); ``mask`` (B, H, W), bool or weights >= 0, keeps the pixels
    whose source lies in the image: a warp fills the rest with zeros, which are a prediction of nothing. What the logits
    hold there does not matter. Gradient flows to both.

    The released code: ``one_way=True``, KL(first || second) alone with the first detached, and ``per_image=True``, the
    mean over images of each image's mean (an image without a pixel in the mask counts as 0). Source: MONA eq. 6.
    """
    check_shapes(first_logits=(first_logits, "BCHW"), second_logits=(second_logits, "BCHW"))
    if mask is None:
        mask = torch.ones_like(first_logits[:, :1]).squeeze(1)
    else:
        check_shapes(first_logits=(first_logits, "BCHW"), mask=(mask, "BHW"))
        first_logits, second_logits = (torch.where(mask[:, None] == 0, 0, x) for x in (first_logits, second_logits))
    if first_logits.numel() == 0:
        return (first_logits * 0).sum() + (second_logits * 0).sum()
    first_log = _log_softmax(first_logits.detach() if one_way else first_logits)
    second_log = _log_softmax(second_logits)
    weight = first_log.exp() if one_way else first_log.exp() - second_log.exp()  # p, or p - q: both directions at once
    divergence = (weight * (first_log - second_log)).sum(dim=1)  # (B, H, W), 0 where masked

    mask = mask.to(divergence.dtype)
    total = (divergence * mask).flatten(1).sum(dim=1)  # (B,)
    pixels = mask.flatten(1).sum(dim=1)
    if not per_image:
        total, pixels = total.sum(), pixels.sum()
    return (total / torch.where(pixels > 0, pixels, 1)).mean()


def _log_softmax(logits: Tensor) -> Tensor:
    """log softmax over axis 1. A class 1e28 below the highest is as good as infinitely far, and stays a number."""
    highest = logits.detach().amax(dim=1, keepdim=True)
    return (logits / 2 - highest / 2).clamp(min=-5e27).mul(2).log_softmax(dim=1)  # halves: 3e38 + 3e38 is infinite


@full_precision
def nearest_neighbor_loss(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    k: int = 5,
    *,
    valid: Tensor | None = None,
    swapped_roles: bool = False,
) -> Tensor:
    """The student should be near the neighbours of the teacher: mean over the B images and k entries of -cos.

    ``student`` (B, D); ``teacher`` (B, D), which picks its k nearest entries of the ``bank`` (M, D), by cosine; a bank
    with fewer than k entries is used whole. ``valid`` (M,) bool leaves slots out that nothing was pushed to, whatever
    they hold. In [-1, 1]. Only the student gets a gradient. NaN in a row that picks is as little hidden as in one that
    is measured.

    ``swapped_roles=True`` (the released code): the student picks and the teacher is measured, so the value moves and
    nobody gets a gradient (the released value is twice ours plus 2). Source: MONA section III-B, "Diversity"; after
    mean-shift (arXiv 2105.07269).
    """
    check_shapes(student=(student, "BD"), teacher=(teacher, "BD"), bank=(bank, "MD"))
    if valid is None:
        valid = torch.ones(len(bank), dtype=torch.bool, device=bank.device)
    check_shapes(bank=(bank, "MD"), valid=(valid, "M"))
    check_mask(valid=valid)
    check_counts(k=k)
    entries = _unit(torch.where(valid[:, None], bank.detach(), 0)).T  # (D, M)
    to_student, to_teacher = _unit(student) @ entries, _unit(teacher.detach()) @ entries  # (B, M)
    picks, measured = (to_student.detach(), to_teacher) if swapped_roles else (to_teacher, to_student)
    picked, nearest = picks.masked_fill(~valid, -math.inf).topk(min(k, len(bank)), dim=1)  # (B, k)
    cosine = measured.gather(1, nearest) * torch.where(picked.isnan(), math.nan, 1)
    kept = valid[nearest]
    distance = -cosine.masked_fill(~kept, 0).sum() / kept.sum().clamp(min=1)
    return distance + (student * 0).sum() if swapped_roles else distance


# --- samplers: which pixels ------------------------------------------------------------------------------------------


def easy_and_hard(labels: Tensor, probabilities: Tensor, threshold: float = 0.97) -> tuple[Tensor, Tensor]:
    """Two (C, B * H * W) bool masks: the pixels of each class that are easy, p_c > threshold, and hard, p_c <= it.

    ``labels`` (B, H, W) int, true or pseudo, -1 for a pixel that is left out; ``probabilities`` (B, C, H, W), of which
    the one at a pixel's own label decides. Source: MONA eq. 5.
    """
    check_shapes(labels=(labels, "BHW"), probabilities=(probabilities, "BCHW"))
    members = _class_masks(labels, probabilities.shape[1])
    own = probabilities.gather(1, labels.long().clamp(min=0)[:, None]).flatten()  # (B * H * W,)
    easy = own > threshold
    return members & easy, members & ~easy


def sample_pixels(masks: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` pixels of each of the (C, N) bool ``masks``, uniform, with replacement -> index (C, count), valid (C,).

    An empty mask is not valid, and its indices (all 0) mean nothing.
    """
    check_shapes(masks=(masks, "CN"))
    check_mask(masks=masks)
    check_counts(count=count)
    classes = torch.arange(len(masks), device=masks.device)[:, None].expand(-1, count)
    return _sample_of_class(masks, classes, generator)


def sample_queries(
    labels: Tensor,
    probabilities: Tensor,
    generator: torch.Generator,
    count: int = 256,
    threshold: float = 0.97,
    hard_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``count`` query pixels of every class, however rare it is -> index (C, count) into B * H * W, valid (C,) bool.

    ``labels`` and ``probabilities`` as in `easy_and_hard`. The first round(hard_share * count) are hard pixels, the
    rest easy ones; where a class has only one of the two kinds and both are wanted, all come from that one. Uniform,
    with replacement. A class without a pixel of a wanted kind is not valid. The paper gives no share; the default draws
    hard pixels only, as in ReCo and the authors' earlier code. Source: MONA eq. 5 and section IV-B (256 queries).
    """
    check_counts(count=count)
    if not 0 <= hard_share <= 1:
        raise ValueError(f"hard_share must lie in [0, 1], got {hard_share}")
    hard_count = round(hard_share * count)
    easy, hard = easy_and_hard(labels, probabilities, threshold)
    if hard_count in (0, count):
        return sample_pixels(hard if hard_count else easy, count, generator)
    easy_index, has_easy = sample_pixels(easy, count, generator)
    hard_index, has_hard = sample_pixels(hard, count, generator)
    wants_hard = torch.arange(count, device=labels.device) < hard_count  # (count,)
    takes_hard = torch.where(wants_hard, has_hard[:, None], ~has_easy[:, None])  # (C, count)
    return torch.where(takes_hard, hard_index, easy_index), has_easy | has_hard


def sample_negative_classes(distribution: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """For each class c, ``count`` classes drawn from row c of the ``distribution`` (C, C) -> (C, count) int64.

    `class_relation_distribution` makes the rows. A class of probability 0 is never drawn; the draws of a row of zeros
    or with NaN are classes, and mean nothing. For negatives from a bank: these are the classes to take them from.
    Source: MONA below eq. 4.
    """
    check_shapes(distribution=(distribution, "CC"))
    check_counts(count=count)
    cumulative = distribution.detach().float().cumsum(dim=1)
    total = cumulative[:, -1:]
    draw = torch.rand(len(distribution), count, generator=generator, device=distribution.device) * total
    draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not reach the end
    return torch.searchsorted(cumulative, draw, right=True).clamp(max=len(distribution) - 1)


def sample_negatives(
    labels: Tensor, distribution: Tensor, generator: torch.Generator, count: int = 512
) -> tuple[Tensor, Tensor]:
    """``count`` negative pixels for every class -> index (C, count) into B * H * W, valid (C,) bool.

    The class of each is drawn from the class's row of the ``distribution`` (C, C), then a pixel uniformly from those of
    ``labels`` (B, H, W) that have this class; with replacement. Where the distribution holds a class that has no pixel,
    hand `class_relation_distribution` which classes are there. A class is valid when its row is not zero and all
    classes in it have pixels; with NaN in its row, too: the prototypes were NaN, and the loss should say so.
    Source: MONA eq. 3-4 and section IV-B (512 keys).
    """
    check_shapes(labels=(labels, "BHW"), distribution=(distribution, "CC"))
    check_counts(count=count)
    members = _class_masks(labels, len(distribution))
    index, present = _sample_of_class(members, sample_negative_classes(distribution, count, generator), generator)
    possible = distribution > 0  # (C, C)
    return index, possible.any(dim=1) & (present | ~possible).all(dim=1) | distribution.isnan().any(dim=1)


def _class_masks(labels: Tensor, classes: int) -> Tensor:
    """(C, N) bool: which pixels have which class."""
    return labels.flatten()[None, :] == torch.arange(classes, device=labels.device)[:, None]


def _sample_of_class(masks: Tensor, classes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pixel of mask ``classes[...]`` for each entry -> its index, and which of the (C, N) masks have any (C,).

    One running count over all masks turns "the r-th pixel of class v" into a binary search.
    """
    size = masks.shape[1]
    if masks.numel() == 0:
        return torch.zeros_like(classes), torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    running = masks.flatten().cumsum(dim=0, dtype=torch.int32)  # (C * N,)
    until = running[size - 1 :: size]  # (C,): pixels of this class and all before it
    per_class = until.diff(prepend=until.new_zeros(1))
    draw = torch.randint(2**62, classes.shape, generator=generator, device=masks.device)  # modulo is fair to 1e-12
    rank = draw % per_class[classes].clamp(min=1)
    place = torch.searchsorted(running, (until - per_class)[classes] + rank.int() + 1)  # the first to reach that count
    present = per_class > 0
    return torch.where(present[classes], place - classes * size, 0), present


def released_contrast_masks(
    labels: Tensor, probabilities: Tensor, entropy: Tensor, labelled: Tensor, percent: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels that the released code contrasts, three (C, B * H * W) bool masks: anchors, positives and negatives.

    ``labels`` (B, H, W) int, true or pseudo, -1 for none; ``probabilities`` (B, C, H, W) of the teacher and ``entropy``
    (B, H, W) of the student, both on the strong view; ``labelled`` (B,) bool; ``percent`` in [0, 100]: there
    20 (1 - epoch / epochs). An unlabelled pixel has low entropy up to this percentile of the unlabelled images, and
    high entropy from percentile (100 - percent) on; a labelled one counts as low.

    - anchors of c: label c, p_c > 0.3, low entropy: easy pixels, fewer by the epoch;
    - positives of c, whose mean is the positive key: label c, low entropy;
    - negatives of c: unlabelled, label c (of the class itself), p_c < 0.97, high entropy, at least three classes more
      probable. So three classes have none at all, and four only where teacher and pseudo-label disagree entirely.
      (A labelled pixel would need the label c and another label.)

    Source: the code of MONA (github.com/charlesyou999648/MONA, commit 3c70567), after U2PL.
    """
    check_shapes(labels=(labels, "BHW"), probabilities=(probabilities, "BCHW"))
    check_shapes(labels=(labels, "BHW"), entropy=(entropy, "BHW"), labelled=(labelled, "B"))
    check_mask(labelled=labelled)
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie in [0, 100], got {percent}")
    entropy = entropy.to(torch.promote_types(entropy.dtype, torch.float32))  # nanquantile takes no half
    given = labelled[:, None, None].expand_as(entropy)
    unlabelled_entropy = entropy.masked_fill(given, math.nan).flatten()
    lowest = unlabelled_entropy.nanquantile(percent / 100)  # NaN where all is labelled: compares False
    highest = unlabelled_entropy.nanquantile(1 - percent / 100)
    low, high = given | (entropy <= lowest), ~given & (entropy >= highest)

    classes = probabilities.shape[1]
    members = _class_masks(labels, classes)
    own = probabilities.transpose(0, 1).flatten(1)  # (C, N)
    above = torch.stack([(own > own[c]).sum(dim=0) for c in range(classes)])  # (C, N): how many are more probable
    anchors = members & (own > 0.3) & low.flatten()
    negatives = members & (own < 0.97) & high.flatten() & (above >= 3) & (above < 20)
    return anchors, members & low.flatten(), negatives


# --- samplers: features of these pixels ------------------------------------------------------------------------------


def sample_features(maps: Sequence[Tensor], index: Tensor, size: tuple[int, int]) -> Tensor:
    """The rows at pixels ``index`` (...) of feature maps up-sampled to ``size`` (H, W) and concatenated -> (..., D).

    ``maps``: tensors (B, C_l, h_l, w_l) of any resolutions, for example the levels of a decoder; D is the sum of C_l.
    The full-size map, sixteen times 130 MB at the paper's size, is never built: each row is the weighted sum of the
    four cells around its pixel, what bilinear interpolation (``align_corners=False``) takes. A pointwise head (1x1
    convolutions as ``nn.Linear``) on the rows is therefore the dense head at those pixels. At least float32.
    """
    _check_maps(maps, len(maps[0]) if maps else 0)
    height, width = size
    pixel = index.flatten()
    image, y, x = pixel // (height * width), pixel // width % height, pixel % width
    rows = []
    for features in maps:
        dtype = torch.promote_types(features.dtype, torch.float32)
        top, bottom, down = _cells_around(y, height, features.shape[2], dtype)
        left, right, across = _cells_around(x, width, features.shape[3], dtype)
        ys, xs = torch.stack([top, top, bottom, bottom]), torch.stack([left, right, left, right])  # (4, n)
        corners = features[image.expand_as(ys), :, ys, xs].to(dtype)  # (4, n, C_l)
        weights = torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across])
        rows.append((corners * weights[:, :, None]).sum(dim=0))
    return torch.cat(rows, dim=1).unflatten(0, index.shape)


def _cells_around(pixel: Tensor, pixels: int, cells: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells of an axis of ``cells`` between which a ``pixel`` of ``pixels`` lies, and the second one's share.

    In whole numbers, as fractions of 2 * pixels: no rounding decides which cell it is.
    """
    position = ((2 * pixel + 1) * cells - pixels).clamp(min=0)  # of the pixel's centre, in cells times 2 * pixels
    first = position // (2 * pixels)
    return first, (first + 1).clamp(max=cells - 1), (position % (2 * pixels)).to(dtype) / (2 * pixels)


def class_means(maps: Sequence[Tensor], labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean row of each class over all its pixels -> means (C, D), present (C,) bool; a class that is absent is 0.

    ``maps`` as in `sample_features`, up-sampled to the size of ``labels`` (B, H, W) int, -1 for a pixel left out. A
    mean commutes with a linear head (with bias, too), so the head of the mean is the mean of the head: the positive key
    of a class, from every pixel it has. The sum is over cells and not over up-sampled pixels: each cell is weighted by
    what it contributes to the pixels of the class. Source: MONA eq. 4.
    """
    _check_maps(maps, len(labels))
    check_shapes(labels=(labels, "BHW"))
    masks = labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]  # (B, C, H, W)
    count = masks.sum(dim=(0, 2, 3))  # (C,)
    means = []
    with torch.autocast(labels.device.type, enabled=False):
        for features in maps:
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            weights = masks.to(features.dtype) / count.clamp(min=1).to(features.dtype)[:, None, None]
            if features.shape[2:] != labels.shape[1:]:
                rows = _interpolation(features.shape[2], labels.shape[1], features)
                columns = _interpolation(features.shape[3], labels.shape[2], features)
                weights = rows @ weights @ columns.T  # (B, C, h_l, w_l)
            means.append((weights.flatten(2) @ features.flatten(2).transpose(1, 2)).sum(dim=0))  # (C, C_l)
    return torch.cat(means, dim=1), count > 0


def _interpolation(cells: int, pixels: int, like: Tensor) -> Tensor:
    """(cells, pixels): the share of each cell in each pixel under linear interpolation of an axis."""
    return F.interpolate(torch.eye(cells, dtype=like.dtype, device=like.device)[None], size=pixels, mode="linear")[0]


def _check_maps(maps: Sequence[Tensor], batch: int) -> None:
    if not maps or any(features.ndim != 4 or len(features) != batch for features in maps):
        shapes = [tuple(features.shape) for features in maps]
        raise ValueError(f"maps must be at least one (B, C, h, w) with B = {batch}, got {shapes}")


def _unit(vectors: Tensor) -> Tensor:
    """`unit_vectors` along the last axis of (..., D)."""
    return unit_vectors(vectors.flatten(0, -2)).reshape(vectors.shape)
