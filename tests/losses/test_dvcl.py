"""DVCL's selection, searches and losses against hand-made numbers, the equations as loops, and any input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses import dvcl
from medlib.losses.dvcl import (
    bound_chain,
    bound_chain_by_definition,
    complementary_label_loss,
    complementary_labels,
    distance_aware_loss,
    distance_aware_loss_by_definition,
    entropy_from_logits,
    entropy_selection,
    entropy_selection_by_definition,
    high_quality_contrastive_loss,
    high_quality_contrastive_loss_by_definition,
    inlier_queries,
    inlier_queries_by_definition,
    nearest_and_farthest,
    nearest_and_farthest_by_definition,
    neighbor_affinity,
    neighbor_affinity_by_definition,
    nnclr_loss,
    partition_neighbors,
    reverse_rank,
    select_by_entropy,
    similarity_affinity,
    snclr_loss,
    voxel_entropy,
    voxel_entropy_by_definition,
)

LOG2 = math.log(2)


def at_angles(*degrees: float) -> torch.Tensor:
    """Vectors in the plane at these angles, of lengths 1, 2, 3, ...: pairs that can be drawn."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    length = torch.arange(1, len(degrees) + 1)[:, None]
    return torch.stack([angle.cos(), angle.sin()], dim=1) * length


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def pool(seed: int, count: int, dim: int, kind: str) -> torch.Tensor:
    """Features with no ties, with many (a coarse grid, some rows 0), or all alike but for their lengths; float64."""
    if kind == "free":
        return normal(seed, count, dim) * 10 ** normal(seed + 1, count, 1)
    if kind == "grid":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-1, 2, (count, dim), generator=generator).double()
    return torch.arange(1, count + 1)[:, None] * normal(seed, 1, dim)


def case(seed: int, count: int = 9, classes: int = 4, k: int = 3, k_far: int = 2) -> tuple[torch.Tensor, ...]:
    """Probabilities (count, classes), queries, neighbours, outsiders and affinities, for the distance-aware loss."""
    features = pool(seed, count, 3, "free")
    probabilities = normal(seed + 2, count, classes).softmax(dim=1)
    queries = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:5]
    neighbors, outsiders = nearest_and_farthest(features, queries, k, k_far)
    return probabilities, queries, neighbors, outsiders, neighbor_affinity(features, queries, neighbors)


# --- entropy: golden, equation, invariance, limits, gradient, extremes -----------------------------------------------


def test_entropy_golden():
    # One class; two alike: log 2; three alike: log 3; 1/2, 1/4, 1/4: log 2 / 2 + 2 (log 4 / 4) = 3/2 log 2.
    p = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25]], dtype=torch.float64)
    expected = torch.tensor([0, LOG2, math.log(3), 1.5 * LOG2], dtype=torch.float64)
    torch.testing.assert_close(voxel_entropy(p), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(entropy_from_logits(p.log()), expected, rtol=1e-14, atol=0)
    assert voxel_entropy(p)[0] == 0


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3, 2), (2, 1, 2, 3, 2), (1, 14, 2, 2, 2)])
def test_entropy_is_equation_4(shape):
    logits = 5 * normal(0, *shape)
    p = logits.softmax(dim=1)
    expected = voxel_entropy_by_definition(p)
    assert expected.shape == (shape[0], *shape[2:])
    torch.testing.assert_close(voxel_entropy(p), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(entropy_from_logits(logits), expected, rtol=1e-12, atol=1e-14)


def test_entropy_sees_neither_the_order_of_classes_nor_the_origin_of_logits():
    logits = 3 * normal(1, 2, 5, 4)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy_from_logits(logits[:, [3, 1, 4, 0, 2]]), entropy)
    torch.testing.assert_close(entropy_from_logits(logits + 1000), entropy, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(voxel_entropy(logits.softmax(1)[:, [3, 1, 4, 0, 2]]), entropy)
    assert (entropy < math.log(5)).all()


def test_entropy_gradcheck():
    logits = (3 * normal(2, 2, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(entropy_from_logits, logits)
    assert torch.autograd.gradcheck(voxel_entropy, logits.detach().softmax(dim=1).requires_grad_())
    ours = torch.autograd.grad(entropy_from_logits(logits).square().sum(), logits)[0]
    theirs = torch.autograd.grad(voxel_entropy(logits.softmax(dim=1)).square().sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 90.0, 1e4, 1e30, 3e38])
def test_entropy_is_finite_for_any_finite_logits(magnitude):
    logits = (2 * torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) - 1) * magnitude
    logits.requires_grad_()
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.isfinite().all() and logits.grad.isfinite().all()
    assert (entropy >= 0).all() and (entropy <= math.log(4) + 1e-6).all()
    torch.testing.assert_close(entropy, voxel_entropy(logits.softmax(dim=1)), rtol=1e-5, atol=1e-6)


def test_entropy_gradient_is_finite_at_one_hot():
    p = torch.eye(3, requires_grad=True)
    entropy = voxel_entropy(p)
    entropy.sum().backward()
    assert (entropy == 0).all()
    assert p.grad.isfinite().all()
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropy_of_half_is_computed_in_float32(dtype):
    logits = (4 * normal(3, 2, 5, 6)).to(dtype).requires_grad_()
    entropy = entropy_from_logits(logits)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy, entropy_from_logits(logits.float()), rtol=0, atol=0)
    entropy.sum().backward()
    assert logits.grad.dtype == dtype
    p = logits.detach().softmax(dim=1)
    torch.testing.assert_close(voxel_entropy(p), voxel_entropy(p.float()), rtol=0, atol=0)


def test_entropy_takes_a_few_maps_of_memory():
    from tests.benchmarks.bench_coral import peak_megabytes

    logits = torch.zeros(1, 32, 64, 64, 8)  # 4.2 MB, one map 0.13 MB
    assert peak_megabytes(lambda: entropy_from_logits(logits)) < 1.2


# --- reliable and unreliable -----------------------------------------------------------------------------------------


def test_selection_golden():
    # Entropies 0, 0, 0, log 2: mean log 2 / 4, deviation log 2 sqrt(3) / 4. Threshold: log 2 (1 + alpha 1.732) / 4.
    p = torch.tensor([[1, 0], [0, 1], [1, 0], [0.5, 0.5]], dtype=torch.float64)
    uncertain = torch.tensor([False, False, False, True])
    for alpha in (0.0, 0.5, 1.0, 1.73):
        reliable, unreliable = entropy_selection(p, alpha)
        assert torch.equal(unreliable, uncertain) and torch.equal(reliable, ~uncertain)
    assert not entropy_selection(p, 1.74)[1].any()  # 1.74 > sqrt(3): the threshold is above log 2
    assert torch.equal(entropy_selection(p, -0.58)[0], torch.zeros(4, dtype=torch.bool))  # below 0: -1/sqrt(3) is 0.577
    assert torch.equal(entropy_selection(p, -0.57)[0], ~uncertain)


def test_selection_default_is_half_a_deviation():
    # 0 three times out of ten: above 80 % nothing is unreliable, below it the seven are (population deviation).
    p = torch.tensor([[1.0, 0.0]] * 3 + [[0.5, 0.5]] * 7)
    assert entropy_selection(p)[1].sum() == 7
    p = torch.tensor([[1.0, 0.0]] * 1 + [[0.5, 0.5]] * 9)
    assert entropy_selection(p)[1].sum() == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.sampled_from([-0.7, 0.0, 0.5, 1.3]), batch=st.integers(1, 3))
def test_selection_is_equation_5(seed, alpha, batch):
    p = (3 * normal(seed, batch, 3, 4, 2)).softmax(dim=1)
    for ours, expected in zip(entropy_selection(p, alpha), entropy_selection_by_definition(p, alpha), strict=True):
        assert ours.shape == (batch, 4, 2) and torch.equal(ours, expected)


def test_selection_has_one_threshold_for_the_whole_tensor():
    p = (3 * normal(5, 6, 3, 10)).softmax(dim=1)
    shuffled = p.movedim(1, -1).flatten(0, 1)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert entropy_selection(shuffled)[1].sum() == entropy_selection(p)[1].sum() > 0
    per_image = sum(entropy_selection(image[None])[1].sum() for image in p)
    assert per_image != entropy_selection(p)[1].sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5])
def test_selection_of_equal_entropies_finds_all_reliable(dtype, alpha):
    p = torch.full((3, 7, 1001), 1 / 7, dtype=dtype)
    reliable, unreliable = entropy_selection(p, alpha)
    assert reliable.all() and not unreliable.any()


def test_selection_of_nothing_and_of_nan():
    reliable, unreliable = entropy_selection(torch.zeros(0, 3, 2, 2))
    assert reliable.shape == unreliable.shape == (0, 2, 2)
    one = select_by_entropy(torch.tensor([0.3]))
    assert one[0].tolist() == [True] and one[1].tolist() == [False]
    reliable, unreliable = select_by_entropy(torch.tensor([0.1, math.nan]))
    assert not reliable.any() and not unreliable.any()


def test_selection_takes_no_gradient():
    p = normal(0, 4, 3).softmax(dim=1).requires_grad_()
    assert not any(mask.requires_grad for mask in entropy_selection(p))


# --- HqCL ------------------------------------------------------------------------------------------------------------


def test_hqcl_golden():
    # Anchors at 0 and 90 degrees, centre at 60; negatives at 90, 180 and at 90, 0. Temperature 1/2.
    near = math.sqrt(3)
    of_0 = math.log(math.exp(1) + math.exp(0) + math.exp(-2)) - 1
    of_90 = math.log(math.exp(near) + math.exp(2) + math.exp(0)) - near
    negatives = torch.stack([at_angles(90, 180), at_angles(90, 0)])
    loss = high_quality_contrastive_loss(at_angles(0, 90), at_angles(60)[0], negatives, 0.5)
    assert loss.item() == pytest.approx((of_0 + of_90) / 2, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), against=st.integers(0, 6),
       temperature=st.sampled_from([0.02, 0.5, 1.0]))  # fmt: skip
def test_hqcl_is_equation_10(seed, count, against, temperature):
    anchors, positive, negatives = normal(seed, count, 4), normal(seed + 1, 4), normal(seed + 2, count, against, 4)
    loss = high_quality_contrastive_loss(anchors, positive, negatives, temperature)
    expected = high_quality_contrastive_loss_by_definition(anchors, positive, negatives, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)


def test_hqcl_sees_neither_length_nor_order_and_has_temperature_1():
    anchors, positive, negatives = normal(1, 6, 4), normal(2, 4), normal(3, 6, 5, 4)
    loss = high_quality_contrastive_loss(anchors, positive, negatives)
    assert loss == high_quality_contrastive_loss(anchors, positive, negatives, 1.0)
    assert loss != high_quality_contrastive_loss(anchors, positive, negatives, 0.5)
    lengths = torch.linspace(0.1, 50, 6, dtype=torch.float64)
    torch.testing.assert_close(
        high_quality_contrastive_loss(anchors * lengths[:, None], 7 * positive, negatives * lengths[:, None, None]),
        loss,
    )
    order = [4, 0, 5, 1, 2, 3]
    torch.testing.assert_close(high_quality_contrastive_loss(anchors[order], positive, negatives[order]), loss)
    torch.testing.assert_close(high_quality_contrastive_loss(anchors, positive, negatives.flip(1)), loss)


def test_hqcl_range_and_collapse():
    one = torch.ones(8, 3)
    negatives = torch.ones(8, 50, 3)
    assert high_quality_contrastive_loss(one, one[0], negatives).item() == pytest.approx(math.log(51), rel=1e-6)
    best = high_quality_contrastive_loss(one, one[0], -negatives)
    worst = high_quality_contrastive_loss(one, -one[0], negatives)
    assert best.item() == pytest.approx(2.05, abs=0.005)
    assert worst.item() == pytest.approx(5.91, abs=0.005)


def test_hqcl_gradcheck_for_all_three():
    args = [x.requires_grad_() for x in (normal(1, 3, 4), normal(2, 4), normal(3, 3, 2, 4))]
    assert torch.autograd.gradcheck(lambda a, p, n: high_quality_contrastive_loss(a, p, n, 0.3), args)


@pytest.mark.parametrize(("count", "against"), [(0, 3), (0, 0), (4, 0)])
def test_hqcl_with_nothing_to_compare_is_zero_and_attached(count, against):
    anchors = torch.ones(count, 3, requires_grad=True)
    loss = high_quality_contrastive_loss(anchors, torch.ones(3), torch.ones(count, against, 3))
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert (anchors.grad == 0).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_hqcl_is_finite(magnitude, temperature):
    anchors, positive, negatives = ((x.float() / 10 * magnitude).requires_grad_() for x in
                                    (normal(1, 3, 4), normal(2, 4), normal(3, 3, 2, 4)))  # fmt: skip
    loss = high_quality_contrastive_loss(anchors, positive, negatives, temperature)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, anchors.grad, positive.grad, negatives.grad))


# --- neighbours and outsiders: golden --------------------------------------------------------------------------------


def test_search_golden():
    # Six voxels on a circle. From 0 degrees: 10, -25, 60, 130, 180. From 130: 180 (50), 60 (70), 10, 0, -25 (155).
    features = at_angles(0, 10, -25, 60, 130, 180)
    near, far = nearest_and_farthest(features, rows(0, 4), 2, 3)
    assert near.tolist() == [[1, 2], [5, 3]]
    assert far.tolist() == [[5, 4, 3], [2, 0, 1]]
    assert near.dtype == far.dtype == torch.int64


def test_affinity_and_outlier_golden():
    # 0 and 5 degrees are a pair, 20 hangs on it, 180 is alone. Nearest of each: 0 -> 5, 5 -> 0, 20 -> 5, 180 -> 20.
    features, queries = at_angles(0, 5, 20, 180), rows(0, 1, 2, 3)
    near, _ = nearest_and_farthest(features, queries, 1, 0)
    assert near.tolist() == [[1], [0], [1], [2]]
    assert neighbor_affinity(features, queries, near).tolist() == [[1.0], [1.0], [0.5], [0.5]]
    assert neighbor_affinity(features, queries, near, 0.1)[2].item() == pytest.approx(0.1)
    # 5's nearest are 0, 20, 180; 20's are 5, 0, 180: with two, 20 is taken back and 180 is not; with three, all are.
    assert inlier_queries(features, queries, near, 1).tolist() == [True, True, False, False]
    assert inlier_queries(features, queries, near, 2).tolist() == [True, True, True, False]
    assert inlier_queries(features, queries, near, 3).tolist() == [True, True, True, True]
    assert reverse_rank(features, queries, near).tolist() == [[0], [0], [1], [2]]


def test_ties_go_to_the_lower_row():
    # Rows 1, 3, 4 are one direction, 0 and 5 its mirror images: from row 2 (0 degrees) both groups tie.
    features = at_angles(90, 40, 0, 40, 40, -90)
    near, far = nearest_and_farthest(features, rows(2), 2, 1)
    assert near.tolist() == [[1, 3]] and far.tolist() == [[0]]
    near, _ = nearest_and_farthest(features, rows(4, 1), 2, 0)
    assert near.tolist() == [[1, 3], [3, 4]]
    # Row 4 has 1 and 3 nearest and row 1 has 3 and 4; row 3 has 1 and 4.
    assert reverse_rank(features, rows(4, 4, 1), torch.tensor([[1, 3], [3, 1], [3, 4]])).tolist() == [
        [1, 1],
        [1, 1],
        [0, 0],
    ]


def test_directions_closer_than_float32_can_tell_are_rounded_to_a_tie():
    # Row 2 is nearer to row 0 by 0.8 * 3e-9; rounded to 2^-26, rows 1 and 2 are one direction. 1e-7 is another.
    near, _ = nearest_and_farthest(torch.tensor([[0.6, 0.8], [1, 0], [1, 3e-9]]).double(), rows(0), 1, 0)
    assert near.tolist() == [[1]]
    near, _ = nearest_and_farthest(torch.tensor([[0.6, 0.8], [1, 0], [1, 1e-7]]).double(), rows(0), 1, 0)
    assert near.tolist() == [[2]]
    # Then sums of products are exact: integer arithmetic agrees to the last bit, and so does any order.
    space = dvcl._search_space(normal(0, 12, 40), rows(), block=1)
    exact = [[sum(int(a) * int(b) for a, b in zip(m, n, strict=True)) for n in space.tolist()] for m in space.tolist()]
    for cosines in (space @ space.T, space.flip(1) @ space.flip(1).T, torch.einsum("md,nd->nm", space, space)):
        assert [[int(x) for x in line] for line in cosines.tolist()] == exact


def test_a_neighbour_that_is_its_own_query_is_not_mutual():
    features = at_angles(0, 5, 20)
    assert reverse_rank(features, rows(1), rows(1, 0)[None]).tolist() == [[3, 0]]
    assert neighbor_affinity(features, rows(1), rows(1, 0)[None]).tolist() == [[0.5, 1.0]]


# --- neighbours and outsiders: streamed equals brute force -----------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), count=st.integers(2, 24), dim=st.integers(1, 4),
       kind=st.sampled_from(["free", "grid", "alike"]), block=st.integers(1, 26),
       at_a_time=st.integers(1, 9))  # fmt: skip
def test_streamed_search_is_the_definition(data, seed, count, dim, kind, block, at_a_time):
    features = pool(seed, count, dim, kind)
    k, k_far = data.draw(st.integers(1, count - 1)), data.draw(st.integers(0, count - 1))
    wide = data.draw(st.integers(1, count + 3))
    queries = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvcl, "ROWS", at_a_time)
        near, far = nearest_and_farthest(features, queries, k, k_far, block=block)
        affinity = neighbor_affinity(features, queries, near, 0.25, block=block)
        inlier = inlier_queries(features, queries, near, wide, block=block)
        both = partition_neighbors(features, queries, near, wide, 0.25, block=block)
    expected_near, expected_far = nearest_and_farthest_by_definition(features, queries, k, k_far)
    assert torch.equal(near, expected_near) and torch.equal(far, expected_far)
    torch.testing.assert_close(affinity, neighbor_affinity_by_definition(features, queries, near, 0.25), rtol=0, atol=0)
    assert torch.equal(inlier, inlier_queries_by_definition(features, queries, near, wide))
    assert torch.equal(both[0], affinity) and torch.equal(both[1], inlier)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_search_finds_what_plain_cosines_find(seed, dtype):
    # No rounded directions here: without ties, the order is that of torch's own cosines.
    features = normal(seed, 60, 6).to(dtype)
    queries = torch.arange(0, 60, 7)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosine = unit @ unit.T
    near, far = nearest_and_farthest(features, queries, 5, 4, block=13)
    assert torch.equal(near, cosine.clone().fill_diagonal_(-2)[queries].topk(5).indices)
    assert torch.equal(far, cosine.clone().fill_diagonal_(2)[queries].topk(4, largest=False).indices)
    nearest = cosine.clone().fill_diagonal_(-2).topk(20).indices
    returned = nearest[near] == queries[:, None, None]
    mutual = returned[:, :, :5].any(dim=2)
    assert torch.equal(neighbor_affinity(features, queries, near) == 1, mutual)
    assert torch.equal(inlier_queries(features, queries, near, 20), returned.any(dim=2).any(dim=1))


@pytest.mark.parametrize("noise", [0, 1e-7, 1e-3])
def test_search_does_not_depend_on_the_block(noise):
    # Collapsed features: thousands of ties and near ties in float32, where any rounding error would show.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 33, generator=generator) + noise * torch.randn(2000, 33, generator=generator)
    queries = torch.arange(0, 2000, 9)
    near, far = nearest_and_farthest(features, queries, 10, 15, block=2000)
    affinity, inlier = partition_neighbors(features, queries, near, 50, block=2000)
    for block in (100, 777):
        again, far_again = nearest_and_farthest(features, queries, 10, 15, block=block)
        assert torch.equal(near, again) and torch.equal(far, far_again)
        affinity_again, inlier_again = partition_neighbors(features, queries, near, 50, block=block)
        assert torch.equal(affinity, affinity_again) and torch.equal(inlier, inlier_again)
    if noise == 0:
        assert (near.amax(dim=1) <= 10).all() and (far.amax(dim=1) <= 15).all()


def test_mutual_neighbours_are_mutual():
    features = pool(3, 40, 3, "free")
    everyone = torch.arange(40)
    near, _ = nearest_and_farthest(features, everyone, 6, 0)
    mutual = torch.zeros(40, 40, dtype=torch.bool).scatter_(1, near, neighbor_affinity(features, everyone, near) == 1)
    assert torch.equal(mutual, mutual.T) and mutual.any() and not mutual.diagonal().any()
    member = torch.zeros(40, 40, dtype=torch.bool).scatter_(1, near, True)
    assert torch.equal(mutual, member & member.T)  # the P x P matrix of eq. 13


def test_search_sees_neither_length_nor_rotation():
    features, queries = pool(4, 50, 3, "free"), torch.arange(50)
    near, far = nearest_and_farthest(features, queries, 4, 4)
    turn, _ = torch.linalg.qr(normal(5, 3, 3))
    for same in (features * torch.linspace(0.01, 90, 50)[:, None], features @ turn, features * 1e9):
        again, far_again = nearest_and_farthest(same, queries, 4, 4)
        assert torch.equal(near, again) and torch.equal(far, far_again)
    near_minus, far_minus = nearest_and_farthest(features * ((queries == 7) * -2 + 1)[:, None], queries[7:8], 4, 4)
    assert torch.equal(near_minus, far[7:8]) and torch.equal(far_minus, near[7:8])  # seen from -r all is reversed


# --- neighbours and outsiders: limits and bad input ------------------------------------------------------------------


def test_search_takes_the_whole_pool_but_no_more():
    features = pool(0, 5, 3, "free")
    near, far = nearest_and_farthest(features, torch.arange(5), 4, 4)
    assert torch.equal(near, far.flip(1))
    assert all(sorted(row) == [n for n in range(5) if n != m] for m, row in enumerate(near.tolist()))
    with pytest.raises(ValueError, match="k must be from 0 to P - 1 .* P = 5 rows, got 5"):
        nearest_and_farthest(features, rows(0), 5, 1)
    with pytest.raises(ValueError, match="k_far must be from 0 .*got 5"):
        nearest_and_farthest(features, rows(0), 1, 5)
    with pytest.raises(ValueError, match="k must be from 0 .*got -1"):
        nearest_and_farthest(features, rows(0), -1, 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_search_of_no_queries(count):
    features = torch.ones(count, 2)
    near, far = nearest_and_farthest(features, rows(), 10, 15)
    assert near.shape == (0, 10) and far.shape == (0, 15)
    affinity, inlier = partition_neighbors(features, rows(), near, 50)
    assert affinity.shape == (0, 10) and inlier.shape == (0,)
    alone = nearest_and_farthest(torch.ones(1, 2), rows(0), 0, 0)
    assert alone[0].shape == alone[1].shape == (1, 0)
    assert not inlier_queries(torch.ones(1, 2), rows(0), alone[0], 50).any()


def test_rows_without_direction_have_cosine_0():
    # 180 degrees, blank, 0, NaN, infinite, 90: from 0 degrees the four without or across tie at 0.
    features = at_angles(180, 0, 0, 0, 0, 90)
    features[1], features[3, 0], features[4, 1] = 0, math.nan, math.inf
    near, far = nearest_and_farthest(features, rows(2, 1), 4, 1)
    assert near.tolist() == [[1, 3, 4, 5], [0, 2, 3, 4]]
    assert far.tolist() == [[0], [0]]


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e30, 3e38])
def test_search_at_any_magnitude(magnitude):
    features = at_angles(0, 10, -25, 60, 130, 180).float()
    features = features / features.norm(dim=1, keepdim=True)
    near, far = nearest_and_farthest(features * magnitude, rows(0), 2, 3)
    blank = magnitude < 1e-12  # the losses' own measure of a row without direction
    assert near.tolist() == ([[1, 2]]) and far.tolist() == ([[1, 2, 3]] if blank else [[5, 4, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_affinity_is_at_least_float32(dtype):
    features = at_angles(0, 5, 20, 180).to(dtype)
    near, _ = nearest_and_farthest(features, rows(0, 2), 1, 0)
    assert near.tolist() == [[1], [1]]
    assert neighbor_affinity(features, rows(0, 2), near, 0.1).dtype == torch.float32


def test_search_is_the_same_under_autocast():
    features = pool(2, 30, 5, "free").float()
    near, far = nearest_and_farthest(features, torch.arange(30), 4, 4)
    affinity = neighbor_affinity(features, torch.arange(30), near)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, far_again = nearest_and_farthest(features, torch.arange(30), 4, 4)
        assert torch.equal(near, again) and torch.equal(far, far_again)
        assert torch.equal(affinity, neighbor_affinity(features, torch.arange(30), near))


def test_search_takes_no_gradient_and_leaves_its_input_alone():
    features = pool(0, 8, 3, "free").requires_grad_()
    before = features.detach().clone()
    near, _ = nearest_and_farthest(features, rows(0, 3), 2, 2)
    assert not neighbor_affinity(features, rows(0, 3), near).requires_grad
    assert not similarity_affinity(features, rows(0, 3), near).requires_grad
    assert torch.equal(features, before)


def test_search_without_float64_runs_elsewhere(monkeypatch):
    moved = []
    features = at_angles(0, 5, 20)

    class Apple(torch.Tensor):
        @property
        def device(self):
            return torch.device("mps")

        def cpu(self):
            moved.append(True)
            return features

    near, _ = nearest_and_farthest(features.as_subclass(Apple), rows(0), 1, 0)
    assert moved and near.tolist() == [[1]]


def test_search_refuses_nonsense(monkeypatch):
    features, near = torch.ones(4, 2), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"features \(4,\)"):
        nearest_and_farthest(features[:, 0], rows(0), 1, 1)
    with pytest.raises(ValueError, match="queries must be int64, got torch.float32"):
        nearest_and_farthest(features, torch.zeros(2), 1, 1)
    with pytest.raises(ValueError, match="neighbors must be int64, got torch.int32"):
        neighbor_affinity(features, rows(0, 1), near.int())
    with pytest.raises(ValueError, match=r"queries \(3,\), neighbors \(2, 3\)"):
        inlier_queries(features, rows(0, 1, 2), near, 5)
    with pytest.raises(ValueError, match="ordinary must be from 0 to 1, got 2"):
        neighbor_affinity(features, rows(0, 1), near, 2)
    with pytest.raises(ValueError, match="wide must be at least 1, got 0"):
        inlier_queries(features, rows(0, 1), near, 0)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        nearest_and_farthest(features, rows(0), 1, 1, block=0)
    monkeypatch.setattr(dvcl, "LARGEST_POOL", 3)
    with pytest.raises(ValueError, match="at most 3 rows, features has 4"):
        nearest_and_farthest(features, rows(0), 1, 1)


def test_search_memory_does_not_grow_with_the_square_of_the_pool():
    from tests.benchmarks.bench_coral import peak_megabytes
    from tests.benchmarks.bench_dvcl import step, voxels

    small, large = (peak_megabytes(lambda n=n: step(*voxels(64, n, dim=8))) for n in (4096, 16384))
    assert large < 1.5 * small + 5  # the P x P matrix of the larger pool has 1074 MB
    assert large < 80


# --- distance-aware loss ---------------------------------------------------------------------------------------------

HAND = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64)


def test_distance_aware_golden():
    # Query 0: neighbours 1 (weight 1) and 2 (1/2), outsider 3: -1/2 - 1/2 * 1/4 + 0 = -5/8.
    # Query 3: neighbours 2 (weight 1) and 1 (1/2), outsider 0: -3/4 - 1/2 * 1/2 + 0 = -1.
    # Query 1: neighbours 0 and 2 (1/2 each), outsider 3: -1/4 - 1/4 + 1/2 = 0.
    queries, neighbors, outsiders = rows(0, 3, 1), torch.tensor([[1, 2], [2, 1], [0, 2]]), torch.tensor([[3], [0], [3]])
    affinity = torch.tensor([[1, 0.5], [1, 0.5], [0.5, 0.5]])
    args = HAND, queries, neighbors, outsiders, affinity
    assert distance_aware_loss(*args).item() == pytest.approx((-5 / 8 - 1 + 0) / 3, rel=1e-12)
    keep = torch.tensor([True, False, True])
    assert distance_aware_loss(*args, keep).item() == pytest.approx(-5 / 16, rel=1e-12)
    # Means over 2 neighbours and 1 outsider: halves for the neighbours: -5/16, -1/2, 1/4.
    loss = distance_aware_loss(*args, reduction="mean")
    assert loss.item() == pytest.approx((-5 / 16 - 1 / 2 + 1 / 4) / 3, rel=1e-12)
    # The third term, (2 - 1) log Z, for query 0 alone: p_0 . p_q are 1, 1/2, 1/4, 0, their mean 7/16.
    only = torch.tensor([True, False, False])
    Z = math.exp(1) + math.exp(1 / 2) + math.exp(1 / 4) + 1
    exact, jensen = (distance_aware_loss(*args, only, partition=name).item() for name in ("exact", "jensen"))
    assert exact == pytest.approx(-5 / 8 + math.log(Z), rel=1e-12)
    assert jensen == pytest.approx(-5 / 8 + math.log(4) + 7 / 16, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 5), k_far=st.integers(0, 5), kept=st.booleans())
def test_distance_aware_is_equation_19(seed, k, k_far, kept):
    args = case(seed, k=k, k_far=k_far)
    keep = torch.tensor([True, False, True, True, False]) if kept else None
    probabilities = args[0].requires_grad_()
    loss, expected = distance_aware_loss(*args, keep), distance_aware_loss_by_definition(*args, keep)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    if k + k_far > 0:
        ours, theirs = (torch.autograd.grad(value, probabilities)[0] for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_distance_aware_sees_no_order():
    probabilities, queries, neighbors, outsiders, affinity = case(1)
    loss = distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity)
    flipped = distance_aware_loss(probabilities, queries, neighbors.flip(1), outsiders.flip(1), affinity.flip(1))
    torch.testing.assert_close(flipped, loss)
    order = [3, 0, 4, 1, 2]
    shuffled = distance_aware_loss(probabilities, *(x[order] for x in (queries, neighbors, outsiders, affinity)))
    torch.testing.assert_close(shuffled, loss)
    classes = distance_aware_loss(probabilities[:, [2, 0, 3, 1]], queries, neighbors, outsiders, affinity)
    torch.testing.assert_close(classes, loss)


def test_distance_aware_range():
    # All voxels in one class: -k + k_far. Query and neighbours in one class, outsiders in another: -k, the least.
    one = torch.tensor([[1.0, 0.0]]).repeat(9, 1)
    queries, ones = rows(0, 1), torch.ones(2, 3)
    neighbors, outsiders = torch.tensor([[2, 3, 4]] * 2), torch.tensor([[5, 6, 7, 8]] * 2)
    assert distance_aware_loss(one, queries, neighbors, outsiders, ones).item() == 1
    apart = one.clone()
    apart[5:] = torch.tensor([0.0, 1.0])
    assert distance_aware_loss(apart, queries, neighbors, outsiders, ones).item() == -3
    assert distance_aware_loss(apart, queries, neighbors, outsiders, ones, reduction="mean").item() == -1


def test_distance_aware_gradient_goes_to_kept_queries_only():
    probabilities, queries, neighbors, outsiders, affinity = case(2)
    probabilities.requires_grad_()
    affinity.requires_grad_()
    keep = torch.tensor([True, True, False, True, False])
    distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, keep).backward()
    touched = probabilities.grad.abs().amax(dim=1) > 0
    assert sorted(touched.nonzero()[:, 0].tolist()) == sorted(queries[keep].tolist())
    assert affinity.grad is None
    together = distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, keep, detach_partners=False)
    (gradient,) = torch.autograd.grad(together, probabilities)
    everyone = {*queries[keep].tolist(), *neighbors[keep].flatten().tolist(), *outsiders[keep].flatten().tolist()}
    assert set((gradient.abs().amax(dim=1) > 0).nonzero()[:, 0].tolist()) == everyone


@pytest.mark.parametrize("partition", ["none", "jensen", "exact"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_distance_aware_gradcheck(partition, reduction):
    probabilities, *rest = case(3)
    keep = torch.tensor([True, False, True, True, True])

    def loss(p):
        return distance_aware_loss(p, *rest, keep, partition=partition, reduction=reduction, detach_partners=False)

    assert torch.autograd.gradcheck(loss, probabilities.requires_grad_())


def test_the_partition_vanishes_from_means():
    args = case(4)
    none, jensen, exact = (
        distance_aware_loss(*args, reduction="mean", partition=p) for p in ("none", "jensen", "exact")
    )
    torch.testing.assert_close(none, exact, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(none, jensen, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("partition", ["none", "jensen", "exact"])
@pytest.mark.parametrize(("count", "asked"), [(0, 0), (4, 0), (4, 2)])
def test_distance_aware_with_nothing_to_compare_is_zero_and_attached(partition, count, asked):
    probabilities = torch.full((count, 3), 1 / 3, requires_grad=True)
    queries = torch.arange(asked)
    near = torch.ones(asked, 2, dtype=torch.int64)
    keep = torch.zeros(asked, dtype=torch.bool)
    for kept in (keep, None) if asked == 0 else (keep,):
        loss = distance_aware_loss(probabilities, queries, near, near, torch.ones(asked, 2), kept, partition=partition)
        assert loss.shape == () and loss.item() == 0
        loss.backward()
        assert (probabilities.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distance_aware_of_half_is_computed_in_float32(dtype):
    probabilities, *rest = case(5)
    half = probabilities.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distance_aware_loss(half, *rest, partition="exact")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distance_aware_loss(half.float(), *rest, partition="exact"), rtol=0, atol=0)
    assert distance_aware_loss(probabilities, *rest).dtype == torch.float64


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1.0, 1e15])
@pytest.mark.parametrize("partition", ["none", "jensen", "exact"])
def test_distance_aware_is_finite(magnitude, partition):
    probabilities, *rest = case(6)
    values = (probabilities.float() * magnitude).requires_grad_()
    loss = distance_aware_loss(values, *rest, partition=partition)
    loss.backward()
    assert loss.isfinite() and values.grad.isfinite().all()


def test_distance_aware_refuses_nonsense():
    probabilities, queries, neighbors, outsiders, affinity = case(7)
    with pytest.raises(ValueError, match=r"affinity \(5, 2\)"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity[:, :2])
    with pytest.raises(ValueError, match=r"outsiders \(4, 2\)"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders[:4], affinity)
    with pytest.raises(ValueError, match="keep must be bool, got torch.int64"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keep \(4,\)"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="outsiders must be int64"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders.float(), affinity)
    with pytest.raises(ValueError, match="partition must be one of none, jensen, exact, got 'all'"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, partition="all")
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, got 'max'"):
        distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity, reduction="max")
    probabilities[queries[0], 0] = math.nan
    assert distance_aware_loss(probabilities, queries, neighbors, outsiders, affinity).isnan()


# --- equation 18 -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 5), k_far=st.integers(0, 5))
def test_bound_chain_is_equation_18(seed, k, k_far):
    args = case(seed, k=k, k_far=k_far)
    ours, expected = bound_chain(*args), bound_chain_by_definition(*args)
    for line, same in zip(ours, expected, strict=True):
        torch.testing.assert_close(line, same, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.exact.mean(), distance_aware_loss(*args, partition="exact"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        ours.jensen.mean(), distance_aware_loss(*args, partition="jensen"), rtol=1e-10, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 8), k_far=st.integers(0, 8), sharp=st.sampled_from([0.1, 1, 10]))
def test_the_printed_bound_needs_as_many_neighbours_as_outsiders(seed, k, k_far, sharp):
    features, queries = pool(seed, 30, 3, "free"), torch.arange(6)
    p = (sharp * normal(seed + 5, 30, 4)).softmax(dim=1)
    neighbors, outsiders = nearest_and_farthest(features, queries, k, k_far)
    affinity = neighbor_affinity(features, queries, neighbors)
    chain = bound_chain(p, queries, neighbors, outsiders, affinity)
    rounding = 1e-10
    assert (chain.exact <= chain.corrected + rounding).all()
    if k < k_far:
        assert (chain.printed < chain.exact).all()  # no bound at all, for any query
        assert (chain.exact <= chain.jensen + rounding).all()
    elif k > k_far:
        assert (chain.exact < chain.printed).all()
        assert (chain.jensen <= chain.exact + rounding).all()  # the first step of eq. 18 goes the wrong way
    else:
        for line in chain[1:]:
            torch.testing.assert_close(line, chain.exact, rtol=1e-12, atol=1e-12)


def test_the_bounds_of_a_collapsed_pool():
    # All voxels surely in one class: Z = P e, so log Z = log P + 1 and every line but the corrected one is psi.
    p = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(8, 1)
    near, far = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    chain = bound_chain(p, rows(0), near, far, torch.ones(1, 2))
    assert chain.exact.item() == pytest.approx(1 - (math.log(8) + 1), rel=1e-12)
    assert chain.jensen.item() == chain.printed.item() == pytest.approx(chain.exact.item(), rel=1e-12)
    assert chain.corrected.item() == pytest.approx(1 - math.log(8), rel=1e-12)


# --- the losses of Table 3 -------------------------------------------------------------------------------------------


def test_similarity_affinity_golden():
    # From 0 degrees, neighbours at 60 and 90: cosines 1/2 and 0; softmax, times 2.
    weights = similarity_affinity(at_angles(0, 60, 90), rows(0), rows(1, 2)[None])
    e = math.exp(0.5)
    assert weights.tolist() == [[pytest.approx(2 * e / (e + 1)), pytest.approx(2 / (e + 1))]]
    assert similarity_affinity(torch.ones(3, 2), rows(0), rows(1, 2)[None]).tolist() == [[1.0, 1.0]]


def test_nnclr_golden():
    # First views at 0 and 100 degrees; the support at 30 and 90 replaces them. Second views at 90 and 30. tau 1/2.
    loss = nnclr_loss(at_angles(0, 100), at_angles(90, 30), at_angles(30, 90), 0.5)
    # Row 0 at 30: its own view is 60 away (score 1), the other 0 (score 2). Row 1 at 90: 60 and 0 away as well.
    assert loss.item() == pytest.approx(math.log(math.exp(1) + math.exp(2)) - 1, rel=1e-12)


def test_snclr_golden():
    # Query at 0 degrees, positive at 60, neighbours at 90 and 0: weights softmax(0, 1); scores 1, 0, 2 at tau 1/2.
    loss = snclr_loss(at_angles(0), at_angles(60), at_angles(90, 0)[None], 0.5)
    everyone = math.log(math.exp(1) + math.exp(0) + math.exp(2))
    w = 1 / (1 + math.e)
    assert loss.item() == pytest.approx((everyone - 1) + w * everyone + (1 - w) * (everyone - 2), rel=1e-12)


def test_snclr_is_the_sum_over_all_candidates():
    B, k, tau = 4, 3, 0.2
    query, positive, neighbors = normal(0, B, 5), normal(1, B, 5), normal(2, B, k, 5)

    def cos(a, b):
        return float(torch.cosine_similarity(a, b, dim=0))

    total = 0.0
    for i in range(B):
        everyone = sum(
            math.exp(cos(query[i], key) / tau) for j in range(B) for key in (positive[j], *neighbors[j])
        )  # candidates: every pair's positive and neighbours
        alike = [math.exp(cos(query[i], n)) for n in neighbors[i]]
        weighted = [(1.0, positive[i]), *((a / sum(alike), n) for a, n in zip(alike, neighbors[i], strict=True))]
        total -= sum(w * math.log(math.exp(cos(query[i], key) / tau) / everyone) for w, key in weighted)
    assert snclr_loss(query, positive, neighbors, tau).item() == pytest.approx(total / B, rel=1e-10)
    plain = snclr_loss(query, positive, neighbors[:, :0], tau)  # without neighbours: InfoNCE within the batch
    scores = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(positive).T / tau
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(scores, torch.arange(B)))


def test_comparison_gradients():
    first, second, support = (normal(i, 3, 4).requires_grad_() for i in range(3))
    nnclr_loss(first, second, support, 0.5).backward()
    assert first.grad is None and support.grad is None and second.grad.abs().max() > 0
    assert torch.autograd.gradcheck(lambda s: nnclr_loss(first, s, support, 0.5), second)


def test_snclr_weights_take_no_gradient():
    query, positive, neighbors = (x.requires_grad_() for x in (normal(0, 3, 4), normal(1, 3, 4), normal(2, 3, 2, 4)))
    # One neighbour has weight 1 whatever its cosine, so that gradcheck sees no weights.
    assert torch.autograd.gradcheck(lambda q, p, n: snclr_loss(q, p, n[:, :1], 0.5), (query, positive, neighbors))
    (gradient,) = torch.autograd.grad(snclr_loss(query, positive, neighbors, 0.5), query)

    weights = torch.cosine_similarity(query[:, None], neighbors, dim=2).softmax(dim=1).detach()
    keys = torch.nn.functional.normalize(torch.cat([positive, neighbors.flatten(0, 1)]), dim=1)
    log_p = (torch.nn.functional.normalize(query, dim=1) @ keys.T / 0.5).log_softmax(dim=1)
    constant = -log_p[:, :3].diagonal() - (
        weights * torch.stack([log_p[i, 3 + 2 * i : 5 + 2 * i] for i in range(3)])
    ).sum(1)
    (expected,) = torch.autograd.grad(constant.mean(), query)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1.0, 3e38])
def test_comparison_losses_are_finite(magnitude):
    first, second = ((normal(i, 3, 4).float() / 10 * magnitude).requires_grad_() for i in range(2))
    for loss in (
        nnclr_loss(first, second, normal(2, 5, 4), 1e-3),
        snclr_loss(first, second, normal(2, 3, 2, 4).float() / 10 * magnitude, 1e-3),
    ):
        loss.backward()
        assert loss.isfinite() and second.grad.isfinite().all() and loss.dtype == torch.float32


def test_comparison_losses_with_nothing_to_compare():
    second = torch.ones(3, 2, requires_grad=True)
    none = torch.ones(0, 2, requires_grad=True)
    for loss in (
        nnclr_loss(second, second, torch.ones(0, 2)),
        nnclr_loss(none, none, torch.ones(4, 2)),
        nnclr_loss(none, none, none),
        nnclr_loss(second[:1], second[:1], second),
        snclr_loss(none, none, torch.ones(0, 3, 2)),
        snclr_loss(second[:1], second[:1], torch.ones(1, 0, 2)),
    ):
        assert loss.shape == () and loss.item() == 0
        loss.backward()


# --- complementary labels --------------------------------------------------------------------------------------------


def test_complementary_labels_golden():
    p = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    # Ranks: 3, 0, 1, 2, 4 and, all alike, 0 to 4.
    assert complementary_labels(p).tolist() == [[True, False, False, False, True], [False, False, False, True, True]]
    assert complementary_labels(p, 1, 2).tolist() == [
        [False, False, True, False, False],
        [False, True, False, False, False],
    ]
    assert not complementary_labels(p[:, :3]).any()
    assert not complementary_labels(p, 2, 2).any()
    with pytest.raises(ValueError, match="got 3 and 2"):
        complementary_labels(p, 3, 2)


def test_complementary_loss_golden():
    # Class 0 at 0 degrees with anchors at 0 and 60, class 1 at 90 with an anchor at 90, class 2 without an anchor.
    # Unreliable at 180 excludes 0 and 1; at 90 it excludes class 0; at 0 it excludes class 2. Temperature 1/2.
    anchors, labels, prototypes = at_angles(0, 60, 90), rows(0, 0, 1), at_angles(0, 90, 180)
    complementary = torch.tensor([[True, True, False], [True, False, False], [False, False, True]])
    loss = complementary_label_loss(anchors, labels, prototypes, at_angles(180, 90, 0), complementary)
    near = math.sqrt(3)
    of_0 = math.log(math.exp(2) + math.exp(-2) + math.exp(0)) - 2
    of_60 = math.log(math.exp(1) + math.exp(-1) + math.exp(near)) - 1
    of_90 = math.log(math.exp(2) + math.exp(0)) - 2
    assert loss.item() == pytest.approx(((of_0 + of_60) / 2 + of_90) / 2, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), temperature=st.sampled_from([0.05, 0.5]))
def test_complementary_loss_is_hqcl_with_other_negatives(seed, temperature):
    anchors, prototypes, unreliable = normal(seed, 7, 3), normal(seed + 1, 5, 3), normal(seed + 2, 6, 3)
    labels = torch.randint(0, 3, (7,), generator=torch.Generator().manual_seed(seed))  # classes 3 and 4 have no anchor
    complementary = complementary_labels(normal(seed + 3, 6, 5).softmax(dim=1), 2)
    per_class = []
    for c in range(5):
        own, negatives = anchors[labels == c], unreliable[complementary[:, c]]
        if len(own) > 0 and len(negatives) > 0:
            negatives = negatives.expand(len(own), -1, -1)
            per_class.append(high_quality_contrastive_loss_by_definition(own, prototypes[c], negatives, temperature))
    expected = sum(per_class) / max(len(per_class), 1)
    loss = complementary_label_loss(anchors, labels, prototypes, unreliable, complementary, temperature)
    assert loss.item() == pytest.approx(float(expected), rel=1e-10, abs=1e-14)


def test_complementary_loss_pushes_unreliable_voxels_away_from_the_class():
    unreliable = at_angles(45).requires_grad_()
    complementary_label_loss(
        at_angles(0), rows(0), at_angles(0, 90), unreliable, torch.tensor([[True, False]])
    ).backward()
    assert -unreliable.grad[0, 0] < 0 < -unreliable.grad[0, 1]  # downhill is away from 0 degrees


def test_complementary_loss_gradcheck_and_limits():
    args = [normal(i, 3, 2).requires_grad_() for i in range(3)]
    complementary = torch.tensor([[True, False, True], [False, False, True], [True, False, False]])

    def loss(anchors, prototypes, unreliable, mask=complementary):
        return complementary_label_loss(anchors, rows(0, 2, 0), prototypes, unreliable, mask, 0.3)

    assert torch.autograd.gradcheck(loss, args)
    none = loss(*args, mask=torch.zeros(3, 3, dtype=torch.bool))
    assert none.item() == 0
    none.backward()
    assert all((x.grad == 0).all() for x in args)
    empty = complementary_label_loss(args[0][:0], rows(), args[1], args[2][:0], complementary[:0])
    assert empty.item() == 0
    empty.backward()
    collapsed = complementary_label_loss(
        torch.ones(3, 2), rows(0, 2, 0), torch.ones(3, 2), torch.ones(3, 2), complementary
    )
    assert collapsed.item() == pytest.approx(math.log(3), rel=1e-6)  # two negatives each, all alike
    with pytest.raises(ValueError, match="complementary must be bool"):
        loss(*args, mask=complementary.int())


# --- what all losses share -------------------------------------------------------------------------------------------

LOSSES = {
    "hqcl": lambda h, tau: high_quality_contrastive_loss(h, h[0], h[:, None].repeat_interleave(2, dim=1), tau),
    "nnclr": lambda h, tau: nnclr_loss(h, h, h, tau),
    "snclr": lambda h, tau: snclr_loss(h, h, h[:, None], tau),
    "complementary": lambda h, tau: complementary_label_loss(
        h, torch.zeros(len(h), dtype=torch.int64), h[:2], h, torch.ones(len(h), 2, dtype=torch.bool), tau
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
@pytest.mark.parametrize("temperature", [0, -0.1, math.nan, math.inf])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        loss(torch.ones(3, 2), temperature)


@every_loss
def test_wrong_shapes_are_named(loss):
    with pytest.raises(ValueError, match=r"\(3, 2, 1\)"):
        loss(torch.ones(3, 2, 1), 1.0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(loss, dtype):
    half = normal(0, 6, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = loss(half, 0.1)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, loss(half.float(), 0.1), rtol=1e-6, atol=1e-7)


@every_loss
def test_nan_is_never_hidden(loss):
    features = normal(0, 4, 3)
    features[0, 1] = math.nan
    assert loss(features, 0.5).isnan()
    assert voxel_entropy(features).isnan().any() and entropy_from_logits(features)[0].isnan()


def test_channels_must_be_there():
    for form in (voxel_entropy, entropy_from_logits, entropy_selection):
        with pytest.raises(ValueError, match=r"must be \(B, C, ...\).*got \(3,\)"):
            form(torch.ones(3))
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        entropy_selection(torch.ones(1, 2), math.nan)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    case(0)
    distance_aware_loss(*case(0))
    assert torch.equal(torch.get_rng_state(), before)
