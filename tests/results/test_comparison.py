"""Two kinds of runs, seed by seed: what may be told, and what not."""

import math

import pytest

from medlib.data.splits import Split
from medlib.results import compare, paired_bootstrap
from tests.results.test_records import evaluation, record

WELL, BADLY = evaluation(1, ("p7", "p8", "p9")), evaluation(3, ("p7", "p8", "p9"))
PAIR = [("a", "b")]


def run(name: str, seed: int, *, good: bool, labelled: int = 1):
    split = Split("ratio", tuple(f"l{i}" for i in range(labelled)), (), ("p7", "p8", "p9"), ())
    val, test = (WELL, BADLY) if good else (BADLY, WELL)
    return record(seed=seed, split=split, val=val, test=test, device=name)


def told(records, pairs=PAIR, **options):
    return compare(records, pairs, label=lambda one: one.device, **options)


def both(*seeds: int, good: bool = True, labelled: int = 1):
    return [run(name, seed, good=good == (name == "a"), labelled=labelled) for seed in seeds for name in ("a", "b")]


def test_three_seeds_that_agree_and_an_interval_beyond_zero_are_told():
    assert WELL.summary["mean"]["dice"] > BADLY.summary["mean"]["dice"]
    (row,) = told(both(0, 1, 2)).to_dict("records")
    interval = paired_bootstrap(*([one.frame()] * 3 for one in (WELL, BADLY)))
    assert (row["labelled"], row["first"], row["second"], row["first is"], row["n"]) == (1, "a", "b", "higher", 3)
    assert (row["by"], row["low"], row["high"]) == (interval.difference, interval.low, interval.high)
    assert row["by"] > row["low"] > 0 and row["seeds"] == pytest.approx(0)
    (row,) = told(both(0, 1, 2), [("b", "a")]).to_dict("records")
    assert row["first is"] == "lower" and row["by"] == pytest.approx(-interval.difference)


def test_the_other_part_is_the_other_answer():
    assert list(told(both(0, 1, 2), part="test")["first is"]) == ["lower"]


def test_two_seeds_or_one_that_disagrees_tell_nothing():
    two = told(both(0, 1)).iloc[0]
    assert (two["first is"], two["n"]) == ("cannot tell", 2) and two["low"] > 0
    one = told(both(0)).iloc[0]
    assert (one["first is"], one["n"]) == ("cannot tell", 1) and math.isnan(one["seeds"])
    mixed = told([*both(0, 1, 2, 3, 4, 5, 6, 7, 8), *both(9, good=False)]).iloc[0]
    assert mixed["low"] > 0 and mixed["first is"] == "cannot tell" and mixed["seeds"] > 0.01


def test_only_seeds_that_both_have_count():
    extra = [run("a", seed, good=False) for seed in (7, 8)]
    assert told([*both(0, 1, 2), *extra]).equals(told(both(0, 1, 2)))


def test_numbers_of_patients_stand_apart_in_order():
    found = told([*both(0, labelled=7), *both(0, 1, labelled=3)])
    assert list(found["labelled"]) == [3, 7] and list(found["n"]) == [2, 1]


def test_pairs_that_were_not_run_give_an_empty_table_of_the_same_columns():
    none = told(both(0), [("a", "c"), ("c", "b")])
    assert none.empty and list(none) == list(told(both(0)))


def test_what_has_no_label_is_left_out():
    found = [*both(0), run("a", 0, good=True)]
    kept = compare(found, PAIR, label=lambda one: one.device if one is not found[-1] else None)
    assert list(kept["n"]) == [1]


def test_two_records_of_one_label_and_seed_are_refused():
    with pytest.raises(ValueError, match="two records are 'a' with 1 labelled and seed 0: label hides"):
        told([*both(0, 1), run("a", 0, good=True)])
