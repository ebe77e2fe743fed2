"""MC-Net: mutual consistency of two decoders (Wu et al., MICCAI 2021, arXiv 2103.02911).

Like IDEAL's cross-consistency, it lets each of two decoders learn from the other; unlike it, the target is a sharpened
probability instead of a decision, the distance a squared error instead of a cross-entropy, and the target takes part in
the gradient, as in the authors' code.
"""

import torch
from torch import Tensor

from medlib.losses.contrastive import check_shapes, check_temperature, full_precision


def sharpened_by_definition(probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """P^(1/T) / (P^(1/T) + (1 - P)^(1/T)), entry by entry. Same arguments and value as `sharpened`."""
    P, T = probabilities, temperature
    return P ** (1 / T) / (P ** (1 / T) + (1 - P) ** (1 / T))


def sharpened(probabilities: Tensor, temperature: float = 0.1) -> Tensor:
    """Probabilities in [0, 1] of any shape, each pushed to the nearer of 0 and 1; 1/2 stays. Shape as given.

    The classes are sharpened one by one, as in the paper: with more than two of them they no longer sum to 1.
    """
    check_temperature(temperature)
    smallest = torch.finfo(probabilities.dtype).eps
    p = probabilities.clamp(smallest, 1 - smallest)
    return torch.sigmoid((p.log() - torch.log1p(-p)) / temperature)


def mutual_consistency_loss_by_definition(
    first_logits: Tensor, second_logits: Tensor, temperature: float = 0.1
) -> Tensor:
    """The loss L_mc as it is written. Same arguments and value as `mutual_consistency_loss`."""
    P_A, P_B = first_logits.softmax(dim=1), second_logits.softmax(dim=1)
    sPL_A, sPL_B = sharpened_by_definition(P_A, temperature), sharpened_by_definition(P_B, temperature)
    return ((P_A - sPL_B) ** 2).mean() + ((P_B - sPL_A) ** 2).mean()


@full_precision
def mutual_consistency_loss(first_logits: Tensor, second_logits: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean squared difference between each branch's probabilities and the other's sharpened ones, both ways summed.

    ``first_logits``, ``second_logits`` (B, K, H, W) of the same pixels; the mean is over pixels and classes;
    ``temperature`` T of the sharpening, 0.1 in the paper. Gradient flows to both sides of each difference.
    Source: MC-Net, eq. 1-3.
    """
    check_shapes(first_logits=(first_logits, "BKHW"), second_logits=(second_logits, "BKHW"))
    check_temperature(temperature)
    if first_logits.numel() == 0:
        return (first_logits * 0).sum() + (second_logits * 0).sum()
    first, second = first_logits.softmax(dim=1), second_logits.softmax(dim=1)
    forth = (first - sharpened(second, temperature)).square().mean()
    return forth + (second - sharpened(first, temperature)).square().mean()
