"""Losses to touch: points that the reader moves, what each loss says of them, and where it pushes."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from medlib.explore.live import LiveFigure
from medlib.explore.panels import block
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import CARD, GRID, INK, MUTED, SERIES, TEMPLATE, position_scale
from medlib.rng import numpy_generator

Range = tuple[float, float, float]  # smallest, largest and first value of a slider
_ARROW = 0.5  # length of the longest arrow, in units of the circle's radius
_RIM = 0.16  # radius of a drawn point
_ANGLES = 121  # angles at which the loss is sampled for its curve
_TOGETHER, _APART = "pulls together", "pushes apart"
_PAIRS: Mapping[str, Mapping[str, str]] = {
    _TOGETHER: {"color": SERIES[0], "dash": "solid"},
    _APART: {"color": SERIES[3], "dash": "dot"},
}
_NAMED_HEIGHT = {1: 900, 2: 690, 3: 580}  # px, by the number of losses side by side


def _slider(name: str, limits: Range, step: float | None = None) -> ipywidgets.FloatSlider:
    """Of a round step, whole where all ``limits`` are, so that the page shows the value it was given."""
    low, high, value = limits
    if step is None:
        step = 10.0 ** math.floor(math.log10((high - low) / 50))
        step = max(step, 1.0) if all(isinstance(limit, int) for limit in limits) else step
    return ipywidgets.FloatSlider(
        value=value,
        min=low,
        max=high,
        step=step,
        description=name.replace("_", " "),
        readout_format=".3g",
        layout=ipywidgets.Layout(width="350px"),
        style={"description_width": "140px"},
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
    figure = LiveFigure(twin)

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
    loss: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]],
    points: np.ndarray,
    positions: Sequence[float],
    parameters: Mapping[str, Range] | None = None,
    *,
    bearing: str | None = None,
    shade: str | None = "position",
    title: str = "Where the loss pushes",
    tip: str = "turn one point around the circle. Where is the loss lowest, and do the arrows lead there?",
) -> Explorer:
    """A few points in the plane, the loss of them, the arrows along which it falls, and the loss as one point turns.

    loss: called as ``loss(features, positions, **parameters)`` with (N,2) and (N,) float64 tensors, returns a 0-d
    tensor: any function of ``medlib.losses`` of that form; or name -> such a function, at most three, side by side over
    the same points · points: (N,2), N <= 8 · positions: N values in [0, 1], shown as colour · parameters: name ->
    (smallest, largest, first value), one slider each, for each loss that takes it · bearing: the name of a parameter
    that is a direction in degrees, drawn as an arrow from the centre · shade: what ``positions`` are, under the colour
    bar; None for roles that only the title explains: no bar. Controls: ``point`` (which to move), ``angle`` in
    degrees, ``radius``, and the parameters by name. A click on a point chooses it. Arrows show minus the gradient;
    equal scale at all times, very long ones are shortened.

    Named losses also show their pairs, see `pair_pulls`: a solid line where a loss pulls two points together, a dotted
    one where it pushes them apart; ``readout`` has the numbers of the chosen point.
    """
    start = np.array(points, np.float64)
    if start.ndim != 2 or start.shape[1] != 2 or not 2 <= len(start) <= 8 or len(positions) != len(start):
        raise ValueError(
            f"points must be (N,2), 2 <= N <= 8, one position each, got {start.shape} and {len(positions)} positions"
        )
    positions = [float(position) for position in positions]
    if not np.isfinite(start).all() or not all(0 <= position <= 1 for position in positions):
        raise ValueError(f"points must be finite and positions in [0, 1], got {start.tolist()} and {positions}")
    named = isinstance(loss, Mapping)
    losses = dict(loss) if isinstance(loss, Mapping) else {"": loss}
    if odd := [name for name, one in losses.items() if not isinstance(name, str) or not callable(one)]:
        raise TypeError(f"loss must be a function, or a mapping of names to functions; that of {odd} is none")
    if not 1 <= len(losses) <= 3:
        raise ValueError(f"one, two or three losses fit side by side, got {len(losses)}")
    place = torch.tensor(positions, dtype=torch.float64)
    moved, busy = start.copy(), [False]
    letters = "ABCDEFGH"[: len(start)]
    radius, angle = np.linalg.norm(start, axis=1), np.degrees(np.arctan2(start[:, 1], start[:, 0])) % 360
    controls: dict[str, ipywidgets.ValueWidget] = {
        "point": ipywidgets.ToggleButtons(
            options=[(s, i) for i, s in enumerate(letters)], description="point", style={"button_width": "36px"}
        ),
        "angle": _slider("angle", (0.0, 360.0, float(angle[0])), step=1.0),
        "radius": _slider("radius", (0.1, 1.5, float(np.clip(radius[0], 0.1, 1.5))), step=0.05),
    }
    settings = {name: _slider(name, limits) for name, limits in (parameters or {}).items()}
    for name in controls.keys() & settings.keys():
        raise ValueError(f"{name} is a control of the explorer itself: give the parameter another name")
    controls.update(settings)
    takes = {name: _taken(one, settings) if named else list(settings) for name, one in losses.items()}
    if unused := [name for name in settings if all(name not in taken for taken in takes.values())]:
        raise ValueError(f"no loss takes the parameter {', '.join(unused)}")
    if bearing is not None and bearing not in settings:
        raise ValueError(f"bearing must name a parameter ({', '.join(settings) or 'there is none'}), got {bearing!r}")

    def at_sliders(name: str) -> Callable[[Tensor], Tensor]:
        given = {parameter: settings[parameter].value for parameter in takes[name]}
        return lambda features: losses[name](features, place, **given)

    def value_and_push(name: str, at: np.ndarray) -> tuple[float, np.ndarray]:
        features = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value = at_sliders(name)(features)
        if not isinstance(value, Tensor) or value.dim():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss {name!r} must return a 0-d tensor, got {got}")
        if not value.requires_grad:  # it does not depend on the points here
            return value.item(), np.zeros_like(at)
        (slope,) = torch.autograd.grad(value, features)
        return value.item(), -slope.numpy()

    def value_at(name: str, at: np.ndarray) -> float:
        with torch.no_grad():
            return float(at_sliders(name)(torch.tensor(at, dtype=torch.float64)))

    def pulls(name: str, at: np.ndarray) -> np.ndarray | None:
        return pair_pulls(at_sliders(name), at) if named else None

    # Where a slope is infinite or no number the longest of the others is the unit.
    longest = {n: np.nan_to_num(value_and_push(n, start)[1], posinf=0.0, neginf=0.0) for n in losses}
    unit_push = {n: max(float(np.linalg.norm(push, axis=1).max()), 1e-9) for n, push in longest.items()}
    pulled = {n: np.nan_to_num(f, posinf=0.0, neginf=0.0) for n in losses if (f := pulls(n, start)) is not None}
    unit_pull = {n: max(float(np.abs(found).max()), 1e-9) for n, found in pulled.items()}
    turn = np.linspace(0, 360, _ANGLES)
    around = np.stack([np.cos(np.radians(turn)), np.sin(np.radians(turn))], axis=1)
    figure = LiveFigure(_loss_frame(list(losses), start, positions, turn, around, shade, named, bool(unit_pull)))
    readout = ipywidgets.HTML()

    def draw(change: object = None) -> None:
        if busy[0]:
            return
        at, chosen = moved, controls["point"].value
        turned = math.radians(controls["angle"].value)
        at[chosen] = controls["radius"].value * np.array([math.cos(turned), math.sin(turned)])
        rounds = np.repeat(at[None], _ANGLES, axis=0)
        rounds[:, chosen] = controls["radius"].value * around
        found = {name: value_and_push(name, at) for name in losses}
        pairs = {name: pulls(name, at) for name in losses}
        with figure.batch_update():
            arrows, lines = [], []
            for number, (name, (value, push)) in enumerate(found.items()):
                end = str(number + 1) if number else ""
                unit = unit_push[name]
                drawn = [_arrow(p, v / unit) for p, v in zip(at, push, strict=True) if np.hypot(*v) > 1e-6 * unit]
                if bearing is not None and bearing in takes[name]:
                    drawn.append(_compass(settings[bearing].value))
                ends = {"xref": f"x{end}", "yref": f"y{end}", "axref": f"x{end}", "ayref": f"y{end}"}
                arrows += [{**arrow, **ends} for arrow in drawn]
                if (pull := pairs[name]) is not None and name in unit_pull:
                    lines += _springs(at, pull / unit_pull[name], end)
                if named:
                    text = f"<b>{name}</b>  loss {value:.3f}"
                    arrows.append({"text": text, "x": 0, "y": 1.62, "xref": f"x{end}", "yref": f"y{end}",
                                   "yanchor": "bottom", "font": {"color": INK, "size": 14}})  # fmt: skip
                figure.layout[f"xaxis{len(losses) + number + 1}"].title.text = f"angle of {letters[chosen]}"
            figure.layout.annotations, figure.layout.shapes = arrows, lines
            shown = "" if named else f" <span style='font-size:14px'> loss {found[''][0]:.3f}</span>"
            figure.layout.title.text = f"{title}{shown}"
        rims = {
            "color": [SERIES[1] if i == chosen else CARD for i in range(len(at))],
            "width": [4 if i == chosen else 2 for i in range(len(at))],
        }
        for number, (name, (value, _)) in enumerate(found.items()):
            _, dots, curve, here = figure.data[4 * number : 4 * number + 4]
            redraw(dots, x=at[:, 0].copy(), y=at[:, 1].copy(), **{"marker.line": rims})
            redraw(curve, y=np.round([value_at(name, r) for r in rounds], 5))
            redraw(here, x=[controls["angle"].value], y=[round(value, 5)])
        readout.value = _pair_table(pairs, chosen, letters)

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
    for number in range(len(losses)):
        figure.data[4 * number + 1].on_click(click)
    draw()
    twin = go.Figure(figure)
    move = ipywidgets.HBox([controls["angle"], controls["radius"]])
    painted = f" coloured by {shade}" if shade else ""
    alt = (
        f"{title}: {len(start)} points in the plane{painted}, arrows along which the loss falls, and the "
        "loss as point A turns"
    )
    alt += f", for each of {', '.join(losses)}." if named else "."
    parts = [hint(tip), figure, controls["point"], move, *settings.values()]
    if named:
        parts.insert(2, readout)
        controls["readout"] = readout
    return Explorer(stack(*parts), twin, alt, controls, {"loss": figure})


def pair_pulls(loss: Callable[[Tensor], Tensor], points: np.ndarray) -> np.ndarray | None:
    """(N,N): minus the derivative of ``loss`` by the cosine of each two of ``points`` (N,D); diagonal 0.

    Positive where the loss falls as the two come together. None for a loss that is not a function of lengths and angles
    between the points alone, such as one with a fixed direction.

    The points get N dimensions more, in which each is ``h`` away from the plane along an axis of its own. This leaves
    all inner products between two points as they are, so the slope along the axis of point j, at point i, is ``h``
    times the derivative by their inner product, exactly up to ``h`` squared.
    """
    h, count = 1e-4, len(points)
    lifted = torch.tensor(np.concatenate([points, h * np.eye(count)], axis=1), requires_grad=True)  # (N, D + N)
    turn = np.linalg.qr(numpy_generator(0, "pair pulls").normal(size=2 * [lifted.shape[1]]))[0]
    try:
        with torch.no_grad():
            value = float(loss(torch.tensor(points)))
            turned = float(loss(lifted.detach() @ torch.from_numpy(turn)))
        (slope,) = torch.autograd.grad(loss(lifted), lifted)
    except (ValueError, RuntimeError, IndexError):  # it takes points of the plane only
        return None
    if not abs(turned - value) <= 1e-5 * (1 + abs(value)):
        return None
    by_product = slope[:, points.shape[1] :].numpy() / h  # (N, N)
    lengths = np.linalg.norm(points, axis=1)
    pull = -by_product * lengths[:, None] * lengths
    np.fill_diagonal(pull, 0.0)
    return pull


def _taken(loss: Callable[..., Tensor], names: Iterable[str]) -> list[str]:
    """Those of ``names`` that ``loss`` takes as an argument."""
    known = inspect.signature(loss).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    return [name for name in names if anything or name in known]


def _loss_frame(
    names: list[str],
    points: np.ndarray,
    positions: list[float],
    turn: np.ndarray,
    around: np.ndarray,
    shade: str | None,
    named: bool,
    pairs: bool,
) -> go.Figure:
    """The planes and the curves of the losses, four traces each: rim, points, curve, where the chosen point is on it.

    One loss without a name: both beside each other. Named ones: a column each.
    """
    count = len(names)
    if named:
        frame = make_subplots(2, count, row_heights=[0.68, 0.32], horizontal_spacing=0.09, vertical_spacing=0.07)
    else:
        frame = make_subplots(1, 2, column_widths=[0.54, 0.46], horizontal_spacing=0.11)
    letters = list("ABCDEFGH"[: len(points)])
    view = {"range": [-1.62, 1.62], "showgrid": False, "showticklabels": False, "fixedrange": True, "title": None}
    degrees = {"tickvals": [0, 90, 180, 270, 360], "ticktext": ["0°", "90°", "180°", "270°", "360°"]}
    for number in range(count):
        plane = {"row": 1, "col": number + 1}
        curve = {"row": 2, "col": number + 1} if named else {"row": 1, "col": 2}
        rim = {"mode": "lines", "line": {"color": GRID, "width": 2}, "hoverinfo": "skip", "showlegend": False}
        frame.add_trace(go.Scatter(x=around[:, 0].round(3), y=around[:, 1].round(3), **rim), **plane)
        frame.add_trace(
            go.Scatter(
                x=points[:, 0],
                y=points[:, 1],
                mode="markers+text",
                text=letters,
                showlegend=False,
                textfont={"color": [CARD if p < 0.75 else INK for p in positions], "size": 13},
                customdata=positions,
                hovertemplate="%{text}" + (f", {shade} %{{customdata:.2f}}" if shade else "") + "<extra></extra>",
                marker={"size": 27, "color": positions, "coloraxis": "coloraxis", "line": {"color": CARD, "width": 2}},
            ),
            **plane,
        )
        line = {"color": SERIES[0], "width": 2.4}
        frame.add_trace(go.Scatter(x=turn, y=turn * 0, mode="lines", line=line, showlegend=False), **curve)
        marker = {"size": 12, "color": SERIES[1]}
        frame.add_trace(go.Scatter(x=[0], y=[0], mode="markers", marker=marker, showlegend=False), **curve)
        end = str(number + 1) if number else ""
        frame.update_layout({f"xaxis{end}": view, f"yaxis{end}": {**view, "scaleanchor": f"x{end}"}})
        frame.update_layout({f"xaxis{count + number + 1}": degrees})
    frame.update_layout({f"yaxis{count + 1}": {"title": "loss"}})
    where = {"x": 0.25, "y": 0.04, "yanchor": "top", "len": 0.4}
    if named:
        where = {"x": 1, "xanchor": "right", "y": 0.008, "yref": "container", "yanchor": "bottom", "len": 0.3}
    bar = {
        "title": {"text": shade, "font": {"size": 12, "color": MUTED}},
        "orientation": "h",
        "thickness": 8,
        "outlinewidth": 0,
        "tickvals": [0, 1],
        "tickfont": {"color": MUTED},
        **where,
    }
    frame.update_layout(
        template=TEMPLATE,
        height=_NAMED_HEIGHT[count] if named else 430,
        margin={"l": 60, "r": 20, "t": 92, "b": 112} if named else {"l": 20, "r": 20, "t": 70, "b": 52},
        coloraxis={
            "colorscale": position_scale(), "cmin": 0, "cmax": 1, "colorbar": bar, "showscale": shade is not None
        },
    )  # fmt: skip
    if pairs:
        for name, look in _PAIRS.items():
            line = go.Scatter(x=[None], y=[None], mode="lines", name=name, line={**look, "width": 4}, showlegend=True)
            frame.add_trace(line, row=1, col=1)
        place = {"x": 0, "y": 0.012, "yref": "container", "yanchor": "bottom"}
        frame.update_layout(legend={"orientation": "h", **place, "itemclick": False, "itemdoubleclick": False})
    return frame


def _springs(points: np.ndarray, pull: np.ndarray, end: str) -> list[dict[str, Any]]:
    """A line for each pair, below the points: as wide as ``pull`` (N,N), 1 being the largest of the first picture."""
    lines = []
    for i, j in zip(*np.triu_indices(len(points), 1), strict=True):
        strength = abs(float(pull[i, j]))
        if strength > 0.01:  # no line where it is no number
            strength = min(1.0, strength)
            look = _PAIRS[_TOGETHER if pull[i, j] > 0 else _APART]
            (x0, y0), (x1, y1) = points[i].tolist(), points[j].tolist()
            lines.append({
                "type": "line", "layer": "below", "xref": f"x{end}", "yref": f"y{end}", "x0": x0, "y0": y0, "x1": x1,
                "y1": y1, "line": {**look, "width": 0.8 + 6 * strength}, "opacity": 0.35 + 0.5 * strength,
            })  # fmt: skip
    return lines


def _pair_table(pulls: Mapping[str, np.ndarray | None], chosen: int, letters: str) -> str:
    """What each loss does to the chosen point and each other, in words for those who do not see the lines."""
    others = [i for i in range(len(letters)) if i != chosen]
    cell = "padding:1px 10px 1px 0;text-align:right"
    head = "".join(f'<th scope="col" style="{cell}">{letters[chosen]}-{letters[i]}</th>' for i in others)
    rows = [f'<tr><th scope="col" style="{cell};text-align:left">pull (minus: push)</th>{head}</tr>']
    for name, pull in pulls.items():
        unknown = f'<td style="{cell}" colspan="{len(others)}">not a function of the angles between the points</td>'
        known = "" if pull is None else "".join(f'<td style="{cell}">{pull[chosen, i]:+.3f}</td>' for i in others)
        rows.append(f'<tr><th scope="row" style="{cell};text-align:left">{escape(name)}</th>{known or unknown}</tr>')
    return block(f'<table style="border-collapse:collapse">{"".join(rows)}</table>')


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
