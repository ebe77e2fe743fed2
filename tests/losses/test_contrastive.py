"""The contrastive losses against hand-made numbers, loops over the formulas, and what must hold for any input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses.contrastive import (
    COLDEST,
    check_counts,
    check_mask,
    check_temperature,
    info_nce_loss,
    nt_xent_loss,
    partition_contrastive_loss,
    positional_contrastive_loss,
    positional_contrastive_loss_by_definition,
    unit_vectors,
)


def at_angles(*degrees: float) -> torch.Tensor:
    """Vectors in the plane at these angles, of lengths 1, 2, 3, ...: pairs that can be drawn."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    length = torch.arange(1, len(degrees) + 1)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=1) * length


def draw(seed: int, *rows: int, dim: int = 5) -> list[torch.Tensor]:
    """Matrices with rows of unequal lengths, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, dim, generator=generator, dtype=torch.float64)
        * 10 ** torch.randn(n, 1, generator=generator, dtype=torch.float64)
        for n in rows
    ]


def cos(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a, b) / (a.norm() * b.norm())


# Each loss with everything but its features filled in, for the checks they share.
POSITIONS = torch.tensor([0.1, 0.15, 0.2, 0.5, 0.55, 0.9], dtype=torch.float64)  # the last has nobody near
PARTITIONS = torch.tensor([0, 0, 0, 1, 1, 2])
LOSSES = {
    "info_nce": lambda h, temperature: info_nce_loss(h, h.flip(1), h.roll(1, dims=0), temperature),
    "nt_xent": lambda h, temperature: nt_xent_loss(h, h.flip(1), temperature),
    "positional": lambda h, temperature: positional_contrastive_loss(h, POSITIONS[: len(h)], 0.12, temperature),
    "partition": lambda h, temperature: partition_contrastive_loss(h, PARTITIONS[: len(h)], temperature),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_info_nce_golden():
    # Query at 0 degrees, positive at 60 (cos 1/2), negatives at 90 and 180 (cos 0 and -1); temperature 1/2.
    loss = info_nce_loss(at_angles(0), at_angles(60), at_angles(90, 180), 0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(1) + math.exp(0) + math.exp(-2)) - 1, rel=1e-12)


def test_info_nce_golden_mean_over_queries():
    # Both queries meet the same negative, at 90 degrees; each has a positive on top of it.
    loss = info_nce_loss(at_angles(0, 90), at_angles(0, 90), at_angles(90), 0.5)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(2)) / 2, rel=1e-12)


def test_nt_xent_golden():
    # Image A: views at 0 and 60 degrees. Image B: 90 and 180. Cosines over temperature 1/2:
    half, third = 1.0, math.sqrt(3)  # 60 degrees apart: 2 * 1/2; 30 apart: 2 * sqrt(3) / 2
    anchors = [
        math.log(math.exp(half) + math.exp(0) + math.exp(-2)) - half,  # 0: partner 60, others 90, 180
        math.log(math.exp(half) + math.exp(third) + math.exp(-half)) - half,  # 60: partner 0, others 90, 180
        math.log(math.exp(0) + math.exp(third) + math.exp(0)) - 0,  # 90: partner 180, others 0, 60
        math.log(math.exp(0) + math.exp(-half) + math.exp(-2)) - 0,  # 180: partner 90, others 0, 60
    ]
    loss = nt_xent_loss(at_angles(0, 90), at_angles(60, 180), 0.5)
    assert loss.item() == pytest.approx(sum(anchors) / 4, rel=1e-12)


def test_positional_golden():
    # Slices at 0.1, 0.2, 0.25 and 0.9, at 0, 60, 90 and 180 degrees; positives are nearer than 0.12.
    near = math.sqrt(3)  # 30 degrees apart, over temperature 1/2
    of_0 = math.log(math.exp(1) + math.exp(0) + math.exp(-2)) - 1  # positive: 1
    of_1 = math.log(math.exp(1) + math.exp(near) + math.exp(-1)) - (1 + near) / 2  # positives: 0 and 2
    of_2 = math.log(math.exp(0) + math.exp(near) + math.exp(0)) - near  # positive: 1
    positions = torch.tensor([0.1, 0.2, 0.25, 0.9], dtype=torch.float64)  # the last has no positive and is no anchor
    loss = positional_contrastive_loss(at_angles(0, 60, 90, 180), positions, 0.12, 0.5)
    assert loss.item() == pytest.approx((of_0 + of_1 + of_2) / 3, rel=1e-12)


def test_partition_golden():
    # The same four, in partitions {0, 1}, {2}, {3}: two anchors.
    near = math.sqrt(3)
    of_0 = math.log(math.exp(1) + math.exp(0) + math.exp(-2)) - 1
    of_1 = math.log(math.exp(1) + math.exp(near) + math.exp(-1)) - 1
    loss = partition_contrastive_loss(at_angles(0, 60, 90, 180), torch.tensor([4, 4, 0, 1]), 0.5)
    assert loss.item() == pytest.approx((of_0 + of_1) / 2, rel=1e-12)


def test_default_temperature_is_a_tenth():
    features = at_angles(0, 60, 90, 180)
    positions = torch.tensor([0.1, 0.2, 0.25, 0.9])
    assert positional_contrastive_loss(features, positions, 0.12) == (
        positional_contrastive_loss(features, positions, 0.12, 0.1)
    )
    ids = torch.tensor([4, 4, 0, 1])
    assert partition_contrastive_loss(features, ids) == partition_contrastive_loss(features, ids, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positional_threshold_is_strict_whatever_the_rounding(dtype):
    # Tenths: neighbours are exactly 0.1 apart on paper; 0.3 - 0.2 is less in floating point.
    features = at_angles(0, 60, 90, 180).to(dtype)
    tenths = torch.tensor([1, 2, 3, 4], dtype=dtype) / 10
    assert positional_contrastive_loss(features, tenths, 0.1).item() == 0
    assert positional_contrastive_loss(features, tenths, 0.1001).item() > 0


def test_positional_tiny_threshold_still_pairs_the_two_views():
    features = at_angles(0, 60, 90, 180)
    positions = torch.tensor([0.1, 0.1, 0.5, 0.5])
    expected = partition_contrastive_loss(features, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(positional_contrastive_loss(features, positions, 1e-9), expected)
    assert positional_contrastive_loss(features, positions, 0).item() == 0


# --- the formulas as loops -------------------------------------------------------------------------------------------


def cross_entropy_of_naming(anchor, positive, candidates, temperature):
    """-log of the softmax share of the positive among the candidates, one number at a time."""
    share = torch.exp(cos(anchor, positive) / temperature)
    return -torch.log(share / sum(torch.exp(cos(anchor, k) / temperature) for k in candidates))


TEMPERATURES = [0.02, 0.1, 0.7]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 6), st.sampled_from(TEMPERATURES))
def test_info_nce_is_its_formula(seed, queries, count, temperature):
    query, positive, negatives = draw(seed, queries, queries, count)
    terms = [cross_entropy_of_naming(q, p, [p, *negatives], temperature) for q, p in zip(query, positive, strict=True)]
    loss = info_nce_loss(query, positive, negatives, temperature)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(TEMPERATURES))
def test_nt_xent_is_its_formula(seed, images, temperature):
    first, second = draw(seed, images, images)
    views = [*first, *second]
    terms = []
    for i, view in enumerate(views):
        partner = views[(i + images) % (2 * images)]
        others = [other for k, other in enumerate(views) if k != i]
        terms.append(cross_entropy_of_naming(view, partner, others, temperature))
    loss = nt_xent_loss(first, second, temperature)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 10), st.sampled_from(TEMPERATURES))
def test_partition_is_its_formula(seed, rows, temperature):
    (features,) = draw(seed, rows)
    partitions = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(seed))
    partitions[:2] = 7  # at least one pair
    anchors = []
    for i in range(rows):
        others = [k for k in range(rows) if k != i]
        mine = [a for a in others if partitions[a] == partitions[i]]
        if mine:
            terms = [cross_entropy_of_naming(features[i], features[a], features[others], temperature) for a in mine]
            anchors.append(torch.stack(terms).mean())
    loss = partition_contrastive_loss(features, partitions, temperature)
    torch.testing.assert_close(loss, torch.stack(anchors).mean(), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 10), st.sampled_from(TEMPERATURES), st.sampled_from([0.05, 0.2, 0.5]))
def test_positional_is_equation_2(seed, rows, temperature, threshold):
    (features,) = draw(seed, rows)
    positions = torch.randint(1, 21, (rows,), generator=torch.Generator().manual_seed(seed)).double() / 20
    positions[1] = positions[0]  # at least one pair: two views of one slice
    loss = positional_contrastive_loss(features, positions, threshold, temperature)
    expected = positional_contrastive_loss_by_definition(features, positions, threshold, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)


def test_info_nce_is_cross_entropy():
    query, positive, negatives = draw(0, 4, 4, 6)
    q, p, n = (torch.nn.functional.normalize(x, dim=1) for x in (query, positive, negatives))
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ n.T], dim=1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(info_nce_loss(query, positive, negatives, 0.2), expected)


# --- invariances -----------------------------------------------------------------------------------------------------


@every_loss
def test_length_does_not_matter(loss):
    features = at_angles(0, 10, 50, 120, 200, 300)
    lengths = torch.tensor([[1e-3], [2.0], [1e3], [1.0], [0.5], [7.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(unit_vectors(features) * 5, 0.3), loss(unit_vectors(features), 0.3))
    if loss not in (LOSSES["info_nce"], LOSSES["nt_xent"]):  # these mirror the rows to make their second view
        torch.testing.assert_close(loss(features * lengths, 0.3), loss(features, 0.3))


def test_nt_xent_is_symmetric_in_its_views():
    first, second = draw(0, 6, 6)
    torch.testing.assert_close(nt_xent_loss(first, second, 0.3), nt_xent_loss(second, first, 0.3))


def test_order_of_the_rows_does_not_matter():
    (features,) = draw(0, 6)
    first, second, third = draw(1, 6, 6, 9)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    negatives = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for shuffled, straight in (
        (
            positional_contrastive_loss(features[order], POSITIONS[order], 0.12),
            positional_contrastive_loss(features, POSITIONS, 0.12),
        ),
        (
            partition_contrastive_loss(features[order], PARTITIONS[order]),
            partition_contrastive_loss(features, PARTITIONS),
        ),
        (nt_xent_loss(first[order], second[order], 0.3), nt_xent_loss(first, second, 0.3)),
        (
            info_nce_loss(first[order], second[order], third[negatives], 0.3),
            info_nce_loss(first, second, third, 0.3),
        ),
    ):
        torch.testing.assert_close(shuffled, straight)


def test_positional_does_not_see_which_end_is_up():
    (features,) = draw(0, 6)
    torch.testing.assert_close(
        positional_contrastive_loss(features, 1 - POSITIONS, 0.12),
        positional_contrastive_loss(features, POSITIONS, 0.12),
    )


# --- collapse: the log of the number of candidates -------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 5.0])
def test_collapse(temperature):
    same = torch.full((6, 4), 0.7, dtype=torch.float64)
    assert info_nce_loss(same, same, same[:3], temperature).item() == pytest.approx(math.log(4), rel=1e-10)
    assert nt_xent_loss(same, same, temperature).item() == pytest.approx(math.log(11), rel=1e-10)
    for within in (LOSSES["positional"], LOSSES["partition"]):
        assert within(same, temperature).item() == pytest.approx(math.log(5), rel=1e-10)


# --- gradients -------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_gradcheck(loss, temperature):
    (features,) = draw(1, 6)
    features = unit_vectors(features).mul_(1.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: loss(h, temperature), features)


def test_info_nce_reaches_query_positive_and_negatives():
    query, positive, negatives = (x.requires_grad_() for x in draw(1, 4, 4, 5))
    info_nce_loss(query, positive, negatives, 0.5).backward()
    for tensor in (query, positive, negatives):
        assert (tensor.grad.abs().sum(dim=1) > 0).all()


def test_nt_xent_reaches_both_views():
    first, second = (x.requires_grad_() for x in draw(1, 4, 4))
    nt_xent_loss(first, second, 0.5).backward()
    for tensor in (first, second):
        assert (tensor.grad.abs().sum(dim=1) > 0).all()


def test_positions_get_no_gradient():
    (features,) = draw(1, 6)
    positions = POSITIONS.clone().requires_grad_()
    positional_contrastive_loss(features.requires_grad_(), positions, 0.12).backward()
    assert positions.grad is None


# --- degenerate and extreme ------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-30, 1e-6, 1e6, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_finite_for_any_finite_input(loss, magnitude, temperature, rows):
    features = (2 * torch.rand(rows, 4, generator=torch.Generator().manual_seed(0)) - 1) * magnitude
    features.requires_grad_()
    value = loss(features, temperature)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert features.grad.isfinite().all()


@every_loss
def test_a_blank_row_gets_no_gradient_and_spoils_none(loss):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features[1] = 0
    features.requires_grad_()
    value = loss(features, 0.1)
    value.backward()
    assert value.isfinite()
    assert features.grad[1].abs().max() == 0
    assert 0 < features.grad.abs().max() < 1e3


def test_cold_temperature_is_the_largest_miss():
    # exp(cos / 1e-3) overflows any float; the loss tends to (largest cos - positive cos) / temperature.
    loss = info_nce_loss(at_angles(0), at_angles(90), at_angles(60, 180), 1e-3)
    assert loss.item() == pytest.approx(500, rel=1e-9)
    assert nt_xent_loss(at_angles(0, 60), at_angles(180, 240), 1e-3).item() == pytest.approx(1500, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (name, rows) for name in LOSSES for rows in (0, 1) if (name, rows) != ("info_nce", 1)
    ],  # one negative is something
)
def test_nothing_to_compare_is_zero_and_attached(name, rows):
    features = torch.ones(rows, 3, requires_grad=True)
    value = LOSSES[name](features, 0.1)
    value.backward()
    assert value.item() == 0
    assert features.grad.abs().sum() == 0


def test_no_negatives_and_no_positives():
    query = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for value in (
        info_nce_loss(query, query.flip(0), query[:0], 0.1),
        positional_contrastive_loss(query, torch.tensor([0.0, 0.5, 1.0]), 0.1),
        partition_contrastive_loss(query, torch.arange(3)),
    ):
        assert value.item() == 0
        query.grad = None
        value.backward()
        assert query.grad.abs().max() == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(loss, dtype):
    half = draw(2, 6)[0].to(dtype)
    value = loss(half, 0.01)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), 0.01), rtol=1e-6, atol=1e-6)


@every_loss
def test_autocast_changes_nothing(loss):
    features = draw(2, 6)[0].float()
    expected = loss(features, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(features, 0.1), expected, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("temperature", [0, -0.5, math.nan, math.inf])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        loss(at_angles(0, 10, 20, 30, 40, 50), temperature)


@every_loss
def test_the_coldest_temperature_leaves_room_and_colder_is_refused(loss):
    features = at_angles(0, 10, 20, 30, 40, 50).float().requires_grad_()
    value = loss(features, COLDEST)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    for colder in (COLDEST / 2, 1e-42, 5e-324):
        with pytest.raises(ValueError, match=f"temperature must be at least 1e-06 and finite, got {colder}"):
            loss(features, colder)


def test_checks_name_the_argument():
    check_temperature(COLDEST)
    check_counts(count=1)
    check_mask(valid=torch.ones(2).bool())
    with pytest.raises(ValueError, match="student_temperature must be at least 1e-06 and finite, got 1e-07"):
        check_temperature(1e-7, "student_temperature")
    for count, message in ((0, "at least 1, got 0"), (-2, "at least 1, got -2"), (2.0, "a whole number, got 2.0")):
        with pytest.raises(ValueError, match=f"count must be {message}"):
            check_counts(count=count)
    for mask in (torch.ones(2), torch.ones(2).int(), torch.ones(2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=f"valid must be bool, got {mask.dtype}"):
            check_mask(valid=mask)


def test_wrong_shapes_are_named():
    features = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"query \(4, 3\), positive \(2, 3\)"):
        info_nce_loss(features, features[:2], features, 0.1)
    with pytest.raises(ValueError, match=r"negatives \(4, 2\)"):
        info_nce_loss(features, features, features[:, :2], 0.1)
    with pytest.raises(ValueError, match=r"first \(4, 3\), second \(4, 2\)"):
        nt_xent_loss(features, features[:, :2], 0.1)
    with pytest.raises(ValueError, match=r"positions \(3,\)"):
        positional_contrastive_loss(features, torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match=r"partitions \(4, 1\)"):
        partition_contrastive_loss(features, torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"features \(4, 3, 1\)"):
        partition_contrastive_loss(features[..., None], torch.zeros(4, dtype=torch.long))


# --- unit vectors ----------------------------------------------------------------------------------------------------


def test_unit_vectors_are_those_of_torch():
    (vectors,) = draw(3, 8)
    torch.testing.assert_close(unit_vectors(vectors), torch.nn.functional.normalize(vectors, dim=1))
    assert torch.autograd.gradcheck(unit_vectors, vectors.requires_grad_())


@pytest.mark.parametrize("magnitude", [1e-11, 1e30, 3e38])
def test_unit_vectors_where_squares_leave_the_range_of_float32(magnitude):
    vectors = torch.tensor([[3.0, -4.0], [0.0, 1.0]]) / 4 * magnitude
    torch.testing.assert_close(unit_vectors(vectors), torch.tensor([[0.6, -0.8], [0.0, 1.0]]))
