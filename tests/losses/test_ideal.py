"""IDEAL's losses against hand-made numbers, the equations as loops, and what must hold for any input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medlib.losses import ideal
from medlib.losses.contrastive import info_nce_loss
from medlib.losses.ideal import (
    NO_MATCH,
    cross_consistency_loss,
    cross_consistency_loss_by_definition,
    dense_correspondence,
    dense_correspondence_by_definition,
    distinct_match_fraction,
    geometric_correspondence,
    local_contrastive_loss,
    local_contrastive_loss_by_definition,
)
from tests.benchmarks.bench_coral import peak_megabytes
from tests.benchmarks.bench_ideal import batch, forward_backward, local_contrastive_loss_plain


def maps(seed: int, batch: int = 3, dim: int = 4, height: int = 2, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of a batch: maps (B, D, h, w) of cells of unequal length, float64."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, batch, dim, height, width, generator=generator, dtype=torch.float64)
    views *= 10 ** torch.randn(2, batch, 1, height, width, generator=generator, dtype=torch.float64)
    return views[0], views[1]


def any_match(seed: int, batch: int, cells: int, missing: bool = False) -> torch.Tensor:
    """A correspondence (B, S) drawn at random, the first cell always matched; ``missing`` leaves some cells out."""
    generator = torch.Generator().manual_seed(seed)
    match = torch.randint(NO_MATCH if missing else 0, cells, (batch, cells), generator=generator)
    match[0, 0] = 0
    return match


def row(*angles: float) -> torch.Tensor:
    """A map (1, 2, 1, w) of unit vectors at these angles in degrees, float64."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()])[None, :, None]


def logits(seed: int, classes: int = 3, batch: int = 2, side: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, classes, side, side, generator=generator, dtype=torch.float64)


# Two images of two cells each. Image 0 looks along 0 and 90 degrees, image 1 along 180 and 270.
QUERY = torch.cat([row(0, 90), row(180, 270)])
KEY = torch.cat([3 * row(90, 0), row(180, 180)])  # image 0: swapped and longer; image 1: both cells along 180
MATCH = torch.tensor([[1, 0], [0, 0]])


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_dense_correspondence_golden():
    assert dense_correspondence(QUERY, KEY).tolist() == [[1, 0], [0, 0]]  # image 1, cell 1: cos 0 with both, the first
    assert dense_correspondence(row(10, 100, 200), row(190, 5, 80)).tolist() == [[1, 2, 0]]


def test_local_contrastive_golden():
    # tau = 1/2. Cell (0, 0), 0 degrees: its match has cos 1; image 1's keys both have cos -1.
    a = math.log(math.exp(2) + 2 * math.exp(-2)) - 2
    # Cell (0, 1), 90 degrees: match cos 1; image 1's keys cos 0 twice.
    b = math.log(math.exp(2) + 2) - 2
    # Cell (1, 0), 180 degrees: match cos 1; image 0's keys at 90 and 0 degrees: cos 0 and -1.
    c = math.log(math.exp(2) + 1 + math.exp(-2)) - 2
    # Cell (1, 1), 270 degrees: match cos 0; image 0's keys: cos -1 and 0.
    d = math.log(1 + math.exp(-2) + 1)
    expected = (a + b + c + d) / 4
    assert local_contrastive_loss(QUERY, KEY, MATCH, 0.5).item() == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.294269, abs=1e-6)


def test_local_contrastive_golden_where_cells_have_no_match():
    match = torch.tensor([[1, NO_MATCH], [NO_MATCH, 0]])
    a = math.log(math.exp(2) + 2 * math.exp(-2)) - 2
    d = math.log(1 + math.exp(-2) + 1)
    assert local_contrastive_loss(QUERY, KEY, match, 0.5).item() == pytest.approx((a + d) / 2, rel=1e-12)


def test_local_contrastive_golden_with_pooled_negatives():
    # One negative from each image: image 0's mean key lies at 45 degrees, image 1's at 180.
    half = math.sqrt(0.5)
    a = math.log(math.exp(2) + math.exp(-2)) - 2  # 0 degrees against 180
    b = math.log(math.exp(2) + 1) - 2  # 90 against 180
    c = math.log(math.exp(2) + math.exp(-2 * half)) - 2  # 180 against 45
    d = math.log(1 + math.exp(-2 * half))  # 270 against 45
    loss = local_contrastive_loss(QUERY, KEY, MATCH, 0.5, negatives="pooled")
    assert loss.item() == pytest.approx((a + b + c + d) / 4, rel=1e-12)


def test_local_contrastive_golden_with_a_queue():
    # One entry along 0 degrees, of any length, allowed for image 1 only; one that is not valid for anyone.
    queue = torch.tensor([[5.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    valid = torch.tensor([[False, False], [True, False]])
    a = math.log(math.exp(2) + 2 * math.exp(-2)) - 2
    b = math.log(math.exp(2) + 2) - 2
    c = math.log(math.exp(2) + 1 + 2 * math.exp(-2)) - 2  # and the entry: cos -1
    d = math.log(1 + math.exp(-2) + 1 + 1)  # and the entry: cos 0
    loss = local_contrastive_loss(QUERY, KEY, MATCH, 0.5, queue=queue, queue_valid=valid)
    assert loss.item() == pytest.approx((a + b + c + d) / 4, rel=1e-12)


def test_distinct_match_fraction_golden():
    match = torch.tensor([[0, 1, 2, 3], [2, 2, 2, 2], [0, 0, NO_MATCH, 3], [NO_MATCH] * 4])
    assert distinct_match_fraction(match).item() == pytest.approx((1 + 1 / 4 + 2 / 3) / 3)  # the last has no match
    assert distinct_match_fraction(match[3:]).item() == 0


def test_geometric_correspondence_golden():
    # A row of four cells at x = -3/4, -1/4, 1/4, 3/4. The other view is shifted by one cell, and mirrored.
    x = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    plain = torch.stack([x, torch.zeros(4)])[None, :, None]  # (1, 2, 1, 4)
    shifted, mirrored = plain.clone(), plain.flip(3)
    shifted[:, 0] += 0.5
    assert geometric_correspondence(plain, plain).tolist() == [[0, 1, 2, 3]]
    assert geometric_correspondence(plain, mirrored).tolist() == [[3, 2, 1, 0]]
    # -3/4 is a whole cell (1/2) from the nearest, which is still within reach; at a shift of 0.6 it is not.
    assert geometric_correspondence(plain, shifted).tolist() == [[0, 0, 1, 2]]
    shifted[:, 0] += 0.1
    assert geometric_correspondence(plain, shifted).tolist() == [[NO_MATCH, 0, 1, 2]]
    # The shifted view's last cell looks at x = 1.35, outside the image; the mirror has a cell within reach of neither.
    assert geometric_correspondence(shifted, plain).tolist() == [[1, 2, 3, NO_MATCH]]
    assert geometric_correspondence(plain + 0.3, plain + 0.3).tolist() == [[0, 1, 2, NO_MATCH]]  # 1.05 is outside


def test_a_pseudo_label_below_the_confidence_is_not_looked_at():
    first = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).log().T.reshape(1, 2, 1, 2)
    second = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64).log().T.reshape(1, 2, 1, 2)
    all_four = (-math.log(0.8) - math.log(0.3) - math.log(0.9) - math.log(0.4)) / 2
    expected = {0.0: all_four, 0.65: -math.log(0.8) + (-math.log(0.9) - math.log(0.4)) / 2, 0.95: 0.0}
    expected[0.75] = -math.log(0.8) - math.log(0.9)
    for confidence, value in expected.items():
        loss = cross_consistency_loss(first, second, confidence=confidence)
        assert loss.item() == pytest.approx(value, rel=1e-12, abs=1e-12), confidence
    labels = torch.tensor([[[0, 1]]])
    assert cross_consistency_loss(first, second, labels, confidence=0.95) == cross_consistency_loss(
        first, second, labels
    )
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence must be in"):
            cross_consistency_loss(first, second, confidence=wrong)
        with pytest.raises(ValueError, match="confidence must be in"):
            cross_consistency_loss(first, second, labels, confidence=wrong)


def test_cross_consistency_golden():
    # One pixel, two classes: branch 1 says (3/4, 1/4), branch 2 (1/5, 4/5).
    first = torch.tensor([0.75, 0.25], dtype=torch.float64).log().view(1, 2, 1, 1)
    second = torch.tensor([0.2, 0.8], dtype=torch.float64).log().view(1, 2, 1, 1)
    # Without a label, y1 = 0 teaches branch 2 and y2 = 1 teaches branch 1.
    assert cross_consistency_loss(first, second).item() == pytest.approx(-math.log(0.25) - math.log(0.2), rel=1e-12)
    label = torch.tensor([[[1]]])
    expected = -math.log(0.25) - math.log(0.8)
    assert cross_consistency_loss(first, second, label).item() == pytest.approx(expected, rel=1e-12)


# --- the paper's equations as loops ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 3), width=st.integers(1, 3))
def test_dense_correspondence_is_its_definition(seed, height, width):
    query, key = maps(seed, height=height, width=width)
    assert torch.equal(dense_correspondence(query, key), dense_correspondence_by_definition(query, key))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(2, 4), temperature=st.sampled_from([0.02, 0.2, 1.5]),
       missing=st.booleans(), chunk=st.sampled_from([1, 20, 2**22]))  # fmt: skip
def test_local_contrastive_is_equation_2(seed, batch, temperature, missing, chunk):
    query, key = maps(seed, batch)
    match = any_match(seed, batch, 6, missing)
    query.requires_grad_()
    key.requires_grad_()
    before, ideal.CHUNK = ideal.CHUNK, chunk  # one row at a time, a few, all at once
    try:
        loss = local_contrastive_loss(query, key, match, temperature)
        gradients = torch.autograd.grad(loss, [query, key])
    finally:
        ideal.CHUNK = before
    expected = local_contrastive_loss_by_definition(query, key, match, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [query, key]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_cross_consistency_is_equation_3(seed):
    first, second = logits(seed).requires_grad_(), logits(seed + 100).requires_grad_()
    labels = torch.randint(-1, 3, (2, 3, 3), generator=torch.Generator().manual_seed(seed))
    for label in (None, labels):
        loss = cross_consistency_loss(first, second, label)
        expected = cross_consistency_loss_by_definition(first, second, label)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        ours, theirs = (torch.autograd.grad(value, [first, second]) for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_geometric_correspondence_is_the_nearest_within_reach():
    generator = torch.Generator().manual_seed(0)
    query, key = 2.4 * torch.rand(2, 4, 2, 3, 5, generator=generator) - 1.2
    found = geometric_correspondence(query, key)
    q, k = query.flatten(2), key.flatten(2)
    for b in range(4):
        for i in range(15):
            distances = (k[b] - q[b, :, i, None]).norm(dim=0)
            nearest = int(distances.argmin())
            shown = q[b, :, i].abs().max() <= 1 and distances[nearest] <= 2 / 5
            assert found[b, i] == (nearest if shown else NO_MATCH)
    assert (found == NO_MATCH).any() and (found >= 0).any()


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_one_cell_is_equation_1(temperature):
    query, key = maps(7, batch=4, height=1, width=1)
    q, k = query.flatten(1), key.flatten(1)
    expected = [
        info_nce_loss(q[b : b + 1], k[b : b + 1], torch.cat([k[:b], k[b + 1 :]]), temperature) for b in range(4)
    ]
    loss = local_contrastive_loss(query, key, torch.zeros(4, 1, dtype=torch.long), temperature)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


# --- invariances -----------------------------------------------------------------------------------------------------


def test_length_order_of_images_and_order_of_cells_do_not_matter():
    query, key = maps(1, batch=4)
    match = dense_correspondence(query, key)
    loss = local_contrastive_loss(query, key, match)
    lengths = torch.linspace(0.1, 50, 24, dtype=torch.float64).view(4, 1, 2, 3)
    assert torch.equal(dense_correspondence(query * lengths, key * lengths.flip(0)), match)
    torch.testing.assert_close(local_contrastive_loss(query * lengths, key * lengths.flip(0), match), loss)

    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(local_contrastive_loss(query[order], key[order], match[order]), loss)

    mirrored = query.flip(3)  # the query cells change places, and take their matches along
    torch.testing.assert_close(local_contrastive_loss(mirrored, key, match.view(4, 2, 3).flip(2).flatten(1)), loss)
    assert torch.equal(dense_correspondence(mirrored, key), match.view(4, 2, 3).flip(2).flatten(1))


def test_a_mirrored_view_is_matched_to_its_mirror():
    query, _ = maps(3, dim=8)
    cells = torch.arange(6).view(2, 3)
    assert torch.equal(dense_correspondence(query, query), cells.flatten().expand(3, 6))
    assert torch.equal(dense_correspondence(query, query.flip(3)), cells.flip(1).flatten().expand(3, 6))


def test_other_cells_of_the_same_image_are_never_negatives():
    # Image 0's unmatched key cells may be anything, as far as image 0's own cells are concerned.
    query, key = maps(4, batch=2)
    match = torch.zeros(2, 6, dtype=torch.long)
    only_image_0 = match.clone()
    only_image_0[1] = NO_MATCH
    changed = key.clone()
    changed[0].flatten(1)[:, 1:] = query[0].flatten(1)[:, 1:]  # would be the hardest negatives there are
    torch.testing.assert_close(
        local_contrastive_loss(query, changed, only_image_0), local_contrastive_loss(query, key, only_image_0)
    )
    assert abs(local_contrastive_loss(query, changed, match) - local_contrastive_loss(query, key, match)) > 1e-3


def test_one_image_twice_in_a_batch_is_not_its_own_negative():
    query, key = maps(5, batch=4)
    match = any_match(5, 4, 6)
    twice = torch.tensor([7, 8, 7, 9])
    expected = []  # the equation with the rows of the same image left out of the negatives
    for b, others in ((0, [1, 3]), (1, [0, 2, 3]), (2, [1, 3]), (3, [0, 1, 2])):
        rows = [b, *others]
        alone = match[rows].clone()
        alone[1:] = NO_MATCH
        expected.append(local_contrastive_loss_by_definition(query[rows], key[rows], alone))
    loss = local_contrastive_loss(query, key, match, images=twice)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    distinct = local_contrastive_loss(query, key, match, images=torch.tensor([3, 1, 4, 2]))
    torch.testing.assert_close(distinct, local_contrastive_loss(query, key, match))

    query.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, also where a zero would hide it
        none = local_contrastive_loss(query, key, match, images=torch.full((4,), 3))  # nobody has a negative
        none.backward()
    assert none.item() == 0 and query.grad.abs().max() == 0


def test_branches_are_exchangeable_and_logits_have_no_origin():
    first, second = logits(1), logits(2)
    labels = torch.randint(0, 3, (2, 3, 3), generator=torch.Generator().manual_seed(0))
    for label in (None, labels):
        loss = cross_consistency_loss(first, second, label)
        torch.testing.assert_close(cross_consistency_loss(second, first, label), loss)
        torch.testing.assert_close(cross_consistency_loss(first + 9, second - 4, label), loss)


def test_the_value_does_not_grow_with_the_image():
    first, second = logits(1), logits(2)
    large = [F.interpolate(x, scale_factor=2, mode="nearest") for x in (first, second)]
    torch.testing.assert_close(cross_consistency_loss(*large), cross_consistency_loss(first, second))


# --- collapse and limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.2, 3.0])
def test_local_contrastive_of_collapsed_features(temperature):
    query = torch.full((4, 5, 2, 3), 2.0, dtype=torch.float64)
    match = dense_correspondence(query, query)
    assert distinct_match_fraction(match).item() == pytest.approx(1 / 6)  # the alarm: all match cell 0
    loss = local_contrastive_loss(query, query, match, temperature)
    assert loss.item() == pytest.approx(math.log(1 + 3 * 6), rel=1e-10)  # one match among 18 negatives, all alike
    pooled = local_contrastive_loss(query, query, match, temperature, negatives="pooled")
    assert pooled.item() == pytest.approx(math.log(1 + 3), rel=1e-10)


def test_the_optimum_is_each_image_on_an_axis_of_its_own():
    query = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1).expand(3, 3, 2, 2)
    match = torch.zeros(3, 4, dtype=torch.long)
    for temperature in (0.5, 0.1):
        loss = local_contrastive_loss(query, query, match, temperature)
        assert loss.item() == pytest.approx(math.log(1 + 8 * math.exp(-1 / temperature)), rel=1e-9)


def test_matches_drawn_at_random_are_distinct_to_two_thirds():
    match = torch.randint(0, 400, (16, 400), generator=torch.Generator().manual_seed(0))
    assert distinct_match_fraction(match).item() == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_branches_that_agree_and_are_sure_have_nothing_to_learn():
    sure = 50 * F.one_hot(torch.arange(3), 3).double().T.reshape(1, 3, 1, 3)
    assert cross_consistency_loss(sure, sure).item() < 1e-20
    undecided = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    assert cross_consistency_loss(undecided, undecided).item() == pytest.approx(2 * math.log(3), rel=1e-12)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [20, 2**22])
@pytest.mark.parametrize("negatives", ["cells", "pooled"])
def test_local_contrastive_gradcheck(monkeypatch, chunk, negatives):
    monkeypatch.setattr(ideal, "CHUNK", chunk)
    query, key = (F.normalize(view, dim=1).mul_(1.5).requires_grad_() for view in maps(4, batch=2, height=1))
    queue = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    valid = torch.tensor([[True, False, True], [True, True, False]])
    match = torch.tensor([[0, 2, NO_MATCH], [1, 1, 0]])

    def loss(q, k, bank):
        return local_contrastive_loss(q, k, match, 0.5, negatives=negatives, queue=bank, queue_valid=valid)

    assert torch.autograd.gradcheck(loss, (query, key, queue))


@pytest.mark.parametrize("labelled", [True, False])
def test_cross_consistency_gradcheck(labelled):
    first, second = logits(1).requires_grad_(), logits(2).requires_grad_()
    labels = torch.tensor([0, 1, 2, -1, 1, 0, 2, 2, 0] * 2).view(2, 3, 3) if labelled else None
    assert torch.autograd.gradcheck(lambda a, b: cross_consistency_loss(a, b, labels), (first, second))


def test_who_gets_a_gradient():
    query, key = (view.requires_grad_() for view in maps(6))
    match = dense_correspondence(query, key)
    assert not match.requires_grad
    local_contrastive_loss(query, key, match).backward()
    assert query.grad.abs().max() > 0 and key.grad.abs().max() > 0

    query.grad = None
    local_contrastive_loss(query, key.detach(), match).backward()  # a momentum key
    assert query.grad.abs().max() > 0

    # A branch learns from the other's decision and teaches with its own: its teaching leaves no gradient. So with the
    # other branch held constant, its gradient is that of plain cross-entropy with fixed labels.
    first, second = logits(3).requires_grad_(), logits(4)
    (ours,) = torch.autograd.grad(cross_consistency_loss(first, second), first)
    (plain,) = torch.autograd.grad(F.cross_entropy(first, second.argmax(dim=1)), first)
    torch.testing.assert_close(ours, plain)


def test_a_step_against_the_gradient_helps():
    query, key = (view.requires_grad_() for view in maps(8))
    match = dense_correspondence(query, key)
    loss = local_contrastive_loss(query, key, match)
    gradients = torch.autograd.grad(loss, [query, key])
    moved = [view - 1e-3 * slope / slope.norm() for view, slope in zip((query, key), gradients, strict=True)]
    assert local_contrastive_loss(*moved, match) < loss


# --- degenerate and extreme ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-3, 0.2, 1e3])
@pytest.mark.parametrize("negatives", ["cells", "pooled"])
def test_finite_for_any_finite_input(magnitude, temperature, negatives):
    query, key = (view.float().sign() * magnitude for view in maps(0))
    query.requires_grad_()
    key.requires_grad_()
    match = dense_correspondence(query, key)
    loss = local_contrastive_loss(query, key, match, temperature, negatives=negatives)
    logits = (view.clamp(-1e30, 1e30) for view in (query, key))  # a loss beyond the largest float has no value
    total = loss + cross_consistency_loss(*logits)
    total.backward()
    for value in (total, query.grad, key.grad):
        assert value.isfinite().all()


def test_cold_temperature_is_the_largest_miss():
    # At 1e-3 exp(s) overflows any float. Cells (0, 0), (0, 1), (1, 0) name their match; for (1, 1), one negative equals
    # the match: log 2.
    loss = local_contrastive_loss(QUERY, KEY, MATCH, 1e-3)
    assert loss.item() == pytest.approx(math.log(2) / 4, rel=1e-12)
    missed = local_contrastive_loss(QUERY, KEY.flip(0), torch.zeros(2, 2, dtype=torch.long), 1e-3)
    assert missed.item() == pytest.approx((2000 + 1000 + 2000 + 1000 + math.log(2) * 0) / 4, rel=0.5)


def test_a_blank_cell_gets_no_gradient_and_matches_the_first():
    query, key = (view.float() for view in maps(2))
    query[1, :, 0, 2] = 0
    query.requires_grad_()
    match = dense_correspondence(query, key)
    assert match[1, 2] == 0
    local_contrastive_loss(query, key, match).backward()
    assert query.grad.isfinite().all()
    assert query.grad[1, :, 0, 2].abs().max() == 0


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (3, 4, 0, 2)])
def test_nothing_to_compare_is_zero_and_attached(shape):
    query = torch.ones(shape, requires_grad=True)
    loss = local_contrastive_loss(
        query, torch.ones(shape), torch.zeros(shape[0], shape[2] * shape[3], dtype=torch.long)
    )
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert query.grad.shape == shape


def test_no_match_at_all_is_zero_and_attached():
    query, key = (view.requires_grad_() for view in maps(0))
    loss = local_contrastive_loss(query, key, torch.full((3, 6), NO_MATCH))
    loss.backward()
    assert loss.item() == 0 and query.grad.abs().max() == 0


def test_no_labelled_pixel_is_zero_and_attached():
    first, second = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = cross_consistency_loss(first, second, torch.full((2, 3, 3), -1))
    loss.backward()
    assert loss.item() == 0 and first.grad.abs().max() == 0
    empty = torch.zeros(0, 3, 2, 2, requires_grad=True)
    cross_consistency_loss(empty, empty).backward()
    assert empty.grad.shape == empty.shape


def test_not_a_number_is_not_hidden():
    query, key = maps(0)
    key[1, 0, 0, 0] = math.nan
    assert local_contrastive_loss(query, key, torch.zeros(3, 6, dtype=torch.long)).isnan()
    assert cross_consistency_loss(key, query).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    query, key = ((0.1 * F.normalize(view, dim=1)).to(dtype) for view in maps(5))
    match = dense_correspondence(query, key)
    assert torch.equal(match, dense_correspondence(query.float(), key.float()))
    for half, full in (
        (
            local_contrastive_loss(query, key, match, 0.01),
            local_contrastive_loss(query.float(), key.float(), match, 0.01),
        ),
        (cross_consistency_loss(query, key), cross_consistency_loss(query.float(), key.float())),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_match_is_found_where_half_precision_sees_a_tie(dtype):
    query = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]], dtype=dtype)  # two cells (1, 0)
    key = torch.tensor([[[[1.0, 1.0]], [[0.02, 0.01]]]], dtype=dtype)  # cosines 0.9998 and 0.99995
    assert dense_correspondence(query, key).tolist() == [[1, 1]]


@pytest.mark.parametrize("chunk", [20, 2**22])
def test_autocast_changes_nothing(monkeypatch, chunk):
    monkeypatch.setattr(ideal, "CHUNK", chunk)
    query, key = (view.float() for view in maps(5))

    def outcome(autocast: bool):
        q = query.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            match = dense_correspondence(q, key)
            loss = local_contrastive_loss(q, key, match) + cross_consistency_loss(q, key)
        loss.backward()  # outside, as in the training loop; chunks are computed again in it
        return match, loss, q.grad

    expected, inside = outcome(False), outcome(True)
    for one, other in zip(inside, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_image_has_no_negatives():
    query, key = maps(0, batch=1)
    with pytest.raises(ValueError, match="B >= 2"):
        local_contrastive_loss(query, key, torch.zeros(1, 6, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0, -0.1, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        local_contrastive_loss(QUERY, KEY, MATCH, temperature)


def test_wrong_shapes_and_values_are_named():
    with pytest.raises(ValueError, match=r"query \(2, 2, 1, 2\), key \(1, 2, 1, 2\)"):
        local_contrastive_loss(QUERY, KEY[:1], MATCH)
    with pytest.raises(ValueError, match=r"correspondence.*\(2, 2\).*\(2, 1\)"):
        local_contrastive_loss(QUERY, KEY, MATCH[:, :1])
    with pytest.raises(ValueError, match="integer type.*float"):
        local_contrastive_loss(QUERY, KEY, MATCH.float())
    for cell in (2, -2):
        with pytest.raises(ValueError, match=rf"cells 0 to 1 or -1.*{cell}"):
            local_contrastive_loss(QUERY, KEY, torch.full((2, 2), cell))
    for odd in (MATCH > 0, MATCH.to(torch.uint8)):  # a mask is no match, and 255 is not -1
        with pytest.raises(ValueError, match="signed integer type"):
            local_contrastive_loss(QUERY, KEY, odd)
        with pytest.raises(ValueError, match="signed integer type"):
            distinct_match_fraction(odd)
    with pytest.raises(ValueError, match="correspondence must be a tensor.*ndarray"):
        local_contrastive_loss(QUERY, KEY, MATCH.numpy())
    with pytest.raises(ValueError, match="cells 0 to 1 or -1.*7"):
        distinct_match_fraction(torch.full((2, 2), 7))
    with pytest.raises(ValueError, match="images must be of an integer type"):
        local_contrastive_loss(QUERY, KEY, MATCH, images=torch.full((2,), math.nan))
    with pytest.raises(ValueError, match="queue_valid must be bool"):
        local_contrastive_loss(QUERY, KEY, MATCH, queue=torch.ones(3, 2), queue_valid=torch.ones(2, 3))
    with pytest.raises(ValueError, match="negatives must be"):
        local_contrastive_loss(QUERY, KEY, MATCH, negatives="all")
    with pytest.raises(ValueError, match="queue and queue_valid"):
        local_contrastive_loss(QUERY, KEY, MATCH, queue=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"queue_valid \(2, 2\)"):
        local_contrastive_loss(QUERY, KEY, MATCH, queue=torch.ones(3, 2), queue_valid=torch.ones(2, 2) > 0)
    with pytest.raises(ValueError, match=r"images \(3,\)"):
        local_contrastive_loss(QUERY, KEY, MATCH, images=torch.arange(3))
    with pytest.raises(ValueError, match=r"query \(2, 2, 1, 2\)"):
        dense_correspondence(QUERY, KEY[:, :1])
    with pytest.raises(ValueError, match="no cell"):
        dense_correspondence(QUERY[..., :0], KEY[..., :0])
    with pytest.raises(ValueError, match=r"\(B, 2, h, w\).*\(1, 3, 2, 2\)"):
        geometric_correspondence(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"second_logits \(2, 2, 3, 3\)"):
        cross_consistency_loss(logits(0), logits(0, classes=2))
    with pytest.raises(ValueError, match=r"labels \(2, 3\)"):
        cross_consistency_loss(logits(0), logits(1), torch.zeros(2, 3, dtype=torch.long))


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_table_of_similarities_is_never_held(monkeypatch):
    """Loose bounds that a return of the whole table would break; `tests.benchmarks.bench_ideal` has the numbers."""
    monkeypatch.setattr(ideal, "CHUNK", 2**16)
    query, key, match = batch(16, 8, dim=8)  # a table of 1024 x 1024: 4 MB a copy
    run = partial(forward_backward, local_contrastive_loss, query, key, match)
    plain = partial(forward_backward, local_contrastive_loss_plain, query, key, match)
    (value, gradient), (expected, expected_gradient) = run(), plain()
    assert value == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-9)
    assert peak_megabytes(run) < 3 < 8 < peak_megabytes(plain)
