"""Pictures of dense features: which cells of two views match, how cells cluster, where two decoders differ.

A cell is one position of the encoder's last map, h x w of them in a picture, counted row by row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go

from medlib.explore import pixels
from medlib.explore.live import LiveFigure
from medlib.explore.measures import unit
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import CATEGORIES, DISAGREEMENT, INK, SERIES, TEMPLATE, WIDTH, bare_axis
from medlib.losses.ideal import NO_MATCH

_GAP = 0.16  # between two views, in parts of a view's side
_SMALL_GAP = 0.04
_VERDICTS = {"right": SERIES[2], "wrong": SERIES[1], "unknown": SERIES[0]}
_TINT = [[0, "rgba(229,0,125,0)"], [0.5, "rgba(229,0,125,0.15)"], [1, "rgba(229,0,125,0.85)"]]
_CELL_GRID = "rgba(255,255,255,0.35)"

Path = tuple[list[float | None], list[float | None]]


def _verdicts(match: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """ "right", "wrong" or "unknown" (no truth to compare with) for each cell."""
    if truth is None:
        return np.full(len(match), "unknown")
    return np.where(truth == NO_MATCH, "unknown", np.where(match == truth, "right", "wrong"))


def _centre(cell: np.ndarray | int, cells: tuple[int, int], left: float, top: float, side: float = 1.0) -> Any:
    """x and y of the centre of a cell of a square picture of side ``side`` at (left, top)."""
    row, column = np.divmod(cell, cells[1])
    return left + (column + 0.5) * side / cells[1], top + (row + 0.5) * side / cells[0]


def _anchor(cell: np.ndarray | int, cells: tuple[int, int], left: float, top: float, side: float = 1.0) -> Any:
    """Where the line of a cell begins: near its centre, each column a little lower, so that parallel lines differ."""
    x, y = _centre(cell, cells, left, top, side)
    return x, y + 0.12 * (np.mod(cell, cells[1]) - (cells[1] - 1) / 2) * side / cells[0]


def _lines(match: np.ndarray, cells: tuple[int, int], first: tuple, second: tuple) -> Path:
    """From each cell that has a match to that match, as one broken line; ``first``, ``second``: left, top, side."""
    xs, ys = [], []
    for cell in np.flatnonzero(match != NO_MATCH):
        a, b = _anchor(int(cell), cells, *first), _anchor(int(match[cell]), cells, *second)
        xs += [round(float(a[0]), 4), round(float(b[0]), 4), None]
        ys += [round(float(a[1]), 4), round(float(b[1]), 4), None]
    return xs, ys


def _grid(cells: tuple[int, int], places: Sequence[tuple]) -> Path:
    """The borders between the cells of the pictures at ``places`` (left, top, side)."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for left, top, side in places:
        for row in range(1, cells[0]):
            xs += [left, left + side, None]
            ys += [top + row * side / cells[0]] * 2 + [None]
        for column in range(1, cells[1]):
            xs += [left + column * side / cells[1]] * 2 + [None]
            ys += [top, top + side, None]
    return xs, ys


def _line(path: Path, colour: str, width: float, name: str = "") -> go.Scatter:
    return go.Scatter(
        x=path[0], y=path[1], mode="lines", line={"color": colour, "width": width}, hoverinfo="skip", name=name,
        showlegend=bool(name),
    )  # fmt: skip


def _put(figure: go.Figure, picture: np.ndarray, place: tuple, layer: str = "below") -> None:
    """``picture`` (H,W,3) uint8 with its top left corner at ``place`` (left, top, side)."""
    left, top, side = place
    figure.add_layout_image(
        source=pixels.data_uri(picture), x=left, y=top, sizex=side, sizey=side, xref="x", yref="y", sizing="stretch",
        layer=layer,
    )  # fmt: skip


def _check_match(match: np.ndarray, cells: tuple[int, int], name: str) -> np.ndarray:
    match = np.asarray(match)
    count = cells[0] * cells[1]
    whole = match.dtype.kind in "iu" and match.shape == (count,) and count > 0
    if not whole or match.min() < NO_MATCH or match.max() >= count:
        raise ValueError(f"{name} must name a cell (0 to {count - 1}, or {NO_MATCH}) for each of {count} cells")
    return match


def _check_views(**views: np.ndarray) -> list[np.ndarray]:
    """Pictures of one size as arrays, (S,S) or stacks (K,S,S)."""
    arrays = [np.asarray(view) for view in views.values()]
    shape = arrays[0].shape
    for name, array in zip(views, arrays, strict=True):
        if len(shape) != 2 or array.ndim not in (2, 3) or array.shape[-2:] != shape:
            raise ValueError(f"{name} must be a picture, (S,S) like the first view {shape}, got {array.shape}")
    return arrays


def correspondence_figure(
    first: np.ndarray,
    second: np.ndarray,
    matches: Mapping[str, np.ndarray],
    cells: tuple[int, int],
    *,
    truth: np.ndarray | None = None,
    title: str = "",
) -> go.Figure:
    """Two views of a slice with a line from each cell of the first to its match in the second.

    first, second: (S,S) · matches: name -> (h*w,) int, one pair of pictures each, two pairs in a row · cells: (h,w) ·
    truth: (h*w,) int, the match by geometry, `NO_MATCH` where there is none: lines are then coloured right or wrong,
    and the name is followed by how many are right.
    """
    first, second = _check_views(first=first, second=second)
    named = {name: _check_match(match, cells, f"match {name!r}") for name, match in matches.items()}
    truth = None if truth is None else _check_match(truth, cells, "truth")
    columns = min(2, len(named))
    rows = -(-len(named) // 2)
    pair, line = 2 + _GAP, 1.16  # widths and heights in parts of a view's side
    across = columns * pair + (columns - 1) * 0.2
    scale = (WIDTH - 40) / across
    head = 92 if truth is not None else 62
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(head + 12 + rows * line * scale)})
    both = [pixels.blend(pixels.to_gray(view.astype(np.float32))) for view in (first, second)]
    paths: dict[str, Path] = {kind: ([], []) for kind in _VERDICTS}
    places = []
    for number, (name, match) in enumerate(named.items()):
        left, top = number % 2 * (pair + 0.2), number // 2 * line + 0.12
        here = [(left, top, 1.0), (left + 1 + _GAP, top, 1.0)]
        for picture, place in zip(both, here, strict=True):
            _put(figure, picture, place)
        places += here
        verdict = _verdicts(match, truth)
        for kind, path in paths.items():
            xs, ys = _lines(np.where(verdict == kind, match, NO_MATCH), cells, *here)
            path[0].extend(xs)
            path[1].extend(ys)
        known = int((verdict != "unknown").sum())
        right = f": {int((verdict == 'right').sum())} of {known} right" if truth is not None else ""
        figure.add_annotation(
            x=left, y=top, xanchor="left", yanchor="bottom", text=f"{name}{right}", font={"size": 13, "color": INK}
        )
    figure.add_trace(_line(_grid(cells, places), _CELL_GRID, 1))
    for kind, path in paths.items():
        if path[0]:
            named_line = {"right": "right", "wrong": "wrong", "unknown": "shown in one view only"}[kind]
            figure.add_trace(_line(path, _VERDICTS[kind], 1.8, named_line if truth is not None else ""))
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": head, "b": 12},
        xaxis=bare_axis(range=[0, across], fixedrange=True),
        yaxis=bare_axis(range=[rows * line, 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    return figure


def correspondence_explorer(
    first: np.ndarray,
    second: np.ndarray,
    similarities: Mapping[str, np.ndarray],
    cells: tuple[int, int],
    *,
    others: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    title: str = "Which cell matches which",
) -> Explorer:
    """Two views with lines between matched cells, and for one cell all that it is compared with.

    first, second: (S,S) · cells: (h,w) · others: (K,S,S), other slices, whose cells are the distractors · similarities:
    name -> (h*w, (1+K)*h*w), cosines of each cell of ``first`` with the cells of ``second`` and then of each of
    ``others``; several names (training steps, say) become a control · truth: (h*w,) int, the match by geometry.

    The match of a cell is the most similar cell of ``second``. Hover over a cell of the first view (or move the slider
    ``cell``): the redder a cell elsewhere, the more similar; a square marks the match, a circle the true place, crosses
    the three most similar distractors. Controls: ``cell``, and ``shown`` where there are several names.
    """
    count = cells[0] * cells[1]
    others = np.empty((0, *np.shape(first))) if others is None else others
    first, second, slices = _check_views(first=first, second=second, others=others)
    tables = {name: np.asarray(table, np.float64) for name, table in similarities.items()}
    for name, table in tables.items():
        if table.shape != (count, (1 + len(slices)) * count):
            wanted = f"({count}, {(1 + len(slices)) * count})"
            raise ValueError(
                f"similarities {name!r} must be {wanted}: cells of {1 + len(slices)} pictures, got {table.shape}"
            )
        if not count or not np.isfinite(table).all():
            raise ValueError(f"similarities {name!r} must be finite numbers, of at least one cell")
    if not tables:
        raise ValueError("similarities is empty: give at least one name with its table")
    truth = None if truth is None else _check_match(truth, cells, "truth")
    matches = {name: table[:, :count].argmax(axis=1) for name, table in tables.items()}

    across = 2 + _GAP
    small = min(0.5, (across - (len(slices) - 1) * _SMALL_GAP) / max(len(slices), 1))
    query, key = (0.0, 0.0, 1.0), (1 + _GAP, 0.0, 1.0)
    places = [key, *((k * (small + _SMALL_GAP), 1.12, small) for k in range(len(slices)))]
    down = 1.12 + small if len(slices) else 1.0
    scale, head, foot = (WIDTH - 40) / across, 118, 12
    figure = LiveFigure(layout={"template": TEMPLATE, "height": round(head + foot + down * scale)})
    limits = tuple(np.percentile(np.concatenate([first[None], second[None], slices]), (1, 99)))
    for view, place in zip([first, second, *slices], [query, *places], strict=True):
        _put(figure, pixels.blend(pixels.to_gray(view.astype(np.float32), limits)), place)
    figure.add_trace(_line(_grid(cells, [query, *places]), _CELL_GRID, 1))
    for left, top, side in places:
        width, height = side / cells[1], side / cells[0]
        figure.add_heatmap(
            z=np.zeros(cells), x0=left + width / 2, dx=width, y0=top + height / 2, dy=height, coloraxis="coloraxis",
            hovertemplate="cosine %{z:.2f}<extra></extra>",
        )  # fmt: skip
    heat = list(range(1, len(figure.data)))
    names = {"right": "match, right", "wrong": "match, wrong", "unknown": "match" if truth is None else "no true place"}
    lines = {}
    for kind, colour in _VERDICTS.items():
        if truth is not None or kind == "unknown":
            lines[kind] = len(figure.data)
            figure.add_trace(_line(([], []), colour, 1.3, names[kind]))
    x, y = _anchor(np.arange(count), cells, *query)
    cell_names = [f"cell {i}" for i in range(count)]
    figure.add_scatter(x=x, y=y, mode="markers", marker={"size": 9, "color": "white", "opacity": 0.55}, text=cell_names,
                       hovertemplate="%{text}<extra></extra>", showlegend=False)  # fmt: skip
    dots = len(figure.data) - 1
    figure.add_trace(_line(([], []), INK, 4))
    figure.add_trace(_line(([], []), DISAGREEMENT, 2.2))
    marks = {
        "match": ("square-open", 20, 3, DISAGREEMENT), "true place": ("circle-open", 26, 3, SERIES[5]),
        "distractors": ("x-thin-open", 9, 2.5, INK),
    }  # fmt: skip
    ring = {}
    for name, (symbol, size, width, colour) in marks.items():
        if (name != "true place" or truth is not None) and (name != "distractors" or len(slices)):
            ring[name] = len(figure.data)
            marker = {"symbol": symbol, "size": size, "color": colour, "line": {"width": width, "color": colour}}
            figure.add_scatter(x=[], y=[], mode="markers", marker=marker, name=name, hoverinfo="skip")
    if len(slices):
        figure.add_annotation(x=0, y=1.12, xanchor="left", yanchor="bottom", text="other slices: the distractors")
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": head, "b": foot},
        xaxis=bare_axis(range=[0, across], fixedrange=True),
        yaxis=bare_axis(range=[down, 0], fixedrange=True),
        coloraxis={"colorscale": _TINT, "showscale": False},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )

    wide = ipywidgets.Layout(width="350px")
    controls: dict[str, ipywidgets.ValueWidget] = {
        "cell": ipywidgets.IntSlider(value=count // 2, min=0, max=count - 1, description="cell", layout=wide)
    }
    last = list(tables)[-1]
    if len(tables) > 1:
        controls["shown"] = ipywidgets.SelectionSlider(
            options=list(tables), value=last, description="shown", layout=wide
        )

    def draw(change: object = None) -> None:
        name, cell = controls["shown"].value if "shown" in controls else last, controls["cell"].value
        match, row = matches[name], tables[name][cell]
        verdict = _verdicts(match, truth)
        for place, trace in enumerate(heat):
            redraw(figure.data[trace], z=row[place * count : (place + 1) * count].reshape(cells).round(3))
        for kind, trace in lines.items():
            xs, ys = _lines(np.where(verdict == kind, match, NO_MATCH), cells, query, key)
            redraw(figure.data[trace], x=xs, y=ys)
        alone = np.where(np.arange(count) == cell, match, NO_MATCH)
        xs, ys = _lines(alone, cells, query, key)
        for trace in (dots + 1, dots + 2):
            redraw(figure.data[trace], x=xs, y=ys)
        (ax, ay), (bx, by) = _centre(cell, cells, *query), _centre(int(match[cell]), cells, *key)
        redraw(figure.data[ring["match"]], x=[ax, bx], y=[ay, by])
        if truth is not None:
            at = [_centre(int(truth[cell]), cells, *key)] if truth[cell] != NO_MATCH else []
            redraw(figure.data[ring["true place"]], x=[p[0] for p in at], y=[p[1] for p in at])
        said = f"cell {cell}, cosine with its match {row[match[cell]]:.2f}"
        if len(slices):
            strongest = np.argsort(-row[count:], kind="stable")[:3]
            at = [_centre(int(k % count), cells, *places[1 + k // count]) for k in strongest]
            redraw(figure.data[ring["distractors"]], x=[p[0] for p in at], y=[p[1] for p in at])
            above = int((row[count:] > row[match[cell]]).sum())
            said += f"; {above} of {len(row) - count} distractors are closer"
        with figure.batch_update():
            shown = f", {name}" if "shown" in controls else ""
            figure.layout.title.text = f"{title}{shown}<br><span style='font-size:13px'>{said}</span>"

    def point(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            controls["cell"].value = points.point_inds[0]

    for control in controls.values():
        control.observe(draw, names="value")
    figure.data[dots].on_hover(point)
    figure.data[dots].on_click(point)
    draw()
    twin = go.Figure(figure)
    tip = "hover over a dot in the left view. Is its match where it should be, and how close come the distractors?"
    alt = (
        f"{title}: two views of a slice with lines between matched cells, and how similar each cell is to one of them."
    )
    return Explorer(stack(hint(tip), figure, *controls.values()), twin, alt, controls, {"views": figure})


def _tiles(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str], title: str, foot: int) -> go.Figure:
    """Named rows of pictures (H,W,3) uint8, one column per title, with ``foot`` px of room below."""
    left, columns = 120, len(titles)
    for name, row in rows.items():
        if len(row) != columns:
            raise ValueError(f"row {name!r} has {len(row)} pictures for {columns} titles")
    cell = min(150.0, (WIDTH - left - 20) / columns)
    height = round(84 + foot + cell * len(rows))
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": height})
    for r, (name, row) in enumerate(rows.items()):
        figure.add_annotation(x=0, xshift=-8, y=(r + 0.5) * cell, text=name, xanchor="right", xref="x", yref="y")
        for c, picture in enumerate(row):
            _put(figure, picture, (c * cell + 1, r * cell + 1, cell - 2), layer="above")
    for c, name in enumerate(titles):
        figure.add_annotation(x=(c + 0.5) * cell, y=0, yshift=10, text=name, xref="x", yref="y")
    figure.update_layout(
        margin={"l": left, "r": 20, "t": 84, "b": foot},
        xaxis=bare_axis(range=[0, (WIDTH - left - 20)], fixedrange=True),
        yaxis=bare_axis(range=[len(rows) * cell, 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )
    return figure


def _key(figure: go.Figure, entries: Mapping[str, str]) -> None:
    """A legend of coloured squares."""
    for name, colour in entries.items():
        marker = {"symbol": "square", "size": 11, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)


def decoder_grid(
    image: np.ndarray,
    decisions: Mapping[str, np.ndarray],
    label: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[str],
    *,
    title: str = "",
) -> go.Figure:
    """What two decoders decide about one slice at several times, and where they differ; the label at the end.

    image, label: (H,W) · decisions: name of the time -> (2,H,W) int · classes, colours: names and ``#rrggbb`` of the
    label values 0, 1, ... (0 is background). Each title says in how many parts of the pixels the decoders differ. Cut
    to the label and half its size around it.
    """
    label = np.asarray(label)
    for name, two in decisions.items():
        if np.shape(two) != (2, *label.shape):
            raise ValueError(f"decisions {name!r} must be (2,{label.shape[0]},{label.shape[1]}), got {np.shape(two)}")
    if np.shape(image) != label.shape:
        raise ValueError(f"image must be of the label's size {label.shape}, got {np.shape(image)}")
    decisions = {name: np.asarray(two) for name, two in decisions.items()}
    box = pixels.focus(label)
    gray = pixels.to_gray(np.asarray(image, np.float32))[box]

    def tint(values: np.ndarray) -> np.ndarray:
        return pixels.blend(gray, pixels.label_overlay(values[box], colours))

    rows: dict[str, list[np.ndarray]] = {"decoder 1": [], "decoder 2": [], "they differ": []}
    titles = []
    for name, (one, two) in decisions.items():
        rows["decoder 1"].append(tint(one))
        rows["decoder 2"].append(tint(two))
        rows["they differ"].append(pixels.blend(gray, pixels.disagreement_overlay(one[box], two[box], colours)))
        titles.append(f"{name}: {100 * np.mean(one != two):.1f} %")
    for row, picture in zip(rows.values(), (tint(label), tint(label), pixels.blend(gray)), strict=True):
        row.append(picture)
    figure = _tiles(rows, [*titles, "label"], title, foot=46)
    shown = dict(zip(classes[1:], colours[1:], strict=True))
    _key(figure, {**shown, "they differ": DISAGREEMENT})
    return figure


def cluster_grid(
    images: np.ndarray,
    clusters: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[str],
    titles: Sequence[str],
    *,
    title: str = "",
) -> go.Figure:
    """Slices with their label, and below each how the cells of its feature map fall into clusters.

    images, labels: (N,H,W) · clusters: name -> (N,h,w) int, one row each; a colour means nothing but "the same cluster"
    within a row · titles: N texts.
    """
    images, labels = np.asarray(images, np.float32), np.asarray(labels)
    if images.ndim != 3 or labels.shape != images.shape or not len(images):
        raise ValueError(f"images and labels must be (N,H,W), at least one, got {images.shape} and {labels.shape}")
    gray = pixels.to_gray(images)
    rows = {"label": [pixels.blend(g, pixels.label_overlay(m, colours)) for g, m in zip(gray, labels, strict=True)]}
    size = gray.shape[1:]
    for name, maps in ((name, np.asarray(maps)) for name, maps in clusters.items()):
        if maps.ndim != 3 or len(maps) != len(gray):
            wanted = f"one map (h,w) for each of {len(gray)} slices"
            raise ValueError(f"clusters {name!r} must have {wanted}, got {maps.shape}")
        palette = ["#000000", *(CATEGORIES[i % len(CATEGORIES)] for i in range(int(np.max(maps)) + 1))]
        row = (np.arange(size[0]) * maps.shape[1] // size[0])[:, None]
        column = np.arange(size[1]) * maps.shape[2] // size[1]
        rows[name] = [
            pixels.blend(g, pixels.label_overlay(m[row, column] + 1, palette, fill=0.5))
            for g, m in zip(gray, maps, strict=True)
        ]
    figure = _tiles(rows, titles, title, foot=46)
    _key(figure, dict(zip(classes[1:], colours[1:], strict=True)))
    return figure


def cell_classes(labels: np.ndarray, cells: tuple[int, int], share: float = 0.25) -> np.ndarray:
    """The structure that a cell shows, (N,h,w) int: of ``labels`` (N,H,W) the commonest class but 0 where all of them
    together fill ``share`` of the cell or more, else 0. H and W must be multiples of ``cells`` (h,w)."""
    labels = np.asarray(labels)
    if labels.ndim != 3 or labels.dtype.kind not in "iub" or not labels.size or min(cells) < 1:
        raise ValueError(f"labels must be whole numbers (N,H,W), cells at least 1 x 1, got {labels.shape} and {cells}")
    if labels.shape[1] % cells[0] or labels.shape[2] % cells[1]:
        raise ValueError(f"labels must be (N,H,W) with H, W multiples of the cells {cells}, got {labels.shape}")
    count = int(labels.max()) + 1
    blocks = labels.reshape(len(labels), cells[0], labels.shape[1] // cells[0], cells[1], labels.shape[2] // cells[1])
    parts = np.stack([(blocks == value).mean(axis=(2, 4)) for value in range(count)])  # (classes,N,h,w)
    if count == 1:
        return np.zeros(parts.shape[1:], int)
    return np.where(parts[1:].sum(axis=0) >= share, parts[1:].argmax(axis=0) + 1, 0)


def neighbour_agreement(features: np.ndarray, kinds: np.ndarray, owners: np.ndarray) -> float:
    """How often the nearest neighbour of *another* owner is of the same kind: mean over points, then over kinds.

    features: (N,D), compared by cosine · kinds, owners: (N,). With k kinds, features that tell nothing give about 1/k,
    features that tell kinds apart 1. A kind that only one owner has is left out; nan where none remains.
    """
    features, kinds, owners = np.asarray(features), np.asarray(kinds), np.asarray(owners)
    if features.ndim != 2 or kinds.shape != (len(features),) or owners.shape != kinds.shape:
        raise ValueError(f"need one kind and owner per row, got {features.shape}, {kinds.shape} and {owners.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold values that are infinite or not a number")
    if not len(features):
        return float("nan")
    rows = unit(features)
    likeness = np.where(owners[:, None] == owners, -np.inf, rows @ rows.T)
    same = kinds[likeness.argmax(axis=1)] == kinds
    shared = [kind for kind in np.unique(kinds) if len(np.unique(owners[kinds == kind])) > 1]
    return float(np.mean([same[kinds == kind].mean() for kind in shared])) if shared else float("nan")
