"""The cost of CORAL's losses: loose bounds that a return of the N x N x N or N x N x D table would break.

The real numbers come from ``python -m tests.benchmarks.bench_coral``.
"""

from functools import partial

import pytest

from medlib.losses.coral import CoralLoss, ordinal_loss, relational_loss
from tests.benchmarks.bench_coral import (
    batch,
    forward_backward,
    in_chunks,
    ordinal_loss_stepped,
    peak_megabytes,
    relational_loss_cubed,
    timed,
)


def test_faster_than_the_tables():
    n = 128
    features, positions, direction = batch(n)
    for form, slow_form, third in (
        (relational_loss, relational_loss_cubed, 0.1),
        (ordinal_loss, ordinal_loss_stepped, direction),
    ):
        fast, seconds = timed(partial(forward_backward, form, features, positions, third), repeat=5)
        slow, slow_seconds = timed(partial(in_chunks(slow_form, n, n), features, positions, third), repeat=2)
        assert fast == pytest.approx(slow, rel=1e-4, abs=1e-5)
        assert slow_seconds > 2 * seconds


@pytest.mark.parametrize("temperature", [0.1, 0.01])  # both branches of the tail sum
def test_a_thousand_slices_take_less_than_200_megabytes(temperature):
    features, positions, _ = batch(1024)
    loss = CoralLoss(features.shape[1], temperature)
    assert peak_megabytes(lambda: forward_backward(lambda: loss(features, positions)["total"])) < 200
