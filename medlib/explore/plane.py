"""Points in a plane that mean something: toy embeddings, side by side, coloured by position."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from medlib.explore.style import CARD, GRID, INK, MUTED, TEMPLATE, position_scale

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
_HEIGHT = 350


def plane_figure(
    panels: Mapping[str, np.ndarray],
    positions: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[str] | None = None,
    arrows: Mapping[str, Sequence[float]] | None = None,
    notes: Mapping[str, str] | None = None,
    title: str = "",
) -> go.Figure:
    """One panel per arrangement of the same N points, a cross at the origin.

    panels: name -> points (N,2) · positions: N values in [0, 1], shown as colour · groups: N names, shown as symbols ·
    arrows: panel name -> direction (2,), drawn from the origin · notes: panel name -> text below it. Each panel has its
    own scale, equal on both axes.
    """
    names = list(dict.fromkeys(groups)) if groups is not None else [""]
    owner = np.array([names.index(g) for g in groups] if groups is not None else [0] * len(positions))
    colours = np.asarray(positions, float).round(3)
    figure = make_subplots(1, len(panels), column_titles=[f"<b>{name}</b>" for name in panels], horizontal_spacing=0.03)
    for column, (name, points) in enumerate(panels.items(), start=1):
        points = np.asarray(points, float)
        if points.shape != (len(colours), 2):
            raise ValueError(f"panel {name!r} must be ({len(colours)},2), one point per position, got {points.shape}")
        axis = "" if column == 1 else str(column)
        for g, group in enumerate(names):
            mine = owner == g
            marker = {"color": colours[mine], "coloraxis": "coloraxis", "size": 11, "symbol": _SYMBOLS[g % 5]}
            marker["line"] = {"color": CARD, "width": 1}
            figure.add_trace(
                go.Scatter(
                    x=points[mine, 0].round(3),
                    y=points[mine, 1].round(3),
                    mode="lines+markers" if groups is not None else "markers",
                    line={"color": GRID, "width": 1.5},
                    marker=marker,
                    showlegend=False,
                    text=[f"{group} position {p:.2f}" for p in colours[mine]],
                    hovertemplate="%{text}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        reach = float(np.abs(points).max()) * 1.25 or 1.0
        cross = {"mode": "markers", "marker": {"symbol": "cross-thin-open", "size": 12, "color": MUTED}}
        figure.add_trace(go.Scatter(x=[0], y=[0], showlegend=False, hoverinfo="skip", **cross), row=1, col=column)
        if arrows and name in arrows:
            towards = np.asarray(arrows[name], float)
            tip = towards / np.linalg.norm(towards) * reach * 0.8
            at = {"xref": f"x{axis}", "yref": f"y{axis}", "axref": f"x{axis}", "ayref": f"y{axis}"}
            figure.add_annotation(x=tip[0], y=tip[1], ax=0, ay=0, **at, text="", showarrow=True, arrowhead=2,
                                  arrowwidth=2.5, arrowcolor=INK)  # fmt: skip
        if notes and name in notes:
            figure.add_annotation(text=notes[name], x=0.5, y=-0.03, xref=f"x{axis} domain", yref=f"y{axis} domain",
                                  yanchor="top", font={"size": 12, "color": MUTED})  # fmt: skip
        box = {"showgrid": False, "showticklabels": False, "range": [-reach, reach], "showline": True, "mirror": True}
        figure.update_xaxes(box, row=1, col=column)
        figure.update_yaxes({**box, "scaleanchor": f"x{axis}", "constrain": "domain"}, row=1, col=column)
    bar = {"title": {"text": "position", "side": "right", "font": {"size": 12, "color": MUTED}}, "thickness": 12}
    bar |= {"outlinewidth": 0, "tickvals": [0, 0.5, 1], "tickfont": {"color": MUTED}, "len": 0.8}
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=_HEIGHT,
        margin={"l": 20, "r": 20, "t": 84, "b": 62 if notes else 20},
        coloraxis={"colorscale": position_scale(), "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    return figure
