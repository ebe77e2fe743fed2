"""Training as curves: from a finished history, and live while it runs."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from IPython.display import display
from plotly.subplots import make_subplots

from medlib.explore.live import LiveFigure
from medlib.explore.pixels import encode_png
from medlib.explore.show import redraw, show
from medlib.explore.style import INK, MUTED, SERIES, TEMPLATE, method_colours

_NOT_TERMS = {"stage", "step", "time", "lr", "val_dice"}
_POINTS = 400  # of one curve: more than the pixels it is drawn with show nothing more


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most ``_POINTS`` points: means over equal runs of steps."""
    runs = np.array_split(np.arange(len(steps)), min(len(steps), _POINTS))
    return (
        [float(np.mean([steps[i] for i in run])) for run in runs],
        [float(f"{np.mean([values[i] for i in run]):.5g}") for run in runs],
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean = weight = 0.0
    smoothed = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(float(f"{mean / weight:.5g}"))
    return smoothed


def term_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss terms in the lines of a metrics file."""
    return list(dict.fromkeys(k for line in history for k, v in line.items() if k not in _NOT_TERMS and np.isscalar(v)))


def training_curves(history: Sequence[Mapping[str, Any]], *, title: str = "Training") -> go.Figure:
    """Loss terms and validation Dice over the steps, one column per stage.

    history: the lines of ``metrics.jsonl``: ``{"stage", "step", "<term>": float, ...}`` and
    ``{"stage", "step", "val_dice": {class: Dice}}``. Faint: as logged. Strong: smoothed; for Dice the mean over
    classes.
    """
    if not history:
        raise ValueError("history is empty: no step has been logged")
    stages = list(dict.fromkeys(line["stage"] for line in history))
    names = term_names(history)
    colours = method_colours(names)
    checked = [any("val_dice" in line for line in history if line["stage"] == stage) for stage in stages]
    rows = 2 if any(checked) else 1
    specs: list[list[dict | None]] = [[{"rowspan": rows if not c else 1} for c in checked]]
    if rows == 2:
        specs.append([{} if c else None for c in checked])
    figure = make_subplots(
        rows,
        len(stages),
        specs=specs,
        column_titles=stages,
        horizontal_spacing=0.13,
        vertical_spacing=0.1,
        row_heights=[0.55, 0.45] if rows == 2 else None,
    )
    for column, (stage, has_dice) in enumerate(zip(stages, checked, strict=True), start=1):
        lines = [line for line in history if line["stage"] == stage]
        end = max(line["step"] for line in lines)
        for name in names:
            logged = [(line["step"], line[name]) for line in lines if name in line]
            if not logged:
                continue
            x, y = thin(*zip(*logged, strict=True))
            common = {"x": x, "legendgroup": name, "name": name, "mode": "lines"}
            faint = go.Scatter(
                **common,
                y=y,
                line={"color": colours[name], "width": 1},
                opacity=0.25,
                showlegend=False,
                hoverinfo="skip",
            )
            first = not any(trace.name == name and trace.showlegend for trace in figure.data)
            strong = go.Scatter(**common, y=_smooth(y), line={"color": colours[name], "width": 2.2}, showlegend=first)
            figure.add_traces([faint, strong], rows=1, cols=column)
        figure.update_yaxes(title_text="loss term", row=1, col=column)
        figure.update_xaxes(range=[0, end * 1.02], showticklabels=not has_dice, row=1, col=column)
        if has_dice:
            _dice(figure, [line for line in lines if "val_dice" in line], column, end)
        figure.update_xaxes(title_text="step", row=2 if has_dice else 1, col=column)
    longest = max((len(name) for line in history for name in line.get("val_dice", ())), default=0)
    many = sum(len(trace.name) + 6 for trace in figure.data if trace.showlegend) > 60  # too many for beside the title
    below = 50 if many else 0
    height = (520 if rows == 2 else 340) + below
    place = {"x": 0, "xanchor": "left", "y": 0, "yanchor": "bottom"}
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=height,
        margin={"t": 88, "r": max(46, 6 * longest - 44), "b": 52 + below},  # some room the axis leaves
        legend={
            "orientation": "h",
            "yref": "container",
            **(place if many else {"x": 1, "xanchor": "right", "y": 1 - 22 / height, "yanchor": "top"}),
        },
    )
    return figure


def _dice(figure: go.Figure, checks: list[Mapping[str, Any]], column: int, end: float) -> None:
    """Validation Dice of each class, thin, and their mean, strong, in the lower panel of ``column``."""
    steps = [line["step"] for line in checks]
    mean = [round(float(np.nanmean(list(line["val_dice"].values()))), 4) for line in checks]
    ends = {"<b>mean</b>": mean[-1]}
    for structure in checks[0]["val_dice"]:
        dice = [round(float(line["val_dice"][structure]), 4) for line in checks]
        ends[structure] = dice[-1]
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=dice,
                name=structure,
                mode="lines",
                showlegend=False,
                line={"color": MUTED, "width": 1.2},
                opacity=0.7,
            ),
            row=2,
            col=column,
        )
    for structure, height in spread(ends).items():
        figure.add_annotation(
            x=steps[-1], y=height, text=structure, xanchor="left", xshift=6, row=2, col=column, font={"size": 11}
        )
    best = int(np.nanargmax(mean))
    figure.add_trace(
        go.Scatter(
            x=steps,
            y=mean,
            name="mean",
            mode="lines+markers",
            showlegend=False,
            line={"color": INK, "width": 2.4},
            marker={"size": 6},
        ),
        row=2,
        col=column,
    )
    figure.add_annotation(
        x=steps[-1],
        y=1,
        yref="y domain",
        xanchor="right",
        yanchor="bottom",
        font={"size": 11, "color": MUTED},
        row=2,
        col=column,
        text=f"best mean {mean[best]:.3f} at step {steps[best]}",
    )
    figure.update_xaxes(range=[0, end * 1.1], row=2, col=column)
    figure.update_xaxes(range=[0, end * 1.1], row=1, col=column)
    figure.update_yaxes(title_text="validation Dice", range=[0, 1.02], row=2, col=column)


def spread(ends: Mapping[str, float], gap: float = 0.075, top: float = 1.0) -> dict[str, float]:
    """Where names go beside curves that end at ``ends`` in [0, 1]: in their order, ``gap`` apart, none above ``top``.

    So many names that they do not fit stand as close as they must.
    """
    order = sorted(ends, key=ends.__getitem__)
    gap = min(gap, top / max(len(order) - 1, 1))
    heights: dict[str, float] = {}
    at = -gap
    for name in order:
        heights[name] = at = max(ends[name], at + gap)
    at = top + gap
    for name in reversed(order):
        heights[name] = at = min(heights[name], at - gap)
    return heights


class LiveCurves:
    """Curves that grow while a training runs; a static figure takes their place at the end.

    Hand ``update`` to the training as its callback. The first call puts the figure on the page; later calls redraw it
    at most every ``interval`` seconds, so a callback per step costs next to nothing. ``finish`` draws the last state
    with its picture. Stages follow each other on one axis.
    """

    def __init__(self, names: Sequence[str], *, title: str = "Training", interval: float = 1.0) -> None:
        self.history: list[dict[str, Any]] = []
        self.names, self.title, self.interval = list(names), title, interval
        self.figure: LiveFigure | None = None
        self._box = ipywidgets.VBox()
        self._drawn = 0.0
        self._starts: dict[str, float] = {}
        self._last = 0.0

    def update(self, stage: str, step: int, terms: Mapping[str, Any]) -> None:
        """Log one line: ``terms`` maps names to numbers, and may hold ``val_dice``, a mapping of class to Dice.

        Terms that were not named at the start are left out.
        """
        self._starts.setdefault(stage, self._last)
        self._last = self._starts[stage] + step
        wanted = (*self.names, "val_dice")
        self.history.append({"stage": stage, "step": step, **{k: _plain(v) for k, v in terms.items() if k in wanted}})
        if self.figure is None:
            self._open()
        elif time.monotonic() - self._drawn >= self.interval:
            self._draw()

    def finish(self) -> None:
        """Take the live figure away and show all that was logged as ``training_curves``."""
        if not self.history:
            raise ValueError("nothing was logged: hand LiveCurves.update to the training as its callback")
        if self.figure is not None:
            self._box.children = ()  # not closed: a page that still draws it would find nobody to answer
            self.figure = None
        stages = ", ".join(self._starts)
        show(
            training_curves(self.history, title=self.title), alt=f"{self.title}: loss terms over the steps of {stages}."
        )

    def _open(self) -> None:
        traces = [
            go.Scatter(name=name, mode="lines", line={"color": SERIES[i % len(SERIES)], "width": 2}, x=[], y=[])
            for i, name in enumerate(self.names)
        ]
        layout = {
            "template": TEMPLATE,
            "title": self.title,
            "height": 300,
            "xaxis": {"title": "step"},
            "yaxis": {"title": "loss term"},
            "showlegend": True,
        }
        self.figure = LiveFigure(traces, layout)
        self._draw()
        self._box.children = (self.figure,)
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        alt = f"{self.title}: curves drawn while the training ran; the finished ones follow."
        nothing = base64.b64encode(encode_png(np.zeros((1, 1, 4), np.uint8))).decode()  # a static page shows the end
        display({"application/vnd.jupyter.widget-view+json": view, "image/png": nothing, "text/plain": alt}, raw=True)

    def _draw(self) -> None:
        assert self.figure is not None
        for trace in self.figure.data:
            logged = [(self._starts[h["stage"]] + h["step"], h[trace.name]) for h in self.history if trace.name in h]
            if logged:
                x, y = thin(*zip(*logged, strict=True))
                redraw(trace, x=x, y=y)
        latest = self.history[-1]
        parts = [f"{n} {latest[n]:.3f}" for n in self.names if n in latest]
        state = f"{latest['stage']}, step {latest['step']} · " + " · ".join(parts)
        self.figure.layout.title.text = f"{self.title} <span style='font-size:13px'> {state}</span>"
        self._drawn = time.monotonic()


def _plain(value: Any) -> Any:
    """Numbers and tensors of one number as float; mappings entry by entry."""
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else float(value)


def live_curves(names: Sequence[str], *, title: str = "Training", interval: float = 1.0) -> LiveCurves:
    """Curves of the terms ``names`` for a training that is about to run; see ``LiveCurves``."""
    return LiveCurves(names, title=title, interval=interval)
