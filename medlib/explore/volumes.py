"""A volume in three linked planes with what a network makes of it, and the neighbours that a voxel has in it."""

import textwrap
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.colors import sequential
from plotly.subplots import make_subplots

from medlib.explore import pixels
from medlib.explore.embedding import PROJECTIONS, project
from medlib.explore.live import LiveFigure
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.slices import check_classes, check_maps, class_legend
from medlib.explore.style import CARD, DISAGREEMENT, INK, MUTED, SERIES, TEMPLATE, WIDTH, bare_axis, method_colours
from medlib.losses.dvcl import neighbor_affinity
from medlib.methods.dvcl import Voxels

CT_WINDOWS = {
    "soft tissue": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
}
"""What is black and what is white, in HU; in radiology's level and width 50/400, 30/150, -600/1500 and 400/1800."""

HEAT = tuple(sequential.Inferno[2:])
"""Colours of a map from 0 to its largest value, without the blacks that a scan has, too."""

_LARGEST = 256  # pixels of a plane
_GAP, _HEAD, _LEFT, _RIGHT = 10, 84, 20, 20  # px
_SPACE = 360  # px of the panel of the feature space
_COLUMNS, _ENTRY, _MARK = 3, 19, 29  # of the legend, px of a line, px of a line where one symbol is a star
_TEXT = "color:var(--jp-ui-font-color1,#1f2933);font-size:13px;line-height:1.5;max-width:720px"


class Plane(NamedTuple):
    """A cut through (Z,H,W): the axis that is ``fixed``, the one to the right and the one along its height."""

    name: str
    fixed: int
    across: int
    along: int


PLANES = (Plane("axial", 0, 2, 1), Plane("coronal", 1, 2, 0), Plane("sagittal", 2, 1, 0))


class Agreement(NamedTuple):
    """Shares in [0, 1], over the queries whose true class is known; NaN without any.

    ``outsiders``: pairs of a query and an outsider that are of different classes (red in DVCL's Figure 6). ``pairs``:
    pairs of a query and a neighbour of one class. ``neighbours``: queries all of whose neighbours are of their class
    (green). ``right``: those queries of which all neighbours are also predicted right (blue).
    """

    outsiders: float
    pairs: float
    neighbours: float
    right: float


# ---- numbers


def _arrays(voxels: Voxels) -> SimpleNamespace:
    """The same fields as NumPy arrays, which all that is drawn wants."""
    return SimpleNamespace(**{name: part.detach().cpu().numpy() for name, part in voxels._asdict().items()})


def agreement(voxels: Voxels) -> Agreement:
    """How often neighbours and outsiders are what DVCL takes them for: the ratios of its Figure 6.

    Raises ValueError where no voxel has a known class.
    """
    found = _arrays(voxels)
    if not (found.classes >= 0).any():
        raise ValueError("no voxel has a known class (classes are all -1): hand over the labels")
    right = found.probabilities.argmax(axis=1) == found.classes
    known = found.classes[found.queries] >= 0
    mine = found.classes[found.queries][known, None]
    neighbours, outsiders = found.neighbors[known], found.outsiders[known]
    if not len(mine):
        return Agreement(*[float("nan")] * 4)
    same = found.classes[neighbours] == mine
    return Agreement(
        outsiders=float((found.classes[outsiders] != mine).mean()),
        pairs=float(same.mean()),
        neighbours=float(same.all(axis=1).mean()),
        right=float((same & right[neighbours]).all(axis=1).mean()),
    )


def step_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, title: str, y_title: str
) -> go.Figure:
    """Numbers over the steps of a training, one panel each and in all of them the same lines: DVCL's Figures 5 and 6.

    panels: name of the panel -> name of the line -> (steps, values), values from 0. All panels have one scale.
    """
    if not panels:
        raise ValueError("panels is empty: there is nothing to draw")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = method_colours(names)
    figure = make_subplots(1, len(panels), column_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.03)
    figure.update_annotations(font={"size": 13, "color": INK})
    drawn: set[str] = set()
    for column, lines in enumerate(panels.values(), start=1):
        for name, (steps, values) in lines.items():
            figure.add_trace(
                go.Scatter(x=list(steps), y=list(values), name=name, legendgroup=name, mode="lines+markers",
                           line={"color": colours[name], "width": 2.2}, showlegend=name not in drawn),
                row=1, col=column,
            )  # fmt: skip
            drawn.add(name)
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title=y_title, col=1)
    return figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=380,
        margin={"t": _HEAD, "b": 96},
        legend={"orientation": "h", "x": 0, "y": -0.24, "yanchor": "top"},
    )


# ---- planes


def _heat(values: np.ndarray, highest: float) -> np.ndarray:
    """``values`` (H,W) from 0 as an RGBA layer: clear at 0, the last colour of `HEAT` at ``highest``."""
    share = np.clip(np.asarray(values, np.float32) / max(highest, 1e-12), 0, 1)
    stops = np.array([pixels.rgb(colour) for colour in HEAT], np.float32)
    at = np.linspace(0, 1, len(stops))
    layer = [np.interp(share, at, stops[:, channel]) for channel in range(3)]
    return np.stack([*layer, 255 * np.sqrt(share)], axis=-1).round().astype(np.uint8)


def _cut(volume: np.ndarray, plane: Plane, at: Sequence[int]) -> np.ndarray:
    """The plane through voxel ``at``, as it is drawn: the front at the top, or the last slice."""
    section = np.take(volume, at[plane.fixed], axis=plane.fixed)
    return pixels.shrink(section if plane.along else section[::-1], _LARGEST)


def _axis(row: int, column: int) -> str:
    """The ending of an axis' name on the board."""
    return str(3 * row + column + 1) if row or column else ""


def _board(
    shape: tuple[int, ...],
    spacing: Sequence[float],
    rows: Sequence[str],
    title: str,
    *,
    left: int,
    right: int,
    foot: int,
) -> go.Figure:
    """Empty axes in mm for the three planes, one line of them for each of ``rows``, all at one scale; cross hairs."""
    size = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    wide, tall = ([size[axis] for axis in axes] for axes in zip(*[(p.across, p.along) for p in PLANES], strict=True))
    inner = WIDTH - left - right
    scale = (inner - 2 * _GAP) / sum(wide)  # px per mm
    line = max(tall) * scale
    height = len(rows) * (line + _GAP)
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(_HEAD + height + foot)})
    for row in range(len(rows)):
        start = 0.0
        for column, plane in enumerate(PLANES):
            end = _axis(row, column)
            middle = (row * (line + _GAP) + line / 2) / (height + foot - _GAP)
            half = tall[column] * scale / 2 / (height + foot - _GAP)
            upwards = [0, tall[column]] if plane.along == 0 else [tall[column], 0]
            across = {"domain": [start / inner, min(1, (start + wide[column] * scale) / inner)], "anchor": f"y{end}"}
            along = {"domain": [max(0, 1 - middle - half), min(1, 1 - middle + half)], "anchor": f"x{end}"}
            figure.update_layout({
                f"xaxis{end}": bare_axis(range=[0, wide[column]], fixedrange=True, **across),
                f"yaxis{end}": bare_axis(range=upwards, fixedrange=True, **along),
            })  # fmt: skip
            start += wide[column] * scale + _GAP
            for _ in range(2):
                figure.add_shape(type="line", xref=f"x{end}", yref=f"y{end}", line={"color": "#ffffff", "width": 1},
                                 opacity=0.55, x0=0, x1=0, y0=0, y1=0)  # fmt: skip
            if row == 0:
                figure.add_annotation(text=f"<b>{plane.name}</b>", x=wide[column] / 2, y=upwards[1], yshift=13,
                                      xref=f"x{end}", yref=f"y{end}", font={"size": 13, "color": INK})  # fmt: skip
        if len(rows) > 1:
            where = {"xref": f"x{_axis(row, 0)}", "yref": f"y{_axis(row, 0)}", "xanchor": "right", "xshift": -8}
            text = textwrap.fill(rows[row], 11).replace("\n", "<br>")
            figure.add_annotation(text=text, x=0, y=size[1] / 2, font={"size": 13, "color": INK}, **where)
    figure.update_layout(margin={"l": left, "r": right, "t": _HEAD, "b": _GAP, "autoexpand": False})
    return figure


def _picture(row: int, column: int, size: Sequence[float], tile: np.ndarray) -> dict[str, Any]:
    """``tile`` (A,B,3) as the layout image of a place on the board."""
    plane, end = PLANES[column], _axis(row, column)
    top = 0 if plane.along else size[0]
    return {"source": pixels.data_uri(tile), "xref": f"x{end}", "yref": f"y{end}", "x": 0, "y": top, "layer": "below",
            "sizing": "stretch", "sizex": size[plane.across], "sizey": size[plane.along]}  # fmt: skip


def _cross(figure: go.Figure, row: int, at: Sequence[float], size: Sequence[float]) -> None:
    """Move the cross hairs of a line of planes to ``at`` (z,y,x) in mm."""
    for column, plane in enumerate(PLANES):
        first = 2 * (3 * row + column)
        x, y = at[plane.across], at[plane.along]
        figure.layout.shapes[first].update(x0=x, x1=x, y0=0, y1=size[plane.along])
        figure.layout.shapes[first + 1].update(x0=0, x1=size[plane.across], y0=y, y1=y)


def _clickable(figure: go.Figure, shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Add to each plane what answers a click anywhere: plotly's pictures do not."""
    for column, plane in enumerate(PLANES):
        across, along = spacing[plane.across], spacing[plane.along]
        end = _axis(0, column)
        nothing = np.zeros((shape[plane.along], shape[plane.across]), np.uint8)
        grid = {"x0": across / 2, "dx": across, "y0": along / 2, "dy": along, "xaxis": f"x{end}", "yaxis": f"y{end}"}
        figure.add_trace(go.Heatmap(z=nothing, opacity=0, showscale=False, hoverinfo="none", **grid))


def _place(points: Any, plane: Plane, at: Sequence[float]) -> list[float]:
    """Where in mm (z,y,x) a click on a plane through ``at`` was."""
    place = list(at)
    place[plane.across], place[plane.along] = points.xs[0], points.ys[0]
    return place


def _bar(title: str, highest: float, **where: Any) -> dict[str, Any]:
    scale = [(i / (len(HEAT) - 1), colour) for i, colour in enumerate(HEAT)]
    name = {"text": title, "side": "right", "font": {"size": 12, "color": MUTED}}
    bar = {"title": name, "thickness": 10, "nticks": 4, "outlinewidth": 0, "x": 1.0, "xpad": 4,
           "tickfont": {"size": 11, "color": MUTED}, **where}  # fmt: skip
    return {"colorscale": scale, "cmin": 0, "cmax": highest, "colorbar": bar}


def linked_planes(
    volume: np.ndarray,
    label: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
    spacing: tuple[float, float, float] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[str] = (),
    *,
    windows: Mapping[str, tuple[float, float]] | None = None,
    at: tuple[int, int, int] | None = None,
    title: str = "A volume in three planes",
) -> Explorer:
    """Axial, coronal and sagittal plane through one voxel, with what is known of it; a click moves all three there.

    volume: (Z,H,W), slice 0 is drawn at the bottom, row 0 at the top of a slice · label, prediction: (Z,H,W) int ·
    maps: name -> (Z,H,W) from 0, such as an entropy or the probability of a class · spacing: (z,y,x) in mm, None: cubes
    · classes, colours: as in ``slice_grid`` · windows: name -> (black, white) in the unit of the volume, such as
    `CT_WINDOWS`; without them gray runs from the 1st to the 99th percentile · at: the voxel to begin with, by default
    the middle of the structures.

    Controls: ``slice``, ``row``, ``column`` (from 0), ``overlay`` ("none", "label", "prediction", "difference" and the
    maps; those that exist), ``opacity``, ``window`` and ``readout``, which says what is at the voxel. The twin shows
    every overlay.
    """
    volume = np.asarray(volume)
    named = {"label": label, "prediction": prediction}
    masks = {name: np.asarray(value) for name, value in named.items() if value is not None}
    heat = {name: np.asarray(value) for name, value in (maps or {}).items()}
    check_maps(volume, **masks, **heat)
    check_classes(classes, colours, *masks.values())
    mm = spacing or (1.0, 1.0, 1.0)
    size = [n * side for n, side in zip(volume.shape, mm, strict=True)]
    highest = {name: float(value.max()) for name, value in heat.items()}
    presets = dict(windows or {"1st to 99th percentile": tuple(np.percentile(volume, (1, 99)))})
    start = at or _middle(masks, volume.shape)
    if not all(0 <= place < n for place, n in zip(start, volume.shape, strict=True)):
        raise ValueError(f"at must be a voxel of the volume {volume.shape}, got {start}")
    kinds = ["none", *masks, *["difference"] * (len(masks) == 2), *heat]

    def tile(plane: Plane, place: Sequence[int], kind: str, window: str, opacity: float) -> np.ndarray:
        gray = pixels.to_gray(_cut(volume, plane, place).astype(np.float32), presets[window])
        if kind == "none":
            return pixels.blend(gray)
        if kind in heat:
            layer = _heat(_cut(heat[kind].astype(np.float32), plane, place), highest[kind])
        elif kind == "difference":
            truth, guess = (_cut(mask, plane, place) for mask in masks.values())
            layer = pixels.disagreement_overlay(truth, guess, colours)
        else:
            layer = pixels.label_overlay(_cut(masks[kind], plane, place), colours)
        layer[..., 3] = (layer[..., 3] * opacity).astype(np.uint8)
        return pixels.blend(gray, layer)

    def middle(place: Sequence[int]) -> list[float]:
        return [(n + 0.5) * side for n, side in zip(place, mm, strict=True)]

    left, right = _LEFT, 64 if heat else _RIGHT
    foot = _legend_height(bool(masks) * (len(classes) - 1 + ("difference" in kinds)))
    figure = LiveFigure(_board(volume.shape, mm, [""], title, left=left, right=right, foot=foot))
    _clickable(figure, volume.shape, mm)
    if masks:
        class_legend(figure, classes, colours, "difference" in kinds)
        _legend(figure, left, right)
    if heat:
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", showlegend=False,
                                    marker={"color": [0], "coloraxis": "coloraxis"}))  # fmt: skip

    wide = ipywidgets.Layout(width="232px")
    controls: dict[str, Any] = {
        name: ipywidgets.IntSlider(value=place, min=0, max=n - 1, description=name, layout=wide)
        for name, place, n in zip(("slice", "row", "column"), start, volume.shape, strict=True)
    }
    first = "difference" if "difference" in kinds else next(iter([*masks, *heat, "none"]))
    controls["overlay"] = ipywidgets.Dropdown(options=kinds, value=first, description="overlay", layout=wide)
    controls["opacity"] = ipywidgets.FloatSlider(value=0.8, min=0, max=1, step=0.05, description="opacity", layout=wide)
    controls["window"] = ipywidgets.Dropdown(options=list(presets), description="window", layout=wide)
    readout = ipywidgets.HTML()

    def draw(change: object = None) -> None:
        place = [controls[name].value for name in ("slice", "row", "column")]
        kind = controls["overlay"].value
        shown = [tile(plane, place, kind, controls["window"].value, controls["opacity"].value) for plane in PLANES]
        with figure.batch_update():
            figure.layout.images = [_picture(0, column, size, one) for column, one in enumerate(shown)]
            _cross(figure, 0, middle(place), size)
            if heat:
                figure.layout.coloraxis = _bar(kind, highest[kind]) if kind in heat else {"showscale": False}
        facts = [f"slice {place[0]}, row {place[1]}, column {place[2]}", f"intensity {float(volume[tuple(place)]):.4g}"]
        facts += [f"{name} <b>{classes[int(mask[tuple(place)])]}</b>" for name, mask in masks.items()]
        facts += [f"{name} {float(values[tuple(place)]):.2f}" for name, values in heat.items()]
        readout.value = f'<div style="{_TEXT}">{" · ".join(facts)}</div>'

    def click(plane: Plane) -> Any:
        def answer(trace: Any, points: Any, state: Any) -> None:
            if points.xs:
                place = _place(points, plane, middle([controls[name].value for name in ("slice", "row", "column")]))
                for name, position, side in zip(("slice", "row", "column"), place, mm, strict=True):
                    controls[name].value = int(position / side)

        return answer

    for control in controls.values():
        control.observe(draw, names="value")
    for plane, trace in zip(PLANES, figure.data, strict=False):
        trace.on_click(click(plane))
    draw()

    rows = kinds[-(1 + len(heat)) :] if masks else kinds[len(heat) > 0 :]  # the difference says what its masks say
    left += 76 * (len(rows) > 1)
    twin = _board(volume.shape, mm, rows, title, left=left, right=right, foot=foot)
    window = controls["window"].value
    twin.update_layout(images=[
        _picture(row, column, size, tile(plane, start, kind, window, 0.8))
        for row, kind in enumerate(rows) for column, plane in enumerate(PLANES)
    ])  # fmt: skip
    if masks:
        class_legend(twin, classes, colours, "difference" in rows)
        _legend(twin, left, right)
    for row, kind in enumerate(rows):
        _cross(twin, row, middle(start), size)
        if kind in heat:
            low, high = twin.layout[f"yaxis{_axis(row, 0)}"].domain
            name = "coloraxis" + str(row + 1) * (row > 0)
            twin.add_trace(go.Scatter(x=[None], y=[None], mode="markers", showlegend=False,
                                      marker={"color": [0], "coloraxis": name}))  # fmt: skip
            twin.update_layout({name: _bar("", highest[kind], y=(low + high) / 2, len=high - low, lenmode="fraction")})
    boxes = [ipywidgets.HBox([controls[name] for name in names])
             for names in (("slice", "row", "column"), ("overlay", "opacity", "window"))]  # fmt: skip
    controls["readout"] = readout
    tip = "click into a plane: the other two follow. Then change the overlay."
    alt = f"{title}: axial, coronal and sagittal plane through slice {start[0]}, row {start[1]}, column {start[2]}"
    alt += f", with {', '.join(rows)}." if rows != ["none"] else "."
    return Explorer(stack(hint(tip), figure, readout, *boxes), twin, alt, controls, {"planes": figure})


def _middle(masks: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, int, int]:
    """The voxel of a structure that is nearest to the middle of all of them; the middle of the volume without any."""
    for mask in masks.values():
        where = np.argwhere(mask > 0)
        if len(where):
            z, y, x = where[np.abs(where - where.mean(axis=0)).sum(axis=1).argmin()].tolist()
            return z, y, x
    return shape[0] // 2, shape[1] // 2, shape[2] // 2


def _legend_height(entries: int, line: int = _ENTRY) -> int:
    """What `_legend` of so many entries needs below the planes, px."""
    return 26 + line * -(-entries // _COLUMNS) if entries else 10


def _legend(figure: go.Figure, left: int, right: int) -> None:
    """Put the legend at the foot, in columns; nothing else moves for it."""
    wide = (WIDTH - left - right) // _COLUMNS - 48  # beside the symbol and its room
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 4 / figure.layout.height, "yref": "container", "yanchor": "bottom",
                "entrywidth": wide, "entrywidthmode": "pixels", "itemsizing": "constant"},
    )  # fmt: skip


# ---- neighbours


def _marks() -> dict[str, dict[str, Any]]:
    """How a query and its partners are drawn over what they are."""
    ring = {"size": 13, "color": SERIES[5]}
    return {
        "neighbour, mutual": {"symbol": "circle-open", **ring, "line": {"width": 3.5}},
        "neighbour, ordinary": {"symbol": "circle-open-dot", **ring, "line": {"width": 1.2}},
        "outsider": {"symbol": "x-thin", "size": 9, "color": DISAGREEMENT, "line": {"width": 2, "color": DISAGREEMENT}},
        "query": {"symbol": "star", "size": 17, "color": "#FFE400", "line": {"width": 1.2, "color": INK}},
    }


def neighborhood_explorer(
    images: np.ndarray,
    voxels: Voxels,
    spacing: tuple[float, float, float] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[str] = (),
    *,
    entropy: np.ndarray | None = None,
    query: int = 0,
    projection: str = "t-SNE",
    title: str = "Who is whose neighbour",
) -> Explorer:
    """A query among the sampled voxels with its neighbours and outsiders, in the scan and in feature space.

    images: (B,Z,H,W), what the network saw · voxels: of `Dvcl.voxels`, places in these images · spacing: (z,y,x) in mm,
    None: cubes · classes, colours: as in ``slice_grid``, here the true ones · entropy: (B,Z,H,W), laid over the scan ·
    query: number of the first query · projection: "PCA" or "t-SNE".

    Above, the three planes through the query: partners in the same scan lie where they lie, faint where not in the
    plane itself. Below, all sampled voxels by their features: squares are reliable, circles are not. A click in either
    chooses the query that is nearest to it. Controls: ``query``, ``projection``, ``colour`` ("true class", "entropy")
    and ``readout``, which says what became of the query.
    """
    images = np.asarray(images)
    found = _arrays(voxels)
    if images.ndim != 4 or found.places.ndim != 2 or found.places.shape[1] != 4:
        raise ValueError(f"images must be (B,Z,H,W) and places (P,4), got {images.shape} and {found.places.shape}")
    if not len(found.queries):
        raise ValueError("no voxel is a query: without unreliable voxels there is nothing to explore")
    if not 0 <= query < len(found.queries):
        raise ValueError(f"query must be from 0 to {len(found.queries) - 1}, got {query}")
    check_classes(classes, colours, found.classes)
    mm = spacing or (1.0, 1.0, 1.0)
    size = [n * side for n, side in zip(images.shape[1:], mm, strict=True)]
    at_mm = (found.places[:, 1:] + 0.5) * np.array(mm)  # (P,3)
    limits = tuple(np.percentile(images, (1, 99)))
    pool = len(found.features) // 2  # `Dvcl.voxels` has as many unreliable voxels as reliable ones, those first
    mutual = neighbor_affinity(voxels.features[:pool], voxels.queries, voxels.neighbors, ordinary=0).cpu().numpy() == 1
    tints = [MUTED if value <= 0 else colours[value] for value in found.classes.tolist()]
    planes: dict[str, np.ndarray] = {}

    def plane_of(kind: str) -> np.ndarray:
        if kind not in planes:
            planes[kind] = project(found.features, kind)
        return planes[kind]

    shown = sorted(set(found.classes[found.classes > 0].tolist()))
    entries = [(classes[c], colours[c]) for c in shown]
    grey = [classes[0]] if (found.classes == 0).any() else []
    if grey := grey + ["unknown"] * bool((found.classes < 0).any()):
        entries.insert(0, (" or ".join(grey), MUTED))
    foot = _legend_height(6 + len(entries), _MARK)
    figure = LiveFigure(_board(images.shape[1:], mm, [""], title, left=_LEFT, right=_RIGHT, foot=_SPACE + foot))
    _clickable(figure, images.shape[1:], mm)
    whole = figure.layout.height - _HEAD - _GAP
    low, high = foot / whole, (foot + _SPACE - 24) / whole
    box = {"showgrid": False, "showticklabels": False, "range": [-1.12, 1.12], "showline": True, "mirror": True}
    figure.update_layout(
        xaxis4={**box, "domain": [0, 1], "anchor": "y4"},
        yaxis4={**box, "domain": [low, high], "anchor": "x4"},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        coloraxis={
            **_bar("entropy", float(found.entropy.max()), y=(low + high) / 2, len=high - low),
            "showscale": False,
        },
    )
    figure.add_annotation(text="<b>feature space</b>", x=0.5, y=high, xref="paper", yref="paper", yshift=13,
                          font={"size": 13, "color": INK})  # fmt: skip
    drawn = len(figure.data)
    for name, symbol, reliable in (("reliable", "square", True), ("unreliable", "circle", False)):
        mine = found.reliable == reliable
        text = [f"{classes[c] if c >= 0 else 'unknown'}<br>entropy {e:.2f}"
                for c, e in zip(found.classes[mine].tolist(), found.entropy[mine].tolist(), strict=True)]  # fmt: skip
        marker = {"symbol": symbol, "size": 5 if reliable else 8, "opacity": 0.6 if reliable else 0.9,
                  "line": {"width": 0.5, "color": CARD}}  # fmt: skip
        figure.add_trace(go.Scatter(mode="markers", name=name, marker=marker, text=text, xaxis="x4", yaxis="y4",
                                    hovertemplate="%{text}<extra></extra>", showlegend=True))  # fmt: skip
    marks = _marks()
    for end in ("", "2", "3", "4"):
        for name, marker in marks.items():
            figure.add_trace(go.Scatter(mode="markers", name=name, marker=marker, xaxis=f"x{end}", yaxis=f"y{end}",
                                        hoverinfo="none", showlegend=end == "4", legendgroup=name))  # fmt: skip

    names, fills = ["", *(name for name, _ in entries)], ["", *(fill for _, fill in entries)]
    class_legend(figure, names, fills, disagreement=False)
    _legend(figure, _LEFT, _RIGHT)

    controls: dict[str, Any] = {
        "query": ipywidgets.BoundedIntText(value=query, min=0, max=len(found.queries) - 1, description="query"),
        "projection": ipywidgets.Dropdown(options=list(PROJECTIONS), value=projection, description="projection"),
        "colour": ipywidgets.Dropdown(options=["true class", "entropy"], description="colour"),
    }
    readout = ipywidgets.HTML()

    def partners(number: int) -> dict[str, np.ndarray]:
        near, close = found.neighbors[number], mutual[number]
        return {"neighbour, mutual": near[close], "neighbour, ordinary": near[~close],
                "outsider": found.outsiders[number], "query": found.queries[[number]]}  # fmt: skip

    def draw(change: object = None) -> None:
        number, kind = controls["query"].value, controls["projection"].value
        row = int(found.queries[number])
        scan, *place = found.places[row].tolist()
        sets = partners(number)
        tiles = []
        for plane in PLANES:
            gray = pixels.to_gray(_cut(images[scan], plane, place).astype(np.float32), limits)
            layer = None if entropy is None else _heat(_cut(entropy[scan], plane, place), float(entropy.max()))
            if layer is not None:
                layer[..., 3] //= 2
            tiles.append(pixels.blend(gray, layer))
        with figure.batch_update():
            figure.layout.images = [_picture(0, column, size, one) for column, one in enumerate(tiles)]
            _cross(figure, 0, at_mm[row], size)
        points = plane_of(kind)
        for trace, reliable in zip(figure.data[drawn : drawn + 2], (True, False), strict=True):
            mine = found.reliable == reliable
            redraw(trace, x=points[mine, 0], y=points[mine, 1])
        for index, trace in enumerate(figure.data[drawn + 2 : drawn + 2 + 4 * len(marks)]):
            panel, members = index // len(marks), sets[trace.name]
            if panel == len(PLANES):
                redraw(trace, x=points[members, 0], y=points[members, 1])
                continue
            plane = PLANES[panel]
            members = members[found.places[members, 0] == scan]
            away = np.abs(found.places[members, 1 + plane.fixed] - place[plane.fixed])
            redraw(trace, x=at_mm[members, plane.across], y=at_mm[members, plane.along])
            with figure.batch_update():
                trace.marker.opacity = np.where(away <= 1, 1.0, 0.4)
        readout.value = _verdict(found, number, mutual[number], classes)

    def paint(change: object = None) -> None:
        by_entropy = controls["colour"].value == "entropy"
        for trace, reliable in zip(figure.data[drawn : drawn + 2], (True, False), strict=True):
            mine = found.reliable == reliable
            values = found.entropy[mine] if by_entropy else [t for t, m in zip(tints, mine, strict=True) if m]
            with figure.batch_update():
                trace.marker.color = values
                trace.marker.coloraxis = "coloraxis" if by_entropy else None
        figure.layout.coloraxis.showscale = by_entropy

    def choose(distance: np.ndarray) -> None:
        controls["query"].value = int(distance[found.queries].argmin())

    def in_space(trace: Any, points: Any, state: Any) -> None:
        if points.xs:
            choose(np.hypot(*(plane_of(controls["projection"].value) - [points.xs[0], points.ys[0]]).T))

    def in_scan(plane: Plane) -> Any:
        def answer(trace: Any, points: Any, state: Any) -> None:
            if points.xs:
                row = int(found.queries[controls["query"].value])
                distance = np.linalg.norm(at_mm - _place(points, plane, at_mm[row]), axis=1)
                choose(np.where(found.places[:, 0] == found.places[row, 0], distance, np.inf))

        return answer

    controls["query"].observe(draw, names="value")
    controls["projection"].observe(draw, names="value")
    controls["colour"].observe(paint, names="value")
    for trace in figure.data[: drawn + 2 + 4 * len(marks)]:
        end = trace.xaxis.removeprefix("x")
        trace.on_click(in_space if end == "4" else in_scan(PLANES[int(end or 1) - 1]))
    draw()
    paint()
    twin = go.Figure(figure)
    line = ipywidgets.HBox([controls[name] for name in ("query", "projection", "colour")])
    controls["readout"] = readout
    tip = "click a circle, or a place in the scan. Are the neighbours of one class? Where in the body do they lie?"
    alt = f"{title}: one unreliable voxel with its neighbours and outsiders in three planes of the scan and among "
    alt += f"{len(found.features)} voxels on a plane ({projection})."
    return Explorer(stack(hint(tip), line, figure, readout), twin, alt, controls, {"neighbours": figure})


def _verdict(found: SimpleNamespace, number: int, mutual: np.ndarray, classes: Sequence[str]) -> str:
    """What is known of one query and its partners, as HTML."""
    row = int(found.queries[number])
    near, far = found.neighbors[number], found.outsiders[number]
    scan = found.places[row, 0]
    best = int(found.probabilities[row].argmax())
    true = int(found.classes[row])
    words = [f"<b>Query {number}</b>: truly {classes[true] if true >= 0 else 'unknown'}, predicted {classes[best]} "
             f"({found.probabilities[row, best]:.2f}), entropy {found.entropy[row]:.2f}",
             f"{len(near)} neighbours: {int(mutual.sum())} mutual, "
             f"{int((found.classes[near] == true).sum())} of its class, {int((found.places[near, 0] != scan).sum())} "
             "in other scans",
             f"{len(far)} outsiders: {int((found.classes[far] == true).sum())} of its class after all",
             "no outlier, it learns" if found.inlier[number] else "<b>an outlier</b>, it is left out"]  # fmt: skip
    return f'<div style="{_TEXT}">{"<br>".join(words)}</div>'
