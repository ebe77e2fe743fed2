"""Which of two kinds of runs has the higher Dice, at each number of labelled patients, and whether one can tell."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from medlib.results.records import Part, RunRecord
from medlib.results.statistics import paired_bootstrap

COLUMNS = ("labelled", "first", "second", "first is", "n", "by", "low", "high", "seeds")
FEWEST = 3  # seeds, below which nothing is told


def compare(
    records: Iterable[RunRecord],
    pairs: Sequence[tuple[str, str]],
    *,
    label: Callable[[RunRecord], str | None],
    part: Part = "val",
) -> pd.DataFrame:
    """Mean Dice of the first of each pair against the second: a row for each number of patients at which both were run.

    ``labelled`` patients; ``n`` seeds that both have, the only ones that count; ``by``, first minus second, and ``low``
    to ``high``, its interval over patients (`paired_bootstrap`); ``seeds``, the standard deviation of the difference
    over seeds, NaN for one. "first is" says "higher" or "lower" only where the interval *and* every seed agree, of at
    least three; else "cannot tell".

    records: of one data set and protocol · pairs: of labels, of which runs may be missing · label: of a record; None
    leaves it out · part: "val" or "test".

    Raises ValueError where two records have one label, number of patients and seed: the labels then hide a setting.
    """
    runs: dict[tuple[int, str], dict[int, RunRecord]] = {}
    for record in records:
        if (name := label(record)) is not None:
            seeds = runs.setdefault((len(record.split.labelled), name), {})
            if record.seed in seeds:
                count = len(record.split.labelled)
                raise ValueError(
                    f"two records are {name!r} with {count} labelled and seed {record.seed}: label hides what differs"
                )
            seeds[record.seed] = record
    rows = []
    for labelled in sorted({count for count, _ in runs}):
        for pair in pairs:
            found = [runs.get((labelled, name), {}) for name in pair]
            if shared := sorted(found[0].keys() & found[1].keys()):
                rows.append((labelled, *pair, *_told([[side[seed] for seed in shared] for side in found], part)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _told(sides: Sequence[Sequence[RunRecord]], part: Part) -> tuple[str, int, float, float, float, float]:
    """The columns from "first is" on, of the records of both sides in one order of seeds."""
    first, second = ([record.evaluation(part) for record in side] for side in sides)
    interval = paired_bootstrap([one.frame() for one in first], [one.frame() for one in second])
    gaps = np.array(
        [one.summary["mean"]["dice"] - two.summary["mean"]["dice"] for one, two in zip(first, second, strict=True)]
    )
    told = "cannot tell"
    if len(gaps) >= FEWEST and min(*gaps, interval.low) > 0:
        told = "higher"
    if len(gaps) >= FEWEST and max(*gaps, interval.high) < 0:
        told = "lower"
    spread = float(gaps.std(ddof=1)) if len(gaps) > 1 else float("nan")
    return told, len(gaps), interval.difference, interval.low, interval.high, spread
