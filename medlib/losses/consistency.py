"""What semi-supervised baselines ask of unlabelled images: one function for each, from the paper that proposed it.

All of them compare predictions of the same pixels and differ in whose prediction is the target: an averaged network
(mean teacher, UA-MT, ICT, pseudo-labels), a second network (CPS, deep co-training), other parts of the same network
(URPC, CCT), or the prediction itself (entropy minimisation).

``logits`` are (B, C, ...) with one or more spatial axes, ``target`` are probabilities of the same shape. A target gets
no gradient unless a function says so. With nothing to compare a loss is 0 and still attached to its first argument.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from medlib.losses.contrastive import full_precision
from medlib.losses.dvcl import entropy_from_logits
from medlib.losses.segmentation import check_labels, cross_entropy_loss

LOWEST = -1e4  # of a log probability: exp(-104) is already 0 in float32


@full_precision
def mean_teacher_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels and classes of (softmax(logits) - target)^2, in [0, 1].

    ``logits`` of the student and ``target``, the teacher's probabilities, both (B, C, ...).
    Source: Tarvainen and Valpola, NeurIPS 2017, section 3, J; the division by C is that of the authors' code.
    """
    _check_alike(logits=logits, target=target)
    return _mean((logits.softmax(dim=1) - target.detach()).square(), logits)


def uncertainty_aware_loss_by_definition(
    logits: Tensor, target: Tensor, uncertainty: Tensor, threshold: float
) -> float:
    """UA-MT eq. 4, pixel by pixel, divided by C. Same arguments and value as `uncertainty_aware_loss`."""
    f, f_teacher, u = (x.movedim(1, -1).flatten(0, -2) for x in (logits.softmax(dim=1), target, uncertainty[:, None]))
    chosen = [v for v in range(len(u)) if float(u[v]) < threshold]
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(f_teacher[v], f[v], strict=True)) for v in chosen]
    return sum(distances) / logits.shape[1] / max(len(chosen), 1)


@full_precision
def uncertainty_aware_loss(logits: Tensor, target: Tensor, uncertainty: Tensor, threshold: float | Tensor) -> Tensor:
    """`mean_teacher_loss` of those pixels alone at which the teacher is certain: ``uncertainty`` below ``threshold``.

    ``logits``, ``target`` (B, C, ...); ``uncertainty`` (B, ...), the entropy in nats of the mean of several noisy
    passes of the teacher (eq. 3); ``threshold`` H in nats, a number or a 0-d tensor.
    Source: UA-MT (Yu et al., MICCAI 2019), eq. 4, divided by C as in the authors' code (where C is 2).
    """
    _check_alike(logits=logits, target=target)
    if uncertainty.shape != logits[:, 0].shape:
        raise ValueError(f"uncertainty must be {tuple(logits[:, 0].shape)}, got {tuple(uncertainty.shape)}")
    certain = uncertainty < threshold  # (B, ...)
    distance = (logits.softmax(dim=1) - target.detach()).square().mean(dim=1)  # (B, ...)
    return (distance * certain).sum() / certain.sum().clamp(min=1)


def uncertainty_threshold(ramp: Tensor, classes: int) -> Tensor:
    """H of UA-MT, from (almost) 3/4 of the largest entropy log C at ``ramp`` 0 to all of it at 1. 0-d, in nats.

    Source: UA-MT, section 2.2; its code has log 2 for its 2 classes, others have kept that for more of them.
    """
    return (0.75 + 0.25 * ramp) * math.log(classes)


@full_precision
def cross_pseudo_supervision_loss(first_logits: Tensor, second_logits: Tensor, confidence: float = 0.0) -> Tensor:
    """Each network learns the other's decisions: CE(first, argmax second) + CE(second, argmax first), in nats.

    ``first_logits``, ``second_logits`` (B, C, ...). A decision with a probability below ``confidence``, in [0, 1), is
    not looked at: 0, as in the paper, takes all. Each cross-entropy is a mean over the pixels looked at.
    Source: CPS (Chen et al., CVPR 2021), eq. 3 (section 3.1).
    """
    _check_alike(first_logits=first_logits, second_logits=second_logits)
    check_confidence(confidence)
    first, second = (_decisions(logits.detach(), confidence) for logits in (first_logits, second_logits))
    return cross_entropy_loss(first_logits, second) + cross_entropy_loss(second_logits, first)


def check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` unless ``confidence`` is in [0, 1)."""
    if not 0 <= confidence < 1:
        raise ValueError(f"confidence must be in [0, 1), got {confidence}")


def _decisions(logits: Tensor, confidence: float) -> Tensor:
    """The likeliest class (B, ...) of logits (B, C, ...), -1 where its probability is below ``confidence``."""
    probability, decision = logits.softmax(dim=1).max(dim=1)
    return decision.masked_fill(probability < confidence, -1)


def pseudo_label_loss_by_definition(
    logits: Tensor, labels: Tensor, confidence: Tensor, threshold: float = 0.97
) -> float:
    """ReCo's pseudo-label loss pixel by pixel, for (B, C, H, W)."""
    total, count = 0.0, 0
    for z, y, s in zip(logits.log_softmax(dim=1), labels, confidence, strict=True):
        pixels = [(i, j) for i in range(y.shape[0]) for j in range(y.shape[1]) if y[i, j] != -1]
        sure = sum(s[i, j].item() >= threshold for i, j in pixels)
        total += sum(-z[y[i, j], i, j].item() * sure / len(pixels) for i, j in pixels)
        count += len(pixels)
    return total / count


@full_precision
def pseudo_label_loss(logits: Tensor, labels: Tensor, confidence: Tensor, threshold: float = 0.97) -> Tensor:
    """Cross-entropy with pseudo-labels; an image counts by the share of its pixels that the teacher is sure of.

    ``logits`` (B, C, ...); ``labels`` (B, ...) int, -1 for a pixel left out; ``confidence`` (B, ...) in [0, 1], the
    teacher's probability of its label, sure from ``threshold`` on. Mean over the pixels with a label.
    Source: ReCo (arXiv 2104.04465), from which MONA's released code has it; MONA names the term without a formula.
    """
    if confidence.shape != labels.shape:
        raise ValueError(f"confidence must be {tuple(labels.shape)} as labels, got {tuple(confidence.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    check_labels(logits, labels)
    labels = labels.long()  # before any comparison: a uint8 of 255 is not -1
    there = labels != -1
    sure = (there & (confidence >= threshold)).flatten(1).sum(dim=1).to(logits.dtype)
    sure = sure / there.flatten(1).sum(dim=1).clamp(min=1)  # (B,)
    terms = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")  # (B, ...)
    return (terms * sure.view(-1, *[1] * (terms.ndim - 1))).sum() / there.sum().clamp(min=1)


def entropy_minimization_loss(logits: Tensor) -> Tensor:
    """Mean over pixels of the entropy of softmax(logits) over its largest value log C, in [0, 1].

    ``logits`` (B, C, ...). The prediction is its own target: the gradient makes it surer of what it holds likeliest.
    Source: Grandvalet and Bengio, NeurIPS 2004; normalised as in ADVENT (Vu et al., CVPR 2019), eq. 2.
    """
    _check_alike(logits=logits)
    return _mean(entropy_from_logits(logits), logits) / math.log(logits.shape[1])


@full_precision
def interpolation_consistency_loss(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """`mean_teacher_loss` at a mixture of two images: its target is the same mixture of the teacher's predictions.

    ``logits`` (B, C, ...) of the student at share * u_1 + (1 - share) * u_2; ``first``, ``second`` (B, C, ...), the
    teacher's probabilities at u_1 and u_2; ``share`` (B,) in [0, 1].
    Source: ICT (Verma et al., IJCAI 2019), eq. 1 and section 2.
    """
    _check_alike(logits=logits, first=first, second=second)
    return mean_teacher_loss(logits, mixed(first, second, share))


def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Mix_share(first, second) = share * first + (1 - share) * second; ``share`` (B,) for tensors (B, ...)."""
    if share.shape != first.shape[:1]:
        raise ValueError(f"share must be one number for each of {len(first)} images, got {tuple(share.shape)}")
    share = share.view(-1, *[1] * (first.ndim - 1))
    return share * first + (1 - share) * second


def cotraining_agreement_loss_by_definition(first_logits: Tensor, second_logits: Tensor) -> float:
    """H((p_1 + p_2) / 2) - (H(p_1) + H(p_2)) / 2 as it is written, pixel by pixel."""

    def entropy(p: list[float]) -> float:
        return -sum(p_c * math.log(p_c) for p_c in p if p_c > 0)

    p_1, p_2 = (
        logits.softmax(dim=1).movedim(1, -1).flatten(0, -2).tolist() for logits in (first_logits, second_logits)
    )
    terms = [
        entropy([(a + b) / 2 for a, b in zip(one, two, strict=True)]) - (entropy(one) + entropy(two)) / 2
        for one, two in zip(p_1, p_2, strict=True)
    ]
    return sum(terms) / len(terms)


@full_precision
def cotraining_agreement_loss(first_logits: Tensor, second_logits: Tensor) -> Tensor:
    """L_cot: the Jensen-Shannon divergence of both predictions, mean over pixels, in nats, in [0, log 2].

    ``first_logits``, ``second_logits`` (B, C, ...). Both sides get a gradient.
    Source: deep co-training (Qiao et al., ECCV 2018), eq. 2.
    """
    _check_alike(first_logits=first_logits, second_logits=second_logits)
    first, second = _log_softmax(first_logits, 1), _log_softmax(second_logits, 1)
    middle = torch.logaddexp(first, second) - math.log(2)  # log of the mean of both
    divergence = first.exp() * (first - middle) + second.exp() * (second - middle)  # (B, C, ...), twice the summands
    return _mean(divergence.sum(dim=1) / 2, first_logits)


@full_precision
def cotraining_diversity_loss(first: Tensor, second: Tensor, first_fooled: Tensor, second_fooled: Tensor) -> Tensor:
    """L_dif: each network predicts from the image that fools the other what that one predicts from the image itself.

    H(p_1(x), p_2(g_1(x))) + H(p_2(x), p_1(g_2(x))), mean over pixels, in nats, H(p, q) = -sum_c p_c log q_c. All are
    logits (B, C, ...): ``first`` = p_1(x), ``second`` = p_2(x), ``first_fooled`` = p_1(g_2(x)) and ``second_fooled`` =
    p_2(g_1(x)), where g_i(x) is an adversarial example of network i. All of them get a gradient.
    Source: deep co-training (Qiao et al., ECCV 2018), eq. 4.
    """
    _check_alike(first=first, second=second, first_fooled=first_fooled, second_fooled=second_fooled)
    forth = (first.softmax(dim=1) * _log_softmax(second_fooled, 1)).sum(dim=1)
    back = (second.softmax(dim=1) * _log_softmax(first_fooled, 1)).sum(dim=1)
    return _mean(-(forth + back), first)


def pyramid_consistency_loss_by_definition(pyramid: Tensor) -> float:
    """URPC eq. 3-5 as they are written, pixel by pixel. Same argument and value as `pyramid_consistency_loss`."""
    p = pyramid.softmax(dim=2).movedim(2, -1).flatten(1, -2)  # (S, V, C)
    S, V, C = p.shape
    total = 0.0
    for s in range(S):
        weights, distances, divergences = [], [], []
        for v in range(V):
            p_c = [sum(float(p[r, v, j]) for r in range(S)) / S for j in range(C)]
            D = sum(float(p[s, v, j]) * math.log(float(p[s, v, j]) / p_c[j]) for j in range(C))
            divergences.append(D)
            weights.append(math.exp(-D))
            distances.append(sum((float(p[s, v, j]) - p_c[j]) ** 2 for j in range(C)) / C)
        total += sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights) + sum(divergences) / V
    return total / S


@full_precision
def pyramid_consistency_loss(pyramid: Tensor) -> Tensor:
    """Predictions of all scales are drawn to their mean p_c, less where a scale is far from it.

    ``pyramid`` (S, B, C, ...), logits of S scales at the same pixels. With D_s = KL(p_s || p_c) at a pixel and the
    weight w_s = exp(-D_s), the mean over scales of

        sum of w_s (p_s - p_c)^2 / sum of w_s  +  mean of D_s

    over pixels, the square being a mean over classes. The mean prediction and the weights take part in the gradient, as
    in the authors' code.
    Source: URPC (Luo et al., MICCAI 2021), eq. 3-5; each scale is divided by its own weights, as in the code, which
    measures D_s the other way round, KL(p_c || p_s).
    """
    if pyramid.ndim < 4:
        raise ValueError(f"pyramid must be (S, B, C, ...), got {tuple(pyramid.shape)}")
    if pyramid.numel() == 0:
        return pyramid.sum()
    scales = _log_softmax(pyramid, 2)
    mean = torch.logsumexp(scales, dim=0) - math.log(len(scales))  # log p_c (B, C, ...)
    divergence = (scales.exp() * (scales - mean)).sum(dim=2).flatten(1)  # (S, V)
    distance = (scales.exp() - mean.exp()).square().mean(dim=2).flatten(1)  # (S, V)
    weight = torch.exp(-divergence)
    rectified = (weight * distance).sum(dim=1) / weight.sum(dim=1)  # (S,)
    return (rectified + divergence.mean(dim=1)).mean()


@full_precision
def perturbed_decoders_loss(auxiliary: Tensor, target: Tensor) -> Tensor:
    """CCT: decoders that see perturbed features are drawn to what the main decoder predicts from the features as is.

    ``auxiliary`` (K, B, C, ...), logits of K decoders; ``target`` (B, C, ...), probabilities of the main one. Mean over
    decoders, pixels and classes of the squared difference.
    Source: CCT (Ouali et al., CVPR 2020), eq. 2 with d the squared error, as in section 3.2.
    """
    if auxiliary.ndim < 4 or auxiliary.shape[1:] != target.shape:
        raise ValueError(
            f"auxiliary must be (K, B, C, ...) and target (B, C, ...) of the same pixels; "
            f"got {tuple(auxiliary.shape)} and {tuple(target.shape)}"
        )
    return _mean((auxiliary.softmax(dim=2) - target.detach()).square(), auxiliary)


def _log_softmax(logits: Tensor, dim: int) -> Tensor:
    """log softmax, cut where it is far beyond all use, so that 0 * log 0 is 0 for the largest logits that there are."""
    return logits.log_softmax(dim).clamp(min=LOWEST)


def _mean(values: Tensor, source: Tensor) -> Tensor:
    """The mean, or 0 attached to ``source`` where there is nothing to take it of."""
    return values.mean() if values.numel() else source.sum()


def _check_alike(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if len(first) < 3 or any(shape != first for shape in shapes.values()):
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected tensors of one shape (B, C, ...); got {got}")
