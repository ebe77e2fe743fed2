"""Losses of the semi-supervised baselines: hand-made numbers, slow definitions, who learns from whom, extremes."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medlib.losses import consistency
from medlib.losses.consistency import (
    cotraining_agreement_loss,
    cotraining_agreement_loss_by_definition,
    cotraining_diversity_loss,
    cross_pseudo_supervision_loss,
    entropy_minimization_loss,
    interpolation_consistency_loss,
    mean_teacher_loss,
    mixed,
    perturbed_decoders_loss,
    pseudo_label_loss,
    pseudo_label_loss_by_definition,
    pyramid_consistency_loss,
    pyramid_consistency_loss_by_definition,
    uncertainty_aware_loss,
    uncertainty_aware_loss_by_definition,
    uncertainty_threshold,
)

SHAPES = st.sampled_from([(1, 2, 3), (3, 4, 2), (2, 2, 3, 2)])  # (B, H, W) and (B, D, H, W)


def pixels(*probabilities: tuple[float, float]) -> Tensor:
    """Two-class probabilities of some pixels, as (1, 2, 1, pixels) in float64."""
    return torch.tensor(probabilities, dtype=torch.float64).T.view(1, 2, 1, -1)


def draw(seed: int, *shape: int, classes: int = 3) -> Tensor:
    """Logits (B, C, ...) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape[0], classes, *shape[1:], generator=generator, dtype=torch.float64)


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p)


# Every loss as a function of logits (B, C, ...) alone: the other arguments are drawn of the same shape.
def others(logits: Tensor, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits) for _ in range(count)]


def probabilities(logits: Tensor) -> Tensor:
    return others(logits)[0].softmax(dim=1)


LOSSES = {
    "mean_teacher": lambda x: mean_teacher_loss(x, probabilities(x)),
    "uncertainty_aware": lambda x: uncertainty_aware_loss(x, probabilities(x), others(x)[1][:, 0].sigmoid(), 0.6),
    "cross_pseudo": lambda x: cross_pseudo_supervision_loss(x, others(x)[0]),
    "pseudo_labels": lambda x: pseudo_label_loss(x, others(x)[0].argmax(dim=1), others(x)[1][:, 0].sigmoid(), 0.5),
    "entropy": entropy_minimization_loss,
    "interpolation": lambda x: interpolation_consistency_loss(
        x, probabilities(x), probabilities(x).flip(0), torch.full((len(x),), 0.3).to(x)
    ),
    "agreement": lambda x: cotraining_agreement_loss(x, others(x)[0]),
    "diversity": lambda x: cotraining_diversity_loss(x, *others(x)),
    "pyramid": lambda x: pyramid_consistency_loss(torch.stack([x, *others(x)])),
    "decoders": lambda x: perturbed_decoders_loss(torch.stack([x, others(x)[1]]), probabilities(x)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


# --- golden, by hand -------------------------------------------------------------------------------------------------

MINE = pixels((3 / 4, 1 / 4), (1 / 2, 1 / 2)).log()
TARGET = pixels((1 / 4, 3 / 4), (1 / 2, 1 / 2))


def test_mean_teacher_golden():
    assert mean_teacher_loss(MINE, TARGET).item() == pytest.approx((1 / 4 + 1 / 4 + 0 + 0) / 4, rel=1e-12)


def test_uncertainty_golden():
    uncertainty = torch.tensor([[[0.1, 0.6]]], dtype=torch.float64)
    values = [uncertainty_aware_loss(MINE, TARGET, uncertainty, H).item() for H in (0.5, 0.7, 0.1)]
    assert values == pytest.approx([1 / 4, 1 / 8, 0], rel=1e-12)  # the first pixel, both, none (0.1 is not below 0.1)
    assert uncertainty_aware_loss(MINE, TARGET, uncertainty, torch.tensor(0.5)).item() == pytest.approx(1 / 4)


def test_the_threshold_rises_from_three_quarters_of_the_largest_entropy():
    ramp = torch.tensor([0, 0.5, 1], dtype=torch.float64)
    expected = torch.tensor([0.75, 0.875, 1], dtype=torch.float64) * math.log(4)
    torch.testing.assert_close(uncertainty_threshold(ramp, 4), expected)


def test_cross_pseudo_supervision_golden():
    first, second = pixels((3 / 4, 1 / 4), (1 / 3, 2 / 3)), pixels((1 / 5, 4 / 5), (9 / 10, 1 / 10))
    forth = (math.log(4) + math.log(3)) / 2  # the second decides 1, 0
    back = (math.log(5) + math.log(10)) / 2  # the first decides 0, 1
    loss = cross_pseudo_supervision_loss(first.log(), second.log())
    assert loss.item() == pytest.approx(forth + back, rel=1e-12)


def test_a_decision_below_the_confidence_is_not_looked_at():
    first, second = pixels((3 / 4, 1 / 4), (1 / 3, 2 / 3)).log(), pixels((1 / 5, 4 / 5), (9 / 10, 1 / 10)).log()
    forth = (math.log(4) + math.log(3)) / 2  # both decisions of the second are sure enough, 4/5 and 9/10
    back = math.log(5)  # of the first only 3/4 is
    assert cross_pseudo_supervision_loss(first, second, 0.7).item() == pytest.approx(forth + back, rel=1e-12)
    first.requires_grad_()
    nobody = cross_pseudo_supervision_loss(first, second, 0.95)
    nobody.backward()
    assert nobody.item() == 0 and not first.grad.any()


def test_pseudo_labels_golden():
    """Two images of two pixels: one sure of half of its pixels, one of all that have a label."""
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 2.0]]], [[[1.0, 5.0]], [[0.0, -5.0]]]])  # (2, 2, 1, 2)
    labels = torch.tensor([[[0, 1]], [[1, -1]]])
    confidence = torch.tensor([[[0.97, 0.9]], [[0.99, 1.0]]])
    first = math.log(2) + math.log(1 + math.exp(-2))
    second = math.log(1 + math.e)
    expected = (0.5 * first + 1.0 * second) / 3
    assert pseudo_label_loss(logits, labels, confidence).item() == pytest.approx(expected, rel=1e-6)
    assert pseudo_label_loss(logits, labels, confidence, threshold=1.0).item() == 0


def test_entropy_golden():
    expected = (entropy(3 / 4, 1 / 4) / math.log(2) + 1) / 2
    assert entropy_minimization_loss(MINE).item() == pytest.approx(expected, rel=1e-12)


def test_interpolation_golden():
    first, second = pixels((1, 0)), pixels((0, 1))
    share = torch.tensor([0.25], dtype=torch.float64)  # the target is (1/4, 3/4)
    loss = interpolation_consistency_loss(pixels((3 / 4, 1 / 4)).log(), first, second, share)
    assert loss.item() == pytest.approx(1 / 4, rel=1e-12)


def test_each_image_is_mixed_with_its_own_share():
    first, second = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    share = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(mixed(first, second, share), share.view(3, 1, 1).expand(3, 2, 2))
    with pytest.raises(ValueError, match=r"share must be one number for each of 3 images, got \(2,\)"):
        mixed(first, second, share[:2])


def test_agreement_golden():
    first, second = pixels((3 / 4, 1 / 4)).log(), pixels((1 / 4, 3 / 4)).log()
    expected = math.log(2) - entropy(3 / 4, 1 / 4)
    assert cotraining_agreement_loss(first, second).item() == pytest.approx(expected, rel=1e-12)


def test_diversity_golden():
    logits = [pixels(p).log() for p in [(3 / 4, 1 / 4), (1 / 5, 4 / 5), (1 / 3, 2 / 3), (9 / 10, 1 / 10)]]
    forth = -(3 / 4 * math.log(9 / 10) + 1 / 4 * math.log(1 / 10))  # H(p_1, p_2 of what fools the first)
    back = -(1 / 5 * math.log(1 / 3) + 4 / 5 * math.log(2 / 3))  # H(p_2, p_1 of what fools the second)
    assert cotraining_diversity_loss(*logits).item() == pytest.approx(forth + back, rel=1e-12)


def test_pyramid_golden():
    """At the first pixel the scales are 1/4 from their mean (1/2, 1/2), at the second they agree."""
    pyramid = torch.stack([pixels((3 / 4, 1 / 4), (2 / 3, 1 / 3)), pixels((1 / 4, 3 / 4), (2 / 3, 1 / 3))]).log()
    divergence = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    weight = math.exp(-divergence)
    expected = weight / 16 / (weight + 1) + divergence / 2  # the same for both scales
    assert pyramid_consistency_loss(pyramid).item() == pytest.approx(expected, rel=1e-12)


def test_decoders_golden():
    auxiliary = torch.stack([pixels((3 / 4, 1 / 4)), pixels((1 / 2, 1 / 2))]).log()
    loss = perturbed_decoders_loss(auxiliary, pixels((1 / 2, 1 / 2)))
    assert loss.item() == pytest.approx(1 / 32, rel=1e-12)


# --- the formulas as loops -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), SHAPES, st.integers(2, 4), st.floats(0, 1))
def test_uncertainty_aware_is_its_formula(seed, shape, classes, threshold):
    logits, target = draw(seed, *shape, classes=classes), draw(seed + 1, *shape, classes=classes).softmax(dim=1)
    uncertainty = draw(seed + 2, *shape)[:, 0].sigmoid()
    expected = uncertainty_aware_loss_by_definition(logits, target, uncertainty, threshold)
    loss = uncertainty_aware_loss(logits, target, uncertainty, threshold)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-15)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(0, 1))
def test_pseudo_labels_are_their_formula(seed, classes, threshold):
    logits, labels = draw(seed, 3, 2, 3, classes=classes), draw(seed + 1, 3, 2, 3, classes=classes).argmax(dim=1) - 1
    labels[:, 0, 0] = 0  # the formula needs a label in each image
    confidence = draw(seed + 2, 3, 2, 3)[:, 0].sigmoid()
    expected = pseudo_label_loss_by_definition(logits, labels, confidence, threshold)
    loss = pseudo_label_loss(logits, labels, confidence, threshold)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), SHAPES, st.integers(2, 4))
def test_agreement_is_its_formula(seed, shape, classes):
    first, second = draw(seed, *shape, classes=classes), draw(seed + 1, *shape, classes=classes)
    expected = cotraining_agreement_loss_by_definition(first, second)
    assert cotraining_agreement_loss(first, second).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), SHAPES, st.integers(2, 4), st.integers(1, 4))
def test_pyramid_is_its_formula(seed, shape, classes, scales):
    pyramid = torch.stack([draw(seed + s, *shape, classes=classes) for s in range(scales)])
    expected = pyramid_consistency_loss_by_definition(pyramid)
    assert pyramid_consistency_loss(pyramid).item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


# --- invariances and bounds ------------------------------------------------------------------------------------------


@every_loss
def test_a_constant_added_to_all_classes_changes_nothing(loss):
    logits = draw(0, 2, 3, 4)
    torch.testing.assert_close(loss(logits + 9), loss(logits))


def test_the_order_of_two_networks_does_not_matter():
    first, second, *fooled = (draw(seed, 2, 3, 4) for seed in range(4))
    for loss in (cross_pseudo_supervision_loss, cotraining_agreement_loss):
        torch.testing.assert_close(loss(first, second), loss(second, first))
    torch.testing.assert_close(
        cotraining_diversity_loss(first, second, *fooled), cotraining_diversity_loss(second, first, *fooled[::-1])
    )
    scales = torch.stack([first, second, *fooled])
    torch.testing.assert_close(pyramid_consistency_loss(scales.flip(0)), pyramid_consistency_loss(scales))


def test_what_agrees_costs_nothing():
    logits = draw(0, 2, 3, 4)
    p = logits.softmax(dim=1)
    share = torch.tensor([0.2, 0.9], dtype=torch.float64)
    zero = [
        mean_teacher_loss(logits, p),
        interpolation_consistency_loss(logits, p, p, share),
        cotraining_agreement_loss(logits, logits + 1),
        pyramid_consistency_loss(torch.stack([logits, logits + 1, logits])),
        perturbed_decoders_loss(torch.stack([logits, logits]), p),
    ]
    torch.testing.assert_close(torch.stack(zero), torch.zeros(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_values_at_the_ends():
    sure, unsure = pixels((1, 0)).mul(2000), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert entropy_minimization_loss(sure).item() == pytest.approx(0, abs=1e-12)
    assert entropy_minimization_loss(torch.zeros(2, 5, 3, 3)).item() == pytest.approx(1)
    assert cotraining_agreement_loss(sure, -sure).item() == pytest.approx(math.log(2))
    assert mean_teacher_loss(sure, pixels((0, 1))).item() == pytest.approx(1)
    assert cross_pseudo_supervision_loss(unsure, unsure).item() == pytest.approx(2 * math.log(2))


# --- gradients -------------------------------------------------------------------------------------------------------


@every_loss
def test_gradients_are_those_of_finite_differences(loss):
    logits = draw(3, 2, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,), check_forward_ad=False)


def gradients(loss, *inputs: Tensor) -> list[bool]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss(*leaves).backward()
    return [leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves]


def test_who_learns_from_whom():
    first, second, third, fourth = (draw(seed, 2, 3, 4) for seed in range(4))
    p, q = second.softmax(dim=1), third.softmax(dim=1)
    share = torch.tensor([0.3, 0.6], dtype=torch.float64)
    uncertainty = first[:, 0].sigmoid().detach()
    assert gradients(mean_teacher_loss, first, p) == [True, False]
    assert gradients(lambda x, y: uncertainty_aware_loss(x, y, uncertainty, 0.6), first, p) == [True, False]
    assert gradients(interpolation_consistency_loss, first, p, q, share) == [True, False, False, False]
    assert gradients(perturbed_decoders_loss, torch.stack([first, third]), p) == [True, False]
    assert gradients(cross_pseudo_supervision_loss, first, second) == [True, True]
    labels = second.argmax(dim=1)
    assert gradients(lambda x, c: pseudo_label_loss(x, labels, c, 0.5), first, p[:, 0]) == [True, False]
    assert gradients(cotraining_agreement_loss, first, second) == [True, True]
    assert gradients(cotraining_diversity_loss, first, second, third, fourth) == [True] * 4


def test_a_decision_is_a_target_without_gradient():
    """The gradient of the first network is that of a cross-entropy with fixed labels."""
    first, second = draw(0, 2, 3, 4).requires_grad_(), draw(1, 2, 3, 4)
    cross_pseudo_supervision_loss(first, second).backward()
    onehot = torch.nn.functional.one_hot(second.argmax(dim=1), 3).movedim(-1, 1)
    torch.testing.assert_close(first.grad, (first.detach().softmax(dim=1) - onehot) / second[:, 0].numel())


# --- degenerate and extreme ------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_for_extreme_logits_and_at_least_float32(loss, scale, dtype):
    logits = draw(0, 2, 3, 4).div(8).mul(scale).to(dtype).requires_grad_()
    value = loss(logits)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(logits.grad).all()


@every_loss
def test_nothing_to_compare_is_0_and_attached(loss):
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    value = loss(logits)
    value.backward()
    assert value.item() == 0 and logits.grad.shape == logits.shape


def test_no_certain_pixel_is_0_and_attached():
    logits = draw(0, 2, 3, 4).requires_grad_()
    value = uncertainty_aware_loss(logits, logits.detach().softmax(dim=1).flip(0), torch.ones(2, 3, 4), 0.5)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


def test_no_pixel_with_a_label_is_0_and_attached():
    logits = draw(0, 2, 3, 4).requires_grad_()
    loss = pseudo_label_loss(logits, torch.full((2, 3, 4), -1), torch.ones(2, 3, 4))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_label_of_255_is_no_pixel_left_out():
    with pytest.raises(IndexError):
        pseudo_label_loss(draw(0, 2, 3, 4), torch.full((2, 3, 4), 255, dtype=torch.uint8), torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: mean_teacher_loss(x, x[:1]), r"logits \(2, 3, 4, 4\), target \(1, 3, 4, 4\)"),
        (lambda x: uncertainty_aware_loss(x, x, x, 0.5), r"uncertainty must be \(2, 4, 4\), got \(2, 3, 4, 4\)"),
        (lambda x: cross_pseudo_supervision_loss(x, x[:, :2]), r"second_logits \(2, 2, 4, 4\)"),
        (lambda x: cross_pseudo_supervision_loss(x, x, 1.0), r"confidence must be in \[0, 1\), got 1.0"),
        (lambda x: pseudo_label_loss(x, x[:, 0].long(), x[:1, 0]), r"confidence must be \(2, 4, 4\) .* \(1, 4, 4\)"),
        (lambda x: pseudo_label_loss(x, x[:, 0], x[:, 0]), "labels are class ids"),
        (lambda x: pseudo_label_loss(x, x[:, 0].long(), x[:, 0], math.nan), r"threshold must be in \[0, 1\], got nan"),
        (lambda x: entropy_minimization_loss(x[:, 0, 0]), r"logits \(2, 4\)"),
        (lambda x: interpolation_consistency_loss(x, x, x[:1], x[:, 0, 0, 0]), r"second \(1, 3, 4, 4\)"),
        (lambda x: interpolation_consistency_loss(x, x, x, x[:1, 0, 0, 0]), "share"),
        (lambda x: cotraining_agreement_loss(x, x[..., :2]), r"second_logits \(2, 3, 4, 2\)"),
        (lambda x: cotraining_diversity_loss(x, x, x, x[:1]), r"second_fooled \(1, 3, 4, 4\)"),
        (lambda x: pyramid_consistency_loss(x[0]), r"got \(3, 4, 4\)"),
        (lambda x: perturbed_decoders_loss(x, x), r"got \(2, 3, 4, 4\) and \(2, 3, 4, 4\)"),
    ],
)
def test_wrong_shapes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4, 4))


def test_every_loss_of_the_module_is_tested_here():
    functions = {name: f for name, f in vars(consistency).items() if inspect.isfunction(f) and name.endswith("_loss")}
    losses = {name for name, f in functions.items() if f.__module__ == consistency.__name__}
    assert losses <= set(globals())
