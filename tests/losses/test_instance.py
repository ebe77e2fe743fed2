"""The losses of GLCon's rivals: numbers by hand, the formulas as loops, who learns, empty batches, blank slots."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses.contrastive import COLDEST, info_nce_loss
from medlib.losses.instance import (
    NEIGHBOR_WEIGHT,
    prediction_loss,
    queue_contrastive_loss,
    queue_contrastive_loss_by_definition,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_a_queue_of_one_at_right_angles_golden():
    """Query and positive along x, the entry along y: cosines 1 and 0, at temperature 1/2 scores 2 and 0."""
    x, y = torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 0.5]], dtype=torch.float64)
    valid = torch.ones(1, dtype=torch.bool)
    log_sum = math.log(math.exp(2) + 1)
    assert queue_contrastive_loss(x, x, y, 0.5, valid=valid).item() == pytest.approx(log_sum - 2, rel=1e-12)
    with_neighbor = queue_contrastive_loss(x, x, y, 0.5, valid=valid, neighbors=1)
    assert with_neighbor.item() == pytest.approx(log_sum - 2 + NEIGHBOR_WEIGHT * log_sum, rel=1e-12)


def test_a_prediction_at_right_angles_and_in_line_golden():
    first = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert prediction_loss(first, torch.tensor([[0.0, 1.0], [0.0, 9.0]])).item() == pytest.approx((2 + 0) / 2)
    assert prediction_loss(first, -first).item() == pytest.approx(4)
    with pytest.raises(ValueError, match="target"):
        prediction_loss(first, first[:1])


# --- the formulas as loops -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3, 99]), st.lists(st.booleans(), min_size=1, max_size=8))
def test_moco_and_knn_moco_are_their_formulas(seed, neighbors, filled):
    query, positive, queue = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1), normal(len(filled), 5, seed=seed + 2)
    valid = torch.tensor(filled)
    expected = queue_contrastive_loss_by_definition(query, positive, queue[valid], 0.5, neighbors)
    found = queue_contrastive_loss(query, positive, queue, 0.5, valid=valid, neighbors=neighbors)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_moco_is_info_nce_on_a_queue():
    query, positive, queue = normal(3, 5), normal(3, 5, seed=1), normal(7, 5, seed=2)
    full = torch.ones(7, dtype=torch.bool)
    torch.testing.assert_close(
        queue_contrastive_loss(query, positive, queue, 0.3, valid=full), info_nce_loss(query, positive, queue, 0.3)
    )
    half = torch.arange(7) < 4
    torch.testing.assert_close(
        queue_contrastive_loss(query, positive, queue, 0.3, valid=half), info_nce_loss(query, positive, queue[:4], 0.3)
    )
    assert queue_contrastive_loss(query, positive, queue, 0.3, valid=full & False, neighbors=2).item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_byol_is_the_squared_distance_of_unit_vectors(seed):
    first, second = normal(4, 6, seed=seed), normal(4, 6, seed=seed + 10)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (first, second)]
    expected = (unit[0] - unit[1]).square().sum(dim=1).mean()
    torch.testing.assert_close(prediction_loss(first, second), expected)


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbors", [0, 2])
def test_lengths_turns_and_orders_change_nothing(neighbors):
    query, positive, queue = normal(3, 5), normal(3, 5, seed=1), normal(7, 5, seed=2)
    valid = torch.tensor([True, True, False, True, True, False, True])
    turn = torch.linalg.qr(normal(5, 5, seed=3)).Q
    images, slots = torch.tensor([2, 0, 1]), torch.randperm(7, generator=torch.Generator().manual_seed(4))

    def both(q, p, k, v):
        return queue_contrastive_loss(q, p, k, valid=v, neighbors=neighbors) + prediction_loss(q, p)

    expected = both(query, positive, queue, valid)
    for other in (
        both(3 * query, 7 * positive, queue / 5, valid),
        both(query @ turn, positive @ turn, queue @ turn, valid),
        both(query[images], positive[images], queue[slots], valid[slots]),
    ):
        torch.testing.assert_close(other, expected)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbors", [0, 1])
def test_gradients_are_those_of_finite_differences_and_the_students_alone(neighbors):
    query, positive, queue = (normal(3, 5, seed=s).requires_grad_() for s in range(3))
    valid = torch.tensor([True, True, False])
    loss = queue_contrastive_loss(query, positive, queue, valid=valid, neighbors=neighbors)
    (loss + prediction_loss(query, positive)).backward()
    assert query.grad.abs().sum() > 0 and positive.grad is None and queue.grad is None
    target, entries = positive.detach(), queue.detach()
    assert torch.autograd.gradcheck(
        lambda q: queue_contrastive_loss(q, target, entries, 0.5, valid=valid, neighbors=neighbors), query
    )
    assert torch.autograd.gradcheck(lambda q: prediction_loss(q, target), query)


# --- the value at collapse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [1, 4, 6])
def test_collapsed_embeddings_cost_what_a_guess_costs(filled):
    """All alike: the positive is one of 1 + K equal candidates, each neighbour another; BYOL has nothing to learn."""
    query, queue = torch.ones(3, 5, dtype=torch.float64), torch.ones(6, 5, dtype=torch.float64)
    valid = torch.arange(6) < filled
    guess = math.log(1 + filled)
    assert queue_contrastive_loss(query, query, queue, valid=valid).item() == pytest.approx(guess, rel=1e-12)
    with_neighbors = queue_contrastive_loss(query, query, queue, valid=valid, neighbors=3)
    assert with_neighbors.item() == pytest.approx((1 + NEIGHBOR_WEIGHT) * guess, rel=1e-12)
    assert prediction_loss(query, 7 * query).item() == pytest.approx(0, abs=1e-14)


# --- degenerate and extreme ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_for_vectors_of_any_length_and_at_least_float32(length, dtype):
    rows = [(normal(3, 5, seed=seed) * length).to(dtype).requires_grad_() for seed in range(3)]
    loss = queue_contrastive_loss(*rows, valid=torch.ones(3).bool(), neighbors=2) + prediction_loss(*rows[:2])
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and rows[0].grad.isfinite().all()


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
