"""The papers' own numbers as data: what was printed, under which protocol, and why it is not ours to compare with.

``published/<paper>.csv`` holds the numbers as printed and ``published/<paper>.json`` where they come from. A number
that looks like ours seldom is: another split, another Dice, another distance. The reason stands in each row.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

_FOLDER = files("medlib.results") / "published"


@cache
def sources() -> dict[str, dict[str, Any]]:
    """Per paper: title, venue, url, protocol, what its spread is over, and the rules behind the column ``reason``."""
    found = sorted((file for file in _FOLDER.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8")) for file in found}


@cache
def _all() -> pd.DataFrame:
    tables = []
    for paper, source in sources().items():
        with (_FOLDER / f"{paper}.csv").open(encoding="utf-8") as file:
            table = pd.read_csv(file, keep_default_na=False, dtype=str)
        for column in ("value", "std"):
            printed = pd.to_numeric(table[column])
            percent = source["percent"] & table["metric"].isin(["dice", "jaccard"])
            table[column] = printed.where(~percent, printed / 100).round(6)
        table["labelled"] = pd.to_numeric(table["labelled"]).astype("Int64")
        table["reason"] = [_reason(row, source["reasons"]) for row in table.to_dict("records")]
        table["source"] = f"{source['title']}, {source['venue']}, Table " + table["table"]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _reason(row: Mapping[str, Any], rules: list[dict[str, str]]) -> str:
    """The reasons of all rules whose every key but ``because`` the row matches."""
    hits = [rule["because"] for rule in rules if all(row[key] == rule[key] for key in rule if key != "because")]
    return "; ".join(hits)


def published(
    *, paper: str | None = None, dataset: str | None = None, table: str | None = None, metric: str | None = None
) -> pd.DataFrame:
    """The published rows that match what is given, in the order printed.

    Columns: paper, table, method, dataset, setting (the labels as the paper calls them), labelled (how many labelled
    patients or volumes, missing where not known), metric ("dice", "jaccard": fractions; "asd", "hd": as printed),
    structure ("mean" over foreground classes, or one organ), value, std (NaN where not printed; `sources` says over
    what), note (about this row), reason (why it cannot be compared with ours; "" where it can) and source.

    Raises ValueError for a paper, data set, table or metric that occurs nowhere in the papers asked for.
    """
    rows = _all()
    for column, wanted in {"paper": paper, "dataset": dataset, "table": table, "metric": metric}.items():
        if wanted is not None:
            if wanted not in set(rows[column]):
                raise ValueError(f"no published row has {column} {wanted!r}; there is {sorted(set(rows[column]))}")
            rows = rows[rows[column] == wanted]
    return rows.reset_index(drop=True)
