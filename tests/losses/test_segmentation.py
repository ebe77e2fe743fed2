"""Cross-entropy and Dice on labelled pixels: hand-made numbers, loops, ignored pixels, extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.losses.segmentation import cross_entropy_loss, dice_loss, supervised_loss

IGNORE = -1
LOSSES = {
    "cross_entropy": cross_entropy_loss,
    "dice": dice_loss,
    "supervised": lambda logits, labels: supervised_loss(logits, labels, 0.5, 0.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def draw(seed: int, *shape: int, classes: int = 3, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C, ...) in float64 and labels (B, ...), some of them ignored, at least one not."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape[0], classes, *shape[1:], generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORE
    labels.view(-1)[0] = 1
    return logits, labels


def pixels(logits: torch.Tensor, labels: torch.Tensor):
    """The (softmax, label) of every labelled pixel, one by one."""
    for scores, label in zip(logits.movedim(1, -1).reshape(-1, logits.shape[1]), labels.reshape(-1), strict=True):
        if label != IGNORE:
            yield scores.exp() / scores.exp().sum(), int(label)


# --- golden, by hand -------------------------------------------------------------------------------------------------

# One image of two pixels, two classes. Softmax: (3/4, 1/4) labelled 0 and (1/2, 1/2) labelled 1.
LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
LABELS = torch.tensor([[[0, 1]]])


def test_cross_entropy_golden():
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert cross_entropy_loss(LOGITS, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_dice_golden():
    e = 1e-5
    background = 1 - (2 * 0.75 + e) / (0.75**2 + 0.5**2 + 1 + e)  # p = 3/4, 1/2; t = 1, 0
    foreground = 1 - (2 * 0.50 + e) / (0.25**2 + 0.5**2 + 1 + e)  # p = 1/4, 1/2; t = 0, 1
    assert dice_loss(LOGITS, LABELS).item() == pytest.approx((background + foreground) / 2, rel=1e-12)


def test_dice_sums_over_the_whole_batch():
    # Two images; together they are the two pixels above.
    logits = LOGITS.view(2, 2).T.reshape(2, 2, 1, 1)
    torch.testing.assert_close(dice_loss(logits, LABELS.view(2, 1, 1)), dice_loss(LOGITS, LABELS))


def test_supervised_golden():
    loss = supervised_loss(LOGITS, LABELS, dice_weight=0.25, cross_entropy_weight=3)
    torch.testing.assert_close(loss, 0.25 * dice_loss(LOGITS, LABELS) + 3 * cross_entropy_loss(LOGITS, LABELS))


def test_ignored_pixels_count_nowhere():
    more = torch.cat([LOGITS, torch.full((1, 2, 1, 1), 5.0).double().expand(1, 2, 1, 3)], dim=3)
    more[:, 0, :, 2:] += 3
    labels = torch.tensor([[[0, 1, IGNORE, IGNORE, IGNORE]]])
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(more, labels), loss(LOGITS, LABELS))
    torch.testing.assert_close(
        supervised_loss(more, labels.where(labels >= 0, 255).byte(), 1, 1, ignore_index=255),
        supervised_loss(LOGITS, LABELS, 1, 1),
    )
    torch.testing.assert_close(dice_loss(more, labels.where(labels >= 0, 255), 255), dice_loss(LOGITS, LABELS))
    torch.testing.assert_close(
        cross_entropy_loss(more, labels.where(labels >= 0, 255), 255), cross_entropy_loss(LOGITS, LABELS)
    )


# --- the formulas as loops -------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(1, 2, 3), (3, 4, 2), (2, 2, 3, 2)])  # (B, H, W) and (B, Z, H, W)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), SHAPES)
def test_cross_entropy_is_its_formula(seed, shape):
    logits, labels = draw(seed, *shape)
    terms = [-probabilities[label].log() for probabilities, label in pixels(logits, labels)]
    torch.testing.assert_close(cross_entropy_loss(logits, labels), torch.stack(terms).mean(), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), SHAPES, st.integers(2, 5))
def test_dice_is_its_formula(seed, shape, classes):
    logits, labels = draw(seed, *shape, classes=classes)
    terms = []
    for c in range(classes):
        both = predicted = true = 0
        for probabilities, label in pixels(logits, labels):
            both += probabilities[c] * (label == c)
            predicted += probabilities[c] ** 2
            true += label == c
        terms.append(1 - (2 * both + 1e-5) / (predicted + true + 1e-5))
    torch.testing.assert_close(dice_loss(logits, labels), torch.stack(terms).mean(), rtol=1e-10, atol=1e-13)


# --- invariances -----------------------------------------------------------------------------------------------------


@every_loss
def test_what_does_not_matter(loss):
    logits, labels = draw(0, 2, 3, 4)
    value = loss(logits, labels)
    torch.testing.assert_close(loss(logits + 9, labels), value)  # a constant added to all classes
    torch.testing.assert_close(loss(logits.flip(0), labels.flip(0)), value)  # order of the images
    torch.testing.assert_close(loss(logits.flip(3), labels.flip(2)), value)  # a mirror
    names = torch.tensor([2, 0, 1])  # class c is called names[c]: ids are names
    renamed = torch.where(labels >= 0, names[labels.clamp(min=0)], IGNORE)
    torch.testing.assert_close(loss(logits[:, names.argsort()], renamed), value)


# --- collapse and optimum --------------------------------------------------------------------------------------------


def test_undecided_network():
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[:, :4] = 1  # half and half of two of four classes; p = 1/4 everywhere, 128 pixels
    logits = torch.full((2, 4, 8, 8), 3.0, dtype=torch.float64)
    assert cross_entropy_loss(logits, labels).item() == pytest.approx(math.log(4), rel=1e-12)
    present = 1 - (2 * 64 / 4 + 1e-5) / (128 / 16 + 64 + 1e-5)
    absent = 1 - 1e-5 / (128 / 16 + 1e-5)
    assert dice_loss(logits, labels).item() == pytest.approx((present + absent) / 2, rel=1e-12)


@every_loss
def test_certain_and_right_or_wrong(loss):
    labels = torch.tensor([[[0, 1, 2, 1]]])
    right = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1) * 50.0
    assert loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    assert loss(right.roll(1, dims=1), labels).item() > 0.9


# --- gradients -------------------------------------------------------------------------------------------------------


@every_loss
def test_gradcheck_and_ignored_pixels_get_none(loss):
    logits, labels = draw(1, 2, 2, 3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits)
    loss(logits, labels).backward()
    per_pixel = logits.grad.abs().sum(dim=1)
    assert (per_pixel[labels == IGNORE] == 0).all()
    assert (per_pixel[labels != IGNORE] > 0).all()
    assert (labels == IGNORE).any()


# --- degenerate and extreme ------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 2, 3, 4), (0, 3, 4)])
def test_nothing_labelled_is_zero_and_attached(loss, shape):
    logits = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(logits, torch.full(shape, IGNORE))
    value.backward()
    assert value.shape == ()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@every_loss
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e3, 1e30])
def test_finite_for_any_finite_input(loss, magnitude):
    logits, labels = draw(2, 2, 3, 4)
    logits = (logits.float() * magnitude).requires_grad_()
    value = loss(logits, labels)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@every_loss
def test_one_class_only(loss):
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)
    value = loss(logits, torch.zeros(1, 2, 2, dtype=torch.long))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(loss, dtype):
    # 300 x 300 pixels: their count alone is beyond float16.
    logits, labels = draw(3, 1, 300, 300)
    half = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(half.float(), labels))


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type_of_labels(loss, dtype):
    logits, labels = draw(4, 1, 3, 3, ignored=0)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, labels))


@every_loss
def test_wrong_shapes_and_types_are_named(loss):
    logits = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"logits \(2, 3, 4, 5\), labels \(2, 5, 4\)"):
        loss(logits, torch.zeros(2, 5, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels \(2, 1, 4, 5\)"):
        loss(logits, torch.zeros(2, 1, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits \(2, 3\)"):
        loss(logits[..., 0, 0], torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="float32"):
        loss(logits, torch.zeros(2, 4, 5))
