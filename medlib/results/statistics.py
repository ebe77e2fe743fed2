"""How sure a difference between two methods is: spread over seeds, an interval and a test over patients.

Two things vary. A new seed gives another network on the same patients: `mean_std` over seeds. New patients give other
numbers for the same networks: `paired_bootstrap` and `wilcoxon` over patients. Neither stands in for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from medlib.rng import numpy_generator


@dataclass(frozen=True)
class Interval:
    """A difference of means, first minus second, with the interval that holds ``confidence`` of the resampled ones."""

    difference: float
    low: float
    high: float
    confidence: float
    patients: int


def mean_std(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (n - 1) and n of one number per seed.

    The deviation is NaN for a single seed. Assumes that seeds are independent and were not chosen by their result.
    Raises ValueError when there is no value or one is NaN: a seed that failed must not vanish from the mean.
    """
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array) or np.isnan(array).any():
        raise ValueError(f"need one defined number per seed, got {list(values)}")
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan"), len(array)


def _mean_over_seeds(tables: pd.DataFrame | Sequence[pd.DataFrame], argument: str) -> pd.DataFrame:
    tables = [tables] if isinstance(tables, pd.DataFrame) else list(tables)
    if not tables:
        raise ValueError(f"{argument} holds no table")
    first = tables[0].sort_index()
    if first.index.names != ["patient", "case"] or first.index.has_duplicates:
        raise ValueError(f"{argument} needs one row per (patient, case) as `Evaluation.frame` gives, got {first.index}")
    for table in tables[1:]:
        if not table.sort_index().index.equals(first.index) or list(table) != list(first):
            raise ValueError(f"{argument}: the seeds were not measured on the same cases and classes")
    stacked = np.stack([table.sort_index().to_numpy(dtype=float) for table in tables])
    return pd.DataFrame(stacked.mean(axis=0), index=first.index, columns=first.columns)


def _paired(
    first: pd.DataFrame | Sequence[pd.DataFrame], second: pd.DataFrame | Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both methods, mean over seeds, with a number kept only where both have one."""
    one, two = _mean_over_seeds(first, "first"), _mean_over_seeds(second, "second")
    if not one.index.equals(two.index) or list(one) != list(two):
        raise ValueError(
            "first and second must be measured on the same cases and classes; a paired comparison needs both"
        )
    both = one.notna() & two.notna()
    return one.where(both), two.where(both)


def paired_bootstrap(
    first: pd.DataFrame | Sequence[pd.DataFrame],
    second: pd.DataFrame | Sequence[pd.DataFrame],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """A percentile bootstrap interval, over patients, for the difference of two methods' means.

    first, second: a table of `Evaluation.frame` (a row per (patient, case), a column per class), or one per seed, which
    are averaged first. The mean is the protocol's: over volumes that have the class, then over classes. Each resample
    draws as many patients as there are, with replacement; all scans of a drawn patient come along (ED and ES are not
    independent) and both methods see the same draw. Seeded by ``seed``; the same tables give the same interval.

    Assumes that the patients are an independent sample of those the claim is about. It says nothing about the spread
    over seeds, and with fewer than about 20 patients the interval is too narrow. A number that one method or one of its
    seeds lacks (a distance where the class was missed) is left out for both. A draw without a class averages the
    others.

    Raises ValueError for tables of different cases or classes, for fewer than two patients, and when the two share no
    number.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"need 0 < confidence < 1 and resamples >= 1, got {confidence} and {resamples}")
    one, two = _paired(first, second)
    patients, owner = np.unique(one.index.get_level_values("patient"), return_inverse=True)
    if len(patients) < 2:
        raise ValueError(f"a bootstrap over patients needs at least two of them, got {list(patients)}")
    defined = one.notna().to_numpy()
    if not defined.any():
        raise ValueError("there is no case where both methods have a number")
    gap = np.where(defined, (one - two).to_numpy(), 0.0)  # (V, K)
    # Sums per patient: a resample is then a weighted sum over patients, and all of them one matrix product.
    total, count = np.zeros((2, len(patients), gap.shape[1]))  # (P, K)
    np.add.at(total, owner, gap)
    np.add.at(count, owner, defined)
    draws = numpy_generator(seed, "bootstrap").multinomial(
        len(patients), np.full(len(patients), 1 / len(patients)), size=resamples
    )  # (R, P): how often each patient is drawn

    def difference(weights: NDArray) -> NDArray:
        totals, counts = weights @ total, weights @ count  # (R, K)
        means = np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0)
        seen = (counts > 0).sum(axis=-1)
        return means.sum(axis=-1)[seen > 0] / seen[seen > 0]

    low, high = np.quantile(difference(draws), [(1 - confidence) / 2, (1 + confidence) / 2])
    observed = difference(np.ones((1, len(patients))))
    return Interval(float(observed[0]), float(low), float(high), confidence, len(patients))


def wilcoxon(first: pd.DataFrame | Sequence[pd.DataFrame], second: pd.DataFrame | Sequence[pd.DataFrame]) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test on one difference per patient.

    Tables as `paired_bootstrap`. A patient's difference is the mean over the patient's scans, then over classes, of
    what both methods have. The null hypothesis is that these differences lie symmetrically about 0; patients are
    assumed independent. It ranks: many small losses can outweigh one large gain, so read it beside the interval, not
    instead of it. No differences at all give 1. Several comparisons need a correction that is not made here.
    """
    one, two = _paired(first, second)
    gap = (one - two).groupby(level="patient").mean().mean(axis=1).dropna()
    if not len(gap):
        raise ValueError("there is no patient where both methods have a number")
    return 1.0 if np.allclose(gap, 0, atol=1e-12) else float(stats.wilcoxon(gap).pvalue)
