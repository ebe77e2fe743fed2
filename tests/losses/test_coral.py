"""CORAL's two losses against hand-made numbers, the equations as loops, and what must hold for any input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses.coral import (
    CoralLoss,
    ordinal_loss,
    ordinal_loss_by_definition,
    relational_loss,
    relational_loss_by_definition,
)

# Three slices drawn on paper: e1, e2, e1 at positions 0, 1/4 and 1.
HAND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
HAND_POSITIONS = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)


def draw(seed: int, rows: int, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of unequal lengths, positions from volumes of 6 to 12 slices (many ties), and a direction; float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    features *= 10 ** torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    depth = torch.randint(6, 13, (rows,), generator=generator)
    index = (torch.rand(rows, generator=generator) * depth).floor()
    direction = torch.randn(dim, generator=generator, dtype=torch.float64)
    return features, (index + 1).double() / depth, direction


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_relational_golden():
    # cos is 1 for slices 0 and 2, else 0; over temperature 1/2 that is 2. Six ordered pairs, (i, j): the terms are
    a = math.log(1 + math.exp(2))  # (0, 1): slice 2 is farther, so log(e^0 + e^2) - 0
    b = 0.0  #                       (0, 2): alone at the far end, log(e^2) - 2
    c = math.log(2)  #               (1, 0): slice 2 is farther, log(1 + 1)
    #                                (1, 2): alone, 0
    d = math.log(math.exp(2) + 1)  # (2, 1): slice 0 is farther: log(e^0 + e^2) - 0
    #                                (2, 0): alone, 0
    expected = (a + b + c + 0 + d + 0) / 6
    assert expected == pytest.approx(0.824501, abs=1e-6)
    assert relational_loss(HAND, HAND_POSITIONS, 0.5).item() == pytest.approx(expected, rel=1e-12)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    softened = (sigmoid(0.25) * a + sigmoid(0.25) * c + sigmoid(0.75) * d) / 6
    assert softened == pytest.approx(0.504991, abs=1e-6)
    assert relational_loss(HAND, HAND_POSITIONS, 0.5, soft_weight=1).item() == pytest.approx(softened, rel=1e-12)


def test_relational_counts_a_tie_as_farther():
    # From slice 1 both others are 1/4 away: each is in the other's set.
    positions = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    expected = (2 * math.log(1 + math.exp(2)) + 2 * math.log(2)) / 6
    assert relational_loss(HAND, positions, 0.5).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relational_tie_survives_rounding(dtype):
    # 3/10 - 2/10 and 2/10 - 1/10 differ in the last bit.
    positions = torch.tensor([1.0, 2.0, 3.0], dtype=dtype) / 10
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    features = HAND.to(dtype)
    assert relational_loss(features, positions, 0.5).item() == relational_loss(features, exact, 0.5).item()


@pytest.mark.parametrize(("apart", "tie"), [(0.9e-6, True), (1.1e-6, False)])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_relational_tie_ends_at_one_millionth(apart, tie, temperature):
    positions = torch.tensor([0.0, 0.25, 0.5 + apart], dtype=torch.float64)
    s = 1 / temperature
    pair = math.log1p(math.exp(-s)) + s  # log(1 + e^s): e1 and e2, with the other e1 in the set
    expected = (2 * pair + (2 if tie else 1) * math.log(2)) / 6  # from slice 1, slice 0 is nearer by `apart`
    assert relational_loss(HAND, positions, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_relational_tie_does_not_chain():
    positions = torch.tensor([0.0, 0.5, 0.5 + 0.8e-6, 0.5 + 1.6e-6], dtype=torch.float64)
    features = torch.ones(4, 2, dtype=torch.float64)  # all alike: each term is the log of the size of its set
    # From slice 0, slice 2 ties with both neighbours, but 3 is farther than 1: the sets are {1,2,3}, {1,2,3}, {2,3}.
    from_0 = 2 * math.log(3) + math.log(2)
    # From each of the others, the two near ones tie and slice 0 is far: sets of 3, 3 and 1.
    from_another = 2 * math.log(3)
    expected = (from_0 + 3 * from_another) / 12
    assert relational_loss(features, positions).item() == pytest.approx(expected, rel=1e-12)
    assert relational_loss_by_definition(features, positions).item() == pytest.approx(expected, rel=1e-12)


def test_ordinal_golden():
    # Steps up: e2 - e1, e1 - e1 (none), e1 - e2. With c = (3, 0): cosines -1/sqrt(2), left out, 1/sqrt(2): mean 0.
    assert ordinal_loss(HAND, HAND_POSITIONS, torch.tensor([3.0, 0.0]).double()).item() == pytest.approx(0, abs=1e-12)
    # Without the last slice one step is left, and c points against it.
    loss = ordinal_loss(HAND[:2], HAND_POSITIONS[:2], torch.tensor([3.0, 0.0]).double())
    assert loss.item() == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_ordinal_leaves_coincident_pairs_out_of_the_count():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    loss = ordinal_loss(features, HAND_POSITIONS, torch.tensor([1.0, 1.0]).double())
    assert loss.item() == pytest.approx(-math.sqrt(0.5), rel=1e-12)  # of two steps, not -2/3 of it, of three


def test_ordinal_does_not_order_equal_positions():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    positions = torch.tensor([0.5, 0.5, 0.75], dtype=torch.float64)
    loss = ordinal_loss(features, positions, torch.tensor([0.0, 1.0]).double())
    assert loss.item() == pytest.approx(-(math.sqrt(0.5) + 1) / 2, rel=1e-12)  # 0 -> 2 and 1 -> 2, not 0 -> 1


# --- the paper's equations as loops ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 9), temperature=st.sampled_from([0.015, 0.02, 0.1, 0.7]),
       soft_weight=st.sampled_from([0.0, 1.0, 5.0]))  # fmt: skip
def test_relational_is_equation_4(seed, rows, temperature, soft_weight):
    features, positions, _ = draw(seed, rows)
    loss = relational_loss(features, positions, temperature, soft_weight)
    expected = relational_loss_by_definition(features, positions, temperature, soft_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(4, 12))
def test_ordinal_is_equation_5(seed, rows):
    features, positions, direction = draw(seed, rows)
    positions[0], positions[-1] = 0, 1  # at least one pair is ordered
    features[1] = features[0]
    loss = ordinal_loss(features, positions, direction)
    expected = ordinal_loss_by_definition(features, positions, direction)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.015, 0.1])  # both branches of the tail sum
def test_gradients_are_those_of_the_equations(temperature):
    features, positions, direction = draw(3, 12)
    features, direction = features.requires_grad_(), direction.requires_grad_()

    def gradients(relational, ordinal):
        total = relational(features, positions, temperature, 1.0) + ordinal(features, positions, direction)
        return torch.autograd.grad(total, [features, direction])

    ours = gradients(relational_loss, ordinal_loss)
    expected = gradients(relational_loss_by_definition, ordinal_loss_by_definition)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_ordinal_is_exact_far_from_the_origin():
    # Features that differ in the 4th digit: the short cut through inner products would keep no digit in float32.
    generator = torch.Generator().manual_seed(0)
    features = 100 + 0.01 * torch.randn(16, 8, generator=generator)
    positions, direction = torch.linspace(0, 1, 16), torch.randn(8, generator=generator)
    expected = ordinal_loss_by_definition(features.double(), positions.double(), direction.double())
    assert ordinal_loss(features, positions, direction).item() == pytest.approx(expected.item(), rel=1e-4)


# --- invariances -----------------------------------------------------------------------------------------------------


def test_order_of_the_rows_does_not_matter():
    features, positions, direction = draw(1, 20)
    shuffle = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        relational_loss(features[shuffle], positions[shuffle], 0.2, 1.0), relational_loss(features, positions, 0.2, 1.0)
    )
    torch.testing.assert_close(
        ordinal_loss(features[shuffle], positions[shuffle], direction), ordinal_loss(features, positions, direction)
    )


def test_relational_sees_neither_length_nor_which_end_is_up():
    features, positions, _ = draw(2, 20)
    loss = relational_loss(features, positions)
    lengths = torch.linspace(0.1, 50, 20, dtype=torch.float64)[:, None]
    torch.testing.assert_close(relational_loss(features * lengths, positions), loss)
    torch.testing.assert_close(relational_loss(features, 1 - positions), loss)
    torch.testing.assert_close(relational_loss(features, positions + 3), loss)


def test_ordinal_sees_neither_origin_nor_scale_but_which_end_is_up():
    features, positions, direction = draw(2, 20)
    loss = ordinal_loss(features, positions, direction)
    assert abs(loss.item()) > 0.01
    torch.testing.assert_close(ordinal_loss(features + 7, positions, direction), loss)
    torch.testing.assert_close(ordinal_loss(features * 30, positions, direction * 0.01), loss)
    torch.testing.assert_close(ordinal_loss(features, positions, -direction), -loss)
    torch.testing.assert_close(ordinal_loss(features, 1 - positions, direction), -loss)


def test_a_line_in_order_is_the_optimum():
    positions = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    assert ordinal_loss(positions[:, None] * direction, positions, direction).item() == pytest.approx(-1, rel=1e-12)

    angle = positions * math.pi / 2  # on an arc, cosine falls with distance: all ranks right
    arc = torch.stack([angle.cos(), angle.sin()], dim=1)
    for seed in range(10):
        shuffled = arc[torch.randperm(30, generator=torch.Generator().manual_seed(seed))]
        assert relational_loss(arc, positions) < relational_loss(shuffled, positions) - 1


# --- collapse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 3.0])
def test_relational_of_collapsed_features(temperature):
    n = 64
    positions = torch.linspace(0, 1, n, dtype=torch.float64).exp()  # no two distances alike
    loss = relational_loss(torch.full((n, 4), 2.0, dtype=torch.float64), positions, temperature)
    assert loss.item() == pytest.approx(math.lgamma(n) / (n - 1), rel=1e-10)  # log((n - 1)!) / (n - 1) = 3.1906
    assert loss.item() == pytest.approx(3.1906, abs=1e-4)


def test_ordinal_of_collapsed_features_is_zero_without_gradient():
    features = torch.full((8, 4), 0.3, requires_grad=True)
    direction = torch.ones(4, requires_grad=True)
    loss = ordinal_loss(features, torch.linspace(0, 1, 8), direction)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().max() == 0
    assert direction.grad.abs().max() == 0


def test_ordinal_does_not_take_rounding_for_a_step():
    # One last bit apart: as far as float32 can tell, these rows coincide.
    features = torch.full((2, 4), 0.3)
    features[1, 0] = torch.nextafter(features[1, 0], torch.tensor(1.0))
    features.requires_grad_()
    loss = ordinal_loss(features, torch.tensor([0.0, 1.0]), torch.ones(4))
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().max() == 0


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.015, 0.5])
@pytest.mark.parametrize("soft_weight", [0.0, 2.0])
def test_relational_gradcheck(temperature, soft_weight):
    features, positions, _ = draw(4, 7)
    features = torch.nn.functional.normalize(features).mul_(1.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: relational_loss(h, positions, temperature, soft_weight), features)


def test_ordinal_gradcheck():
    features, positions, direction = draw(4, 7)
    features = torch.nn.functional.normalize(features).add_(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, c: ordinal_loss(h, positions, c), (features, direction.requires_grad_()))


def test_positions_get_no_gradient():
    features, positions, direction = draw(4, 7)
    features.requires_grad_()
    positions.requires_grad_()
    total = relational_loss(features, positions, soft_weight=1) + ordinal_loss(features, positions, direction)
    total.backward()
    assert positions.grad is None
    assert features.grad.abs().max() > 0


def test_ordinal_gradient_is_small_enough_for_near_rows():
    # float32 rows 1e-3 apart, far from the origin: the gradient agrees with the one in float64.
    generator = torch.Generator().manual_seed(0)
    near = 5 + 1e-3 * torch.randn(12, 6, generator=generator)
    positions, direction = torch.linspace(0, 1, 12), torch.randn(6, generator=generator)

    def gradient(dtype):
        features = near.to(dtype).requires_grad_()
        ordinal_loss(features, positions, direction.to(dtype)).backward()
        return features.grad.double()

    exact = gradient(torch.float64)
    assert (gradient(torch.float32) - exact).abs().max() < 2e-3 * exact.abs().max()


# --- degenerate and extreme ------------------------------------------------------------------------------------------

EXTREME = [0.0, 1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e30, 3e38]


@pytest.mark.parametrize("magnitude", EXTREME)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_finite_for_any_finite_input(magnitude, temperature, rows):
    generator = torch.Generator().manual_seed(0)
    features = ((2 * torch.rand(rows, 6, generator=generator) - 1) * magnitude).requires_grad_()
    direction = ((2 * torch.rand(6, generator=generator) - 1) * magnitude).requires_grad_()
    positions = torch.rand(rows, generator=generator)
    total = relational_loss(features, positions, temperature) + ordinal_loss(features, positions, direction)
    total.backward()
    for value in (total, features.grad, direction.grad):
        assert value.isfinite().all()


def test_one_blank_row_and_one_huge_row():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    features[2], features[4] = 0, features[4] * 1e30
    features.requires_grad_()
    loss = relational_loss(features, torch.linspace(0, 1, 6), 1e-3)
    loss.backward()
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    assert features.grad[2].abs().max() == 0


def test_cold_temperature_is_the_largest_miss():
    # At 1e-3 exp(s) overflows any float; the loss tends to the mean of (max over N_r of cos - cos) / temperature.
    loss = relational_loss(HAND, HAND_POSITIONS, 1e-3)
    assert loss.item() == pytest.approx((1000 + math.log(2) + 1000) / 6, rel=1e-12)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_compare_is_zero_and_attached(rows):
    features = torch.ones(rows, 3, requires_grad=True)
    direction = torch.ones(3, requires_grad=True)
    for loss in (relational_loss(features, torch.zeros(rows)), ordinal_loss(features, torch.zeros(rows), direction)):
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
    assert features.grad.shape == features.shape
    assert direction.grad.abs().max() == 0


def test_all_at_one_position():
    # No pair is ordered; every pair ties with every other.
    features, _, direction = draw(0, 5)
    features.requires_grad_()
    ordinal = ordinal_loss(features, torch.full((5,), 0.5), direction)
    assert ordinal.item() == 0
    ordinal.backward()
    collapsed = relational_loss(torch.ones(5, 3), torch.full((5,), 0.5))
    assert collapsed.item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    features, positions, direction = (x.float() for x in draw(5, 12))
    half = (0.1 * torch.nn.functional.normalize(features)).to(dtype)
    for loss, narrow in (
        (relational_loss(half.float(), positions, 0.01), relational_loss(half, positions, 0.01)),
        (ordinal_loss(half.float(), positions, direction), ordinal_loss(half, positions, direction)),
    ):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, loss, rtol=1e-6, atol=1e-7)


def test_autocast_changes_nothing():
    features, positions, direction = (x.float() for x in draw(5, 12))
    expected = [relational_loss(features, positions), ordinal_loss(features, positions, direction)]
    gradient = torch.autograd.functional.jacobian(lambda h: ordinal_loss(h, positions, direction), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(relational_loss(features, positions), expected[0], rtol=0, atol=0)
        torch.testing.assert_close(ordinal_loss(features, positions, direction), expected[1], rtol=0, atol=0)
        inside = torch.autograd.functional.jacobian(lambda h: ordinal_loss(h, positions, direction), features)
    torch.testing.assert_close(inside, gradient, rtol=0, atol=0)


def test_the_features_decide_the_type():
    features, positions, direction = draw(5, 12)
    assert relational_loss(features, positions.float(), soft_weight=1).dtype == torch.float64
    assert relational_loss(features.float(), positions, soft_weight=1).dtype == torch.float32
    assert relational_loss(positions=positions, features=features.float(), soft_weight=1).dtype == torch.float32
    assert ordinal_loss(features.float(), positions, direction).dtype == torch.float32


def test_slice_numbers_serve_as_positions():
    features, _, direction = draw(5, 6)
    numbers = torch.tensor([3, 1, 0, 2, 2, 5], dtype=torch.uint8)
    torch.testing.assert_close(relational_loss(features, numbers), relational_loss(features, numbers.double()))
    torch.testing.assert_close(
        ordinal_loss(features, numbers, direction), ordinal_loss(features, numbers.double(), direction)
    )


@pytest.mark.parametrize("temperature", [0, -0.1, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        relational_loss(HAND, HAND_POSITIONS, temperature)
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        CoralLoss(2, temperature)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"features \(3, 2\), positions \(2,\)"):
        relational_loss(HAND, HAND_POSITIONS[:2])
    with pytest.raises(ValueError, match=r"positions \(3, 1\)"):
        relational_loss(HAND, HAND_POSITIONS[:, None])
    with pytest.raises(ValueError, match=r"features \(3, 2\).*direction \(3,\)"):
        ordinal_loss(HAND, HAND_POSITIONS, torch.ones(3))
    with pytest.raises(ValueError, match=r"features \(2,\)"):
        ordinal_loss(HAND[0], HAND_POSITIONS, torch.ones(2))
    with pytest.raises(ValueError, match="soft_weight.*-1"):
        relational_loss(HAND, HAND_POSITIONS, soft_weight=-1)


# --- the module ------------------------------------------------------------------------------------------------------


def test_module_adds_the_terms():
    features, positions, _ = (x.float() for x in draw(6, 10))
    loss = CoralLoss(5, temperature=0.3, relational_weight=2, ordinal_weight=0.5, soft_weight=1)
    terms = loss(features, positions)
    assert list(terms) == ["total", "relational", "ordinal"]
    torch.testing.assert_close(terms["relational"], relational_loss(features, positions, 0.3, 1))
    torch.testing.assert_close(terms["ordinal"], ordinal_loss(features, positions, loss.direction))
    torch.testing.assert_close(terms["total"], 2 * terms["relational"] + 0.5 * terms["ordinal"])


def test_module_defaults_are_the_papers():
    features, positions, _ = (x.float() for x in draw(6, 10))
    loss = CoralLoss(5)
    terms = loss(features, positions)
    torch.testing.assert_close(terms["total"], terms["relational"] + terms["ordinal"])
    torch.testing.assert_close(terms["relational"], relational_loss(features, positions, 0.1))


@pytest.mark.parametrize("term", ["relational", "ordinal"])
def test_module_with_one_term(term):
    features, positions, _ = (x.float() for x in draw(6, 10))
    features.requires_grad_()
    loss = CoralLoss(5, **{f"{other}_weight": 0.0 for other in ("relational", "ordinal") if other != term})
    terms = loss(features, positions)
    gradient = torch.autograd.grad(terms["total"], features, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(terms[term], features)[0])


def test_module_owns_the_direction():
    loss = CoralLoss(512, generator=torch.Generator().manual_seed(3))
    assert [name for name, _ in loss.named_parameters()] == ["direction"]
    assert "direction" in loss.state_dict()
    assert loss.direction.norm().item() == pytest.approx(math.sqrt(512), rel=0.1)  # N(0, 1) per entry
    again = CoralLoss(512, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss.direction, again.direction, rtol=0, atol=0)
    assert not torch.equal(loss.direction, CoralLoss(512, generator=torch.Generator().manual_seed(4)).direction)


def test_module_leaves_global_random_state_alone():
    before = torch.get_rng_state()
    CoralLoss(512)
    assert torch.equal(torch.get_rng_state(), before)


def test_module_learns_the_direction():
    positions = torch.linspace(0, 1, 10)
    axis = torch.tensor([1.0, -2.0, 0.5])
    loss = CoralLoss(3)
    optimiser = torch.optim.SGD(loss.parameters(), lr=1.0)
    for _ in range(100):
        optimiser.zero_grad()
        loss(positions[:, None] * axis, positions)["ordinal"].backward()
        optimiser.step()
    assert torch.cosine_similarity(loss.direction, axis, dim=0) > 0.99


@pytest.mark.parametrize("name", ["relational_weight", "ordinal_weight", "soft_weight"])
def test_module_refuses_negative_weights(name):
    with pytest.raises(ValueError, match=f"{name}.*-1"):
        CoralLoss(4, **{name: -1})


def test_nan_is_never_hidden():
    features = torch.randn(6, 3)
    features[2, 1] = float("nan")
    positions = torch.arange(6) / 6
    assert relational_loss(features, positions).isnan()
    assert ordinal_loss(features, positions, torch.ones(3)).isnan()
