"""Runs as points: every seed is seen, and the mean over seeds is only a line through them."""

from collections.abc import Callable, Sequence

import numpy as np
import plotly.graph_objects as go

from medlib.explore.style import INK, SERIES, TEMPLATE, method_colours
from medlib.results import RunRecord
from medlib.results.records import Part

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x", "star")


def records_figure(
    records: Sequence[RunRecord],
    *,
    label: Callable[[RunRecord], str],
    x: Callable[[RunRecord], float] = lambda record: len(record.split.labelled),
    x_title: str = "labelled patients",
    part: Part = "val",
    title: str = "Every run",
    series: Sequence[str] = (),
) -> go.Figure:
    """Mean Dice over foreground classes of every run against ``x``, on a log axis; a line joins the means over seeds.

    records: of one data set and one part · label: the name of a record's series · x: a positive number per record.
    series: the names of several figures, in order, which then have one colour and symbol each in all of them.
    Series stand a little apart, so that seeds of two of them do not hide each other.
    """
    if not records:
        raise ValueError("records is empty: there is no run to draw")
    if isinstance(series, str):
        raise TypeError(f"series must be a sequence of names, got the text {series!r}")
    names = list(dict.fromkeys(label(record) for record in records))
    known = list(dict.fromkeys([*series, *names]))
    names.sort(key=known.index)
    colours = method_colours(known)
    places = sorted({float(x(record)) for record in records})
    if places[0] <= 0:
        raise ValueError(f"x must be positive for a log axis, got {places[0]}")
    figure = go.Figure()
    for i, name in enumerate(names):
        mine = [record for record in records if label(record) == name]
        at = np.array([x(record) for record in mine], float)
        dice = np.array([record.evaluation(part).summary["mean"]["dice"] for record in mine])
        aside = 1.03 ** (i - (len(names) - 1) / 2)
        common = {"legendgroup": name, "name": name}
        number = known.index(name)
        symbol = _SYMBOLS[(number + number // len(SERIES)) % len(_SYMBOLS)]  # another where colours begin again
        means = [(place * aside, dice[at == place].mean()) for place in places if (at == place).any()]
        figure.add_scatter(x=[m[0] for m in means], y=[round(m[1], 4) for m in means], mode="lines", showlegend=False,
                           line={"color": colours[name], "width": 2}, hoverinfo="skip", **common)  # fmt: skip
        figure.add_scatter(
            x=at * aside,
            y=dice.round(4),
            mode="markers",
            marker={"color": colours[name], "size": 8, "symbol": symbol, "line": {"color": INK, "width": 0.5}},
            text=[f"{name}<br>seed {record.seed}" for record in mine],
            hovertemplate="%{text}<br>Dice %{y:.3f}<extra></extra>",
            **common,
        )
    ticks = [f"{place:g}" for place in places]
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=460,
        xaxis={"type": "log", "title": x_title, "tickvals": places, "ticktext": ticks, "minor": {"ticks": ""}},
        yaxis={"title": f"mean Dice, {'validation' if part == 'val' else part}"},
        legend={"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        margin={"b": 110},
    )
    return figure
