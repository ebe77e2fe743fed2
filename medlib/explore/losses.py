"""A loss to touch: points that the reader moves, the loss, and where it pushes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import CARD, GRID, INK, MUTED, SERIES, TEMPLATE, position_scale

Range = tuple[float, float, float]  # smallest, largest and first value of a slider
_ARROW = 0.5  # length of the longest arrow, in units of the circle's radius
_RIM = 0.16  # radius of a drawn point
_ANGLES = 121  # angles at which the loss is sampled for its curve


def _slider(name: str, limits: Range, step: float | None = None) -> ipywidgets.FloatSlider:
    low, high, value = limits
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step or (high - low) / 100,
        description=name.replace("_", " "),
        readout_format=".3g",
        layout=ipywidgets.Layout(width="350px"),
        style={"description_width": "110px"},
    )


def loss_slider(
    curves: Callable[..., Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    parameters: Mapping[str, Range],
    *,
    title: str,
    x_title: str,
    y_title: str,
    tip: str = "move a slider and watch which curve answers.",
) -> Explorer:
    """Any function of a few numbers as curves with sliders.

    curves: called with every parameter by name; returns curve name -> (x values, y values), always the same names ·
    parameters: name -> (smallest, largest, first value). The axes keep the range of the first picture, so that a change
    is seen as one.
    """
    controls = {name: _slider(name, limits) for name, limits in parameters.items()}

    def values() -> dict[str, float]:
        return {name: control.value for name, control in controls.items()}

    start = curves(**values())
    traces = [
        go.Scatter(
            x=list(x), y=list(y), name=name, mode="lines+markers" if len(x) <= 12 else "lines", line={"width": 2.4}
        )
        for name, (x, y) in start.items()
    ]
    low, high = (f([float(v) for _, y in start.values() for v in y]) for f in (min, max))
    room = 0.12 * (high - low or 1.0)
    twin = go.Figure(
        traces,
        {
            "template": TEMPLATE,
            "title": title,
            "height": 360,
            "showlegend": len(start) > 1,
            "xaxis": {"title": x_title},
            "yaxis": {"title": y_title, "range": [low - room, high + room]},
        },
    )
    figure = go.FigureWidget(twin)

    def draw(change: object = None) -> None:
        drawn = curves(**values())
        for trace in figure.data:
            x, y = drawn[trace.name]
            redraw(trace, x=list(x), y=list(y))

    for control in controls.values():
        control.observe(draw, names="value")
    alt = f"{title}: {y_title} against {x_title}, curves {', '.join(start)}."
    return Explorer(stack(hint(tip), figure, *controls.values()), twin, alt, controls, {"curves": figure})


def loss_explorer(
    loss: Callable[..., Tensor],
    points: np.ndarray,
    positions: Sequence[float],
    parameters: Mapping[str, Range] | None = None,
    *,
    bearing: str | None = None,
    title: str = "Where the loss pushes",
    tip: str = "turn one point around the circle. Where is the loss lowest, and do the arrows lead there?",
) -> Explorer:
    """A few points in the plane, the loss of them, the arrows along which it falls, and the loss as one point turns.

    loss: called as ``loss(features, positions, **parameters)`` with (N,2) and (N,) float64 tensors, returns a 0-d
    tensor: any function of ``medlib.losses`` of that form · points: (N,2), N <= 8 · positions: N values in [0, 1],
    shown as colour · parameters: name -> (smallest, largest, first value), one slider each · bearing: the name of a
    parameter that is a direction in degrees, drawn as an arrow from the centre. Controls: ``point`` (which to move),
    ``angle`` in degrees, ``radius``, and the parameters by name. A click on a point chooses it. Arrows show minus the
    gradient; equal scale at all times, very long ones are shortened.
    """
    start = np.array(points, np.float64)
    if start.ndim != 2 or start.shape[1] != 2 or not 2 <= len(start) <= 8 or len(positions) != len(start):
        raise ValueError(
            f"points must be (N,2), 2 <= N <= 8, one position each, got {start.shape} and {len(positions)} positions"
        )
    place = torch.tensor(list(positions), dtype=torch.float64)
    moved, busy = start.copy(), [False]
    letters = "ABCDEFGH"[: len(start)]
    radius, angle = np.linalg.norm(start, axis=1), np.degrees(np.arctan2(start[:, 1], start[:, 0])) % 360
    controls: dict[str, ipywidgets.ValueWidget] = {
        "point": ipywidgets.ToggleButtons(
            options=[(s, i) for i, s in enumerate(letters)], style={"button_width": "36px"}
        ),
        "angle": _slider("angle", (0.0, 360.0, float(angle[0])), step=1.0),
        "radius": _slider("radius", (0.1, 1.5, float(np.clip(radius[0], 0.1, 1.5))), step=0.05),
    }
    settings = {name: _slider(name, limits) for name, limits in (parameters or {}).items()}
    for name in controls.keys() & settings.keys():
        raise ValueError(f"{name} is a control of the explorer itself: give the parameter another name")
    controls.update(settings)

    def value_and_push(at: np.ndarray) -> tuple[float, np.ndarray]:
        features = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value = loss(features, place, **{name: s.value for name, s in settings.items()})
        (slope,) = torch.autograd.grad(value, features)
        return value.item(), -slope.numpy()

    def value_at(at: np.ndarray) -> float:
        with torch.no_grad():
            return float(
                loss(torch.tensor(at, dtype=torch.float64), place, **{name: s.value for name, s in settings.items()})
            )

    if bearing is not None and bearing not in settings:
        raise ValueError(f"bearing must name a parameter ({', '.join(settings) or 'there is none'}), got {bearing!r}")
    unit_push = max(float(np.linalg.norm(value_and_push(start)[1], axis=1).max()), 1e-9)
    turn = np.linspace(0, 360, _ANGLES)
    around = np.stack([np.cos(np.radians(turn)), np.sin(np.radians(turn))], axis=1)

    frame = make_subplots(1, 2, column_widths=[0.54, 0.46], horizontal_spacing=0.11)
    rim = {"mode": "lines", "line": {"color": GRID, "width": 2}, "hoverinfo": "skip", "showlegend": False}
    frame.add_trace(go.Scatter(x=around[:, 0].round(3), y=around[:, 1].round(3), **rim), row=1, col=1)
    frame.add_trace(
        go.Scatter(
            x=start[:, 0],
            y=start[:, 1],
            mode="markers+text",
            text=list(letters),
            showlegend=False,
            textfont={"color": [CARD if p < 0.75 else INK for p in positions], "size": 13},
            customdata=list(positions),
            hovertemplate="%{text}, position %{customdata:.2f}<extra></extra>",
            marker={
                "size": 27,
                "color": list(positions),
                "coloraxis": "coloraxis",
                "line": {"color": CARD, "width": 2},
            },
        ),
        row=1,
        col=1,
    )
    frame.add_trace(
        go.Scatter(x=turn, y=turn * 0, mode="lines", line={"color": SERIES[0], "width": 2.4}, showlegend=False),
        row=1,
        col=2,
    )
    frame.add_trace(
        go.Scatter(x=[0], y=[0], mode="markers", marker={"size": 12, "color": SERIES[1]}, showlegend=False),
        row=1,
        col=2,
    )
    view = {"range": [-1.62, 1.62], "showgrid": False, "showticklabels": False, "fixedrange": True, "title": None}
    frame.update_layout(
        template=TEMPLATE,
        height=430,
        margin={"l": 20, "r": 20, "t": 70, "b": 52},
        xaxis=view,
        yaxis={**view, "scaleanchor": "x"},
        xaxis2={"tickvals": [0, 90, 180, 270, 360], "ticktext": ["0°", "90°", "180°", "270°", "360°"]},
        yaxis2={"title": "loss"},
        coloraxis={
            "colorscale": position_scale(),
            "cmin": 0,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "position", "font": {"size": 12, "color": MUTED}},
                "orientation": "h",
                "thickness": 8,
                "len": 0.4,
                "x": 0.25,
                "y": 0.04,
                "yanchor": "top",
                "outlinewidth": 0,
                "tickvals": [0, 1],
                "tickfont": {"color": MUTED},
            },
        },
    )
    figure = go.FigureWidget(frame)

    def draw(change: object = None) -> None:
        if busy[0]:
            return
        at, chosen = moved, controls["point"].value
        turned = math.radians(controls["angle"].value)
        at[chosen] = controls["radius"].value * np.array([math.cos(turned), math.sin(turned)])
        value, push = value_and_push(at)
        rounds = np.repeat(at[None], _ANGLES, axis=0)
        rounds[:, chosen] = controls["radius"].value * around
        landscape = [value_at(r) for r in rounds]
        with figure.batch_update():
            arrows = [
                _arrow(p, v / unit_push) for p, v in zip(at, push, strict=True) if np.hypot(*v) > 1e-6 * unit_push
            ]
            if bearing is not None:
                arrows.append(_compass(settings[bearing].value))
            figure.layout.annotations = arrows
            figure.layout.xaxis2.title.text = f"angle of {letters[chosen]}"
            figure.layout.title.text = f"{title} <span style='font-size:14px'> loss {value:.3f}</span>"
        rims = {
            "color": [SERIES[1] if i == chosen else CARD for i in range(len(at))],
            "width": [4 if i == chosen else 2 for i in range(len(at))],
        }
        redraw(figure.data[1], x=at[:, 0].copy(), y=at[:, 1].copy(), **{"marker.line": rims})
        redraw(figure.data[2], y=np.round(landscape, 5))
        redraw(figure.data[3], x=[controls["angle"].value], y=[round(value, 5)])

    def choose(change: object = None) -> None:
        x, y = moved[controls["point"].value]
        busy[0] = True  # two sliders move: draw once, and do not move the point from half of the news
        controls["angle"].value = math.degrees(math.atan2(y, x)) % 360
        controls["radius"].value = math.hypot(x, y)
        busy[0] = False
        draw()

    def click(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            controls["point"].value = points.point_inds[0]

    controls["point"].observe(choose, names="value")
    for name, control in controls.items():
        if name != "point":
            control.observe(draw, names="value")
    figure.data[1].on_click(click)
    draw()
    twin = go.Figure(figure)
    move = ipywidgets.HBox([controls["angle"], controls["radius"]])
    alt = (
        f"{title}: {len(start)} points in the plane coloured by position, arrows along which the loss falls, and the "
        "loss as point A turns."
    )
    return Explorer(
        stack(hint(tip), figure, controls["point"], move, *settings.values()), twin, alt, controls, {"loss": figure}
    )


def _arrow(point: np.ndarray, push: np.ndarray) -> dict:
    """A plotly annotation from the rim of ``point`` along ``push``, whose length 1 is drawn as two thirds of the
    longest arrow."""
    length = float(np.hypot(*push))
    rim, tip = (
        point + push * (distance / length) for distance in (_RIM, _RIM + 0.06 + _ARROW * math.tanh(0.8 * length))
    )
    return {
        "x": tip[0],
        "y": tip[1],
        "ax": rim[0],
        "ay": rim[1],
        "xref": "x",
        "yref": "y",
        "axref": "x",
        "ayref": "y",
        "text": "",
        "showarrow": True,
        "arrowhead": 2,
        "arrowsize": 0.8,
        "arrowwidth": 2.4,
        "arrowcolor": INK,
        "standoff": 0,
    }


def _compass(degrees: float) -> dict:
    """A plotly annotation from the centre along a direction."""
    x, y = (0.62 * f(math.radians(degrees)) for f in (math.cos, math.sin))
    ends = {"x": x, "y": y, "ax": 0, "ay": 0, "xref": "x", "yref": "y", "axref": "x", "ayref": "y"}
    return {**ends, "text": "", "showarrow": True, "arrowhead": 3, "arrowwidth": 4, "arrowcolor": SERIES[0]}
