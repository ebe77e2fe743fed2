"""The losses of GLCon's rivals: what they do with empty batches, blank slots and wrong arguments.

Their formulas are tested with the methods that train with them, in ``tests/methods/test_mona.py``.
"""

import math

import pytest
import torch

from medlib.losses.contrastive import COLDEST
from medlib.methods.glcon import prediction_loss, queue_contrastive_loss


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("neighbors", [0, 2, 5])
@pytest.mark.parametrize("anything", [math.nan, math.inf])
def test_a_slot_left_out_may_hold_anything(neighbors, anything):
    query, positive, queue = normal(3, 5).requires_grad_(), normal(3, 5, seed=1), normal(7, 5, seed=2)
    valid = torch.tensor([True, True, False, True, True, False, False])
    broken = torch.where(valid[:, None], queue, anything)
    expected = queue_contrastive_loss(query, positive, queue, valid=valid, neighbors=neighbors)
    loss = queue_contrastive_loss(query, positive, broken, valid=valid, neighbors=neighbors)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    found, wanted = torch.autograd.grad(loss, query), torch.autograd.grad(expected, query)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("neighbors", [0, 2])
def test_nan_is_never_hidden(place, neighbors):
    rows = [normal(3, 5, seed=seed) for seed in range(3)]
    rows[place][1, 2] = math.nan
    assert queue_contrastive_loss(*rows, valid=torch.tensor([True, True, False]), neighbors=neighbors).isnan()
    if place < 2:
        assert prediction_loss(*rows[:2]).isnan()


def test_an_empty_batch_is_zero_and_attached():
    query, queue = torch.ones(0, 5, requires_grad=True), normal(7, 5)
    valid = torch.ones(7, dtype=torch.bool)
    for loss in (
        queue_contrastive_loss(query, query, queue, valid=valid),
        queue_contrastive_loss(query, query, queue, valid=valid, neighbors=3),
        prediction_loss(query, query),
    ):
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
        assert query.grad.shape == query.shape
        query.grad = None


def test_finite_at_the_coldest_temperature():
    query, positive, queue = (normal(3, 5, seed=seed).float() for seed in range(3))
    query.requires_grad_()
    loss = queue_contrastive_loss(query, positive, queue, COLDEST, valid=torch.ones(3).bool(), neighbors=2)
    loss.backward()
    assert loss.isfinite()
    assert query.grad.isfinite().all()


def test_wrong_arguments_are_named():
    a, valid = torch.ones(3, 4), torch.ones(3, dtype=torch.bool)
    for mask in (valid.long(), valid.to(torch.uint8), valid.float()):
        with pytest.raises(ValueError, match=f"valid must be bool, got {mask.dtype}"):
            queue_contrastive_loss(a, a, a, valid=mask)
    for neighbors in (2.0, -1):
        with pytest.raises(ValueError, match=f"neighbors must be .*, got {neighbors}"):
            queue_contrastive_loss(a, a, a, valid=valid, neighbors=neighbors)
    with pytest.raises(ValueError, match="temperature.*1e-42"):
        queue_contrastive_loss(a, a, a, 1e-42, valid=valid)


def test_an_empty_queue_leaves_nothing_to_tell_apart():
    none = torch.zeros(0, 5, dtype=torch.float64)
    nobody = torch.zeros(0, dtype=torch.bool)
    for neighbors in (0, 2):
        loss = queue_contrastive_loss(normal(3, 5), normal(3, 5, seed=1), none, valid=nobody, neighbors=neighbors)
        assert loss == 0
