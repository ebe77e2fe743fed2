"""DACL's density, weights, loss and samplers against hand-made numbers, the equations as loops, and what must hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses import dacl
from medlib.losses.contrastive import COLDEST, info_nce_loss
from medlib.losses.dacl import (
    claim_1,
    class_mean_contrastive_loss,
    class_mean_contrastive_loss_by_definition,
    class_prototypes,
    class_prototypes_by_definition,
    dense_center,
    densest,
    feature_density,
    feature_density_by_definition,
    gaussian_ramp,
    intra_class_variation_loss,
    intra_class_variation_loss_by_definition,
    other_class_rows,
    positiveness_weights,
    positiveness_weights_by_definition,
    sample_per_class,
    soft_density_guided_loss,
    soft_density_guided_loss_by_definition,
    sparsest,
    take_rows,
)
from medlib.rng import generator
from tests.benchmarks.bench_coral import peak_megabytes, timed
from tests.benchmarks.bench_dacl import density_from_tables, density_sum, features_and_banks
from tests.losses.masked import assert_leaves_no_trace


def at_angles(*degrees: float) -> torch.Tensor:
    """Vectors in the plane at these angles, of lengths 1, 2, 3, ...: pairs that can be drawn."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    length = torch.arange(1, len(degrees) + 1)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=1) * length


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors with rows of unequal lengths, float64."""
    stream = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=stream, dtype=torch.float64)
        * 10 ** torch.randn(*shape[:-1], 1, generator=stream, dtype=torch.float64)
        for shape in shapes
    ]


def draw_masks(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


# The loss on one class, in an order that gives the tests their names.
def guided(anchors, center, negatives, weights=None, **settings):
    weights = torch.ones(len(anchors), dtype=anchors.dtype) if weights is None else weights
    return soft_density_guided_loss(anchors, center, negatives, weights, **settings)


# Each loss and the density as functions of one matrix (6, 4), for the checks they share.
MASKS = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
LABELS = torch.tensor([0, 0, 1, 1, 2, -1])
WEIGHTS = torch.tensor([0.5, 1.5, 1.0, 2.0, 0.25, 0.75], dtype=torch.float64)
FUNCTIONS = {
    "prototypes": lambda h: class_prototypes(h.T[None, :, None], MASKS[None, :, None])[0].sum(),
    "density": lambda h: feature_density(h, h.flip(1), (1, 2, 5)).sum(),
    "guided": lambda h: guided(h, h.flip(1).sum(0), h.roll(1, 0).flip(1), WEIGHTS),
    "inside": lambda h: guided(h, h.flip(1).sum(0), h.roll(1, 0).flip(1), WEIGHTS, weight_inside=True),
    "decoupled": lambda h: guided(h, h.flip(1).sum(0), h.roll(1, 0).flip(1), WEIGHTS, include_positive=False),
    "class_mean": lambda h: class_mean_contrastive_loss(h, LABELS, h[:3].flip(1), 0.4),
    "variation": lambda h: intra_class_variation_loss(
        h.T[None, :, None], torch.arange(12).reshape(1, 2, 1, 6) % 5 - 1.0, MASKS[None, :, None]
    ),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_prototypes_golden():
    # One image of three pixels: (1, 0), (3, 4) and (5, 8). Class 0 has two of them, class 1 none, class 2 all.
    features = torch.tensor([[1.0, 3.0, 5.0], [0.0, 4.0, 8.0]])[None, :, None]
    masks = torch.tensor([[True, True, False], [False] * 3, [True] * 3])[None, :, None]
    prototypes, present = class_prototypes(features, masks)
    assert prototypes[0].tolist() == [[2, 2], [0, 0], [3, 4]]
    assert present[0].tolist() == [True, False, True]


def test_density_golden():
    # Seen from 0 degrees the pool stands at 60, 0, 90 and 180: cosines 1, 1/2, 0, -1 in order.
    # k = 1: 1. k = 2: 3/4. k = 3: 1/2. Larger than the pool: 1/8.
    pool = at_angles(60, 0, 90, 180)
    for neighbors, expected in (((1,), 1), ((2,), 0.75), ((1, 3), 0.75), ((1, 2, 3), 0.75), ((2, 99), 0.4375)):
        assert feature_density(at_angles(0), pool, neighbors).item() == pytest.approx(expected, rel=1e-12)
    # From 90 degrees: 1, cos 30, 0, 0.
    assert feature_density(at_angles(90), pool, (2,)).item() == pytest.approx((1 + math.sqrt(3) / 2) / 2, rel=1e-12)


def test_density_scales_default_to_those_of_dgcl():
    features, pool = draw(0, (7, 5), (50, 5))
    torch.testing.assert_close(feature_density(features, pool), feature_density(features, pool, (8, 16, 32)))


def test_weights_golden():
    # Cosines with the centre at 0 degrees: 1, 1/2, 0.
    share = [math.exp(1), math.exp(0.5), 1.0]
    total = sum(share)
    for scale, one in (("mean", total / 3), ("max", math.e), ("sum", total)):
        weights = positiveness_weights(at_angles(0, 60, 90), at_angles(0)[0] * 7, scale=scale)
        assert weights.tolist() == pytest.approx([x / one for x in share], rel=1e-12)


def test_loss_golden():
    # Anchors at 0 and 90 degrees with weights 1/2 and 3/2, the centre at 60, one negative at 180; temperature 1/2.
    anchors, center, negatives = at_angles(0, 90), at_angles(60)[0], at_angles(180)
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    near, far = 1.0, -2.0  # cos / temperature of the first with centre and negative
    near_90, far_90 = math.sqrt(3), 0.0
    first = math.log(math.exp(near) + math.exp(far)) - near
    second = math.log(math.exp(near_90) + math.exp(far_90)) - near_90
    args = anchors, center, negatives, weights, 0.5
    loss = soft_density_guided_loss(*args)
    assert loss.item() == pytest.approx((0.5 * first + 1.5 * second) / 2, rel=1e-12)
    assert soft_density_guided_loss(*args, reduction="sum").item() == pytest.approx(2 * loss.item(), rel=1e-12)
    # Without the positive the logarithm holds the negative alone; inside, the weight is a constant -log w.
    alone = soft_density_guided_loss(*args, include_positive=False)
    assert alone.item() == pytest.approx((0.5 * (far - near) + 1.5 * (far_90 - near_90)) / 2, rel=1e-12)
    inside = soft_density_guided_loss(*args, weight_inside=True)
    assert inside.item() == pytest.approx((first + second - math.log(0.75)) / 2, rel=1e-12)


def test_loss_defaults_are_the_papers_temperature_and_the_positive():
    anchors, negatives = draw(0, (4, 3), (5, 3))
    weights = torch.ones(4)
    expected = soft_density_guided_loss(anchors, anchors[0], negatives, weights, temperature=0.4, include_positive=True)
    assert soft_density_guided_loss(anchors, anchors[0], negatives, weights) == expected


def test_class_mean_golden():
    # Class 0 at 0 and 60 degrees, class 1 at 180; means at 0 and 180; temperature 1/2; the last pixel is nobody's.
    loss = class_mean_contrastive_loss(at_angles(0, 60, 180, 90), torch.tensor([0, 0, 1, -1]), at_angles(0, 180), 0.5)
    aligned, slanted = math.log(1 + math.exp(-4)), math.log(1 + math.exp(-2))
    assert loss.item() == pytest.approx(((aligned + slanted) / 2 + aligned) / 2, rel=1e-12)


def test_variation_golden():
    # Two pixels of one class: at 0 and 120 degrees the prototype is at 60 and both cosines are 1/2; in the other
    # network they coincide, cosine 1. A third pixel is in no mask.
    first = torch.stack([at_angles(0)[0], at_angles(120)[0], at_angles(17)[0]], dim=1)[None, :, None]
    second = torch.tensor([2.0, 1.0, 9.0], dtype=torch.float64)[None, None, None]
    mask = torch.tensor([True, True, False])[None, None, None]
    assert intra_class_variation_loss(first, second, mask).item() == pytest.approx(0.25, rel=1e-12)


def test_ramp_golden():
    assert gaussian_ramp(30_000, 30_000) == pytest.approx(0.1)
    assert gaussian_ramp(15_000, 30_000) == pytest.approx(0.1 * math.exp(-1.25))
    assert gaussian_ramp(1_000, 30_000) == pytest.approx(0.0009, abs=5e-5)
    assert gaussian_ramp(999, 30_000) == 0
    assert gaussian_ramp(0, 30_000, delay=0) == pytest.approx(0.1 * math.exp(-5))
    assert gaussian_ramp(40_000, 30_000, peak=0.3) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="total.*0"):
        gaussian_ramp(1, 0)


# --- the equations as loops ------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4))
def test_prototypes_are_equation_2(seed, images, classes):
    (features,) = draw(seed, (images, 3, 2, 4))
    masks = draw_masks(seed, images, classes, 2, 4)
    for ours, expected in zip(
        class_prototypes(features, masks), class_prototypes_by_definition(features, masks), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_prototypes_of_volumes():
    (features,) = draw(0, (2, 3, 4, 2, 5))
    masks = draw_masks(0, 2, 4, 4, 2, 5)
    prototypes, present = class_prototypes(features, masks)
    flat = class_prototypes(features.flatten(2)[:, :, None], masks.flatten(2)[:, :, None])
    torch.testing.assert_close(prototypes, flat[0])
    assert torch.equal(present, flat[1])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_density_is_equations_3_to_5(seed, rows, size, neighbors):
    features, pool = draw(seed, (rows, 4), (size, 4))
    expected = feature_density_by_definition(features, pool, neighbors)
    torch.testing.assert_close(feature_density(features, pool, neighbors), expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 9), st.booleans())
def test_the_search_in_groups_finds_the_same(seed, size, k, ties):
    (rows,) = draw(seed, (2, 3, size))
    if ties:
        rows = rows.sign()
    expected = rows.topk(min(k, size), dim=2).values
    assert torch.equal(dacl._largest(rows, k), expected)


def test_density_of_a_long_pool_and_in_blocks(monkeypatch):
    features, pool = draw(5, (23, 6), (301, 6))  # groups of 4 and one left over
    pool[300] = features[7]  # the nearest of 7 is the one left over
    expected = feature_density_by_definition(features, pool)
    torch.testing.assert_close(feature_density(features, pool), expected, rtol=1e-10, atol=1e-13)
    monkeypatch.setattr(dacl, "BLOCK", 301 * 4)  # 4 rows at a time, 3 in the last block
    torch.testing.assert_close(feature_density(features, pool), expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_weights_are_equation_9(seed, rows):
    anchors, centers = draw(seed, (rows, 4), (1, 4))
    expected = positiveness_weights_by_definition(anchors, centers[0])
    torch.testing.assert_close(positiveness_weights(anchors, centers[0]), expected, rtol=1e-10, atol=0)
    assert expected.mean().item() == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.02, 0.1, 0.4]),
       st.booleans(), st.booleans())  # fmt: skip
def test_loss_is_equation_10(seed, rows, others, temperature, include_positive, weight_inside):
    anchors, centers, negatives = draw(seed, (rows, 4), (1, 4), (others, 4))
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    args = anchors, centers[0], negatives, weights, temperature, include_positive
    torch.testing.assert_close(
        soft_density_guided_loss(*args, weight_inside=weight_inside),
        soft_density_guided_loss_by_definition(*args, weight_inside=weight_inside),
        rtol=1e-10,
        atol=1e-12,
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.02, 0.1, 0.7]))
def test_class_mean_is_its_formula(seed, rows, temperature):
    features, means = draw(seed, (rows, 4), (3, 4))
    labels = torch.randint(-1, 3, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[0] = 1
    args = features, labels, means, temperature
    expected = class_mean_contrastive_loss_by_definition(*args)
    torch.testing.assert_close(class_mean_contrastive_loss(*args), expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_variation_is_its_formula(seed):
    first, second = draw(seed, (2, 3, 2, 4), (2, 5, 2, 4))
    masks = draw_masks(seed, 2, 3, 2, 4)
    masks[0, 0, 0, 0] = True
    expected = intra_class_variation_loss_by_definition(first, second, masks)
    torch.testing.assert_close(intra_class_variation_loss(first, second, masks), expected, rtol=1e-9, atol=1e-13)


def test_with_equal_weights_it_is_info_nce():
    anchors, negatives = draw(1, (5, 4), (7, 4))
    expected = info_nce_loss(anchors, anchors[:1].expand(5, -1), negatives, 0.4)
    torch.testing.assert_close(guided(anchors, anchors[0], negatives), expected)


def test_gradients_are_those_of_the_equations():
    anchors, negatives, pool = (x.requires_grad_() for x in draw(3, (6, 4), (7, 4), (40, 4)))
    weights = positiveness_weights(anchors, pool[0])

    def gradients(loss, density):
        total = loss(anchors, pool[0], negatives, weights, 0.4, False) + density(anchors, pool, (1, 4)).sum()
        return torch.autograd.grad(total, [anchors, negatives, pool])

    ours = gradients(soft_density_guided_loss, feature_density)
    expected = gradients(soft_density_guided_loss_by_definition, feature_density_by_definition)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- all classes at once ---------------------------------------------------------------------------------------------

SIZES = [(5, 7), (0, 3), (2, 0), (1, 1), (6, 9)]  # rows and pool, or anchors and negatives, of five classes


def ragged(seed: int, sizes: list[int], dim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (C, max, D) and which are there, in any place; those that are not there are huge."""
    rows = torch.full((len(sizes), max(sizes) + 2, dim), 1e6, dtype=torch.float64)
    valid = torch.zeros(rows.shape[:2], dtype=torch.bool)
    for c, size in enumerate(sizes):
        place = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed + c))[:size]
        rows[c, place] = draw(seed + c, (size, dim))[0]
        valid[c, place] = True
    return rows, valid


def test_density_of_classes_is_that_of_each():
    features, there = ragged(0, [m for m, _ in SIZES])
    pool, valid = ragged(10, [p for _, p in SIZES])
    density = feature_density(features, pool, (2, 4), valid)
    for c, (rows, size) in enumerate(SIZES):
        if rows and size:
            expected = feature_density_by_definition(features[c, there[c]], pool[c, valid[c]], (2, 4))
            torch.testing.assert_close(density[c, there[c]], expected, rtol=1e-10, atol=1e-13)
        elif not size:
            assert (density[c] == 0).all()
    one = feature_density(features[0], pool[0], (2, 4), valid[0])
    torch.testing.assert_close(one, density[0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", ["mean", "max", "sum"])
def test_weights_of_classes_are_those_of_each(scale):
    anchors, valid = ragged(0, [m for m, _ in SIZES])
    (centers,) = draw(1, (5, 4))
    weights = positiveness_weights(anchors, centers, valid, scale=scale)
    assert (weights[~valid] == 0).all()
    for c in range(5):
        expected = positiveness_weights(anchors[c, valid[c]], centers[c], scale=scale)
        torch.testing.assert_close(weights[c, valid[c]], expected)


@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("weight_inside", [True, False])
def test_loss_of_classes_is_the_mean_of_those_that_have_both(include_positive, weight_inside):
    anchors, valid = ragged(0, [m for m, _ in SIZES])
    negatives, negative_valid = ragged(10, [k for _, k in SIZES])
    (centers,) = draw(1, (5, 4))
    weights = positiveness_weights(anchors, centers, valid)
    chosen = {"include_positive": include_positive, "weight_inside": weight_inside}
    masks = {"valid": valid, "negative_valid": negative_valid}
    anchors.requires_grad_()
    loss = soft_density_guided_loss(anchors, centers, negatives, weights, **chosen, **masks)
    each = []
    for c in (0, 3, 4):  # class 1 has no anchor, class 2 no negative
        rows = anchors[c, valid[c]], centers[c], negatives[c, negative_valid[c]], weights[c, valid[c]]
        each.append(soft_density_guided_loss_by_definition(*rows, **chosen))
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-10, atol=1e-13)
    (gradient,) = torch.autograd.grad(loss, anchors)
    assert gradient.isfinite().all()
    assert (gradient[~valid] == 0).all()
    total = soft_density_guided_loss(anchors, centers, negatives, weights, reduction="sum", **chosen, **masks)
    counts = [5, 1, 6]
    expected = sum(n * mean for n, mean in zip(counts, each, strict=True))
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


# --- invariances -----------------------------------------------------------------------------------------------------


def test_length_does_not_matter():
    anchors, negatives, centers = draw(0, (6, 4), (9, 4), (1, 4))
    lengths = torch.tensor([1e-3, 2, 1e3, 1, 0.5, 7], dtype=torch.float64)[:, None]
    for stretched, straight in (
        (feature_density(anchors * lengths, negatives * 3), feature_density(anchors, negatives)),
        (positiveness_weights(anchors * lengths, 5 * centers[0]), positiveness_weights(anchors, centers[0])),
        (guided(anchors * lengths, 5 * centers[0], negatives * 3), guided(anchors, centers[0], negatives)),
        (
            class_mean_contrastive_loss(anchors * lengths, LABELS, negatives[:3] * 3),
            class_mean_contrastive_loss(anchors, LABELS, negatives[:3]),
        ),
    ):
        torch.testing.assert_close(stretched, straight)


def test_order_of_the_rows_does_not_matter():
    anchors, negatives, centers = draw(0, (6, 4), (9, 4), (1, 4))
    order, mixed = torch.tensor([3, 5, 0, 1, 4, 2]), torch.tensor([8, 1, 0, 3, 2, 4, 6, 5, 7])
    torch.testing.assert_close(
        feature_density(anchors[order], negatives[mixed], (2, 3)), feature_density(anchors, negatives, (2, 3))[order]
    )
    torch.testing.assert_close(
        positiveness_weights(anchors[order], centers[0]), positiveness_weights(anchors, centers[0])[order]
    )
    torch.testing.assert_close(
        guided(anchors[order], centers[0], negatives[mixed], WEIGHTS[order]),
        guided(anchors, centers[0], negatives, WEIGHTS),
    )
    torch.testing.assert_close(
        class_mean_contrastive_loss(anchors[order], LABELS[order], negatives[:3]),
        class_mean_contrastive_loss(anchors, LABELS, negatives[:3]),
    )


def test_rotation_does_not_matter():
    anchors, negatives, centers = draw(0, (6, 4), (9, 4), (1, 4))
    turn, _ = torch.linalg.qr(draw(1, (4, 4))[0])
    torch.testing.assert_close(feature_density(anchors @ turn, negatives @ turn), feature_density(anchors, negatives))
    torch.testing.assert_close(
        guided(anchors @ turn, centers[0] @ turn, negatives @ turn), guided(anchors, centers[0], negatives)
    )


def test_a_smaller_scale_is_never_sparser():
    features, pool = draw(2, (20, 4), (50, 4))
    scales = [feature_density(features, pool, (k,)) for k in (1, 4, 16, 50)]
    for small, large in zip(scales, scales[1:], strict=False):
        assert (small >= large - 1e-12).all()
    torch.testing.assert_close(feature_density(features, pool, (1, 4, 16, 50)), torch.stack(scales).mean(0))


def test_density_tells_the_cluster_from_its_rim():
    stream = torch.Generator().manual_seed(0)
    core = torch.tensor([1.0, 0, 0]) + 0.1 * torch.randn(100, 3, generator=stream)
    rim = torch.tensor([1.0, 0, 0]) + 1.0 * torch.randn(20, 3, generator=stream)
    features = torch.cat([core, rim])
    index, _ = sparsest(feature_density(features, features), torch.ones(120, dtype=torch.bool), 10)
    assert (index >= 100).all()


# --- collapse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.4, 5.0])
def test_collapse(temperature):
    same = torch.full((6, 4), 0.7, dtype=torch.float64)
    weights = positiveness_weights(same, same[0])
    assert weights.tolist() == pytest.approx([1] * 6)
    loss = soft_density_guided_loss(same, same[0], same[:3], weights, temperature)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-10)
    alone = soft_density_guided_loss(same, same[0], same[:3], weights, temperature, include_positive=False)
    assert alone.item() == pytest.approx(math.log(3), rel=1e-10)
    assert feature_density(same, same).tolist() == pytest.approx([1] * 6)
    assert class_mean_contrastive_loss(same, LABELS, same[:3], temperature).item() == pytest.approx(math.log(3))
    images = same.T[None, :, None]
    assert intra_class_variation_loss(images, images * 3, MASKS[None, :, None]).item() == pytest.approx(0, abs=1e-20)


def test_only_with_the_positive_it_is_bounded_below():
    anchors, center, negatives = at_angles(0, 0), at_angles(0)[0], at_angles(180, 180)
    assert guided(anchors, center, negatives, temperature=0.05).item() == pytest.approx(0, abs=1e-12)
    expected = math.log(2) - 40
    assert guided(anchors, center, negatives, temperature=0.05, include_positive=False).item() == pytest.approx(
        expected
    )


# --- Claim 1 ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.booleans())
def test_claim_1_bound_holds_and_is_reached(seed, rows, weight_inside):
    stream = torch.Generator().manual_seed(seed)
    similarities = 5 * torch.randn(rows, generator=stream, dtype=torch.float64)
    weights = torch.rand(rows, generator=stream, dtype=torch.float64) + 0.05
    objective, bound = claim_1(similarities, weights, weight_inside)
    assert objective >= bound - 1e-9
    claimed = torch.zeros(rows, dtype=torch.float64) if weight_inside else weights.log()  # their softmax is the optimum
    torch.testing.assert_close(claim_1(claimed, weights, weight_inside)[0], bound, rtol=1e-9, atol=1e-9)


def test_claim_1_golden():
    # Shares 1/2 and 1/2, weights 1 and 3: 4 log 2, where -log(1/4) - 3 log(3/4) is possible; inside, -log(1/2 * 3/2).
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    objective, bound = claim_1(torch.zeros(2, dtype=torch.float64), weights)
    assert objective.item() == pytest.approx(4 * math.log(2))
    assert bound.item() == pytest.approx(math.log(4) + 3 * math.log(4 / 3))
    objective, bound = claim_1(torch.zeros(2, dtype=torch.float64), weights, weight_inside=True)
    assert objective.item() == pytest.approx(-math.log(0.75))
    assert bound.item() == pytest.approx(-math.log(0.75))


def test_the_optimum_of_the_claim_belongs_to_weights_outside():
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    for weight_inside, expected in ((False, weights / 8), (True, torch.full_like(weights, 1 / 3))):
        similarities = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.SGD([similarities], lr=0.1)
        for _ in range(500):
            optimiser.zero_grad()
            claim_1(similarities, weights, weight_inside)[0].backward()
            optimiser.step()
        torch.testing.assert_close(similarities.detach().softmax(0), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_inside_the_logarithm_has_no_gradient():
    anchors, negatives = draw(0, (6, 4), (9, 4))
    anchors.requires_grad_()

    def gradient(weights, weight_inside):
        loss = guided(anchors, negatives[0], negatives, weights, weight_inside=weight_inside)
        return torch.autograd.grad(loss, anchors)[0]

    torch.testing.assert_close(gradient(WEIGHTS, True), gradient(torch.ones(6), True), rtol=0, atol=0)
    assert (gradient(WEIGHTS, False) - gradient(torch.ones(6), False)).abs().max() > 1e-3


# --- gradients -------------------------------------------------------------------------------------------------------


@every_function
def test_gradcheck(function):
    (features,) = draw(1, (6, 4))
    features = torch.nn.functional.normalize(features).mul_(1.3).requires_grad_()
    assert torch.autograd.gradcheck(function, features)


def test_density_gradcheck_in_groups():
    features, pool = (torch.nn.functional.normalize(x).requires_grad_() for x in draw(4, (3, 4), (27, 4)))
    assert torch.autograd.gradcheck(lambda f, p: feature_density(f, p, (1, 3)), (features, pool))


def test_who_gets_a_gradient():
    anchors, negatives, centers = (x.requires_grad_() for x in draw(1, (6, 4), (5, 4), (1, 4)))
    weights = positiveness_weights(anchors, centers[0])
    assert not weights.requires_grad
    learned = WEIGHTS.clone().requires_grad_()
    soft_density_guided_loss(anchors, centers[0], negatives, learned).backward()
    assert learned.grad is None
    for tensor in (anchors, negatives, centers):
        assert (tensor.grad.abs().sum(dim=1) > 0).all()


def test_the_other_network_gets_no_gradient():
    first, second = (x.requires_grad_() for x in draw(1, (2, 3, 2, 4), (2, 5, 2, 4)))
    intra_class_variation_loss(first, second, draw_masks(0, 2, 3, 2, 4)).backward()
    assert second.grad is None
    assert first.grad.abs().max() > 0


def test_keys_and_negatives_are_detached():
    features = torch.ones(2, 3, 4, requires_grad=True)
    valid = torch.ones(2, 3, dtype=torch.bool)
    assert not dense_center(features, valid)[0].requires_grad
    assert not other_class_rows(features, valid, 2, generator(0, "negatives"))[0].requires_grad
    assert take_rows(features, torch.zeros(2, 1, dtype=torch.long)).requires_grad


# --- who takes part --------------------------------------------------------------------------------------------------


def test_sparsest_and_densest_golden():
    density = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.4, 0.1, 0.8]])
    valid = torch.tensor([[True, True, True, True], [False, True, False, True]])
    index, chosen = sparsest(density, valid, 2)
    assert index[0].tolist() == [1, 3]
    assert index[1].tolist() == [1, 3]
    assert chosen.all()
    index, chosen = densest(density, valid, 3)
    assert index[0].tolist() == [2, 0, 3]
    assert index[1, :2].tolist() == [3, 1]
    assert chosen.tolist() == [[True] * 3, [True, True, False]]
    assert sparsest(density, valid, 99)[0].shape == (2, 4)
    assert sparsest(density[:, :0], valid[:, :0], 3)[0].shape == (2, 0)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("choose", [sparsest, densest])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_row_that_is_there_ranks_before_one_that_is_not(odd, choose, dtype):
    density = torch.tensor([[9.0, 0.5, odd, -9.0, 0.1]], dtype=dtype)
    valid = torch.tensor([[False, True, True, False, True]])
    index, chosen = choose(density, valid, 3)
    assert chosen.all()
    assert sorted(index[0].tolist()) == [1, 2, 4]
    first = (odd == -math.inf) if choose is sparsest else (odd == math.inf)
    assert index[0].tolist().index(2) == (0 if first else 2)  # NaN is the last choice


def test_dense_center_golden():
    keys = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]], [[1.0, 1.0]] * 3])
    center, present = dense_center(keys, torch.tensor([[True, True, False], [False] * 3]))
    assert center.tolist() == [[2, 1], [0, 0]]
    assert present.tolist() == [True, False]
    keys[0, 2] = math.nan  # what is not there cannot spoil it
    assert dense_center(keys, torch.tensor([[True, True, False], [False] * 3]))[0][0].tolist() == [2, 1]


def test_take_rows_golden():
    rows = torch.arange(12.0).reshape(2, 3, 2)
    assert take_rows(rows, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(-2, 5), max_size=40), st.integers(1, 12))
def test_sample_per_class_takes_up_to_count_of_its_own(seed, given_labels, count):
    labels = torch.tensor(given_labels, dtype=torch.long)
    index, valid = sample_per_class(labels, 4, count, torch.Generator().manual_seed(seed))
    assert index.shape == valid.shape == (4, count)
    for c in range(4):
        mine = index[c, valid[c]].tolist()
        assert len(set(mine)) == len(mine) == min(count, given_labels.count(c))
        assert all(given_labels[i] == c for i in mine)


def test_sample_per_class_is_fair():
    labels = torch.tensor([0] * 10 + [1] * 3 + [0] * 10)
    stream = generator(0, "sample")
    drawn = torch.zeros(23)
    for _ in range(600):
        index, valid = sample_per_class(labels, 2, 4, stream)
        drawn[index[valid]] += 1
    zeros = drawn[labels == 0] / 600
    assert ((zeros - 0.2).abs() < 0.07).all()  # 4 of 20; the standard error is 0.016
    assert (drawn[labels == 1] == 600).all()


def test_negatives_come_from_other_classes():
    rows, valid = ragged(0, [3, 0, 2, 4])
    marked = torch.arange(4.0)[:, None, None].expand_as(rows).clone()
    marked[..., 0] = torch.arange(rows.shape[1])
    negatives, there = other_class_rows(marked, valid, 5, generator(0, "negatives"))
    assert negatives.shape == (4, 5, 4)
    assert there.sum(dim=1).tolist() == [5, 5, 5, 5]  # of 6, 9, 7 and 5
    for c in range(4):
        drawn = [(int(row[1]), int(row[0])) for row in negatives[c, there[c]]]
        assert len(set(drawn)) == 5  # without replacement
        assert all(other != c and valid[other, place] for other, place in drawn)
    _, everyone = other_class_rows(marked, valid, 99, generator(0, "negatives"))
    assert everyone.sum(dim=1).tolist() == [6, 9, 7, 5]


def test_negatives_are_a_fair_draw():
    rows = torch.arange(15.0).reshape(3, 5, 1)
    valid = torch.ones(3, 5, dtype=torch.bool)
    stream, drawn = generator(0, "negatives"), torch.zeros(15)
    for _ in range(500):
        drawn[other_class_rows(rows, valid, 2, stream)[0][0].flatten().long()] += 1
    assert (drawn[:5] == 0).all()
    assert ((drawn[5:] / 500 - 0.2).abs() < 0.09).all()  # 2 of 10; the standard error is 0.018


def test_one_class_has_no_negatives():
    for rows in (torch.ones(1, 3, 2), torch.ones(2, 0, 2)):
        negatives, there = other_class_rows(rows, torch.ones(rows.shape[:2], dtype=torch.bool), 4, generator(0, "n"))
        assert there.sum() == 0
        assert negatives.shape == (len(rows), 0, 2)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    sample_per_class(LABELS, 3, 2, generator(0, "sample"))
    other_class_rows(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), 2, generator(0, "negatives"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parts_fit_together():
    # Pixels of three classes, to anchors, keys, centre, negatives, weights and loss, as the method will do it.
    stream = generator(0, "parts")
    labels = torch.randint(-1, 3, (300,), generator=stream)
    axes = torch.nn.functional.one_hot(labels.clamp(min=0), 4).float()
    pixels = torch.nn.Parameter(axes + 0.5 * torch.randn(300, 4, generator=stream))
    optimiser = torch.optim.SGD([pixels], lr=5.0)
    losses = []
    for _ in range(30):
        index, valid = sample_per_class(labels, 3, 64, stream)
        rows = torch.nn.functional.normalize(pixels[index.flatten()], dim=1).unflatten(0, index.shape)
        density = feature_density(rows.detach(), rows.detach(), valid=valid)
        sparse, chosen = sparsest(density, valid, 16)
        anchors = take_rows(rows, sparse)
        dense, dense_valid = densest(density, valid, 16)
        center, present = dense_center(take_rows(rows, dense), dense_valid)
        negatives, negative_valid = other_class_rows(anchors, chosen, 32, stream)
        weights = positiveness_weights(anchors, center, chosen)
        masks = {"valid": chosen & present[:, None], "negative_valid": negative_valid}
        loss = soft_density_guided_loss(anchors, center, negatives, weights, **masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert pixels.grad[labels == -1].abs().max() == 0


# --- degenerate and extreme ------------------------------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e18])
def test_finite_for_any_finite_input(function, magnitude):
    features = (2 * torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) - 1) * magnitude
    features.requires_grad_()
    value = function(features)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()


def test_finite_at_the_end_of_the_range():
    features = torch.tensor([[3e38, -3e38, 1e30, 0.0]]).repeat(6, 1).requires_grad_()
    total = (
        feature_density(features, features).sum()
        + guided(features, features[0], features[:2])
        + class_mean_contrastive_loss(features, LABELS, features[:3])
    )
    prototypes, _ = class_prototypes(features.T[None, :, None], MASKS[None, :, None])  # no sum of pixels overflows
    assert prototypes.isfinite().all()
    total.backward()
    assert total.isfinite()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("weight", [0.0, 1e-40, 1e6])
@pytest.mark.parametrize("weight_inside", [True, False])
def test_loss_finite_at_extreme_settings(temperature, include_positive, weight, weight_inside):
    anchors, negatives = (x.float().requires_grad_() for x in draw(0, (6, 4), (9, 4)))
    settings_ = {"temperature": temperature, "include_positive": include_positive, "weight_inside": weight_inside}
    loss = guided(anchors, negatives[0], negatives, torch.full((6,), weight), **settings_)
    loss.backward()
    assert loss.isfinite()
    assert anchors.grad.isfinite().all()
    assert negatives.grad.isfinite().all()


@pytest.mark.parametrize("include_positive", [True, False])
def test_finite_at_the_coldest_temperature(include_positive):
    anchors, negatives = (x.float().requires_grad_() for x in draw(0, (6, 4), (9, 4)))
    loss = guided(anchors, negatives[0], negatives, temperature=COLDEST, include_positive=include_positive)
    loss = loss + class_mean_contrastive_loss(anchors, LABELS, negatives[:3], COLDEST)
    loss.backward()
    assert loss.isfinite()
    assert anchors.grad.isfinite().all()
    assert negatives.grad.isfinite().all()


def test_cold_temperature_is_the_largest_miss():
    loss = guided(at_angles(0), at_angles(90)[0], at_angles(60, 180), temperature=1e-3)
    assert loss.item() == pytest.approx(500, rel=1e-9)


@pytest.mark.parametrize(("rows", "others"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("include_positive", [True, False])
@pytest.mark.parametrize("weight_inside", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_compare_is_zero_and_attached(rows, others, include_positive, weight_inside, reduction):
    anchors, negatives = torch.ones(rows, 4, requires_grad=True), torch.ones(others, 4)
    weights = positiveness_weights(anchors, torch.ones(4)) * 2
    assert weights.shape == (rows,)
    chosen = {"include_positive": include_positive, "weight_inside": weight_inside, "reduction": reduction}
    loss = guided(anchors, torch.ones(4), negatives, weights, **chosen)
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    assert anchors.grad.shape == anchors.shape
    assert (anchors.grad == 0).all()


def test_nothing_to_compare_elsewhere():
    features = torch.ones(6, 4, requires_grad=True)
    nobody = torch.full((6,), -1)
    images, no_masks = features.T[None, :, None], torch.zeros(1, 2, 1, 6, dtype=torch.bool)
    prototypes, present = class_prototypes(images, no_masks)
    assert not present.any()
    for value in (
        feature_density(features, features[:0]).sum(),
        feature_density(features[:0], features).sum(),
        feature_density(features, features, valid=torch.zeros(6, dtype=torch.bool)).sum(),
        class_mean_contrastive_loss(features, nobody, features[:3]),
        class_mean_contrastive_loss(features, LABELS, features[:1]),  # one mean: the answer is known
        class_mean_contrastive_loss(features, LABELS, features[:3], present=torch.tensor([False, True, False])),
        class_mean_contrastive_loss(features, LABELS, features[:0]),
        class_mean_contrastive_loss(features[:0], LABELS[:0], features[:3]),
        intra_class_variation_loss(images, images, no_masks),
        prototypes.sum(),
    ):
        features.grad = None
        assert value.item() == 0
        value.backward()
        assert features.grad is None or (features.grad == 0).all()
        assert value.requires_grad


def test_an_absent_mean_is_no_candidate():
    features, means = draw(0, (6, 4), (3, 4))
    present = torch.tensor([True, False, True])
    labels = torch.tensor([0, 0, 1, 0, 2, -1])
    relabelled = torch.tensor([0, 0, -1, 0, 1, -1])
    torch.testing.assert_close(
        class_mean_contrastive_loss(features, labels, means, present=present),
        class_mean_contrastive_loss(features, relabelled, means[present]),
    )


@pytest.mark.parametrize("anything", [math.nan, math.inf])
def test_what_a_mask_leaves_out_may_hold_anything(anything):
    anchors, negatives, centers, pool = draw(0, (3, 6, 4), (3, 5, 4), (3, 4), (3, 40, 4))
    weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, means = draw(1, (6, 4), (3, 4))
    first, second = draw(2, (2, 3, 2, 4), (2, 5, 2, 4))
    masks = draw_masks(0, 2, 2, 2, 4)
    anywhere = masks.any(dim=1, keepdim=True)
    there, other_there, in_pool = draw_masks(1, 3, 6), draw_masks(2, 3, 5), draw_masks(3, 3, 40)
    there[0, 0] = other_there[0, 0] = there[1, 0] = True
    there[2], other_there[1] = False, False  # class 2 has no anchor, class 1 no negative
    compared = there & other_there.any(dim=1, keepdim=True)
    present, labels = torch.tensor([True, False, True]), torch.tensor([0, 0, 1, 0, 2, -1])
    pixels = ((labels == 0) | (labels == 2))[:, None]
    both = {"valid": there, "negative_valid": other_there}
    cases = [
        (lambda a, c, n, w, chosen=chosen: soft_density_guided_loss(a, c, n, w, **chosen, **both),
         (anchors, centers, negatives, weights),
         (compared[:, :, None], compared.any(dim=1)[:, None], other_there[:, :, None], compared))
        for chosen in ({}, {"include_positive": False}, {"weight_inside": True, "reduction": "sum"})
    ]  # fmt: skip
    cases += [
        (lambda f, m: class_mean_contrastive_loss(f, labels, m, present=present), (features, means),
         (pixels, present[:, None])),
        (lambda f, p: feature_density(f, p, (1, 2, 3), in_pool).sum(), (anchors, pool), (True, in_pool[:, :, None])),
        (lambda f: class_prototypes(f, masks)[0].sum(), (first,), (anywhere,)),
        (lambda f, g: intra_class_variation_loss(f, g, masks), (first, second), (anywhere, anywhere)),
    ]  # fmt: skip
    for loss, given_, kept in cases:
        assert_leaves_no_trace(loss, given_, kept, anything)


@every_function
def test_a_blank_row_gets_no_gradient_and_spoils_none(function):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features[5] = 0
    features.requires_grad_()
    value = function(features)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()
    assert features.grad.abs().max() < 1e3


@every_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(function, dtype):
    half = torch.nn.functional.normalize(draw(2, (6, 4))[0]).to(dtype)
    value = function(half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, function(half.float()), rtol=1e-2, atol=1e-3)  # the test's own sums round


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_not_rounded_again(dtype):
    anchors, negatives = (torch.nn.functional.normalize(x).to(dtype) for x in draw(2, (6, 4), (9, 4)))
    weights = positiveness_weights(anchors, negatives[0])
    assert weights.dtype == torch.float32
    for half, full in (
        (guided(anchors, negatives[0], negatives, temperature=0.01),
         guided(anchors.float(), negatives[0].float(), negatives.float(), temperature=0.01)),
        (weights, positiveness_weights(anchors.float(), negatives[0].float())),
        (feature_density(anchors, negatives, (3,)), feature_density(anchors.float(), negatives.float(), (3,))),
    ):  # fmt: skip
        torch.testing.assert_close(half, full, rtol=1e-6, atol=1e-6)


@every_function
def test_autocast_changes_nothing(function):
    features = torch.nn.functional.normalize(draw(2, (6, 4))[0]).float()
    expected = function(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(function(features), expected, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["anchors", "negatives", "center"])
def test_nan_is_never_hidden(place):
    rows = {"anchors": torch.randn(6, 4), "negatives": torch.randn(9, 4), "center": torch.randn(1, 4)}
    rows[place][-1, 2] = math.nan
    assert guided(rows["anchors"], rows["center"][0], rows["negatives"]).isnan()
    assert feature_density(rows["anchors"], rows["negatives"]).isnan().any() == (place != "center")


@pytest.mark.parametrize("temperature", [0, -0.5, 1e-42, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    features = at_angles(0, 10, 20)
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        guided(features, features[0], features, temperature=temperature)
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        class_mean_contrastive_loss(features, LABELS[:3], features, temperature)


def test_wrong_shapes_are_named():
    rows, image = torch.ones(4, 3), torch.ones(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"anchors \(4, 3\), center \(1, 3\)"):
        guided(rows, rows[:1], rows)
    with pytest.raises(ValueError, match=r"negatives \(4, 2\)"):
        guided(rows, rows[0], rows[:, :2])
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        guided(rows, rows[0], rows, torch.ones(3))
    with pytest.raises(ValueError, match=r"anchors \(1, 4, 3\), center \(3,\)"):
        positiveness_weights(rows[None], rows[0])
    with pytest.raises(ValueError, match=r"features \(4, 3\), pool \(4, 2\)"):
        feature_density(rows, rows[:, :2])
    with pytest.raises(ValueError, match=r"features \(1, 4, 3\), pool \(4, 3\)"):
        feature_density(rows[None], rows)
    with pytest.raises(ValueError, match=r"masks \(2, 3, 5, 4\)"):
        class_prototypes(image, torch.ones(2, 3, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"features \(4, 3\)"):
        class_prototypes(rows, rows.bool())
    with pytest.raises(ValueError, match=r"valid.*\(4,\).*\(3,\)"):
        guided(rows, rows[0], rows, valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        class_mean_contrastive_loss(rows, torch.zeros(3), rows)
    with pytest.raises(ValueError, match=r"second \(2, 3, 4, 4\)"):
        intra_class_variation_loss(image, image[..., :4], torch.ones(2, 1, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"similarities \(4, 3\)"):
        claim_1(rows, rows[0])
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\)"):
        sparsest(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), 1)


def test_wrong_settings_are_named():
    rows, image = torch.ones(4, 3), torch.ones(2, 3, 4, 5)
    for neighbors in ((), (4, 0), (4.0,), (4, "8"), 8.0):
        with pytest.raises(ValueError, match="neighbors must be one or more whole numbers"):
            feature_density(rows, rows, neighbors)
    with pytest.raises(ValueError, match="scale.*'median'"):
        positiveness_weights(rows, rows[0], scale="median")
    with pytest.raises(ValueError, match="reduction.*'max'"):
        guided(rows, rows[0], rows, reduction="max")
    with pytest.raises(ValueError, match="masks must be bool.*float32"):
        class_prototypes(image, image)
    with pytest.raises(ValueError, match="valid must be bool.*float32"):
        feature_density(rows, rows, valid=torch.ones(4))
    with pytest.raises(ValueError, match="negative_valid must be bool.*int64"):
        guided(rows, rows[0], rows, negative_valid=torch.ones(4).long())
    with pytest.raises(ValueError, match="weights must be floating point, got torch.int64"):
        guided(rows, rows[0], rows, torch.ones(4).long())
    with pytest.raises(ValueError, match="labels must be of an integer type, got torch.float32"):
        sample_per_class(torch.tensor([0.5, 1.0]), 3, 2, generator(0, "s"))
    with pytest.raises(ValueError, match="count.*2.5"):
        sample_per_class(LABELS, 3, 2.5, generator(0, "s"))
    with pytest.raises(ValueError, match="count.*0"):
        sample_per_class(LABELS, 3, 0, generator(0, "s"))
    with pytest.raises(ValueError, match="count.*0"):
        sparsest(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), 0)


# --- cost: loose bounds; the real numbers come from ``python -m tests.benchmarks.bench_dacl`` -------------------------


def test_density_of_ten_thousand_features_of_each_class_takes_less_than_600_megabytes():
    features, banks = features_and_banks(10_000)
    assert peak_megabytes(lambda: density_sum(feature_density, features, banks)) < 600


def test_density_is_faster_than_a_search_per_scale():
    features, banks = features_and_banks(300)
    fast, seconds = timed(lambda: density_sum(feature_density, features, banks), repeat=5)
    slow, slow_seconds = timed(lambda: density_sum(density_from_tables, features, banks), repeat=2)
    assert fast == pytest.approx(slow, rel=1e-5)
    assert slow_seconds > 1.4 * seconds  # 1.8 on a slow day, 1.0 if nothing is shared
