"""Losses on labelled pixels or voxels: cross-entropy, Dice, and their weighted sum.

``logits`` (B, C, ...) with two or three spatial axes, ``labels`` (B, ...) of class ids 0..C-1. A pixel that carries
``ignore_index`` counts nowhere; when every pixel does, each loss is 0 and still attached to the logits.
"""

import torch
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from medlib.losses.contrastive import full_precision


@full_precision
def cross_entropy_loss(logits: Tensor, labels: Tensor, ignore_index: int = -1) -> Tensor:
    """Mean over the labelled pixels of -log softmax(logits)[label], in nats. Shapes as in the module's docstring."""
    check_labels(logits, labels)
    labels = labels.long()  # before any comparison: a uint8 of 255 is not -1
    labelled = (labels != ignore_index).sum().clamp(min=1)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / labelled


@full_precision
def dice_loss(logits: Tensor, labels: Tensor, ignore_index: int = -1) -> Tensor:
    """1 - Dice of the softmax, in [0, 1]. Shapes as in the module's docstring.

    With p the softmax and t the one-hot labels, both 0 at ignored pixels, and sums over all pixels of the whole batch,

        mean over classes of 1 - (2 sum p t + e) / (sum p^2 + sum t^2 + e),   e = 1e-5

    Squared denominators, background included, one sum per batch: the convention of the SSL4MIS code and of the papers
    built on it. Other conventions (no squares, or a Dice per image) give other numbers.
    """
    check_labels(logits, labels)
    labels = labels.long()  # before any comparison: a uint8 of 255 is not -1
    classes = logits.shape[1]
    labelled = (labels != ignore_index)[:, None]  # (B, 1, ...)
    ids = torch.where(labelled[:, 0], labels, 0)
    truth = F.one_hot(ids, classes).movedim(-1, 1).to(logits.dtype)  # (B, C, ...)
    dice = DiceLoss(squared_pred=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    return dice(logits.softmax(dim=1) * labelled, truth * labelled)


def supervised_loss(
    logits: Tensor, labels: Tensor, dice_weight: float, cross_entropy_weight: float, ignore_index: int = -1
) -> Tensor:
    """``dice_weight`` * Dice loss + ``cross_entropy_weight`` * cross-entropy. Each paper has weights of its own."""
    cross_entropy = cross_entropy_loss(logits, labels, ignore_index)
    return dice_weight * dice_loss(logits, labels, ignore_index) + cross_entropy_weight * cross_entropy


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless ``labels`` (B, ...) are class ids of the pixels of ``logits`` (B, C, ...)."""
    if logits.ndim < 3 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"expected logits (B, C, ...) and labels (B, ...) of the same pixels; "
            f"got logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are class ids and must be of an integer type, got {labels.dtype}")
