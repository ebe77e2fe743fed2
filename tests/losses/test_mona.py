"""MONA's losses against hand-made numbers and the equations as loops; its samplers against exact distributions."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from medlib.losses.contrastive import COLDEST
from medlib.losses.mona import (
    anatomical_contrastive_loss,
    anatomical_contrastive_loss_by_definition,
    class_means,
    class_relation_distribution,
    class_relation_distribution_by_definition,
    easy_and_hard,
    equivariance_loss,
    equivariance_loss_by_definition,
    instance_discrimination_loss,
    instance_discrimination_loss_by_definition,
    local_instance_discrimination_loss,
    local_windows,
    nearest_neighbor_loss,
    nearest_neighbor_loss_by_definition,
    released_contrast_masks,
    sample_features,
    sample_negative_classes,
    sample_negatives,
    sample_pixels,
    sample_queries,
)
from tests.benchmarks.bench_coral import peak_megabytes
from tests.benchmarks.bench_mona import batch, contrast_dense, contrast_sampled, draw, step
from tests.losses.masked import assert_leaves_no_trace
from tests.methods import test_mona as method
from tests.no_waiting import NoWaiting

E1, E2 = [1.0, 0.0], [0.0, 1.0]


def exact(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, (N, 2)."""
    angle = torch.deg2rad(exact(*degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def normal(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Standard normal float64 tensors; rows of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t * (0.5 + torch.rand(*t.shape[:-1], 1, generator=generator, dtype=torch.float64)) for t in tensors]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- golden, by hand -------------------------------------------------------------------------------------------------


def test_instance_discrimination_golden():
    # Mined views e1 and e2. The student looks along e1: logits (2, 0) at 1/2. The teacher along e2: (0, 4) at 1/4.
    student, teacher, mined = exact([3.0, 0.0]), exact([0.0, 5.0]), exact(E1, E2)
    s = [math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)]
    t = [1 / (1 + math.exp(4)), math.exp(4) / (1 + math.exp(4))]
    expected = sum(a * math.log(a / b) for a, b in zip(t, s, strict=True))
    assert expected == pytest.approx(2.000861, abs=1e-6)
    loss = instance_discrimination_loss(student, teacher, mined, 0.5, 0.25)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_instance_discrimination_defaults_are_the_papers():
    student, teacher, mined = normal(0, (3, 4), (3, 4), (6, 4))
    loss = instance_discrimination_loss(student, teacher, mined)
    expected = instance_discrimination_loss(
        student=student, teacher=teacher, mined=mined, student_temperature=0.1, teacher_temperature=0.01
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_class_relation_golden():
    # G[0, 1] = 2, G[0, 2] = G[1, 2] = 0: dot products, not cosines.
    high, low = math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)
    expected = exact([0.0, high, low], [high, 0.0, low], [0.5, 0.5, 0.0])
    found = class_relation_distribution(exact([1.0, 0.0], [2.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_class_relation_knows_only_classes_that_are_there():
    prototypes = exact([1.0, 0.0], [2.0, 0.0], [0.0, 1.0])
    found = class_relation_distribution(prototypes, torch.tensor([True, False, True]))
    torch.testing.assert_close(found, exact([0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]))
    alone = class_relation_distribution(prototypes, torch.tensor([True, False, False]))
    assert alone.abs().max() == 0


def test_anatomical_contrastive_golden():
    # Class 0: one query e1 on its mean, negatives e2 and e1. At 1/2 the exponents are 2 and 0, 2.
    # Class 1: one query e2 against its mean: -2 and 2, 0.
    queries = exact([[1.0, 0.0]], [[0.0, 3.0]])
    positives, negatives = exact([2.0, 0.0], [0.0, -1.0]), exact([E2, E1], [E2, E1])
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(2)))
    second = -math.log(math.exp(-2) / (math.exp(-2) + math.exp(2) + 1))
    assert (first, second) == (pytest.approx(0.758623, abs=1e-6), pytest.approx(4.142932, abs=1e-6))
    loss = anatomical_contrastive_loss(queries, positives, negatives)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    one = anatomical_contrastive_loss(queries, positives, negatives, valid=torch.tensor([False, True]))
    assert one.item() == pytest.approx(second, rel=1e-12)


def test_anatomical_contrastive_temperature():
    loss = anatomical_contrastive_loss(exact([E1]), exact(E1), exact([E2]), temperature=0.25)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-12)


def test_a_released_bank_of_zeros_only_attracts():
    # The released banks start with a zero row; three classes never get another: log(1 + 512 e^(-cos / tau)).
    queries, positives = at_angles(0)[None], at_angles(60)
    loss = anatomical_contrastive_loss(queries, positives, torch.zeros(1, 512, 2, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(1 + 512 * math.exp(-0.5 / 0.5)), rel=1e-12)


def pixel(*probabilities: float) -> torch.Tensor:
    """Logits (1, C, 1, 1) of one pixel, off by a constant."""
    return (exact(*probabilities).log() + 3).view(1, -1, 1, 1)


def test_equivariance_golden():
    # (3/4, 1/4) and (1/2, 1/2): both directions are sum (p - q) log(p / q) = 1/4 log 3/2 + 1/4 log 2.
    first, second = pixel(0.75, 0.25), pixel(0.5, 0.5)
    assert equivariance_loss(first, second).item() == pytest.approx(0.25 * math.log(3), rel=1e-12)
    one_way = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert equivariance_loss(first, second, one_way=True).item() == pytest.approx(one_way, rel=1e-12)


def test_equivariance_means():
    # Image 0 has two pixels in the mask, at 1/4 log 3 and 0; image 1 has one, at 1/4 log 3; image 2 has none.
    apart, same = (pixel(0.75, 0.25), pixel(0.5, 0.5)), (pixel(0.5, 0.5), pixel(0.5, 0.5))
    rows = [(apart, same), (apart, apart), (apart, apart)]
    first, second = (torch.cat([torch.cat([pair[i] for pair in row], dim=3) for row in rows]) for i in (0, 1))
    mask = torch.tensor([[[1, 1]], [[0, 1]], [[0, 0]]]).bool()
    value = 0.25 * math.log(3)
    assert equivariance_loss(first, second, mask).item() == pytest.approx(2 / 3 * value, rel=1e-12)
    assert equivariance_loss(first, second, mask.int()).item() == pytest.approx(2 / 3 * value, rel=1e-12)
    by_image = (1 / 2 + 1 + 0) / 3 * value
    assert equivariance_loss(first, second, mask, per_image=True).item() == pytest.approx(by_image, rel=1e-12)
    weights = exact([[1.0, 0.5]], [[0.0, 0.25]], [[0.0, 0.0]])
    assert equivariance_loss(first, second, weights).item() == pytest.approx(1.25 / 1.75 * value, rel=1e-12)


def test_nearest_neighbor_golden():
    # The teacher at 0 degrees picks the entries at 10 and -20; the student at 90 is 80 and 110 away from them.
    bank = at_angles(180, 10, 90, -20, 75) * exact(1, 2, 3, 4, 5)[:, None]
    student, teacher = at_angles(90), at_angles(0)
    loss = nearest_neighbor_loss(student, teacher, bank, k=2)
    assert loss.item() == pytest.approx(-(cos(80) + cos(110)) / 2, rel=1e-12)
    # Released: the student picks 90 and 75, and the teacher's distance is taken.
    swapped = nearest_neighbor_loss(student, teacher, bank, k=2, swapped_roles=True)
    assert swapped.item() == pytest.approx(-(cos(90) + cos(75)) / 2, rel=1e-12)


def test_nearest_neighbor_in_a_young_bank():
    bank, student, teacher = at_angles(10, 90, -20, 0), at_angles(90), at_angles(0)
    valid = torch.tensor([True, True, False, False])  # only two slots are filled: both are neighbours
    expected = pytest.approx(-(cos(80) + cos(0)) / 2, rel=1e-12)
    assert nearest_neighbor_loss(student, teacher, bank, k=3, valid=valid).item() == expected
    assert nearest_neighbor_loss(student, teacher, bank[:2], k=3).item() == expected
    one = nearest_neighbor_loss(student, teacher, bank, k=1, valid=valid)
    assert one.item() == pytest.approx(-cos(80), rel=1e-12)


def test_nearest_neighbor_takes_five():
    bank, student, teacher = at_angles(1, 2, 3, 4, 5, 90, 91), at_angles(0), at_angles(0)
    expected = -sum(cos(angle) for angle in range(1, 6)) / 5
    assert nearest_neighbor_loss(student, teacher, bank).item() == pytest.approx(expected, rel=1e-12)


# --- the paper's equations as loops ----------------------------------------------------------------------------------

SEEDS = st.integers(0, 10**6)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 5), mined=st.integers(1, 7), temperatures=st.sampled_from(
    [(0.1, 0.01), (0.2, 0.2), (0.05, 1.0)]))  # fmt: skip
def test_instance_discrimination_is_equations_1_and_2(seed, rows, mined, temperatures):
    student, teacher, keys = normal(seed, (rows, 4), (rows, 4), (mined, 4))
    loss = instance_discrimination_loss(student, teacher, keys, *temperatures)
    expected = instance_discrimination_loss_by_definition(student, teacher, keys, *temperatures)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 7), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_class_relation_is_its_equation(seed, classes, scale):
    (prototypes,) = normal(seed, (classes, 5))
    found = class_relation_distribution(scale * prototypes)
    expected = class_relation_distribution_by_definition(scale * prototypes)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, classes=st.integers(1, 4), count=st.integers(1, 5), keys=st.integers(1, 6),
       temperature=st.sampled_from([0.02, 0.1, 0.5, 2.0]), data=st.data())  # fmt: skip
def test_anatomical_contrastive_is_equation_3(seed, classes, count, keys, temperature, data):
    queries, positives, negatives = normal(seed, (classes, count, 4), (classes, 4), (classes, keys, 4))
    there = data.draw(st.lists(st.booleans(), min_size=classes, max_size=classes).filter(any))
    for valid in (None, torch.tensor(there)):
        loss = anatomical_contrastive_loss(queries, positives, negatives, temperature, valid)
        expected = anatomical_contrastive_loss_by_definition(queries, positives, negatives, temperature, valid)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4), masked=st.booleans())
def test_equivariance_is_equation_6(seed, classes, masked):
    first, second = normal(seed, (2, classes, 2, 3), (2, classes, 2, 3))
    mask = torch.rand(2, 2, 3, generator=seeded(seed)) < 0.6 if masked else None
    if mask is not None:
        mask[0, 0, 0] = True
    loss = equivariance_loss(3 * first, 3 * second, mask)
    expected = equivariance_loss_by_definition(3 * first, 3 * second, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, rows=st.integers(1, 4), entries=st.integers(1, 9), k=st.integers(1, 6))
def test_nearest_neighbor_is_its_definition(seed, rows, entries, k):
    student, teacher, bank = normal(seed, (rows, 4), (rows, 4), (entries, 4))
    loss = nearest_neighbor_loss(student, teacher, bank, k)
    expected = nearest_neighbor_loss_by_definition(student, teacher, bank, k)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-13)


def test_gradients_are_those_of_the_equations():
    student, teacher, bank = normal(3, (4, 5), (4, 5), (7, 5))
    queries, positives, negatives = normal(4, (3, 4, 5), (3, 5), (3, 6, 5))
    first, second = normal(5, (2, 3, 2, 2), (2, 3, 2, 2))
    for ours, definition, given_ in (
        (instance_discrimination_loss, instance_discrimination_loss_by_definition, (student, teacher, bank)),
        (anatomical_contrastive_loss, anatomical_contrastive_loss_by_definition, (queries, positives, negatives)),
        (equivariance_loss, equivariance_loss_by_definition, (first, second)),
        (nearest_neighbor_loss, nearest_neighbor_loss_by_definition, (student, teacher, bank)),
    ):
        found = torch.autograd.functional.jacobian(lambda x, f=ours, g=given_: f(x, *g[1:]), given_[0])
        expected = torch.autograd.functional.jacobian(lambda x, f=definition, g=given_: f(x, *g[1:]), given_[0])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- invariances -----------------------------------------------------------------------------------------------------


def test_instance_discrimination_sees_neither_lengths_nor_orders():
    student, teacher, mined = normal(1, (6, 5), (6, 5), (9, 5))
    loss = instance_discrimination_loss(student, teacher, mined)
    images, slots = torch.randperm(6, generator=seeded()), torch.randperm(9, generator=seeded(1))
    torch.testing.assert_close(instance_discrimination_loss(student[images], teacher[images], mined[slots]), loss)
    torch.testing.assert_close(instance_discrimination_loss(7 * student, 0.1 * teacher, 3 * mined), loss)
    assert abs(instance_discrimination_loss(teacher, student, mined) - loss) > 0.01  # a student is not a teacher


def test_instance_discrimination_in_a_young_bank():
    student, teacher, mined = normal(1, (6, 5), (6, 5), (9, 5))
    valid = torch.arange(9) < 4
    both = (student.requires_grad_(), teacher.requires_grad_())
    loss = instance_discrimination_loss(student, teacher, mined, valid=valid, teacher_gradient=True)
    expected = instance_discrimination_loss(student, teacher, mined[:4], teacher_gradient=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, both), torch.autograd.grad(expected, both))


def test_class_relation_follows_the_order_of_the_classes_and_any_rotation():
    (prototypes,) = normal(2, (5, 4))
    order = torch.randperm(5, generator=seeded())
    found = class_relation_distribution(prototypes)
    torch.testing.assert_close(class_relation_distribution(prototypes[order]), found[order][:, order])
    rotation = torch.linalg.qr(normal(3, (4, 4))[0]).Q
    torch.testing.assert_close(class_relation_distribution(prototypes @ rotation), found)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert found.diagonal().abs().max() == 0


def test_anatomical_contrastive_sees_neither_lengths_nor_orders():
    queries, positives, negatives = normal(2, (3, 4, 5), (3, 5), (3, 6, 5))
    loss = anatomical_contrastive_loss(queries, positives, negatives)
    torch.testing.assert_close(anatomical_contrastive_loss(3 * queries, 0.2 * positives, 8 * negatives), loss)
    torch.testing.assert_close(anatomical_contrastive_loss(queries.flip(1), positives, negatives.roll(2, 1)), loss)
    torch.testing.assert_close(anatomical_contrastive_loss(queries.flip(0), positives.flip(0), negatives.flip(0)), loss)
    twice = [torch.cat([x, x]) for x in (queries, positives, negatives)]
    torch.testing.assert_close(anatomical_contrastive_loss(*twice), loss)  # a mean over classes
    doubled = torch.cat([queries, queries], dim=1)
    torch.testing.assert_close(anatomical_contrastive_loss(doubled, positives, negatives), loss)  # and over queries


def test_equivariance_is_symmetric_and_blind_to_constants_and_places():
    first, second = normal(2, (2, 3, 4, 4), (2, 3, 4, 4))
    loss = equivariance_loss(first, second)
    torch.testing.assert_close(equivariance_loss(second, first), loss)
    torch.testing.assert_close(equivariance_loss(first + 100, second - 3), loss)
    torch.testing.assert_close(equivariance_loss(first.flip(1, 3), second.flip(1, 3)), loss)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    outside = torch.where(mask[:, None], second, 50 * second)
    torch.testing.assert_close(equivariance_loss(first, outside, mask), equivariance_loss(first, second, mask))
    torch.testing.assert_close(
        equivariance_loss(first, outside, mask), equivariance_loss(first[:, :, :2], second[:, :, :2])
    )
    assert abs(equivariance_loss(first, second, one_way=True) - equivariance_loss(second, first, one_way=True)) > 1e-3


def test_equivariance_is_the_sum_of_the_two_ways():
    first, second = normal(2, (2, 3, 4, 4), (2, 3, 4, 4))
    both = equivariance_loss(first, second, one_way=True) + equivariance_loss(second, first, one_way=True)
    torch.testing.assert_close(equivariance_loss(first, second), both)


def test_nearest_neighbor_sees_neither_lengths_nor_the_order_of_the_bank():
    student, teacher, bank = normal(2, (4, 5), (4, 5), (9, 5))
    loss = nearest_neighbor_loss(student, teacher, bank)
    torch.testing.assert_close(nearest_neighbor_loss(2 * student, 9 * teacher, bank.flip(0) * 0.3), loss)
    assert abs(nearest_neighbor_loss(teacher, student, bank) - loss) > 0.01


# --- limits ----------------------------------------------------------------------------------------------------------


def test_instance_discrimination_limits():
    student, teacher, mined = normal(3, (4, 5), (4, 5), (8, 5))
    assert instance_discrimination_loss(student, student, mined, 0.1, 0.1).item() == pytest.approx(0, abs=1e-12)
    assert instance_discrimination_loss(student, student, mined).item() > 0.1  # a sharper teacher is another one
    # A student that has collapsed relates to all alike: log K less the teacher's entropy, which is small at 0.01.
    collapsed = instance_discrimination_loss(torch.zeros_like(student), teacher, mined, 0.1, 1e-4)
    assert collapsed.item() == pytest.approx(math.log(8), rel=1e-6)
    assert instance_discrimination_loss(student, teacher, mined[:1] + 0 * mined).item() == pytest.approx(0, abs=1e-12)


def test_class_relation_limits():
    (direction,) = normal(3, (1, 5))
    torch.testing.assert_close(
        class_relation_distribution(direction.expand(4, 5)), (1 - torch.eye(4, dtype=torch.float64)) / 3
    )
    far = class_relation_distribution(at_angles(0, 10, 180) * 1e3)
    torch.testing.assert_close(far, exact([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))


@pytest.mark.parametrize("temperature", [1e-3, 0.5, 30.0])
def test_anatomical_contrastive_of_collapsed_features(temperature):
    ones = torch.ones(3, 7, 4, dtype=torch.float64)
    loss = anatomical_contrastive_loss(ones, ones[:, 0], torch.ones(3, 512, 4, dtype=torch.float64), temperature)
    assert loss.item() == pytest.approx(math.log(513), rel=1e-10)


def test_anatomical_contrastive_of_separate_classes():
    corner = torch.eye(3, dtype=torch.float64)
    queries, negatives = corner[:, None].expand(3, 8, 3), -corner[:, None].expand(3, 16, 3)
    loss = anatomical_contrastive_loss(queries, corner, negatives, 0.1)
    assert loss.item() == pytest.approx(math.log(1 + 16 * math.exp(-20)), rel=1e-6)
    cold = anatomical_contrastive_loss(queries, -corner, corner[:, None], 1e-3)  # the worst, cold: the difference / tau
    assert cold.item() == pytest.approx(2000, rel=1e-12)


def test_equivariance_limits():
    (logits,) = normal(3, (2, 3, 4, 4))
    assert equivariance_loss(logits, logits).item() == 0
    # Certain of two different classes: each KL is the distance of the logits.
    certain = torch.tensor([80.0, 0.0, 0.0]).double().view(1, 3, 1, 1)
    assert equivariance_loss(certain, certain.roll(1, 1)).item() == pytest.approx(160, rel=1e-12)


def test_nearest_neighbor_limits():
    (bank,) = normal(3, (6, 5))
    one = bank[:1].expand(6, 5)
    assert nearest_neighbor_loss(3 * bank[:1], bank[1:2], one).item() == pytest.approx(-1, rel=1e-12)
    assert nearest_neighbor_loss(-bank[:1], bank[1:2], one).item() == pytest.approx(1, rel=1e-12)
    assert nearest_neighbor_loss(torch.zeros(1, 5), bank[1:2].float(), bank.float()).item() == 0  # no direction


# --- gradients -------------------------------------------------------------------------------------------------------


def test_gradchecks():
    student, teacher, bank = (x.requires_grad_() for x in normal(4, (3, 4), (3, 4), (6, 4)))
    with torch.no_grad():
        teacher_, bank_ = teacher.clone(), bank.clone()
    check = torch.autograd.gradcheck
    assert check(lambda u: instance_discrimination_loss(u, teacher_, bank_, 0.3, 0.2), student)
    assert check(lambda u: nearest_neighbor_loss(u, teacher_, bank_, 2), student)
    assert check(
        lambda u, v: instance_discrimination_loss(u, v, bank_, 0.3, 0.2, teacher_gradient=True), (student, teacher)
    )
    assert check(class_relation_distribution, teacher)
    contrast = [x.requires_grad_() for x in normal(5, (2, 3, 4), (2, 4), (2, 5, 4))]
    assert check(anatomical_contrastive_loss, contrast)
    assert check(lambda *x: anatomical_contrastive_loss(*x, valid=torch.tensor([True, False])), contrast)
    first, second = (x.requires_grad_() for x in normal(6, (2, 3, 2, 2), (2, 3, 2, 2)))
    assert check(equivariance_loss, (first, second))
    mask = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 1]]]).bool()
    assert check(lambda x, y: equivariance_loss(x, y, mask), (first, second))
    with torch.no_grad():
        target = first.clone()
    assert check(lambda y: equivariance_loss(target, y, mask, one_way=True, per_image=True), second)
    local = [x.requires_grad_() for x in normal(7, (2, 3, 4), (2, 3, 4), (2, 6, 4))]
    with torch.no_grad():
        keys = [x.clone() for x in local[1:]]
    for scrambled in (False, True):
        assert check(
            lambda u, s=scrambled: local_instance_discrimination_loss(u, *keys, 0.3, 0.2, scrambled_fragments=s),
            local[0],
        )


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[bool]:
    """Which inputs get a gradient that is not 0."""
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [g is not None and bool(g.abs().max() > 0) for g in found]


def test_who_gets_a_gradient():
    student, teacher, bank = (x.requires_grad_() for x in normal(8, (3, 4), (3, 4), (6, 4)))
    three = (student, teacher, bank)
    assert gradients(instance_discrimination_loss(*three), *three) == [True, False, False]
    released = instance_discrimination_loss(*three, teacher_temperature=0.3, teacher_gradient=True)
    assert gradients(released, *three) == [True, True, False]
    assert gradients(nearest_neighbor_loss(*three), *three) == [True, False, False]
    assert gradients(nearest_neighbor_loss(*three, swapped_roles=True), *three) == [False, False, False]
    local = [x.requires_grad_() for x in normal(9, (2, 3, 4), (2, 3, 4), (2, 6, 4))]
    assert gradients(local_instance_discrimination_loss(*local), *local) == [True, False, False]
    released = local_instance_discrimination_loss(*local, teacher_temperature=0.3, teacher_gradient=True)
    assert gradients(released, *local) == [True, True, False]
    contrast = [x.requires_grad_() for x in normal(5, (2, 3, 4), (2, 4), (2, 5, 4))]
    assert gradients(anatomical_contrastive_loss(*contrast), *contrast) == [True, True, True]
    pair = [x.requires_grad_() for x in normal(6, (2, 3, 2, 2), (2, 3, 2, 2))]
    assert gradients(equivariance_loss(*pair), *pair) == [True, True]
    assert gradients(equivariance_loss(*pair, one_way=True), *pair) == [False, True]


def test_a_step_down_the_gradient_pulls_the_student_to_the_teachers_neighbours():
    student, teacher, bank = normal(10, (4, 6), (4, 6), (30, 6))
    student.requires_grad_()
    optimiser = torch.optim.SGD([student], lr=2.0)
    for _ in range(200):
        optimiser.zero_grad()
        nearest_neighbor_loss(student, teacher, bank, k=1).backward()
        optimiser.step()
    nearest = bank[(F.normalize(teacher) @ F.normalize(bank).T).argmax(dim=1)]
    assert torch.cosine_similarity(student, nearest).min() > 0.999


# --- degenerate and extreme ------------------------------------------------------------------------------------------

EXTREME = [0.0, 1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e19, 1e30, 3e38]


def all_losses(magnitude: float, temperature: float, rows: int, others: int) -> list[tuple[torch.Tensor, list]]:
    """Every loss with inputs that reach to +-magnitude: (value, its inputs)."""
    generator = seeded(1)

    def reach(*shape: int) -> torch.Tensor:
        return ((2 * torch.rand(shape, generator=generator) - 1) * magnitude).requires_grad_()

    student, teacher, bank = reach(rows, 6), reach(rows, 6), reach(others, 6)
    queries, positives, negatives = reach(rows, 4, 6), reach(rows, 6), reach(rows, others, 6)
    first, second, prototypes = reach(rows, 3, 2, 4), reach(rows, 3, 2, 4), reach(rows, 6)
    local = [reach(2, rows, 6), reach(2, rows, 6), reach(2, others, 6)]
    return [
        (instance_discrimination_loss(student, teacher, bank, temperature, temperature, teacher_gradient=True),
         [student, teacher]),
        (local_instance_discrimination_loss(*local, temperature, temperature), local[:1]),
        (class_relation_distribution(prototypes).square().sum(), [prototypes]),
        (anatomical_contrastive_loss(queries, positives, negatives, temperature), [queries, positives, negatives]),
        (equivariance_loss(first, second), [first, second]),
        (equivariance_loss(first, second, one_way=True, per_image=True), [second]),
        (nearest_neighbor_loss(student, teacher, bank), [student]),
    ]  # fmt: skip


@pytest.mark.parametrize("magnitude", EXTREME)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1e3])
@pytest.mark.parametrize(("rows", "others"), [(0, 3), (1, 0), (1, 1), (2, 3), (7, 9), (0, 0)])
def test_finite_for_any_finite_input(magnitude, temperature, rows, others):
    for loss, inputs in all_losses(magnitude, temperature, rows, others):
        assert loss.shape == ()
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, inputs):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("rows", "others"), [(0, 3), (0, 0), (3, 0)])
def test_nothing_to_compare_is_zero_and_attached(rows, others):
    student, teacher, bank = (x.requires_grad_() for x in normal(0, (rows, 4), (rows, 4), (others, 4)))
    local = [x.requires_grad_() for x in normal(0, (2, rows, 4), (2, rows, 4), (2, others, 4))]
    contrast = [x.requires_grad_() for x in normal(0, (2, rows, 4), (2, 4), (2, others, 4))]
    pair = [x.requires_grad_() for x in normal(0, (0, 3, 2, 2), (0, 3, 2, 2))]
    for loss, given_ in (
        (instance_discrimination_loss(student, teacher, bank), student),
        (nearest_neighbor_loss(student, teacher, bank), student),
        (nearest_neighbor_loss(student, teacher, bank, swapped_roles=True), student),
        (local_instance_discrimination_loss(*local), local[0]),
        (anatomical_contrastive_loss(*contrast), contrast[0]),
        (equivariance_loss(*pair), pair[0]),
    ):
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
        assert given_.grad.shape == given_.shape
        assert given_.grad.abs().sum() == 0
        given_.grad = None


def test_nothing_valid_is_zero_and_attached():
    student, teacher, bank = normal(0, (3, 4), (3, 4), (6, 4))
    queries, positives, negatives = normal(0, (2, 3, 4), (2, 4), (2, 5, 4))
    first, second = normal(0, (2, 3, 2, 2), (2, 3, 2, 2))
    for x in (student, queries, first):
        x.requires_grad_()
    local = [x.expand(2, *x.shape) for x in (student, teacher, bank)]
    none = torch.zeros(6, dtype=torch.bool)
    for loss, given_ in (
        (instance_discrimination_loss(student, teacher, bank, valid=none), student),
        (local_instance_discrimination_loss(*local, valid=none), student),
        (nearest_neighbor_loss(student, teacher, bank, valid=none), student),
        (anatomical_contrastive_loss(queries, positives, negatives, valid=none[:2]), queries),
        (equivariance_loss(first, second, torch.zeros(2, 2, 2)), first),
        (equivariance_loss(first, second, torch.zeros(2, 2, 2, dtype=torch.bool), per_image=True), first),
        (class_relation_distribution(queries[:, 0], none[:2]).sum(), queries),
        (class_relation_distribution(queries[:1, 0]).sum(), queries),
    ):
        assert loss.item() == 0
        loss.backward()
        assert given_.grad.abs().max() == 0
        given_.grad = None


def test_an_absent_class_may_hold_anything():
    contrast = normal(1, (3, 4, 5), (3, 5), (3, 6, 5))
    valid = torch.tensor([True, False, True])
    expected = anatomical_contrastive_loss(*(x[valid] for x in contrast))
    broken = [x.clone() for x in contrast]
    for x in broken:
        x[1] = math.nan
        x.requires_grad_()
    loss = anatomical_contrastive_loss(*broken, valid=valid)
    torch.testing.assert_close(loss, expected)
    for gradient in torch.autograd.grad(loss, broken):
        assert gradient.isfinite().all()
        assert gradient[1].abs().max() == 0
    relation = class_relation_distribution(broken[1], valid)
    assert relation.isfinite().all()


@pytest.mark.parametrize("anything", [math.nan, math.inf])
def test_what_a_mask_leaves_out_may_hold_anything(anything):
    student, teacher, bank = normal(1, (3, 5), (3, 5), (6, 5))
    local = normal(2, (2, 3, 5), (2, 3, 5), (2, 6, 5))
    pair = normal(3, (2, 3, 4, 4), (2, 3, 4, 4))
    valid, inside = torch.arange(6) < 4, torch.rand(2, 4, 4, generator=seeded()) < 0.6
    kept_slots, kept_pixels = valid[:, None], inside[:, None].expand(-1, 3, -1, -1)
    one_pixel = kept_pixels | (torch.arange(2).view(2, 1, 1, 1) == 0)  # logits of one input only are broken there
    for loss, given_, kept in (
        (lambda *x: instance_discrimination_loss(*x, valid=valid), (student, teacher, bank), (True, True, kept_slots)),
        (lambda *x: instance_discrimination_loss(*x, valid=valid, teacher_gradient=True), (student, teacher, bank),
         (True, True, kept_slots)),
        (lambda *x: local_instance_discrimination_loss(*x, valid=valid), local, (True, True, kept_slots)),
        (lambda *x: nearest_neighbor_loss(*x, valid=valid), (student, teacher, bank), (True, True, kept_slots)),
        (lambda *x: nearest_neighbor_loss(*x, valid=valid, swapped_roles=True), (student, teacher, bank),
         (True, True, kept_slots)),
        (lambda *x: equivariance_loss(*x, inside), pair, (kept_pixels, one_pixel)),
        (lambda *x: equivariance_loss(*x, inside.float(), one_way=True, per_image=True), pair, (True, kept_pixels)),
    ):  # fmt: skip
        assert_leaves_no_trace(loss, given_, kept, anything)


def test_finite_at_the_coldest_temperature():
    for loss, inputs in all_losses(1.0, COLDEST, 7, 9):
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, inputs):
            assert gradient.isfinite().all()


def test_one_blank_and_one_huge_row():
    queries, positives, negatives = (x.float() for x in normal(1, (2, 4, 5), (2, 5), (2, 6, 5)))
    queries[0, 1], negatives[1, 2] = 0, negatives[1, 2] * 1e30
    queries.requires_grad_()
    loss = anatomical_contrastive_loss(queries, positives, negatives, 1e-3)
    loss.backward()
    assert loss.isfinite()
    assert queries.grad.isfinite().all()
    assert queries.grad[0, 1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    student, teacher, bank = (x.to(dtype) for x in normal(2, (3, 4), (3, 4), (6, 4)))
    contrast = [x.to(dtype) for x in normal(2, (2, 3, 4), (2, 4), (2, 5, 4))]
    pair = [x.to(dtype) for x in normal(2, (2, 3, 2, 2), (2, 3, 2, 2))]
    local = [x.to(dtype) for x in normal(2, (2, 3, 4), (2, 3, 4), (2, 5, 4))]
    for loss, given_ in (
        (instance_discrimination_loss, [student, teacher, bank]),
        (local_instance_discrimination_loss, local),
        (nearest_neighbor_loss, [student, teacher, bank]),
        (anatomical_contrastive_loss, contrast),
        (equivariance_loss, pair),
        (class_relation_distribution, [bank]),
    ):
        narrow, wide = loss(*given_), loss(*(x.float() for x in given_))
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, wide, rtol=0, atol=0)
        assert loss(*(x.double() for x in given_)).dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(loss(*(x.float() for x in given_)), wide, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0, -0.1, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    student, teacher, bank = normal(2, (3, 4), (3, 4), (6, 4))
    three = [x[None] for x in (student, teacher, bank)]
    with pytest.raises(ValueError, match=f"student_temperature.*{temperature}"):
        instance_discrimination_loss(student, teacher, bank, temperature)
    with pytest.raises(ValueError, match=f"teacher_temperature.*{temperature}"):
        instance_discrimination_loss(student, teacher, bank, 0.1, temperature)
    with pytest.raises(ValueError, match=f"student_temperature.*{temperature}"):
        local_instance_discrimination_loss(*three, temperature)
    with pytest.raises(ValueError, match=f"teacher_temperature.*{temperature}"):
        local_instance_discrimination_loss(*three, 0.1, temperature)
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        anatomical_contrastive_loss(student[None], bank[:1], bank[None], temperature)


def test_wrong_shapes_and_values_are_named():
    a, b = torch.ones(3, 4), torch.ones(2, 4)
    for call, message in (
        (lambda: instance_discrimination_loss(a, b, a), r"student \(3, 4\), teacher \(2, 4\)"),
        (lambda: instance_discrimination_loss(a, a, a, valid=torch.ones(2).bool()), r"valid \(2,\)"),
        (lambda: local_instance_discrimination_loss(a, a, a), r"student \(3, 4\)"),
        (lambda: local_instance_discrimination_loss(a[None], a[None], a[None], valid=b[0]), r"valid \(4,\)"),
        (lambda: local_instance_discrimination_loss(*3 * [b[None]], scrambled_fragments=True,
                                                    valid=torch.ones(2).bool()), "scrambled_fragments"),
        (lambda: local_instance_discrimination_loss(b[None], b[None], a[None], scrambled_fragments=True), "K = 3, B"),
        (lambda: class_relation_distribution(a[0]), r"prototypes \(4,\)"),
        (lambda: class_relation_distribution(a, torch.ones(2).bool()), r"valid \(2,\)"),
        (lambda: anatomical_contrastive_loss(a[None], b, a[None]), r"queries \(1, 3, 4\), positives \(2, 4\)"),
        (lambda: anatomical_contrastive_loss(a[None], a[:1], b[None], valid=torch.ones(2).bool()), r"valid \(2,\)"),
        (lambda: equivariance_loss(a, a), r"first_logits \(3, 4\)"),
        (lambda: equivariance_loss(a[None, None], a[None, None], a), r"mask \(3, 4\)"),
        (lambda: equivariance_loss(a[None, None], b[None, None]), r"second_logits \(1, 1, 2, 4\)"),
        (lambda: nearest_neighbor_loss(a, b, a), r"teacher \(2, 4\)"),
        (lambda: nearest_neighbor_loss(a, a, a, valid=torch.ones(2).bool()), r"valid \(2,\)"),
        (lambda: nearest_neighbor_loss(a, a, a, k=0), "k must be at least 1, got 0"),
        (lambda: nearest_neighbor_loss(a, a, a, k=2.0), "k must be a whole number, got 2.0"),
        (lambda: local_windows(torch.ones(1, 1, 223, 256)), r"need 224 px.*\(1, 1, 223, 256\)"),
        (lambda: local_windows(torch.ones(1, 1, 256, 256), stride=30), "30"),
        (lambda: local_windows(torch.ones(1, 1, 256, 256), size=60), "60"),
        (lambda: local_windows(torch.ones(1, 1, 256, 256), grid=0), "0"),
        (lambda: sample_pixels(torch.ones(4).bool(), 3, seeded()), r"masks \(4,\)"),
        (lambda: sample_pixels(a, 3, seeded()), "masks must be bool, got torch.float32"),
        (lambda: sample_pixels(a.int(), 3, seeded()), "masks must be bool, got torch.int32"),
        (lambda: sample_queries(a.int(), torch.ones(1, 2, 3, 4), seeded()), r"labels \(3, 4\)"),
        (lambda: sample_queries(a[None].int(), torch.ones(1, 2, 3, 4), seeded(), hard_share=1.5), "hard_share.*1.5"),
        (lambda: sample_negative_classes(a, 3, seeded()), r"distribution \(3, 4\)"),
        (lambda: sample_negatives(a.int(), torch.eye(2), seeded()), r"labels \(3, 4\)"),
        (lambda: sample_features([a], torch.zeros(1).long(), (4, 4)), r"\[\(3, 4\)\]"),
        (lambda: sample_features([], torch.zeros(1).long(), (4, 4)), r"got \[\]"),
        (lambda: class_means([torch.ones(2, 1, 4, 4)], torch.ones(3, 4, 4), 2), r"B = 3.*\(2, 1, 4, 4\)"),
        (lambda: released_contrast_masks(a[None].int(), torch.ones(1, 2, 3, 4), a, torch.ones(1).bool(), 20),
         r"entropy \(3, 4\)"),
        (lambda: released_contrast_masks(a[None].int(), torch.ones(1, 2, 3, 4), a[None], torch.ones(1).bool(), 120),
         "percent.*120"),
        (lambda: released_contrast_masks(a[None].int(), torch.ones(1, 2, 3, 4), a[None], torch.ones(1).int(), 20),
         "labelled must be bool, got torch.int32"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("count", [0, -1, -2, 2.5])
def test_a_count_is_a_whole_number_from_1_up(count):
    labels, probabilities = long_tail()
    distribution = class_relation_distribution(normal(0, (4, 3))[0])
    for call in (
        lambda: sample_pixels(torch.ones(4, 9).bool(), count, seeded()),
        lambda: sample_queries(labels, probabilities, seeded(), count),
        lambda: sample_queries(labels, probabilities, seeded(), count, hard_share=0.5),
        lambda: sample_negative_classes(distribution, count, seeded()),
        lambda: sample_negatives(labels, distribution, seeded(), count),
    ):
        with pytest.raises(ValueError, match=f"count must be .*, got {count}"):
            call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_is_bool(dtype):
    a = torch.ones(3, 4)
    valid = torch.ones(3).to(dtype)
    for call in (
        lambda: instance_discrimination_loss(a, a, a, valid=valid),
        lambda: local_instance_discrimination_loss(a[None], a[None], a[None], valid=valid),
        lambda: class_relation_distribution(a, valid),
        lambda: anatomical_contrastive_loss(a[:, None], a, a[:, None], valid=valid),
        lambda: nearest_neighbor_loss(a, a, a, valid=valid),
    ):
        with pytest.raises(ValueError, match=f"valid must be bool, got {dtype}"):
            call()


def test_nan_is_never_hidden():
    student, teacher, bank = normal(2, (3, 4), (3, 4), (6, 4))
    contrast = normal(2, (2, 3, 4), (2, 4), (2, 5, 4))
    pair = normal(2, (2, 3, 2, 2), (2, 3, 2, 2))
    student[1, 2] = contrast[0][1, 1, 1] = pair[0][1, 1, 1, 1] = math.nan
    assert instance_discrimination_loss(student, teacher, bank).isnan()
    assert nearest_neighbor_loss(student, teacher, bank).isnan()
    assert anatomical_contrastive_loss(*contrast).isnan()
    assert equivariance_loss(*pair).isnan()
    assert equivariance_loss(*pair, mask=torch.ones(2, 2, 2).bool()).isnan()
    assert class_relation_distribution(student).isnan().any()


@pytest.mark.parametrize("swapped_roles", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_neither_who_picks_nor_who_is_measured_hides_nan(place, swapped_roles, bad):
    rows = normal(2, (3, 4), (3, 4), (6, 4))
    rows[0].requires_grad_()
    with torch.no_grad():
        rows[place][1, 2] = bad
    valid = torch.arange(6) < 2  # fewer than k: the mask of the picks must not hide it, either
    loss = nearest_neighbor_loss(*rows, valid=valid, swapped_roles=swapped_roles)
    assert loss.isnan()
    if not swapped_roles:
        loss.backward()
        assert rows[0].grad.isnan().any()


def test_nan_prototypes_still_have_negatives_and_reach_the_loss():
    labels = torch.tensor([[[0, 0, 1, 1, -1]]])  # no pixel of class 2
    present = torch.tensor([True, True, False])
    (prototypes,) = normal(2, (3, 3))
    for place in (0, ...):
        broken = prototypes.clone()
        broken[place] = math.nan
        index, valid = sample_negatives(labels, class_relation_distribution(broken, present), seeded(), 30)
        assert valid.tolist() == [True, True, False]
        assert index.min() >= 0
        assert index.max() < labels.numel()
        rows = normal(3, (3, 2, 3), (5, 3))
        assert anatomical_contrastive_loss(rows[0], broken, rows[1][index], valid=valid).isnan()


@pytest.mark.parametrize("class_bank", [0, 16])
def test_nan_of_the_representation_head_is_reported(class_bank):
    work = method.begin("finetune", class_bank=class_bank)
    assert method.step(work)["contrast"].isfinite()
    with torch.no_grad():
        for parameter in work.networks["representation"].parameters():
            parameter.fill_(math.nan)
    assert method.step(work)["contrast"].isnan()


# --- local windows ---------------------------------------------------------------------------------------------------


def pointwise_head(channels: int) -> nn.Module:
    """Not linear, to show that it need not be; float64, weights from a seed."""
    head = nn.Sequential(nn.Conv2d(channels, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 1)).double()
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(), dtype=torch.float64)
    return head


@pytest.mark.parametrize(("side", "grid", "size", "stride", "cells"), [
    (256, 6, 64, 32, 8), (256, 7, 64, 32, 8), (40, 3, 16, 12, 4), (33, 2, 8, 9, 8)])  # fmt: skip
def test_local_windows_are_cut_pooled_and_projected_one_by_one(side, grid, size, stride, cells):
    maps, head = torch.randn(2, 4, side, side, generator=seeded(1), dtype=torch.float64), pointwise_head(4)
    for project in (None, head):
        found = local_windows(maps, project, grid=grid, size=size, stride=stride, cells=cells)
        expected = []
        for i in range(grid):
            for j in range(grid):
                window = maps[:, :, i * stride : i * stride + size, j * stride : j * stride + size]
                pooled = F.adaptive_avg_pool2d(window, cells)
                expected.append((pooled if project is None else project(pooled)).flatten(1))
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_the_paper_has_36_windows():
    assert local_windows(torch.zeros(2, 4, 256, 256)).shape == (36, 2, 256)


def test_local_is_the_mean_over_places_of_the_global():
    student, teacher, mined = normal(4, (5, 3, 4), (5, 3, 4), (5, 6, 4))
    valid = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    for kept in (None, valid):
        loss = local_instance_discrimination_loss(student, teacher, mined, 0.2, 0.05, valid=kept)
        places = [
            instance_discrimination_loss(u, v, w, 0.2, 0.05, valid=kept)
            for u, v, w in zip(student, teacher, mined, strict=True)
        ]
        torch.testing.assert_close(loss, torch.stack(places).mean(), rtol=1e-12, atol=0)


def test_scrambled_fragments_are_what_the_released_code_compares():
    places, images, slots, dim = 7, 2, 6, 4
    student, teacher, *batches = normal(5, *[(places, images, dim)] * (2 + slots // images))
    # There: a patch-major tensor read as (B, P, D), a queue (K, P, D) of those, both read as rows of P numbers.
    queue = torch.cat([b.reshape(images, places, dim) for b in batches])
    rows = [x.reshape(images, places, dim).reshape(images * dim, places) for x in (student, teacher)]
    expected = instance_discrimination_loss_by_definition(*rows, queue.reshape(slots * dim, places), 0.3, 0.2)
    mined = torch.cat(batches, dim=1)  # (P, K, D): what a bank of windows holds
    loss = local_instance_discrimination_loss(student, teacher, mined, 0.3, 0.2, scrambled_fragments=True)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert abs(loss - local_instance_discrimination_loss(student, teacher, mined, 0.3, 0.2)) > 1e-3


# --- samplers: which pixels ------------------------------------------------------------------------------------------


def long_tail(seed: int = 0, images: int = 2, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (B, H, W) with shares of 90, 7, 2 and under 1 percent and some left out; probabilities (B, 4, H, W)."""
    generator = seeded(seed)
    share = torch.rand(images, side, side, generator=generator)
    labels = torch.bucketize(share, torch.tensor([0.9, 0.97, 0.99]))
    probabilities = (6 * torch.randn(images, 4, side, side, generator=generator)).softmax(dim=1)
    labels[torch.rand(images, side, side, generator=generator) < 0.1] = -1
    return labels, probabilities


def assert_drawn_from(index: torch.Tensor, expected: torch.Tensor) -> None:
    """The indices (n,) follow the probabilities ``expected`` (N,): nothing impossible, and no chi-square below 1e-3."""
    counts = index.bincount(minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    test = chisquare(counts[possible].numpy(), (expected[possible].double() * len(index)).numpy(), sum_check=False)
    assert 1e-3 < test.pvalue < 1 - 1e-3  # too even is no chance, either


def test_easy_and_hard_part_at_the_threshold():
    labels = torch.tensor([[[0, 0, 1, 1, -1, 0]]])
    first = torch.tensor([0.97, 0.98, 0.02, 0.5, 0.99, 0.1])
    probabilities = torch.stack([first, 1 - first])[None, :, None]
    easy, hard = easy_and_hard(labels, probabilities, threshold=0.97)
    assert easy.tolist() == [[False, True, False, False, False, False], [False, False, True, False, False, False]]
    assert hard.tolist() == [[True, False, False, False, False, True], [False, False, False, True, False, False]]


def test_sample_pixels_is_uniform_in_each_mask():
    masks = torch.rand(3, 50, generator=seeded()) < torch.tensor([[0.9], [0.2], [0.0]])
    masks[0, 0] = masks[0, -1] = masks[1, -1] = True  # the ends of a row are the ends of a search
    index, valid = sample_pixels(masks, 20_000, seeded(1))
    assert index.shape == (3, 20_000)
    assert valid.tolist() == [True, True, False]
    for c in (0, 1):
        assert_drawn_from(index[c], masks[c] / masks[c].sum())
    assert index[2].abs().max() == 0


def test_sample_pixels_of_one_pixel():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, 8] = masks[1, 0] = masks[3, 4] = True
    index, valid = sample_pixels(masks, 5, seeded())
    assert valid.tolist() == [True, True, False, True]
    assert index.tolist() == [[8] * 5, [0] * 5, [0] * 5, [4] * 5]
    nobody, valid = sample_pixels(torch.zeros(2, 0, dtype=torch.bool), 3, seeded())
    assert nobody.tolist() == [[0] * 3] * 2
    assert not valid.any()


def test_classes_are_balanced_however_rare():
    labels, probabilities = long_tail()
    frequency = [(labels == c).sum().item() for c in range(4)]
    assert frequency[0] > 50 * frequency[3] > 0
    index, valid = sample_queries(labels, probabilities, seeded())
    assert valid.all()
    drawn = labels.flatten()[index]
    assert torch.equal(drawn, torch.arange(4)[:, None].expand(4, 256))  # 256 of each, none left out, none astray


@pytest.mark.parametrize("hard_share", [0.0, 0.25, 1.0])
def test_queries_are_hard_and_easy_as_asked(hard_share):
    labels, probabilities = long_tail()
    index, valid = sample_queries(labels, probabilities, seeded(), 4000, 0.9, hard_share)
    assert valid.all()
    confidence = probabilities.gather(1, labels.clamp(min=0)[:, None]).flatten()
    assert torch.equal(confidence[index] <= 0.9, (torch.arange(4000) < hard_share * 4000).expand(4, -1))
    for c in (1, 2):
        pool = (labels.flatten() == c) & (confidence <= 0.9 if hard_share else confidence > 0.9)
        drawn = index[c, : int(hard_share * 4000)] if hard_share else index[c]
        assert_drawn_from(drawn, pool / pool.sum())


def test_a_class_of_one_kind_gives_what_it_has():
    labels = torch.tensor([[[0, 0, 1, 1, 2, -1]]])
    own = torch.tensor([0.99, 0.99, 0.2, 0.3, 0.99, 0.1])  # class 0 is easy, 1 hard, 2 easy, 3 absent
    probabilities = torch.zeros(1, 4, 1, 6).scatter(1, labels.clamp(min=0)[:, None], own.view(1, 1, 1, 6))
    index, valid = sample_queries(labels, probabilities, seeded(), count=40, hard_share=0.5)
    assert valid.tolist() == [True, True, True, False]
    assert [set(row.tolist()) for row in index[:3]] == [{0, 1}, {2, 3}, {4}]
    for share, expected in ((1.0, [False, True, False, False]), (0.0, [True, False, True, False])):
        assert sample_queries(labels, probabilities, seeded(), hard_share=share)[1].tolist() == expected


def test_negative_classes_follow_the_graph():
    (prototypes,) = normal(0, (5, 3))
    distribution = class_relation_distribution(prototypes)
    drawn = sample_negative_classes(distribution, 20_000, seeded())
    assert drawn.shape == (5, 20_000)
    for c in range(5):
        assert_drawn_from(drawn[c], distribution[c])  # which holds "never itself"


def test_negative_classes_never_come_from_nothing():
    distribution = exact([0.0, 0.3, 0.0, 0.7], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])
    drawn = sample_negative_classes(distribution, 20_000, seeded())
    assert_drawn_from(drawn[0], distribution[0])
    assert_drawn_from(drawn[3], distribution[3])
    assert drawn[1].abs().max() == 0
    assert drawn[2].min() >= 0
    assert drawn[2].max() <= 3  # means nothing, but is a class


@pytest.mark.parametrize(("draw_", "expected"), [(0.0, 1), (1.0, 2)])
def test_the_smallest_and_the_largest_draw_have_a_class(monkeypatch, draw_, expected):
    # The largest float32 below 1 times the sum of a row may round up to the sum. Rows begin and end in zeros.
    rows = torch.zeros(400, 400)
    rows[:, 1:3] = torch.rand(400, 1, generator=seeded()) * torch.tensor([0.5, 1.5])
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, draw_))
    assert sample_negative_classes(rows, 3, seeded()).unique().tolist() == [expected]


def test_negatives_follow_the_graph_and_fill_their_classes():
    labels, _ = long_tail(images=1, side=24)
    (prototypes,) = normal(1, (4, 3))
    distribution = class_relation_distribution(prototypes)
    index, valid = sample_negatives(labels, distribution, seeded(), count=60_000)
    assert index.shape == (4, 60_000)
    assert valid.all()
    flat = labels.flatten()
    frequency = torch.stack([(flat == v).sum() for v in range(4)])
    for c in range(4):
        per_pixel = torch.where(flat >= 0, (distribution[c] / frequency)[flat.clamp(min=0)], 0)
        assert_drawn_from(index[c], per_pixel)  # the exact distribution, pixel by pixel
        assert_drawn_from(flat[index[c]], distribution[c])


def test_negatives_of_classes_that_are_not_there():
    labels = torch.tensor([[[0, 0, 1, 1, -1]]])
    prototypes = normal(2, (3, 3))[0]
    present = torch.tensor([True, True, False])
    index, valid = sample_negatives(labels, class_relation_distribution(prototypes, present), seeded(), 30)
    assert valid.tolist() == [True, True, False]
    assert [set(row.tolist()) for row in index[:2]] == [{2, 3}, {0, 1}]
    _, valid = sample_negatives(labels, class_relation_distribution(prototypes), seeded())
    assert valid.tolist() == [False, False, True]  # classes 0 and 1 may draw class 2, which has no pixel
    alone = class_relation_distribution(prototypes, torch.tensor([True, False, False]))
    assert not sample_negatives(labels, alone, seeded())[1].any()


def test_the_paper_draws_256_and_512():
    labels, probabilities = long_tail()
    assert sample_queries(labels, probabilities, seeded())[0].shape == (4, 256)
    assert sample_negatives(labels, class_relation_distribution(normal(0, (4, 3))[0]), seeded())[0].shape == (4, 512)


def test_draws_come_from_the_generator_alone():
    labels, probabilities = long_tail()
    distribution = class_relation_distribution(normal(0, (4, 3))[0])
    before = torch.get_rng_state()
    for sample in (
        lambda g: sample_queries(labels, probabilities, g, hard_share=0.5)[0],
        lambda g: sample_negatives(labels, distribution, g)[0],
        lambda g: sample_negative_classes(distribution, 50, g),
    ):
        assert torch.equal(sample(seeded(3)), sample(seeded(3)))
        assert not torch.equal(sample(seeded(3)), sample(seeded(4)))
    assert torch.equal(torch.get_rng_state(), before)


# --- samplers: features of these pixels ------------------------------------------------------------------------------

LEVELS = [((3, 7, 16, 12)), ((3, 5, 8, 6)), ((3, 4, 3, 5)), ((3, 2, 1, 1)), ((3, 6, 20, 9))]


def levels(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Maps of whole, half and odd resolutions, one pixel and finer than the image, whose size is 16 x 12."""
    generator = seeded(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in LEVELS]


def upsampled(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([F.interpolate(m, size=(16, 12), mode="bilinear", align_corners=False) for m in maps], dim=1)


def test_head_on_sampled_pixels_is_the_dense_head_there():
    maps, head = levels(), nn.Linear(24, 5).double()
    index = torch.cat([torch.tensor([0, 11, 180, 191, 192, 575]), torch.randint(576, (90,), generator=seeded())])
    index = index.view(4, 24)  # corners of the first image, ends of the batch, repeated and random pixels
    found = head(sample_features(maps, index, (16, 12)))
    dense = F.conv2d(upsampled(maps), head.weight[:, :, None, None], head.bias)
    expected = dense.permute(0, 2, 3, 1).flatten(0, 2)[index]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)

    towards = torch.randn(found.shape, generator=seeded(), dtype=torch.float64)
    leaves = (*maps, *head.parameters())
    for one, other in zip(
        torch.autograd.grad(found, leaves, towards), torch.autograd.grad(expected, leaves, towards), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_sampled_rows_follow_the_index():
    maps = levels()
    every = sample_features(maps, torch.arange(576), (16, 12))
    torch.testing.assert_close(every.view(3, 16, 12, 24).permute(0, 3, 1, 2), upsampled(maps), rtol=1e-12, atol=1e-13)
    assert sample_features(maps, torch.zeros(2, 0, dtype=torch.long), (16, 12)).shape == (2, 0, 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_maps_are_interpolated_in_float32(dtype):
    maps = levels(dtype)
    index = torch.arange(0, 576, 5)
    labels = long_tail(images=3, side=16)[0][:, :, :12]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, means = sample_features(maps, index, (16, 12)), class_means(maps, labels, 4)[0]
    assert rows.dtype == means.dtype == torch.float32
    wide = [m.float() for m in maps]
    torch.testing.assert_close(rows, sample_features(wide, index, (16, 12)), rtol=0, atol=0)
    torch.testing.assert_close(means, class_means(wide, labels, 4)[0], rtol=0, atol=0)


def test_class_means_are_those_of_all_upsampled_pixels():
    maps, head = levels(), nn.Linear(24, 5).double()
    labels = torch.randint(-1, 4, (3, 16, 12), generator=seeded())
    labels[labels == 2] = 0
    means, present = class_means(maps, labels, 5)
    assert present.tolist() == [True, True, False, True, False]
    assert means[~present].abs().max() == 0
    pixels = upsampled(maps).permute(0, 2, 3, 1)
    dense = head(pixels)
    expected = torch.stack([pixels[labels == c].mean(dim=0) for c in (0, 1, 3)])
    torch.testing.assert_close(means[present], expected, rtol=1e-11, atol=1e-12)
    for c in (0, 1, 3):
        torch.testing.assert_close(head(means[c]), dense[labels == c].mean(dim=0), rtol=1e-11, atol=1e-12)
    towards = torch.randn(3, 24, generator=seeded(), dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(means[present], maps, towards), torch.autograd.grad(expected, maps, towards), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_sampled_step_is_the_dense_step_and_needs_a_quarter_of_its_memory():
    given_ = batch(images=2, side=128, dim=64)
    pixels = draw(given_, seeded(1))
    assert pixels[2].all()
    leaves = (*given_.maps, *given_.head.parameters())
    seen, megabytes = [], []
    for form in (contrast_dense, contrast_sampled):
        value = step(form, given_, *pixels)
        seen.append([torch.tensor(value), *(leaf.grad.clone() for leaf in leaves)])
        megabytes.append(peak_megabytes(lambda form=form: step(form, given_, *pixels)))
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert megabytes[0] > 4 * megabytes[1]


# --- what the released code draws ------------------------------------------------------------------------------------


def released_masks_pixel_by_pixel(labels, probabilities, entropy, labelled, percent):
    """The released masks by sorting, one pixel at a time."""
    (images, classes, height, width), area = probabilities.shape, labels[0].numel()
    pool = sorted(entropy[~labelled].flatten().tolist())

    def percentile(p: float) -> float:
        place = p / 100 * (len(pool) - 1)
        low = math.floor(place)
        return pool[low] + (place - low) * (pool[min(low + 1, len(pool) - 1)] - pool[low])

    masks = torch.zeros(3, classes, images * area, dtype=torch.bool)
    for b in range(images):
        for y in range(height):
            for x in range(width):
                c, n = int(labels[b, y, x]), b * area + y * width + x
                if c < 0:
                    continue
                p = probabilities[b, :, y, x]
                low = bool(labelled[b]) or entropy[b, y, x] <= percentile(percent)
                high = not labelled[b] and entropy[b, y, x] >= percentile(100 - percent)
                rank = p.argsort(descending=True).tolist().index(c)
                masks[0, c, n] = bool(p[c] > 0.3) and low
                masks[1, c, n] = low
                masks[2, c, n] = bool(p[c] < 0.97) and high and 3 <= rank < 20
    return masks


@pytest.mark.parametrize("classes", [4, 6])
def test_released_masks(classes):
    generator = seeded(3)
    labels = torch.randint(-1, classes, (3, 6, 5), generator=generator)
    probabilities = (2 * torch.randn(3, classes, 6, 5, generator=generator, dtype=torch.float64)).softmax(dim=1)
    entropy = torch.rand(3, 6, 5, generator=generator, dtype=torch.float64)
    labelled = torch.tensor([True, False, False])
    found = released_contrast_masks(labels, probabilities, entropy, labelled, 40)
    expected = released_masks_pixel_by_pixel(labels, probabilities, entropy, labelled, 40)
    assert torch.equal(torch.stack(found), expected)
    assert all(mask.any() for mask in found)
    assert not found[2][:, :30].any()  # no negative on a labelled image


def test_released_masks_of_three_classes_hold_no_negative():
    labels, probabilities = torch.randint(3, (2, 8, 8), generator=seeded()), torch.rand(2, 3, 8, 8, generator=seeded())
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    entropy = torch.rand(2, 8, 8, generator=seeded()).half()
    anchors, positives, negatives = released_contrast_masks(
        labels, probabilities, entropy, torch.tensor([True, False]), 100
    )
    assert anchors.any()
    assert positives.sum() == 128
    assert not negatives.any()


def test_released_masks_without_unlabelled_images():
    labels, probabilities = long_tail()
    masks = released_contrast_masks(labels, probabilities, torch.rand(2, 40, 40), torch.tensor([True, True]), 20)
    assert masks[1].sum() == (labels >= 0).sum()
    assert not masks[2].any()


# --- no step waits for the device ------------------------------------------------------------------------------------


def test_no_waiting_sees_waits():
    x = torch.arange(4.0)
    for wait in (lambda: x[x > 1], lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.sum() > 1),
                 lambda: x.masked_select(x > 1), lambda: x.unique()):  # fmt: skip
        with pytest.raises(AssertionError), NoWaiting():
            wait()


def test_a_step_never_waits():
    given_ = batch(images=2, side=64, dim=16)
    maps, labels, probabilities = given_.maps, given_.labels, given_.probabilities
    student, teacher, bank = (x.requires_grad_() for x in normal(0, (4, 6), (4, 6), (8, 6)))
    local = [local_windows(p, grid=3, size=16, stride=8, cells=4) for p in (probabilities, probabilities.flip(3))]
    valid, mask = torch.arange(8) < 5, torch.rand(2, 64, 64, generator=seeded()) < 0.5
    logits = probabilities.log().requires_grad_()
    generator, labelled = seeded(), torch.tensor([True, False])
    with NoWaiting():
        sampled = contrast_sampled(given_, *draw(given_, generator))
        relation = class_relation_distribution(*class_means(maps, labels, 4))
        sample_queries(labels, probabilities, generator, hard_share=0.5)
        sample_negatives(labels, relation, generator)
        released_contrast_masks(labels, probabilities, probabilities[:, 0], labelled, 20)
        total = (
            sampled
            + instance_discrimination_loss(student, teacher, bank, valid=valid)
            + local_instance_discrimination_loss(local[0], local[1], local[1])
            + local_instance_discrimination_loss(local[0], local[1], local[1], scrambled_fragments=True)
            + equivariance_loss(logits, logits.flip(3), mask)
            + equivariance_loss(logits, logits.flip(3), mask, one_way=True, per_image=True)
            + nearest_neighbor_loss(student, teacher, bank, valid=valid)
        )
        total.backward()
    assert total.isfinite()
