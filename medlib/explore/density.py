"""How dense the features of a class lie: a cloud to drag, clouds over training, sparse places on the slice, scores."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.ndimage import distance_transform_edt
from sklearn.cluster import KMeans
from sklearn.metrics import davies_bouldin_score, silhouette_score, v_measure_score
from torch import Tensor

from medlib.explore import pixels
from medlib.explore.live import LiveFigure
from medlib.explore.measures import unit
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import (
    CARD,
    DISAGREEMENT,
    INK,
    MUTED,
    SERIES,
    TEMPLATE,
    WIDTH,
    bare_axis,
    method_colours,
    position_scale,
)
from medlib.losses.dacl import (
    densest,
    feature_density,
    positiveness_weights,
    soft_density_guided_loss,
    sparsest,
)

_REACH = 1.6  # of the window on the sphere, to each side
_OTHERS = "other class"
_ARROW = 0.3  # length of the longest arrow, in units of the window
_BIN_EDGES = (0.0, 1.5, 2.5, 4.5)  # px to the nearest pixel of another class: touching, next to touching, near, inside
_BIN_NAMES = ("1 px (touching)", "2 px", "3-4 px", "5 px and more")


class Cloud(NamedTuple):
    """Pixels of one moment: ``points`` (M,2), ``density`` (M,), and bool (M,): ``mine`` for the pixels of the class
    that is looked at, ``anchor`` and ``dense`` for the anchors and keys."""

    points: np.ndarray
    mine: np.ndarray
    density: np.ndarray
    anchor: np.ndarray
    dense: np.ndarray


class ClusterScores(NamedTuple):
    """How well features fall into their classes: silhouette and V-measure higher, Davies-Bouldin lower is better."""

    silhouette: float
    davies_bouldin: float
    v_measure: float


# ---- numbers


def cluster_scores(features: np.ndarray, classes: np.ndarray, seed: int = 0) -> ClusterScores:
    """The three scores of DACL's Figure 1, on the directions of the features (rows of length 1).

    features: (N,D) · classes: (N,) int, two classes or more, not each row its own. Silhouette (cosine distance, in
    [-1, 1]) and Davies-Bouldin (Euclidean, from 0) take the classes as the clusters; the V-measure, in [0, 1], compares
    the classes with what k-means of as many clusters finds, seeded. The paper states none of these choices.
    """
    features, classes = np.asarray(features), np.asarray(classes)
    if features.ndim != 2 or classes.shape != (len(features),):
        raise ValueError(f"features must be (N,D) and classes (N,), got {features.shape} and {classes.shape}")
    count = len(np.unique(classes))
    if not 2 <= count < len(features):
        raise ValueError(f"scores need 2 to N - 1 classes, got {count} in {len(features)} features")
    rows = unit(features)
    found = KMeans(count, n_init=10, random_state=seed).fit_predict(rows)
    return ClusterScores(
        float(silhouette_score(rows, classes, metric="cosine")),
        float(davies_bouldin_score(rows, classes)),
        float(v_measure_score(classes, found)),
    )


def boundary_distance(maps: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How far each place is from the nearest pixel of another class in its slice, (M,) in px: 1 where they touch.

    maps: (N,H,W) int · places: (M,3) int, slice, row and column. Infinite in a slice of one class.
    """
    maps, places = np.asarray(maps), np.asarray(places)
    if maps.ndim != 3 or places.ndim != 2 or places.shape[1] != 3:
        raise ValueError(f"maps must be (N,H,W) and places (M,3), got {maps.shape} and {places.shape}")
    distance = np.full(maps.shape, np.inf)
    for n in np.unique(places[:, 0]):
        values = np.unique(maps[n])
        for value in values[len(values) == 1 :]:  # a slice of one class has no boundary
            mine = maps[n] == value
            distance[n][mine] = distance_transform_edt(mine)[mine]
    return distance[tuple(places.T)]


# ---- pictures


def _density_bar(**where: Any) -> dict:
    title = {"text": "density", "side": "right", "font": {"size": 12, "color": MUTED}}
    return {"title": title, "thickness": 12, "outlinewidth": 0, "tickfont": {"color": MUTED}, **where}


def _marks() -> dict[str, dict]:
    """How anchors and dense keys are drawn around their points."""
    return {
        "sparse: anchor": {"symbol": "circle-open", "size": 13, "color": DISAGREEMENT, "line": {"width": 2.2}},
        "dense: key": {"symbol": "square-open", "size": 11, "color": INK, "line": {"width": 1.3}},
    }


def cloud_figure(clouds: Mapping[str, Cloud], *, notes: Mapping[str, str] | None = None, title: str = "") -> go.Figure:
    """One panel per moment: the pixels of a class coloured by density, its anchors ringed, its keys in squares.

    Pixels of other classes are gray. clouds: name -> `Cloud` · notes: name -> text below it. Axes have no unit, and
    each panel its own; the colours mean the same in all, and the lowest 2 % share one.
    """
    if not clouds:
        raise ValueError("clouds is empty: give at least one name with its Cloud")
    for name, cloud in clouds.items():
        lengths = {key: len(value) for key, value in cloud._asdict().items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"cloud {name!r}: one row per pixel in every part, got {lengths}")
    figure = make_subplots(1, len(clouds), column_titles=[f"<b>{n}</b>" for n in clouds], horizontal_spacing=0.03)
    for column, (name, cloud) in enumerate(clouds.items(), start=1):
        points, mine = np.asarray(cloud.points, float).round(3), np.asarray(cloud.mine)
        coloured = {"color": np.round(cloud.density[mine], 3), "coloraxis": "coloraxis", "size": 5}
        drawn = [(~mine, "other classes", {"color": "#c3cad2", "size": 4}), (mine, "the class", coloured)]
        for (kind, look), chosen in zip(_marks().items(), (cloud.anchor, cloud.dense), strict=True):
            drawn.append((mine & chosen, kind, {**look, "size": 8, "line": {"width": 1.3}}))
        for chosen, kind, look in drawn:
            figure.add_trace(
                go.Scatter(
                    x=points[chosen, 0], y=points[chosen, 1], mode="markers", marker=look, name=kind, legendgroup=kind,
                    showlegend=column == 1 and kind != "the class",
                    hovertemplate="density %{marker.color:.3f}<extra></extra>" if kind == "the class" else None,
                    hoverinfo="skip",
                ),
                row=1, col=column,
            )  # fmt: skip
        axis = "" if column == 1 else str(column)
        if notes and name in notes:
            figure.add_annotation(text=notes[name], x=0.5, y=-0.03, xref=f"x{axis} domain", yref=f"y{axis} domain",
                                  yanchor="top")  # fmt: skip
    box = {"showgrid": False, "showticklabels": False, "showline": True, "mirror": True, "constrain": "domain"}
    figure.update_xaxes(box)
    figure.update_yaxes(box)
    lowest = np.percentile(np.concatenate([cloud.density[cloud.mine] for cloud in clouds.values()]), 2)
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=390,
        margin={"l": 20, "r": 20, "t": 84, "b": 86},
        coloraxis={"colorscale": position_scale(), "cmin": min(round(float(lowest), 3), 0.999), "cmax": 1,
                   "colorbar": _density_bar(len=0.9)},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )  # fmt: skip
    return figure


def sparse_places(
    images: np.ndarray,
    maps: np.ndarray,
    places: np.ndarray,
    anchor: np.ndarray,
    dense: np.ndarray,
    colours: Sequence[str],
    *,
    slices: Sequence[int],
    titles: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Where on the slices the anchors and the dense keys lie: each slice with its classes, and below it the places.

    images: (N,H,W) · maps: (N,H,W) int, the classes the pixels were taken for · places: (M,3) int, slice, row and
    column · anchor, dense: (M,) bool · colours: ``#rrggbb`` of the class values (0 stays clear) · slices: which of the
    N to draw · titles: one text for each of them. All are cut to the structures and half their size around them.
    """
    images, maps, places = np.asarray(images), np.asarray(maps), np.asarray(places)
    if images.ndim != 3 or maps.shape != images.shape or places.shape != (len(anchor), 3) or len(dense) != len(anchor):
        raise ValueError(
            f"images and maps must be (N,H,W), places (M,3), anchor and dense (M,); got {images.shape}, {maps.shape}, "
            f"{places.shape}, {np.shape(anchor)}, {np.shape(dense)}"
        )
    slices = list(slices)
    rows, columns = pixels.focus(maps[slices])
    cut = images[slices][:, rows, columns].astype(np.float32)
    gray = pixels.to_gray(cut, tuple(np.percentile(cut, (1, 99))))
    tall, wide = cut.shape[1:]
    step, head = wide * 1.04, tall * 0.12
    left = 84
    scale = (WIDTH - left - 20) / (step * len(slices))
    height = 2 * tall + head + tall * 0.04
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(58 + 46 + height * scale)})
    at: dict[str, list[np.ndarray]] = {kind: [] for kind in _marks()}
    for n, number in enumerate(slices):
        for line, layer in enumerate((pixels.label_overlay(maps[number, rows, columns], colours), None)):
            figure.add_layout_image(
                source=pixels.data_uri(pixels.blend(gray[n], layer)), x=n * step, y=head + line * tall * 1.04,
                sizex=wide, sizey=tall, xref="x", yref="y", sizing="stretch", layer="below",
            )  # fmt: skip
        if titles is not None:
            figure.add_annotation(x=n * step + wide / 2, y=head / 2, text=titles[n], xref="x", yref="y")
        for kind, chosen in zip(_marks(), (anchor, dense), strict=True):
            mine = places[(places[:, 0] == number) & np.asarray(chosen)]
            y = mine[:, 1] - rows.start + 0.5 + head + tall * 1.04
            at[kind].append(np.stack([mine[:, 2] - columns.start + 0.5 + n * step, y], axis=1))
    for kind, look in _marks().items():
        spots = np.concatenate(at[kind])
        marker = {"symbol": "circle", "size": 4.5, "color": look["color"], "line": {"width": 0.6, "color": CARD}}
        marker["color"] = "#F0E442" if kind.startswith("dense") else look["color"]
        figure.add_scatter(x=spots[:, 0], y=spots[:, 1], mode="markers", marker=marker, name=kind, hoverinfo="skip")
    for line, name in enumerate(("classes", "places")):
        y = head + tall * (0.5 + line * 1.04)
        figure.add_annotation(x=0, xshift=-8, y=y, text=name, xanchor="right", xref="x", yref="y")
    figure.update_layout(
        margin={"l": left, "r": 20, "t": 58, "b": 46},
        xaxis=bare_axis(range=[0, step * len(slices)], fixedrange=True),
        yaxis=bare_axis(range=[height, 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )
    return figure


def boundary_bars(distances: Mapping[str, np.ndarray], *, title: str = "Where they lie") -> go.Figure:
    """Per group of pixels, the share that lies so far from the nearest pixel of another class.

    distances: name -> (M,) in px, of `boundary_distance`. The bars of a group add up to 100 %.
    """
    figure = go.Figure()
    for (name, values), colour in zip(distances.items(), method_colours(list(distances)).values(), strict=True):
        if not len(values):
            raise ValueError(f"group {name!r} is empty: there is no share to draw")
        place = np.digitize(values, _BIN_EDGES) - 1
        share = np.bincount(place, minlength=len(_BIN_NAMES)) / len(values) * 100
        figure.add_bar(x=list(_BIN_NAMES), y=share.round(1), name=name, marker={"color": colour})
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=340,
        xaxis={"title": "distance to the nearest pixel of another class"},
        yaxis={"title": "% of the group", "rangemode": "tozero"},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    )
    return figure


def score_curves(
    scores: Mapping[str, Mapping[int, ClusterScores]], *, title: str = "Clusters over training"
) -> go.Figure:
    """`ClusterScores` over the steps of a training, one panel per score and one line per method.

    scores: method -> step -> scores.
    """
    panels = {"silhouette": "silhouette ↑", "davies_bouldin": "Davies-Bouldin ↓", "v_measure": "V-measure ↑"}
    figure = make_subplots(1, 3, column_titles=list(panels.values()), horizontal_spacing=0.09)
    colours = method_colours(list(scores))
    for column, field in enumerate(panels, start=1):
        for name, line in scores.items():
            values = [round(getattr(one, field), 4) for one in line.values()]
            figure.add_trace(
                go.Scatter(
                    x=list(line), y=values, mode="lines+markers", name=name, legendgroup=name, showlegend=column == 1,
                    line={"color": colours[name], "width": 2.2},
                ),
                row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title_text="step")
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=360,
        margin={"t": 84, "b": 88},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    return figure


# ---- the cloud to drag


def on_sphere(points: Tensor) -> Tensor:
    """The features (N,3) that points (N,2) of a flat map stand for: the map touches the unit sphere at its middle."""
    raised = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    return raised / raised.norm(dim=1, keepdim=True)


def density_explorer(
    points: np.ndarray,
    others: np.ndarray,
    handles: Mapping[str, Sequence[int]],
    *,
    scales: Sequence[Sequence[int]] = ((4,), (8,), (16,), (32,), (8, 16, 32)),
    anchors: int = 10,
    keys: int = 20,
    temperature: float = 0.4,
    title: str = "A class as a cloud",
) -> Explorer:
    """A class of features on a map of the sphere, its density, its anchors and keys, and where the loss moves them.

    points: (N,2) of the class, N <= 200 · others: (K,2), the negatives, pixels of another class · handles: name ->
    rows of ``points`` that move together; the others have a handle, too · scales: choices for the numbers of
    neighbours, the last one shown first · anchors, keys, temperature: first values. A point (x, y) stands for the
    direction of (x, y, 1), so that cosines can be seen as distances. Density is measured in the class itself, each
    point counting itself, as eq. 3 has it.

    Drag a handle (its label), or move it with ``group``, ``x`` and ``y``; other controls: ``scales``, ``anchors``,
    ``keys``. Arrows show minus the gradient on each anchor, at one scale; very long ones are shortened.
    """
    start, foes = np.array(points, np.float64), np.array(others, np.float64)
    if start.ndim != 2 or start.shape[1] != 2 or not 2 <= len(start) <= 200 or foes.ndim != 2 or foes.shape[1] != 2:
        raise ValueError(f"points must be (N,2), 2 <= N <= 200, and others (K,2), got {start.shape} and {foes.shape}")
    if not handles:
        raise ValueError("handles is empty: name at least one group of points that can be moved")
    own = len(start)
    moved, busy = np.concatenate([start, foes]), [False]
    groups = {name: np.asarray(rows, int) for name, rows in handles.items()} | {_OTHERS: own + np.arange(len(foes))}
    names = list(groups)

    menu: dict[str, Any] = {"style": {"description_width": "90px"}, "layout": ipywidgets.Layout(width="350px")}
    choices = [(" + ".join(map(str, k)), tuple(k)) for k in scales]
    middle = start[groups[names[0]]].mean(axis=0)
    place = dict(min=-_REACH, max=_REACH, step=0.02, readout_format=".2f", **menu)
    controls: dict[str, Any] = {
        "scales": ipywidgets.SelectionSlider(options=choices, value=choices[-1][1], description="neighbours", **menu),
        "anchors": ipywidgets.IntSlider(anchors, 1, len(start) // 2, description="anchors", **menu),
        "keys": ipywidgets.IntSlider(keys, 1, len(start) // 2, description="keys", **menu),
        "group": ipywidgets.ToggleButtons(options=names, description="move", style={"description_width": "70px"}),
        "x": ipywidgets.FloatSlider(middle[0], description="x", **place),
        "y": ipywidgets.FloatSlider(middle[1], description="y", **place),
    }

    def state() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
        """Density, rows of anchors, rows of keys, centre on the map, push on the anchors, loss."""
        flat = torch.tensor(moved[:own], dtype=torch.float64, requires_grad=True)
        features, negatives = on_sphere(flat), on_sphere(torch.from_numpy(moved[own:]))
        density = feature_density(features.detach(), features.detach(), controls["scales"].value)
        everyone = torch.ones_like(density, dtype=torch.bool)
        sparse, _ = sparsest(density, everyone, controls["anchors"].value)
        thick, _ = densest(density, everyone, controls["keys"].value)
        center = features.detach()[thick].mean(dim=0)
        weights = positiveness_weights(features[sparse], center)
        loss = soft_density_guided_loss(features[sparse], center, negatives, weights, temperature)
        (slope,) = torch.autograd.grad(loss, flat)
        on_map = (center[:2] / center[2]).numpy()
        return density.numpy(), sparse.numpy(), thick.numpy(), on_map, -slope[sparse].numpy(), loss.item()

    density, _, _, _, push, _ = state()
    longest = max(float(np.linalg.norm(push, axis=1).max()), 1e-12)
    frame = go.Figure()
    cross = {"symbol": "x-thin-open", "size": 7, "color": MUTED}
    frame.add_scatter(mode="markers", name=_OTHERS, marker=cross, hoverinfo="skip")
    frame.add_scatter(
        mode="lines+markers", name="where the loss moves them", hoverinfo="skip", line={"color": INK, "width": 1.4},
        marker={"symbol": "arrow", "angleref": "previous", "color": INK},
    )  # fmt: skip
    frame.add_scatter(
        mode="markers", name="the class", showlegend=False, hovertemplate="density %{marker.color:.3f}<extra></extra>",
        marker={"coloraxis": "coloraxis", "size": 8, "line": {"color": CARD, "width": 0.5}},
    )  # fmt: skip
    for kind, look in _marks().items():
        frame.add_scatter(mode="markers", marker=look, name=kind, hoverinfo="skip")
    star_look = {"symbol": "star", "size": 17, "color": SERIES[4], "line": {"color": INK, "width": 1}}
    frame.add_scatter(mode="markers", name="centre of the keys", hoverinfo="skip", marker=star_look)
    box = {"range": [-_REACH, _REACH], "showgrid": False, "showticklabels": False, "showline": True, "mirror": True}
    frame.update_layout(
        template=TEMPLATE,
        height=590,
        margin={"l": 20, "r": 20, "t": 56, "b": 70},
        xaxis={**box, "fixedrange": True, "constrain": "domain"},
        yaxis={**box, "fixedrange": True, "scaleanchor": "x", "constrain": "domain"},
        coloraxis={"colorscale": position_scale(), "cmin": round(float(density.min()) - 0.02, 2), "cmax": 1,
                   "colorbar": _density_bar(len=0.9)},
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )  # fmt: skip
    for name, rows in groups.items():
        x, y = _beside(moved[rows])
        frame.add_annotation(x=x, y=y, text=f"✥ {name}", bgcolor=CARD, bordercolor=INK, borderpad=3, opacity=0.85,
                             font={"color": INK})  # fmt: skip
    figure = LiveFigure(frame)
    figure._config = {**figure._config, "edits": {"annotationPosition": True}}

    def draw(change: object = None) -> None:
        if busy[0]:
            return
        density, sparse, thick, center, push, loss = state()
        crosses, arrows, cloud, *marks, star = figure.data
        ends = moved[sparse] + _ARROW * np.tanh(push / longest)
        gap = np.full((len(sparse), 1), np.nan)
        lines = [np.concatenate([moved[sparse, i : i + 1], ends[:, i : i + 1], gap], 1).ravel() for i in (0, 1)]
        redraw(arrows, x=lines[0], y=lines[1], **{"marker.size": np.tile([0, 8, 0], len(sparse))})
        redraw(crosses, x=moved[own:, 0].copy(), y=moved[own:, 1].copy())
        redraw(cloud, x=moved[:own, 0].copy(), y=moved[:own, 1].copy(), **{"marker.color": density.round(4)})
        for trace, rows in zip(marks, (sparse, thick), strict=True):
            redraw(trace, x=moved[rows, 0], y=moved[rows, 1])
        redraw(star, x=center[:1], y=center[1:])
        taken = [
            f"{name}: anchors {np.isin(groups[name], sparse).sum()}, keys {np.isin(groups[name], thick).sum()}"
            for name in handles
        ]
        text = f"{title} <span style='font-size:13px'> {' · '.join([f'loss {loss:.3f}', *taken])}</span>"
        busy[0] = True
        with figure.batch_update():
            figure.layout.title.text = text
            for handle, rows in zip(figure.layout.annotations, groups.values(), strict=True):
                handle.x, handle.y = _beside(moved[rows])
        busy[0] = False

    def shift(name: str, to: np.ndarray) -> None:
        rows = groups[name]
        moved[rows] += np.clip(to, -_REACH, _REACH) - moved[rows].mean(axis=0)

    def choose(change: object = None) -> None:
        busy[0] = True  # two sliders move: draw once, and do not move the group from half of the news
        controls["x"].value, controls["y"].value = moved[groups[controls["group"].value]].mean(axis=0)
        busy[0] = False

    def slide(change: object = None) -> None:
        if not busy[0]:
            shift(controls["group"].value, np.array([controls["x"].value, controls["y"].value]))
            draw()

    def dropped(layout: Any, annotations: Any) -> None:
        if busy[0]:
            return
        for handle, (name, rows) in zip(annotations, groups.items(), strict=True):
            away = np.array([handle.x, handle.y]) - _beside(moved[rows])
            if np.abs(away).max() > 1e-9:
                shift(name, moved[rows].mean(axis=0) + away)
                controls["group"].value = name
        choose()
        draw()

    controls["group"].observe(choose, names="value")
    for name in ("x", "y"):
        controls[name].observe(slide, names="value")
    for name in ("scales", "anchors", "keys"):
        controls[name].observe(draw, names="value")
    figure.layout.on_change(dropped, "annotations")
    draw()
    twin = go.Figure(figure)
    tip = (
        f"drag <b>✥ {names[0]}</b> away from the cloud and back. From where on are its points anchors? Then let fewer "
        "neighbours count."
    )
    alt = (
        f"{title}: {len(start)} points of one class coloured by density, the sparsest ringed as anchors, the densest "
        "in squares as keys, their centre a star, and arrows along which the loss moves the anchors."
    )
    sliders = [ipywidgets.HBox([controls[a], controls[b]]) for a, b in (("anchors", "keys"), ("x", "y"))]
    widget = stack(hint(tip), figure, controls["scales"], sliders[0], controls["group"], sliders[1])
    return Explorer(widget, twin, alt, controls, {"cloud": figure})


def _beside(rows: np.ndarray) -> tuple[float, float]:
    """Where the label of a group stands: above its middle, clear of its points."""
    return float(rows[:, 0].mean()), float(rows[:, 1].max()) + 0.17
