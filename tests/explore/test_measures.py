"""The numbers for what the eye sees, against answers known beforehand."""

import numpy as np
import pytest

from medlib.explore import direction_alignment, position_probe_error, rank_correlation
from medlib.rng import numpy_generator

POSITIONS = np.tile(np.arange(1, 9) / 8, 6)
PATIENTS = np.repeat([f"patient{i}" for i in range(6)], 8)


def on_an_arc(positions: np.ndarray, turn: float = np.pi / 2) -> np.ndarray:
    return np.stack([np.cos(turn * positions), np.sin(turn * positions)], axis=1)


def test_rank_correlation_is_one_on_an_arc_and_ignores_length():
    features = on_an_arc(POSITIONS)
    assert rank_correlation(features, POSITIONS) == pytest.approx(1, abs=1e-12)
    lengths = numpy_generator(0, "length").uniform(0.1, 9, (len(features), 1))
    assert rank_correlation(features * lengths, POSITIONS) == pytest.approx(1, abs=1e-9)


def test_rank_correlation_by_hand():
    # Angles 0, 60, 90 degrees: distances AB .5, AC 1, BC .134. Positions 0, .1, 1: gaps .1, 1, .9. Ranks 2 3 1 and 1 3
    # 2.
    features = on_an_arc(np.array([0, 2 / 3, 1]))
    assert rank_correlation(features, np.array([0, 0.1, 1.0])) == pytest.approx(0.5, abs=1e-12)


def test_rank_correlation_of_noise_is_near_zero_and_of_one_point_is_nan():
    noise = numpy_generator(0, "noise").normal(size=(len(POSITIONS), 16))
    assert abs(rank_correlation(noise, POSITIONS)) < 0.1
    assert np.isnan(rank_correlation(np.ones((4, 2)), np.arange(4) / 4))


def test_alignment_is_one_on_a_line_and_minus_one_against_it():
    features = POSITIONS[:, None] * np.array([[3.0, 4.0]])
    assert direction_alignment(features, POSITIONS, PATIENTS) == pytest.approx(1, abs=1e-12)
    assert direction_alignment(features, POSITIONS, PATIENTS, np.array([-3.0, -4.0])) == pytest.approx(-1, abs=1e-12)
    assert direction_alignment(features, POSITIONS, PATIENTS, np.array([4.0, -3.0])) == pytest.approx(0, abs=1e-12)


def test_alignment_counts_only_steps_between_patients():
    # Each patient climbs along its own axis; the step between the two patients' first and last slices is all that
    # counts.
    features, positions = np.array([[0, 0], [0, 1], [0, 0], [1, 0]], float), np.array([0, 1, 0, 1.0])
    within = np.array(["a", "a", "a", "a"])
    across = np.array(["a", "a", "b", "b"])
    assert np.isnan(direction_alignment(features, positions, within))
    assert direction_alignment(features, positions, across) == pytest.approx(np.sqrt(0.5), abs=1e-12)


def test_alignment_is_the_mean_over_pairs():
    features = 50 + numpy_generator(3, "alignment").normal(size=(len(POSITIONS), 5))
    features[9] = features[0]  # coincident: left out
    steps = [
        (features[j] - features[i]) / np.linalg.norm(features[j] - features[i])
        for i in range(len(features))
        for j in range(len(features))
        if POSITIONS[j] > POSITIONS[i] and PATIENTS[i] != PATIENTS[j] and (features[i] != features[j]).any()
    ]
    mean = np.mean(steps, axis=0)
    assert direction_alignment(features, POSITIONS, PATIENTS) == pytest.approx(np.linalg.norm(mean), rel=1e-12)
    towards = np.arange(5.0)
    found = direction_alignment(features, POSITIONS, PATIENTS, towards)
    assert found == pytest.approx(mean @ towards / np.linalg.norm(towards), rel=1e-12)


def test_probe_reads_a_linear_position_of_unseen_patients():
    noise = numpy_generator(1, "noise").normal(size=(len(POSITIONS), 4))
    features = np.column_stack([POSITIONS, 0.01 * noise])
    error, baseline = position_probe_error(features, POSITIONS, PATIENTS)
    assert error < 0.02
    assert baseline == pytest.approx(0.25, abs=1e-12)  # |k/8 - 4.5/8| over k = 1..8


def test_probe_does_not_profit_from_knowing_the_patient():
    # Position is a function of who is asked: nothing is learnt about the next patient.
    patients = np.repeat([f"patient{i}" for i in range(10)], 4)
    rank = np.repeat(numpy_generator(2, "rank").permutation(10), 4)
    features = np.eye(10)[np.repeat(np.arange(10), 4)]
    error, baseline = position_probe_error(features, rank / 10, patients)
    assert error >= 0.95 * baseline


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3,\)"):
        rank_correlation(np.ones((4, 2)), np.ones(3))
    with pytest.raises(ValueError, match="left out"):
        position_probe_error(np.ones((4, 2)), np.arange(4.0), np.array(["a"] * 4))
    with pytest.raises(ValueError, match="finite"):
        rank_correlation(np.full((4, 2), np.nan), np.arange(4.0))
