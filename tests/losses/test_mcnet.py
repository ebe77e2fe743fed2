"""MC-Net's loss: the slow form, numbers by hand, invariance, limits, gradients, extremes."""

import pytest
import torch

from medlib.losses.mcnet import (
    mutual_consistency_loss,
    mutual_consistency_loss_by_definition,
    sharpened,
    sharpened_by_definition,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_both_are_their_definitions():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(sharpened(p, 0.3), sharpened_by_definition(p, 0.3))
    first, second = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    expected = mutual_consistency_loss_by_definition(first, second, 0.5)
    torch.testing.assert_close(mutual_consistency_loss(first, second, 0.5), expected)


def test_golden():
    """0.8 at T = 1/2: 0.64 / (0.64 + 0.04) = 16/17."""
    assert sharpened(torch.tensor(0.8), 0.5).item() == pytest.approx(16 / 17)
    first = torch.tensor([0.8, 0.2]).log().view(1, 2, 1, 1)
    second = torch.tensor([0.5, 0.5]).log().view(1, 2, 1, 1)
    expected = 0.3**2 + (0.5 - 16 / 17) ** 2  # both classes differ by the same, so the mean is one of them
    assert mutual_consistency_loss(first, second, 0.5).item() == pytest.approx(expected)


def test_sharpening_has_its_limits():
    p = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0])
    torch.testing.assert_close(sharpened(p, 1.0), p, atol=1e-6, rtol=0)
    torch.testing.assert_close(sharpened(p, 0.001), torch.tensor([0.0, 0, 0.5, 1, 1]), atol=1e-6, rtol=0)


def test_the_branches_are_alike_and_pixels_have_no_order():
    first, second = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    loss = mutual_consistency_loss(first, second)
    torch.testing.assert_close(mutual_consistency_loss(second, first), loss)
    torch.testing.assert_close(mutual_consistency_loss(first.flip(2) + 3, second.flip(2)), loss)


def test_it_is_zero_for_two_sure_branches_that_agree():
    sure = 60 * torch.nn.functional.one_hot(torch.tensor([[[0, 1], [2, 1]]]), 3).movedim(-1, 1).double()
    assert mutual_consistency_loss(sure, sure).item() == pytest.approx(0, abs=1e-12)
    assert mutual_consistency_loss(sure, sure.roll(1, dims=1)) > 0.5


def test_gradient_flows_to_both_sides():
    first, second = drawn(1, 3, 2, 2).requires_grad_(), drawn(1, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mutual_consistency_loss(a, b, 0.5), (first, second))


@pytest.mark.parametrize("size", [0.0, 1e4, 3e38])
def test_finite_for_any_finite_input(size):
    logits = (drawn(2, 3, 4, 4).sign() * size).float().requires_grad_()
    loss = mutual_consistency_loss(logits, -logits)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    half = drawn(2, 3, 4, 4).bfloat16()
    assert mutual_consistency_loss(half, half).dtype == torch.float32


def test_nothing_is_zero_and_bad_input_is_named():
    empty = drawn(0, 3, 4, 4).requires_grad_()
    mutual_consistency_loss(empty, empty).backward()
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 3, 4, 5\)"):
        mutual_consistency_loss(drawn(2, 3, 4, 4), drawn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="temperature"):
        sharpened(torch.tensor(0.5), 0.0)
