"""GCL's two losses: the slow loop, numbers by hand, invariance, collapse, gradients, extremes."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from medlib.losses.contrastive import partition_contrastive_loss
from medlib.losses.gcl import (
    global_partition_loss,
    global_partition_loss_by_definition,
    region_contrastive_loss,
    region_contrastive_loss_by_definition,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PARTS = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3])


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_both_are_their_definitions(temperature):
    z = drawn(8, 5)
    expected = global_partition_loss_by_definition(z, PARTS, temperature)
    torch.testing.assert_close(global_partition_loss(z, PARTS, temperature), expected)
    first, second = drawn(2, 4, 5), drawn(2, 4, 5, seed=1)
    expected = region_contrastive_loss_by_definition(first, second, temperature)
    torch.testing.assert_close(region_contrastive_loss(first, second, temperature), expected)


def test_global_golden():
    """Slices e1 e1 e2 e2, two partitions, tau 1: each names its positive (cos 1) among itself and two at cos 0."""
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    found = global_partition_loss(z, torch.tensor([0, 0, 1, 1]), 1.0)
    assert found.item() == pytest.approx(math.log(1 + 2 / math.e))


def test_region_golden():
    """One slice, two regions e1, e2, alike in both views, tau 1: cos 1 against two negatives at cos 0."""
    views = torch.tensor([[[1.0, 0], [0, 1]]])
    assert region_contrastive_loss(views, views, 1.0).item() == pytest.approx(math.log(1 + 2 / math.e))


def test_other_positives_are_no_negatives():
    """That is the difference to the loss with the same positives: a third slice of the partition changes nothing."""
    z = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    parts = torch.tensor([0, 0, 0, 1])
    assert global_partition_loss(z, parts, 1.0).item() == pytest.approx(math.log(1 + 1 / math.e))
    assert partition_contrastive_loss(z, parts, 1.0) > global_partition_loss(z, parts, 1.0)


def test_length_and_order_do_not_matter():
    z, order = drawn(8, 5), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(global_partition_loss(z * 7, PARTS), global_partition_loss(z, PARTS))
    torch.testing.assert_close(global_partition_loss(z[order], PARTS[order]), global_partition_loss(z, PARTS))
    first, second = drawn(2, 4, 5), drawn(2, 4, 5, seed=1)
    torch.testing.assert_close(region_contrastive_loss(second, first), region_contrastive_loss(first, second))


def test_collapse_is_the_logarithm_of_the_competitors():
    z = torch.ones(4, 3)
    assert global_partition_loss(z, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(math.log(3))
    assert region_contrastive_loss(torch.ones(2, 4, 3), torch.ones(2, 4, 3)).item() == pytest.approx(math.log(7))


def test_gradients():
    z = drawn(8, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: global_partition_loss(z, PARTS, 0.5), (z,))
    first, second = drawn(2, 3, 3).requires_grad_(), drawn(2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: region_contrastive_loss(a, b, 0.5), (first, second))


def test_nothing_to_compare_is_exactly_zero_and_attached():
    for z, parts in ((drawn(3, 2), torch.arange(3)), (drawn(0, 2), torch.zeros(0, dtype=torch.long))):
        z.requires_grad_()
        loss = global_partition_loss(z, parts)
        loss.backward()
        assert loss.item() == 0 and z.grad is not None and not z.grad.any()
    one = drawn(3, 2).requires_grad_()
    global_partition_loss(one, torch.zeros(3, dtype=torch.long)).backward()  # positives, no negatives
    assert one.grad.isfinite().all()
    empty = drawn(0, 4, 2).requires_grad_()
    region_contrastive_loss(empty, empty).backward()


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_for_any_finite_input(size, dtype):
    z = (normalize(drawn(8, 4)) * size).to(dtype).requires_grad_()
    loss = global_partition_loss(z, PARTS) + region_contrastive_loss(z.view(2, 4, 4), z.view(2, 4, 4))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and z.grad.isfinite().all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(8, 5\).*\(7,\)"):
        global_partition_loss(drawn(8, 5), PARTS[:7])
    with pytest.raises(ValueError, match=r"first.*\(2, 4, 5\).*\(2, 3, 5\)"):
        region_contrastive_loss(drawn(2, 4, 5), drawn(2, 3, 5))
    with pytest.raises(ValueError, match="temperature"):
        global_partition_loss(drawn(8, 5), PARTS, 0.0)
