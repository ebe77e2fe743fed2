"""Spread over seeds and intervals over patients, with answers known beforehand."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medlib.results import mean_std, paired_bootstrap, wilcoxon
from medlib.rng import numpy_generator


def frame(values, classes=("RV", "LV"), scans=2):
    """values (patients, scans, classes) as `Evaluation.frame` gives them."""
    values = np.asarray(values, dtype=float).reshape(-1, scans, len(classes))
    index = pd.MultiIndex.from_product(
        [[f"p{i:03}" for i in range(len(values))], ["ED", "ES"][:scans]], names=["patient", "case"]
    )
    return pd.DataFrame(values.reshape(-1, len(classes)), index=index, columns=list(classes))


def noise(seed, patients=40, classes=2):
    return numpy_generator(seed, "statistics").uniform(0.5, 0.9, (patients, 2, classes))


def test_mean_std_by_hand():
    mean, std, count = mean_std([0.5, 0.7, 0.9])
    assert (mean, std, count) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    mean, std, count = mean_std([0.5])
    assert (mean, count) == (0.5, 1) and math.isnan(std)
    for wrong in ([], [0.5, math.nan], [[0.5]]):
        with pytest.raises(ValueError, match="per seed"):
            mean_std(wrong)


def test_a_constant_gain_has_an_interval_without_width():
    values = noise(0)
    found = paired_bootstrap(frame(values + 0.05), frame(values))
    assert found.difference == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(0.05)
    assert found.patients == 40 and found.confidence == 0.95


def test_the_interval_is_the_textbook_one_for_many_patients():
    first, second = noise(1, 200, 1), noise(2, 200, 1)
    found = paired_bootstrap(frame(first, ["LV"]), frame(second, ["LV"]))
    gap = (first - second).mean(axis=(1, 2))  # one per patient
    half = 1.96 * gap.std() / math.sqrt(200)
    assert found.difference == pytest.approx(gap.mean())
    assert found.low == pytest.approx(gap.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gap.mean() + half, abs=0.1 * half)


def test_the_scans_of_a_patient_stay_together():
    gap = noise(3, 30, 1)[:, :1].repeat(2, axis=1) - 0.7  # ED and ES say the same
    twice = paired_bootstrap(frame(gap, ["LV"]), frame(0 * gap, ["LV"]))
    once = paired_bootstrap(frame(gap[:, :1], ["LV"], 1), frame(0 * gap[:, :1], ["LV"], 1))
    assert (twice.low, twice.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_bootstrap_equals_the_loop_that_resamples_whole_patients():
    first, second = frame(noise(4, 5)), frame(noise(5, 5))
    first.iloc[3, 0] = math.nan  # a scan without the class
    found = paired_bootstrap(first, second, seed=3, resamples=300)
    names = first.index.unique("patient")
    gap = (first - second).to_numpy().reshape(5, 2, 2)
    means = []
    for counts in numpy_generator(3, "bootstrap").multinomial(len(names), np.full(len(names), 0.2), size=300):
        drawn = np.concatenate([gap[i] for i in range(5) for _ in range(counts[i])])
        means.append(np.nanmean(drawn, axis=0).mean())
    assert (found.low, found.high) == (
        pytest.approx(np.quantile(means, 0.025)),
        pytest.approx(np.quantile(means, 0.975)),
    )


def test_order_of_rows_does_not_matter_and_swapping_turns_the_sign():
    first, second = frame(noise(6)), frame(noise(7))
    there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
    assert there == paired_bootstrap(first.sample(frac=1, random_state=0), second)
    assert there.difference == pytest.approx(-back.difference) and there.low == pytest.approx(-back.high)
    assert paired_bootstrap(first, second, seed=1) != there


def test_seeds_are_averaged_before_patients_are_drawn():
    values = [noise(s) for s in range(3)]
    found = paired_bootstrap([frame(v) for v in values], frame(noise(9)))
    assert found == paired_bootstrap(frame(np.mean(values, axis=0)), frame(noise(9)))


def test_the_interval_covers_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        gap = numpy_generator(trial, "coverage").normal(0.02, 0.1, (50, 1, 1))
        found = paired_bootstrap(frame(gap, ["LV"], 1), frame(0 * gap, ["LV"], 1), resamples=500, confidence=0.9)
        covered += found.low <= 0.02 <= found.high
    assert 0.82 <= covered / 200 <= 0.96


def test_numbers_that_one_method_lacks_are_left_out_for_both():
    first, second = noise(8), noise(8) - 0.1
    first[0, 0, 0], second[1, 1, 1] = math.nan, math.nan
    assert paired_bootstrap(frame(first), frame(second)).difference == pytest.approx(0.1)


def test_ten_thousand_resamples_take_well_under_a_second():
    first, second = frame(noise(1, 100)), frame(noise(2, 100))
    start = time.process_time()
    paired_bootstrap(first, second)
    assert time.process_time() - start < 2


def test_wilcoxon_is_scipys_on_one_number_per_patient():
    first, second = noise(10, 20), noise(11, 20)
    expected = stats.wilcoxon((first - second).mean(axis=(1, 2))).pvalue
    assert wilcoxon(frame(first), frame(second)) == pytest.approx(expected)


def test_wilcoxon_known_values():
    base = noise(12, 6)
    steps = np.arange(1, 7).reshape(6, 1, 1) / 100
    assert wilcoxon(frame(base + steps), frame(base)) == pytest.approx(2 / 2**6)  # all six signs alike, two sides
    assert wilcoxon(frame(base), frame(base)) == 1


@pytest.mark.parametrize("compare", [paired_bootstrap, wilcoxon])
def test_what_cannot_be_paired_is_refused(compare):
    good = frame(noise(0, 4))
    with pytest.raises(ValueError, match="same cases and classes"):
        compare(good, frame(noise(0, 5)))
    with pytest.raises(ValueError, match="same cases and classes"):
        compare(good, good.rename(columns={"LV": "MYO"}))
    with pytest.raises(ValueError, match="seeds were not measured"):
        compare([good, frame(noise(0, 5))], good)
    with pytest.raises(ValueError, match="no table"):
        compare([], good)
    with pytest.raises(ValueError, match=r"\(patient, case\)"):
        compare(good.reset_index(drop=True), good)
    with pytest.raises(ValueError, match="both methods have a number"):
        compare(good * math.nan, good)


def test_bootstrap_refuses_one_patient_and_odd_levels():
    with pytest.raises(ValueError, match="at least two"):
        paired_bootstrap(frame(noise(0, 1)), frame(noise(1, 1)))
    with pytest.raises(ValueError, match="confidence"):
        paired_bootstrap(frame(noise(0)), frame(noise(1)), confidence=95)
