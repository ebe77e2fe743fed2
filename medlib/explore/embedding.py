"""An embedding to explore: where a point lies, what it shows, and which slices the network finds alike."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from medlib.explore import pixels
from medlib.explore.measures import direction_alignment, position_probe_error, rank_correlation, unit
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import DISAGREEMENT, INK, MUTED, TEMPLATE, category_colours, position_scale

PROJECTIONS = ("PCA", "t-SNE")
_WEBGL_FROM = 5_000  # points; below, SVG is as fast and sharper
_NEIGHBOURS = 6


def project(features: np.ndarray, projection: str, *, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """``features`` (N,D) on the plane, (N,2) float32, by "PCA" or "t-SNE" of their directions (rows of length 1).

    t-SNE starts from PCA and is seeded; ``perplexity`` is lowered to (N-1)/3 where there are few points. Axes have no
    unit: each picture is centred and scaled to its largest extent, and turned so that it does not mirror between runs.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    if features.ndim != 2 or len(features) < 4:
        raise ValueError(f"features must be (N,D) with N >= 4, got {features.shape}")
    rows = unit(features)
    if projection == "PCA":
        plane = PCA(n_components=2, svd_solver="full").fit_transform(rows)
    else:
        near = min(perplexity, (len(rows) - 1) / 3)
        plane = TSNE(n_components=2, perplexity=near, init="pca", random_state=seed).fit_transform(rows)
    plane = plane - plane.mean(axis=0)
    plane = plane * np.where(plane[np.abs(plane).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    return (plane / max(float(np.abs(plane).max()), 1e-12)).astype(np.float32)


def nearest(features: np.ndarray, point: int, count: int = _NEIGHBOURS) -> np.ndarray:
    """The ``count`` rows of ``features`` (N,D) with the largest cosine to row ``point``, itself excluded, best
    first."""
    rows = unit(features)
    likeness = rows @ rows[point]
    likeness[point] = -np.inf
    return np.argsort(-likeness, kind="stable")[: min(count, len(rows) - 1)]


def _measured(features: np.ndarray, positions: np.ndarray, patients: np.ndarray) -> str:
    text = f"rank correlation {rank_correlation(features, positions):.2f}"
    if len(np.unique(patients)) > 1:
        error, mean_error = position_probe_error(features, positions, patients)
        text += f" · alignment {direction_alignment(features, positions, patients):.2f}"
        text += f"<br>probe error {error:.3f} (guessing the mean {mean_error:.3f})"
    return text


def _scatter(
    planes: Mapping[str, np.ndarray], positions: np.ndarray, hover: Sequence[str], notes: Mapping[str, str], title: str
) -> go.Figure:
    """One panel per method, coloured by position, with its numbers below it."""
    figure = make_subplots(1, len(planes), column_titles=[f"<b>{name}</b>" for name in planes], horizontal_spacing=0.04)
    kind = go.Scattergl if len(positions) >= _WEBGL_FROM else go.Scatter
    size = float(np.clip(220 / np.sqrt(len(positions)), 4, 9))
    colours = np.round(positions.astype(float), 3)
    for i, (name, plane) in enumerate(planes.items(), start=1):
        marker = {"color": colours, "coloraxis": "coloraxis", "size": size, "opacity": 0.9}
        figure.add_trace(
            kind(
                x=plane[:, 0],
                y=plane[:, 1],
                mode="markers",
                marker=marker,
                text=list(hover),
                showlegend=False,
                hovertemplate="%{text}<extra></extra>",
                name=name,
            ),
            row=1,
            col=i,
        )
        axis = "" if i == 1 else str(i)
        figure.add_annotation(
            x=0.5,
            y=-0.02,
            xref=f"x{axis} domain",
            yref=f"y{axis} domain",
            yanchor="top",
            text=notes[name],
            font={"size": 12, "color": MUTED},
        )
    box = {"showgrid": False, "showticklabels": False, "range": [-1.12, 1.12], "showline": True, "mirror": True}
    figure.update_xaxes(**box)
    figure.update_yaxes(**box)
    bar = {
        "title": {"text": "position", "side": "right", "font": {"size": 12, "color": MUTED}},
        "thickness": 12,
        "outlinewidth": 0,
        "len": 1,
        "y": 0.5,
        "tickvals": [0, 0.5, 1],
        "tickfont": {"color": MUTED},
    }
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=478 if len(planes) > 1 else 600,
        margin={"l": 20, "r": 20, "t": 84, "b": 60},
        coloraxis={"colorscale": position_scale(), "cmin": 0, "cmax": 1, "colorbar": bar},
    )
    return figure


def _chips(colours: Mapping[str, str]) -> str:
    """A legend in HTML; nothing where there are too many entries to tell their colours apart."""
    if not 0 < len(colours) <= 10:
        return ""
    dot = "display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:5px;background:"
    entry = (
        '<span style="white-space:nowrap;display:inline-block;margin-right:14px"><span style="{}{}"></span>{}</span>'
    )
    return "".join(entry.format(dot, colour, escape(name)) for name, colour in colours.items())


def embedding_explorer(
    methods: Mapping[str, np.ndarray],
    positions: np.ndarray,
    patients: Sequence[str],
    thumbnails: np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    projection: str = "t-SNE",
    seed: int = 0,
    perplexity: float = 30.0,
    title: str = "What the network finds alike",
) -> Explorer:
    """Slices as points, up to two methods side by side, with their pictures and nearest neighbours.

    methods: name -> features (N,D_m); with more than two, the first two are drawn and menus choose · positions: (N,) in
    [0, 1] · patients: N names · thumbnails: (N,h,w) uint8 · groups: N names (diagnosis, phase, ...), optional. Under
    each picture stand numbers from the full feature space (``medlib.explore.measures``): the picture itself proves
    nothing.

    A click on a point (or the slider ``point``) shows the slice and, for each method, its six nearest neighbours by
    cosine in the full feature space, and rings them in both pictures. Controls: ``point``, ``colour``, ``projection``,
    and with more than two methods ``left`` and ``right``. The twin is the picture coloured by position.
    """
    positions, owners = np.asarray(positions, np.float64), np.asarray([str(p) for p in patients])
    features = {name: np.asarray(f, np.float32) for name, f in methods.items()}
    count = len(positions)
    if not features:
        raise ValueError("methods is empty: give at least one name with its features")
    shapes = {name: f.shape for name, f in features.items() if f.ndim != 2 or len(f) != count}
    if shapes or len(owners) != count or thumbnails.ndim != 3 or len(thumbnails) != count:
        raise ValueError(
            f"lengths differ: {count} positions, {len(owners)} patients, "
            f"thumbnails {thumbnails.shape}, features {shapes}"
        )
    kinds = [str(g) for g in groups] if groups is not None else None
    hover = [f"{p}<br>position {x:.2f}" for p, x in zip(owners, positions, strict=True)]
    if kinds is not None:
        hover = [f"{text}<br>{group}" for text, group in zip(hover, kinds, strict=True)]
    planes: dict[tuple[str, str], np.ndarray] = {}
    notes = {name: _measured(f, positions, owners) for name, f in features.items()}
    thumbs = pixels.shrink(np.asarray(thumbnails, np.uint8), 96)

    def plane(name: str, kind: str) -> np.ndarray:
        if (name, kind) not in planes:
            planes[name, kind] = project(features[name], kind, seed=seed, perplexity=perplexity)
        return planes[name, kind]

    shown = list(features)[:2]
    twin = _scatter({n: plane(n, projection) for n in shown}, positions, hover, notes, f"{title} ({projection})")
    figure = go.FigureWidget(twin)
    drawn = len(shown)
    for axis in ["", "2"][:drawn]:
        ring = {
            "mode": "markers",
            "showlegend": False,
            "hoverinfo": "skip",
            "x": [],
            "y": [],
            "xaxis": f"x{axis}",
            "yaxis": f"y{axis}",
        }
        figure.add_trace(
            go.Scatter(**ring, marker={"size": 15, "symbol": "circle-open", "color": INK, "line": {"width": 2}})
        )
        figure.add_trace(
            go.Scatter(
                **ring, marker={"size": 19, "symbol": "circle-open", "color": DISAGREEMENT, "line": {"width": 3.5}}
            )
        )

    menu: dict[str, Any] = {"layout": ipywidgets.Layout(width="230px"), "style": {"description_width": "76px"}}
    controls: dict[str, ipywidgets.ValueWidget] = {
        "colour": ipywidgets.Dropdown(
            options=["position", "patient", *["group"] * (kinds is not None)], description="colour by", **menu
        ),
        "projection": ipywidgets.Dropdown(options=PROJECTIONS, value=projection, description="projection", **menu),
        "point": ipywidgets.IntSlider(
            value=0, min=0, max=count - 1, description="point", continuous_update=False, **menu
        ),
    }
    if len(features) > 2:
        for side, name in zip(("left", "right"), shown, strict=True):
            controls[side] = ipywidgets.Dropdown(options=list(features), value=name, description=side, **menu)
    legend, strip = ipywidgets.HTML(), ipywidgets.HTML()

    def names() -> list[str]:
        return [controls[s].value for s in ("left", "right")] if "left" in controls else shown

    def mark(change: object = None) -> None:
        point, kind = controls["point"].value, controls["projection"].value
        found = {name: nearest(features[name], point) for name in dict.fromkeys(names())}
        for i, name in enumerate(names()):
            at = plane(name, kind)
            redraw(figure.data[drawn + 2 * i], x=at[found[name], 0], y=at[found[name], 1])
            redraw(figure.data[drawn + 2 * i + 1], x=at[[point], 0], y=at[[point], 1])
        strip.value = _strip(point, found, thumbs, positions, owners, hover)

    def move(change: object = None) -> None:
        kind = controls["projection"].value
        for i, name in enumerate(names()):
            redraw(figure.data[i], x=plane(name, kind)[:, 0], y=plane(name, kind)[:, 1])
        with figure.batch_update():
            for i, name in enumerate(names()):
                figure.layout.annotations[i].text = f"<b>{name}</b>"
                figure.layout.annotations[drawn + i].text = notes[name]
            figure.layout.title.text = f"{title} ({kind})"
        mark()

    def paint(change: object = None) -> None:
        by = controls["colour"].value
        values = {"patient": list(owners), "group": kinds}.get(by)
        palette = category_colours(values) if values is not None else {}
        colours = [palette[v] for v in values] if values is not None else positions.round(3)
        with figure.batch_update():
            for i in range(drawn):
                figure.data[i].marker.color = colours
            figure.layout.coloraxis.showscale = values is None
        legend.value = f'<div style="{_TEXT}">{_chips(palette)}</div>'

    def click(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            controls["point"].value = points.point_inds[0]

    for name, answer in _observers(mark, move, paint).items():
        if name in controls:
            controls[name].observe(answer, names="value")
    for trace in figure.data[:drawn]:
        trace.on_click(click)
    mark()
    tip = "click a point. Are its neighbours from the same height of <i>other</i> patients? Then colour by patient."
    rows = [ipywidgets.HBox([controls[k] for k in ("projection", "colour", "point")])]
    rows += [ipywidgets.HBox([controls["left"], controls["right"]])] if "left" in controls else []
    alt = (
        f"{title}: {count} slices of {len(set(owners))} patients as points on a plane ({projection}), coloured by "
        f"position, for {' and '.join(shown)}."
    )
    return Explorer(
        stack(hint(tip), *rows, legend, figure, strip), twin, alt, {**controls, "strip": strip}, {"embedding": figure}
    )


_TEXT = "color:var(--jp-ui-font-color1,#1f2933);font-size:12px;line-height:1.35;max-width:720px"


def _observers(mark: Callable, move: Callable, paint: Callable) -> dict[str, Callable]:
    return {"point": mark, "projection": move, "left": move, "right": move, "colour": paint}


def _strip(
    point: int,
    found: Mapping[str, np.ndarray],
    thumbs: np.ndarray,
    positions: np.ndarray,
    owners: np.ndarray,
    hover: Sequence[str],
) -> str:
    """The chosen slice and, one line per method, its neighbours with what they share with it, as HTML."""

    def cell(index: int, colour: str) -> str:
        text = hover[index].replace("<br>", ", ")
        source = pixels.data_uri(pixels.blend(thumbs[index]))
        frame = f"width:76px;height:76px;border-radius:6px;border:2px solid {colour};display:block"
        return (
            f'<figure style="margin:0;width:80px"><img src="{source}" alt="{escape(text)}" style="{frame}">'
            f'<figcaption style="font-size:11px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis">'
            f"{escape(str(owners[index]))}<br>position {positions[index]:.2f}</figcaption></figure>"
        )

    lines = []
    for name, indices in found.items():
        away = np.abs(positions[indices] - positions[point]).mean()
        others = int((owners[indices] != owners[point]).sum())
        shared = f"neighbours {away:.2f} away in position, {others} of {len(indices)} from other patients"
        pictures = "".join(cell(int(i), "#8a94a0") for i in indices)
        lines.append(
            f'<div style="margin:8px 0 3px"><b>{escape(name)}</b>: {shared}</div>'
            f'<div style="display:flex;gap:10px">{cell(point, DISAGREEMENT)}'
            f'<span style="align-self:center;margin-top:-24px">&rarr;</span>{pictures}</div>'
        )
    return f'<div style="{_TEXT}">{"".join(lines)}</div>'
