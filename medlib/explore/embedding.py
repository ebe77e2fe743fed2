"""An embedding to explore: where a point lies, what it shows, what the network finds alike, what a group shares."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from medlib.explore import panels, pixels
from medlib.explore.live import LiveFigure
from medlib.explore.measures import direction_alignment, position_probe_error, rank_correlation, unit
from medlib.explore.projection import (
    MAY_NOT_BE_READ,
    PROJECTIONS,
    QUALITY_POINTS,
    TSNE_POINTS,
    project,
    projection_quality,
    sample_rows,
)
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.slices import check_classes, check_maps
from medlib.explore.style import (
    CATEGORIES,
    DISAGREEMENT,
    INK,
    MUTED,
    TEMPLATE,
    category_colours,
    position_scale,
)

_WEBGL_FROM = 10_000  # points; below, SVG is as fast and sharper
_TEXT_UP_TO = 10_000  # points that carry their text to the page; above, the panel below the picture shows it alone
_NEIGHBOURS = 6
_PERPLEXITIES = (2, 5, 10, 20, 30, 50, 100)
_EVERYBODY = "all"
_RINGS = ((INK, 15, 2), (DISAGREEMENT, 19, 3.5))  # colour, width and line (pixels): of the neighbours, the chosen point


def nearest(features: np.ndarray, point: int, count: int = _NEIGHBOURS) -> np.ndarray:
    """The ``count`` rows of ``features`` (N,D) with the largest cosine to row ``point``, itself excluded, best
    first."""
    return _nearest(unit(features), point, count)


def _nearest(rows: np.ndarray, point: int, count: int = _NEIGHBOURS) -> np.ndarray:
    likeness = rows @ rows[point]
    likeness[point] = -np.inf
    return np.argsort(-likeness, kind="stable")[: min(count, len(rows) - 1)]


def _measured(features: np.ndarray, positions: np.ndarray, patients: np.ndarray, seed: int) -> str:
    """Two lines of numbers from the full space, of at most ``TSNE_POINTS`` points."""
    rows = sample_rows(len(features), TSNE_POINTS, seed)
    features, positions, patients = features[rows], positions[rows], patients[rows]
    text = f"rank correlation {rank_correlation(features, positions):.2f}"
    if len(np.unique(patients)) > 1:
        error, mean_error = position_probe_error(features, positions, patients)
        text += f" · alignment {direction_alignment(features, positions, patients):.2f}"
        text += f"<br>probe error {error:.3f} (guessing the mean {mean_error:.3f})"
    return text


class _Colouring:
    """How one column is painted: a number per point, a colour axis, and names with their colours where it has any."""

    def __init__(
        self, name: str, values: Sequence[Any] | np.ndarray, count: int, palette: Mapping[str, str] | None = None
    ):
        column = np.asarray(values)
        if column.shape != (count,):
            raise ValueError(f"column {name!r} must hold one value for each of {count} points, got {column.shape}")
        self.name, self.number = name, column.dtype.kind in "iuf"
        self.palette: dict[str, str] = {}
        if self.number:
            self.values = column.astype(float)
            finite = self.values[np.isfinite(self.values)]
            if not len(finite):
                raise ValueError(f"column {name!r} holds no finite number")
            low, high = (0.0, 1.0) if name == "position" else np.percentile(finite, (1, 99)).tolist()
            self.codes = self.values.round(3) if name == "position" else self.values
            self.axis = {"colorscale": position_scale(), "cmin": low, "cmax": max(high, low + 1e-9), "showscale": True}
        else:
            self.values = np.array([str(value) for value in column])
            names, index = np.unique(self.values, return_inverse=True)
            whole = palette if palette and set(names) <= set(palette) else category_colours(names.tolist())
            self.palette = {value: whole[value] for value in names.tolist()}
            self.codes, shades = index.astype(float), list(self.palette.values())
            edges = [(k / len(shades), (k + 1) / len(shades)) for k in range(len(shades))]
            steps = [(edge, colour) for pair, colour in zip(edges, shades, strict=True) for edge in pair]
            self.axis = {"colorscale": steps, "cmin": -0.5, "cmax": len(shades) - 0.5, "showscale": False}

    def coloraxis(self) -> dict[str, Any]:
        bar = {
            "title": {"text": self.name, "side": "right", "font": {"size": 12, "color": MUTED}},
            "thickness": 12,
            "outlinewidth": 0,
            "len": 1,
            "y": 0.5,
            "tickvals": [0, 0.5, 1] if self.name == "position" else None,
            "tickfont": {"color": MUTED},
        }
        return {**self.axis, "colorbar": bar}


def _canvas(panels_drawn: int, count: int, dimensions: int, hover: Sequence[str] | None) -> go.Figure:
    """An empty picture: per panel its points; in a box, then per panel the rings of neighbours and chosen point."""
    solid = dimensions == 3
    spec = [[{"type": "scene" if solid else "xy"}] * panels_drawn]
    figure = make_subplots(1, panels_drawn, specs=spec, column_titles=[" "] * panels_drawn, horizontal_spacing=0.04)
    kind = go.Scatter3d if solid else go.Scattergl if count >= _WEBGL_FROM else go.Scatter
    size = float(np.clip(220 / np.sqrt(count), 2 if count >= _WEBGL_FROM else 4, 9)) * (0.4 if solid else 1)
    keep: dict[str, Any] = (
        {} if solid else {"selected": {"marker": {"opacity": 1}}, "unselected": {"marker": {"opacity": 0.12}}}
    )
    text: dict[str, Any] = (
        {"hoverinfo": "none"} if hover is None else {"text": list(hover), "hovertemplate": "%{text}<extra></extra>"}
    )
    for column in range(1, panels_drawn + 1):
        marker = {"coloraxis": "coloraxis", "size": size, "opacity": 0.9}
        figure.add_trace(kind(mode="markers", marker=marker, showlegend=False, **text, **keep), row=1, col=column)
    for column in range(1, panels_drawn + 1 if solid else 1):  # on a plane `_rings` marks them, which redraws no point
        for colour, width, line in _RINGS:
            ring = {"size": width / 2, "symbol": "circle-open", "color": colour, "line": {"width": line}}
            look: dict[str, Any] = {"mode": "markers", "showlegend": False, "hoverinfo": "skip"}
            figure.add_trace(go.Scatter3d(marker=ring, **look), row=1, col=column)
    box = {"showgrid": False, "showticklabels": False, "range": [-1.12, 1.12]}
    if solid:
        face = {**box, "title": "", "showbackground": False, "showline": True, "linecolor": MUTED, "zeroline": False}
        near = {"eye": {"x": 1.05, "y": 1.05, "z": 0.7}}
        figure.update_scenes(xaxis=face, yaxis=face, zaxis=face, aspectmode="cube", camera=near)
    else:
        figure.update_xaxes(**box, showline=True, mirror=True)
        figure.update_yaxes(**box, showline=True, mirror=True)
    for column in range(panels_drawn):
        where = figure.layout[f"{'scene' if solid else 'xaxis'}{column + 1 if column else ''}"].domain
        left, right = where.x if solid else where
        note = {"xref": "paper", "yref": "paper", "xanchor": "center", "yanchor": "top"}
        figure.add_annotation(x=(left + right) / 2, y=-0.02, text="", font={"size": 12, "color": MUTED}, **note)
    figure.update_layout(
        template=TEMPLATE,
        height=496 if panels_drawn > 1 else 618,
        margin={"l": 20, "r": 20, "t": 84, "b": 78},
        dragmode="orbit" if solid else "lasso",
    )
    return figure


def _rings(places: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """Circles around the neighbours and the chosen point of each panel, (n,2) each; none where a point is not drawn."""
    found = []
    for panel, marked in enumerate(places):
        axis = str(panel + 1) if panel else ""
        for spots, (colour, width, line) in zip(marked, _RINGS, strict=True):
            half = {"x0": -width / 2, "x1": width / 2, "y0": -width / 2, "y1": width / 2}
            look = {"type": "circle", "xsizemode": "pixel", "ysizemode": "pixel", **half}
            look |= {"xref": f"x{axis}", "yref": f"y{axis}", "line": {"color": colour, "width": line}}
            found += [{**look, "xanchor": x, "yanchor": y} for x, y in spots.tolist() if np.isfinite(x)]
    return found


class _Board:
    """The state behind an embedding explorer: what is drawn, what is chosen, and the figures that show it."""

    def __init__(
        self,
        features: Mapping[str, np.ndarray],
        columns: Mapping[str, _Colouring],
        thumbs: np.ndarray,
        maps: Mapping[str, Any],
        hover: Sequence[str],
        title: str,
        seed: int,
    ):
        self.features, self.columns, self.thumbs, self.maps = features, columns, thumbs, maps
        self.rows = {name: unit(f) for name, f in features.items()}
        self.positions, self.owners = columns["position"].values, columns["patient"].values
        self.hover, self.title, self.seed = hover, title, seed
        self.count, self.panels = len(self.positions), min(2, len(features))
        self.flats: dict[tuple, tuple[np.ndarray, str]] = {}
        self.notes: dict[str, str] = {}
        self.selected: np.ndarray | None = None
        self.controls: dict[str, Any] = {}
        text = hover if self.count < _TEXT_UP_TO else None
        self.figures = {"embedding": LiveFigure(_canvas(self.panels, self.count, 2, text))}
        self.body = ipywidgets.VBox()

    # ---- what is computed once

    def flat(self, name: str, dimensions: int) -> tuple[np.ndarray, str]:
        """Coordinates (N,dimensions) of a method, not-a-number where a point was not drawn into the sample, and a line
        on how far they can be trusted."""
        kind, seed, perplexity = (self.controls[k].value for k in ("projection", "seed", "perplexity"))
        key = (name, kind, dimensions, *((seed, perplexity) if kind == "t-SNE" else ()))
        if key not in self.flats:
            rows = sample_rows(self.count, TSNE_POINTS if kind == "t-SNE" else self.count, self.seed)
            one = project(self.features[name][rows], kind, seed=seed, perplexity=perplexity, dimensions=dimensions)
            few = sample_rows(len(rows), QUALITY_POINTS, self.seed)
            quality = projection_quality(self.rows[name][rows[few]], one[few])
            flat = np.full((self.count, dimensions), np.nan, np.float32)
            flat[rows] = one
            text = f"picture: trustworthiness {quality.trustworthiness:.2f} · continuity {quality.continuity:.2f}"
            self.flats[key] = flat, text
        return self.flats[key]

    def note(self, name: str) -> str:
        if name not in self.notes:
            self.notes[name] = _measured(self.features[name], self.positions, self.owners, self.seed)
        return self.notes[name]

    # ---- what is shown

    @property
    def dimensions(self) -> int:
        return 3 if self.controls["dimensions"].value == "3D" else 2

    @property
    def figure(self) -> go.FigureWidget:
        if self.dimensions == 2:
            return self.figures["embedding"]
        if "space" not in self.figures:
            text = self.hover if self.count < _TEXT_UP_TO else None
            self.figures["space"] = LiveFigure(_canvas(self.panels, self.count, 3, text))
            self.answer(self.figures["space"])
        return self.figures["space"]

    def names(self) -> list[str]:
        sides = [self.controls[side].value for side in ("left", "right") if side in self.controls]
        return sides or list(self.features)[:2]

    def shown(self) -> np.ndarray:
        """Which points the filters leave, (N,) bool."""
        mask = np.ones(self.count, bool)
        for name in ("patient", "group"):
            control = self.controls.get(f"only {name}")
            if control is not None and control.value != _EVERYBODY:
                mask &= self.columns[name].values == control.value
        if self.controls["selected only"].value and self.selected is not None:
            mask[np.setdiff1d(np.arange(self.count), self.selected)] = False
        return mask

    def caption(self, drawn: int) -> str:
        kind = self.controls["projection"].value
        part = []
        if kind == "t-SNE" and self.count > TSNE_POINTS:
            part.append(f"{TSNE_POINTS:,} of {self.count:,} points drawn at random")
        if drawn < self.count:
            part.append(f"{drawn:,} of {self.count:,} shown")
        return f"{self.title} ({', '.join([kind, *part])})"

    # ---- what the controls do

    def draw(self, change: object = None) -> None:
        """The points, after another projection, method or filter."""
        figure, axes = self.figure, "xyz"[: self.dimensions]
        uses_seed = self.controls["projection"].value == "t-SNE"
        self.controls["perplexity"].disabled = self.controls["seed"].disabled = not uses_seed
        mask = self.shown()
        drawn = [self.flat(name, self.dimensions) for name in self.names()]
        for trace, (flat, _) in zip(figure.data, drawn, strict=False):
            hidden = np.where(mask[:, None], flat, np.nan)
            redraw(trace, **{axis: hidden[:, i] for i, axis in enumerate(axes)})
        with figure.batch_update():
            for i, (name, (_, quality)) in enumerate(zip(self.names(), drawn, strict=True)):
                figure.layout.annotations[i].text = f"<b>{name}</b>"
                figure.layout.annotations[self.panels + i].text = f"{self.note(name)}<br>{quality}"
            figure.layout.title.text = self.caption(int(mask.sum()))
        self.controls["note"].value = panels.block(f"<i>{MAY_NOT_BE_READ[self.controls['projection'].value]}</i>")
        self.paint()
        self.mark()
        self.describe()
        self.body.children = (figure,)  # now, with all that it shows

    def mark(self, change: object = None) -> None:
        """The chosen point and its neighbours, as pictures and in the picture."""
        point = self.controls["point"].value
        found = {name: _nearest(self.rows[name], point) for name in dict.fromkeys(self.names())}
        label, predictions = self.maps["label"], self.maps["predictions"]
        shown = {name: maps[point] for name, maps in predictions.items() if name in ("", *self.names())}
        alone = panels.chosen(
            self.thumbs[point],
            None if label is None else label[point],
            shown,
            self.maps["colours"],
            self.hover[point].replace("<br>", ", "),
        )
        strip = panels.neighbour_strip(point, found, self.thumbs, self.positions, self.owners, self.hover)
        self.controls["strip"].value = panels.block(alone + strip)
        places = []
        for name in self.names():
            flat, _ = self.flat(name, self.dimensions)
            places.append((flat[found[name]], flat[[point]]))
        if self.dimensions == 2:
            self.figure.layout.shapes = _rings(places)
            return
        for trace, spots in zip(self.figure.data[self.panels :], [one for pair in places for one in pair], strict=True):
            redraw(trace, **{axis: spots[:, k] for k, axis in enumerate("xyz")})

    def paint(self, change: object = None) -> None:
        column, figure = self.columns[self.controls["colour"].value], self.figure
        figure.layout.coloraxis = column.coloraxis()
        for trace in figure.data[: self.panels]:
            redraw(trace, **{"marker.color": column.codes})
        self.controls["legend"].value = panels.block(panels.chips(column.palette))
        self.say()

    def say(self) -> None:
        """What the picture shows, as a sentence: its twin for a reader who does not see it."""
        told = [f"{self.figure.layout.title.text}, coloured by {self.controls['colour'].value}."]
        for i, name in enumerate(self.names()):
            told.append(f"{name}: {self.figure.layout.annotations[self.panels + i].text}.".replace("<br>", ", "))
        self.controls["spoken"].value = panels.spoken(" ".join(told))

    def describe(self) -> None:
        """What the selected points, else those that the filters leave, have in common."""
        mask = self.shown()
        if self.selected is None and mask.all():
            text = "Draw a lasso around points: here stands what they share, beside all points."
            self.controls["selection"].value = panels.block(text)
            return
        rows = np.flatnonzero(mask) if self.selected is None else self.selected
        numbers = {name: column.values for name, column in self.columns.items() if column.number}
        texts = {name: column.values for name, column in self.columns.items() if not column.number}
        what = "shown" if self.selected is None else "selected"
        methods = {name: self.features[name] for name in dict.fromkeys(self.names())}
        self.controls["selection"].value = panels.group_panel(rows, numbers, texts, methods, what)

    def select(self, rows: Sequence[int] | None) -> None:
        """The same points in both panels; None: no selection."""
        self.selected = None if rows is None else np.unique(np.asarray(rows, int))
        for trace in self.figures["embedding"].data[: self.panels]:
            redraw(trace, selectedpoints=self.selected)
        if self.controls["selected only"].value:
            self.draw()
        else:
            self.describe()

    def answer(self, figure: go.FigureWidget) -> None:
        """What a click, the mouse over a point and a lasso do in ``figure``."""

        def click(trace: Any, points: Any, state: Any) -> None:
            if points.point_inds:
                self.controls["point"].value = points.point_inds[0]

        def hover(trace: Any, points: Any, state: Any) -> None:
            if points.point_inds:
                point = points.point_inds[0]
                lines = [f"point {point}", *self.hover[point].split("<br>")]
                self.controls["hover"].value = panels.hovered(self.thumbs[point], lines)

        def lasso(trace: Any, points: Any, selector: Any) -> None:
            if points.point_inds:
                self.select(points.point_inds)
            else:  # plotly tells every trace, and unselects all points of those beside the lasso
                redraw(trace, selectedpoints=self.selected)

        def drop(trace: Any, points: Any) -> None:
            if self.selected is not None:
                self.select(None)

        for trace in figure.data[: self.panels]:
            trace.on_click(click)
            trace.on_hover(hover)
            if isinstance(trace, go.Scatter | go.Scattergl):
                trace.on_selection(lasso)
                trace.on_deselect(drop)


def _prediction_maps(predictions: Any, methods: Sequence[str]) -> dict[str, np.ndarray]:
    if predictions is None:
        return {}
    if isinstance(predictions, Mapping):
        if unknown := [name for name in predictions if name not in methods]:
            raise ValueError(f"predictions of {unknown} belong to no method; methods are {list(methods)}")
        return {name: np.asarray(maps) for name, maps in predictions.items()}
    return {"": np.asarray(predictions)}


def embedding_explorer(
    methods: Mapping[str, np.ndarray],
    positions: np.ndarray,
    patients: Sequence[str],
    thumbnails: np.ndarray,
    groups: Sequence[str] | None = None,
    *,
    columns: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    labels: np.ndarray | None = None,
    predictions: np.ndarray | Mapping[str, np.ndarray] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[str] = (),
    palette: Mapping[str, str] | None = None,
    colour: str = "position",
    projection: str | None = None,
    seed: int = 0,
    perplexity: float = 30.0,
    title: str = "What the network finds alike",
) -> Explorer:
    """Slices or voxels as points, up to two methods side by side, with their pictures and nearest neighbours.

    methods: name -> features (N,D_m); with more than two, the first two are drawn and menus choose · positions: (N,) in
    [0, 1] · patients: N names · thumbnails: (N,h,w) uint8 · groups: N names (diagnosis, phase, ...), optional ·
    columns: name -> N further values to colour by (entropy, error, data set, ...): numbers get a scale from their 1st
    to their 99th percentile, anything else colours by value · labels: (N,h,w) int · predictions: (N,h,w) int, or one
    such for each of some methods · classes, colours: names and ``#rrggbb`` of their values · palette: value ->
    ``#rrggbb`` for each column that has no other values · colour: of "position", "patient", "group" and ``columns``,
    the first · projection: "PCA" or "t-SNE", by default t-SNE up to 1,500 points.
    Under each picture stand numbers from the full feature space (``medlib.explore.measures``), of 1,500 points at
    random where there are more, and how many neighbours the picture keeps: the picture itself proves nothing.

    The mouse over a point shows it. A click (or the slider ``point``) shows the slice, with label and prediction where
    given, and, for each method, its six nearest neighbours by cosine in the full feature space, and rings them in both
    pictures. A lasso selects points in both and says what they share; a double click ends that. Controls: ``point``,
    ``colour``, ``projection``, ``dimensions``, ``perplexity``, ``seed``, ``only patient``, ``only group``, ``selected
    only``, and with more than two methods ``left`` and ``right``. From 10,000 points on WebGL draws; t-SNE is of 1,500
    points at random where there are more. The twin is the picture in ``colour``, on the plane.
    """
    places = np.asarray(positions, np.float64)
    features = {name: np.asarray(f, np.float32) for name, f in methods.items()}
    count, thumbs = len(places), np.asarray(thumbnails)
    if not features:
        raise ValueError("methods is empty: give at least one name with its features")
    shapes = {name: f.shape for name, f in features.items() if f.ndim != 2 or len(f) != count}
    if shapes or len(patients) != count or thumbs.ndim != 3 or len(thumbs) != count:
        raise ValueError(
            f"lengths differ: {count} positions, {len(patients)} patients, thumbnails {thumbs.shape}, features {shapes}"
        )
    if bad := [name for name, f in features.items() if not np.isfinite(f).all()]:
        raise ValueError(f"features of {bad} are not finite")
    guesses = _prediction_maps(predictions, list(features))
    truth = None if labels is None else np.asarray(labels)
    check_maps(thumbs, labels=truth, **{f"predictions {name}".strip(): maps for name, maps in guesses.items()})
    check_classes(classes, colours, truth, *guesses.values())
    given: dict[str, Any] = {"position": places, "patient": [str(p) for p in patients]}
    if groups is not None:
        given["group"] = [str(group) for group in groups]
    if taken := [name for name in columns or {} if name in ("position", "patient", "group")]:
        raise ValueError(f"columns {taken} are there already: give them another name")
    table = {name: _Colouring(name, values, count, palette) for name, values in {**given, **(columns or {})}.items()}
    for name, value, known in (("colour", colour, tuple(table)), ("projection", projection, (None, *PROJECTIONS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")

    small = pixels.shrink(np.asarray(thumbs, np.uint8), 96)
    maps = {
        "label": None if truth is None else pixels.shrink(truth.astype(np.uint8), 96),
        "predictions": {name: pixels.shrink(one.astype(np.uint8), 96) for name, one in guesses.items()},
        "colours": list(colours),
    }
    board = _Board(features, table, small, maps, _hover_texts(table), title, seed)
    board.controls = _controls(board, colour, projection, seed, perplexity)
    board.answer(board.figures["embedding"])
    board.draw()
    _observe(board)
    controls = board.controls
    shown = board.names()
    alt = (
        f"{title}: {count:,} points of {len(np.unique(board.owners))} patients on a plane "
        f"({controls['projection'].value}), coloured by {colour}, for {' and '.join(shown)}."
    )
    tip = "click a point. Are its neighbours from the same height of <i>other</i> patients? Then colour by patient, "
    tip += "and draw a lasso around a cluster: is it one patient?"
    keys = [["projection", "dimensions", "colour"], ["perplexity", "seed", "point"]]
    keys += [[name for name in ("only patient", "only group", "selected only") if name in controls]]
    keys += [["left", "right"]] if "left" in controls else []
    rows = [ipywidgets.HBox([controls[name] for name in names], layout={"align_items": "center"}) for names in keys]
    below = ipywidgets.HBox([controls["hover"], controls["selection"]])
    told = [controls[name] for name in ("note", "legend", "spoken")]
    widget = stack(hint(tip), *rows, *told, board.body, below, controls["strip"])
    return Explorer(widget, _twin(board, colour), alt, controls, board.figures)


def _hover_texts(table: Mapping[str, _Colouring]) -> list[str]:
    """One text per point: patient, position, then whatever else is known of it."""
    lines = [table["patient"].values, [f"position {p:.2f}" for p in table["position"].values]]
    lines += [table["group"].values] if "group" in table else []
    for name, column in table.items():
        if name not in ("position", "patient", "group"):
            lines.append([f"{name} {value:.3g}" if column.number else f"{name} {value}" for value in column.values])
    return ["<br>".join(map(str, line)) for line in zip(*lines, strict=True)]


def _controls(board: _Board, colour: str, projection: str | None, seed: int, perplexity: float) -> dict[str, Any]:
    """All controls by name, and the places for text."""
    menu: dict[str, Any] = {"layout": ipywidgets.Layout(width="236px"), "style": {"description_width": "84px"}}
    kind = projection or ("t-SNE" if board.count <= TSNE_POINTS else "PCA")
    steps = sorted({*(p for p in _PERPLEXITIES if p < min(board.count, TSNE_POINTS) / 3), perplexity})
    made: dict[str, Any] = {
        "projection": ipywidgets.Dropdown(options=PROJECTIONS, value=kind, description="projection", **menu),
        "dimensions": ipywidgets.ToggleButtons(
            options=["2D", "3D"], style={"button_width": "60px"}, layout=ipywidgets.Layout(width="236px")
        ),
        "colour": ipywidgets.Dropdown(options=list(board.columns), value=colour, description="colour by", **menu),
        "perplexity": ipywidgets.SelectionSlider(
            options=[(f"{step:g}", step) for step in steps],
            value=perplexity,
            description="perplexity",
            continuous_update=False,
            **menu,
        ),
        "seed": ipywidgets.IntSlider(
            value=seed, min=0, max=max(9, seed), description="seed", continuous_update=False, **menu
        ),
        "point": ipywidgets.IntSlider(
            value=0, min=0, max=board.count - 1, description="point", continuous_update=False, **menu
        ),
    }
    for name in ("patient", "group"):
        if name in board.columns:
            choices = [_EVERYBODY, *sorted(set(board.columns[name].values.tolist()))]
            made[f"only {name}"] = ipywidgets.Dropdown(options=choices, description=f"only {name}", **menu)
    made["selected only"] = ipywidgets.Checkbox(description="selected points only", indent=False, layout=menu["layout"])
    if len(board.features) > 2:
        for side, name in zip(("left", "right"), list(board.features)[:2], strict=True):
            made[side] = ipywidgets.Dropdown(options=list(board.features), value=name, description=side, **menu)
    made |= {name: ipywidgets.HTML() for name in ("note", "legend", "spoken", "strip", "selection")}
    made["hover"] = ipywidgets.HTML(
        panels.block("The point under the mouse is shown here."), layout=ipywidgets.Layout(width="210px")
    )
    return made


def _observe(board: _Board) -> None:
    answers: dict[str, Callable] = {"point": board.mark, "colour": board.paint}
    for name, control in board.controls.items():
        if not isinstance(control, ipywidgets.HTML):
            control.observe(answers.get(name, board.draw), names="value")


def _twin(board: _Board, colour: str) -> go.Figure:
    """The live picture without its rings; names of colours in a legend where it has no scale."""
    twin = go.Figure(board.figures["embedding"])
    twin.layout.shapes = ()
    palette = board.columns[colour].palette
    if 0 < len(palette) <= len(CATEGORIES):
        for name, shade in palette.items():
            twin.add_scatter(x=[None], y=[None], mode="markers", marker={"color": shade}, name=name)
        twin.update_layout(legend={"orientation": "v", "y": 0.5})
    return twin
