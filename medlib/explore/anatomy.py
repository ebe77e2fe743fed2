"""MONA to look at: the long tail, where queries and negatives lie, the relation of classes, a warp, neighbours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from kornia.geometry.transform import get_affine_matrix2d
from plotly.subplots import make_subplots
from torch import Tensor

from medlib.augment import ThinPlateAugmentation, Warp
from medlib.explore import pixels
from medlib.explore.live import LiveFigure
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import (
    CARD,
    DISAGREEMENT,
    GRID,
    INK,
    SERIES,
    TEMPLATE,
    WIDTH,
    bare_axis,
)
from medlib.losses.mona import class_relation_distribution, equivariance_loss
from medlib.rng import generator

_BACKGROUND = "#c3cad2"  # of bars and crosses of the class that has no colour
_SHADE = [[0, CARD], [1, SERIES[0]]]
_BEND = 0.1  # range of the control points' moves at bend 1, in parts of half the side; MONA's code has 0.01
_SURE = 1.0  # nats of divergence per pixel that are drawn in full colour
_MOST_SLICES = 6
_LINE = 17  # px of a line of small text
_REACH = 3.0  # of the plane of class means, to each side

Predict = Callable[[Tensor], Tensor]


def _lines_of(texts: Sequence[str]) -> int:
    """The most lines that one of the texts has."""
    return max((text.count("<br>") + 1 for text in texts), default=0)


class Draw(NamedTuple):
    """The pixels that one step contrasts, per class: ``queries`` (n_c,) and which of them are ``hard`` (n_c,) bool,
    ``negatives`` (m_c,). A pixel is (n * H + y) * W + x for slice n."""

    queries: Sequence[np.ndarray]
    hard: Sequence[np.ndarray]
    negatives: Sequence[np.ndarray]


# ---- the long tail


def long_tail_bars(counts: Mapping[str, Mapping[str, int]], *, title: str = "") -> go.Figure:
    """The share of each class in all pixels, on a log axis: one panel per data set, the largest class first.

    counts: data set -> class -> number of pixels. A class without a pixel has no bar. The class "background" is gray.
    """
    if not counts or any(sum(classes.values()) <= 0 for classes in counts.values()):
        raise ValueError(f"counts must hold pixels for each data set, got {dict(counts)}")
    rows = [len(classes) for classes in counts.values()]
    bars = 25 * sum(rows) + 34 * len(rows)
    figure = make_subplots(
        len(rows), 1, shared_xaxes=True, row_heights=rows, vertical_spacing=30 / bars if len(rows) > 1 else 0
    )
    lowest = 100.0
    for row, (name, classes) in enumerate(counts.items(), start=1):
        total = sum(classes.values())
        order = sorted(classes, key=lambda one: -classes[one])
        share = np.array([100 * classes[one] / total for one in order])
        lowest = min([lowest, *share[share > 0]])
        text = [f"{value:.2g} %" if value < 10 else f"{value:.0f} %" for value in share]
        colour = [_BACKGROUND if one == "background" else SERIES[0] for one in order]
        figure.add_trace(
            go.Bar(
                x=[value if value > 0 else None for value in share], y=order, orientation="h", text=text, name=name,
                textposition="outside", cliponaxis=False, marker={"color": colour}, showlegend=False,
                hovertemplate="%{y}: %{x:.3g} %<extra></extra>",
            ),
            row=row, col=1,
        )  # fmt: skip
        axis = "" if row == 1 else str(row)
        figure.add_annotation(
            text=f"<b>{name}</b>", x=0, xref="x domain", y=1, yref=f"y{axis} domain", xanchor="left", yanchor="bottom"
        )
    smallest = 10 ** np.floor(np.log10(lowest))
    ticks = [t for t in (0.0001, 0.001, 0.01, 0.1, 1, 10, 100) if t >= smallest]
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(
        type="log", range=[np.log10(smallest), 2.35], tickvals=ticks, ticktext=[f"{tick:g} %" for tick in ticks]
    )
    figure.update_xaxes(title_text="share of all pixels", row=len(rows), col=1)
    figure.update_layout(
        template=TEMPLATE, title=title, height=bars + 130, margin={"l": 130, "r": 24, "t": 78, "b": 52}, bargap=0.25
    )
    return figure


# ---- where queries and negatives lie


def anchor_explorer(
    images: np.ndarray,
    labels: np.ndarray,
    draws: Mapping[str, Draw],
    classes: Sequence[str],
    colours: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    title: str = "Where the contrast looks",
) -> Explorer:
    """Slices with their classes, and below them the query pixels of one class and the negatives they meet.

    images: (N,H,W), N <= 6 · labels: (N,H,W) int, the classes the pixels were taken for, -1 for none · draws: name ->
    `Draw`; several names become a control · classes, colours: names and ``#rrggbb`` of the label values 0, 1, ... ·
    titles: one per slice. A cross has the colour of its own class. Controls: ``class``, and ``shown``.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 3 or images.shape != labels.shape or not 1 <= len(images) <= _MOST_SLICES:
        raise ValueError(
            f"images and labels must be (N,H,W), N from 1 to {_MOST_SLICES}, got {images.shape} and {labels.shape}"
        )
    if not draws:
        raise ValueError("draws is empty: give at least one name with its Draw")
    for name, draw in draws.items():
        if any(len(part) != len(classes) for part in draw):
            raise ValueError(f"draw {name!r} must have queries, hard and negatives for each of {len(classes)} classes")
    count, height, width = images.shape
    step, line, left = width * 1.04, height * 1.04, 62
    scale = (WIDTH - left - 20) / (step * count)
    head = _lines_of(titles or ()) * _LINE / scale + 0.02 * height
    figure = LiveFigure(layout={"template": TEMPLATE, "height": round(86 + 50 + (head + 2 * line) * scale)})
    limits = tuple(np.percentile(images, (1, 99)))
    for n in range(count):
        gray = pixels.to_gray(images[n].astype(np.float32), limits)
        for row, layer in enumerate((pixels.label_overlay(labels[n], colours), None)):
            figure.add_layout_image(
                source=pixels.data_uri(pixels.blend(gray, layer)), x=n * step, y=head + row * line, sizex=width,
                sizey=height, xref="x", yref="y", sizing="stretch", layer="below",
            )  # fmt: skip
        if titles is not None:
            figure.add_annotation(x=n * step + width / 2, y=head, text=titles[n], yanchor="bottom", xref="x", yref="y")
    for row, text in enumerate(("classes", "drawn")):
        y = head + row * line + height / 2
        figure.add_annotation(x=0, xshift=-8, y=y, text=text, xanchor="right", xref="x", yref="y")
    # A hair of black around each mark: tints of the slice below are as bright as the marks.
    palette = [_BACKGROUND, *colours[1:]]
    cross = {"symbol": "x", "size": 5, "line": {"width": 0.5, "color": INK}}
    looks = {f"negatives: {name}": cross | {"color": palette[c]} for c, name in enumerate(classes)}
    looks |= {
        "easy queries": {"symbol": "circle-open", "size": 7, "line": {"width": 1.8}},
        "hard queries": {"symbol": "circle", "size": 7, "line": {"width": 0.9, "color": CARD}},
    }
    for name, look in looks.items():
        figure.add_scatter(x=[], y=[], mode="markers", name=name, marker=look, hoverinfo="skip")
    figure.update_layout(
        margin={"l": left, "r": 20, "t": 86, "b": 50},
        xaxis=bare_axis(range=[0, step * count], fixedrange=True),
        yaxis=bare_axis(range=[head + 2 * line, 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )
    flat = labels.flatten()

    names = {"style": {"description_width": "50px", "button_width": "auto"}}
    rarest = min(range(len(classes)), key=lambda c: ((flat == c).sum() or flat.size, c))
    controls: dict[str, ipywidgets.ValueWidget] = {
        "class": ipywidgets.ToggleButtons(options=list(classes), value=classes[rarest], description="class", **names)
    }
    if len(draws) > 1:
        controls["shown"] = ipywidgets.ToggleButtons(options=list(draws), value=list(draws)[-1], description="shown",
                                                     **names)  # fmt: skip

    def place(index: np.ndarray) -> dict[str, np.ndarray]:
        n, y, x = np.unravel_index(np.asarray(index, int), images.shape)
        return {"x": x + 0.5 + n * step, "y": y + 0.5 + head + line}

    def show(change: object = None) -> None:
        name = controls["shown"].value if "shown" in controls else next(iter(draws))
        c = list(classes).index(controls["class"].value)
        queries, hard, negatives = (np.asarray(part[c]) for part in draws[name])
        hard = hard.astype(bool)
        *crosses, easy_dots, hard_dots = figure.data
        own = flat[negatives.astype(int)]
        for v, trace in enumerate(crosses):
            redraw(trace, **place(negatives[own == v]))
        redraw(easy_dots, **place(queries[~hard]), **{"marker.color": palette[c]})
        redraw(hard_dots, **place(queries[hard]), **{"marker.color": palette[c]})
        said = f"{classes[c]}: {len(queries)} queries"
        said += f", {100 * hard.mean():.0f} % of them hard" if len(queries) else ""
        if len(negatives):
            shares = [(int((own == v).sum()), classes[v]) for v in range(len(classes))]
            of = [f"{100 * n / len(negatives):.0f} % {v}" for n, v in sorted(shares, reverse=True) if n]
            said += f"; {len(negatives)} negatives: {', '.join(of)}"
        which = f", {name}" if "shown" in controls else ""
        with figure.batch_update():
            figure.layout.title.text = f"{title}{which}<br><span style='font-size:13px'>{said}</span>"

    for control in controls.values():
        control.observe(show, names="value")
    show()
    tip = "choose a class. Where do its queries lie, and from which classes do its negatives come?"
    alt = f"{title}: {count} slices with their classes, and the query pixels of one class with the negatives they meet."
    return Explorer(stack(hint(tip), figure, *controls.values()), go.Figure(figure), alt, controls, {"slices": figure})


# ---- the relation of classes


def _heat(relation: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """A table of shares as a heat map, the first row on top."""
    return {
        "z": relation.round(4), "x": list(classes), "y": list(classes), "zmin": 0, "zmax": 1, "colorscale": _SHADE,
        "texttemplate": "%{z:.2f}", "showscale": False, "xgap": 3, "ygap": 3,
        "hovertemplate": "class %{y}: %{z:.1%} of its negatives are %{x}<extra></extra>",
    }  # fmt: skip


def _check_relations(relations: Mapping[str, np.ndarray], classes: Sequence[str]) -> dict[str, np.ndarray]:
    if not relations:
        raise ValueError("relations is empty: give at least one name with its table")
    tables = {name: np.asarray(table, np.float64) for name, table in relations.items()}
    for name, table in tables.items():
        if table.shape != (len(classes), len(classes)):
            raise ValueError(f"relation {name!r} must be ({len(classes)},{len(classes)}), got {table.shape}")
    return tables


def relation_figure(
    relations: Mapping[str, np.ndarray], classes: Sequence[str], *, title: str = "Where negatives come from"
) -> go.Figure:
    """Tables (C,C) beside each other: row c says which part of the negatives of class c comes from each other class."""
    tables = _check_relations(relations, classes)
    figure = make_subplots(
        1,
        len(tables),
        column_titles=list(tables),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        x_title="negatives come from",
    )
    for column, table in enumerate(tables.values(), start=1):
        figure.add_trace(go.Heatmap(**_heat(table, classes)), row=1, col=column)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, autorange="reversed")
    figure.update_layout(
        template=TEMPLATE, title=title, height=360, margin={"l": 92, "t": 84, "b": 64}, yaxis={"title": "class"}
    )
    return figure


def relation_explorer(
    relations: Mapping[str, np.ndarray], classes: Sequence[str], *, title: str = "Where negatives come from"
) -> Explorer:
    """The relation of classes as a heat map that a slider moves through time.

    relations: name of the time -> (C,C), see `relation_figure`. Control: ``shown``. The twin shows both ends.
    """
    tables = _check_relations(relations, classes)
    names = list(tables)
    figure = LiveFigure(relation_figure({names[-1]: tables[names[-1]]}, classes, title=title))
    figure.update_layout(height=400, width=520)
    wide = {"layout": ipywidgets.Layout(width="420px"), "style": {"description_width": "60px"}}
    controls = {"shown": ipywidgets.SelectionSlider(options=names, value=names[-1], description="shown", **wide)}

    def show(change: object = None) -> None:
        redraw(figure.data[0], z=tables[controls["shown"].value].round(4))
        with figure.batch_update():
            figure.layout.annotations[0].text = controls["shown"].value

    controls["shown"].observe(show, names="value")
    show()
    ends = {name: tables[name] for name in dict.fromkeys((names[0], names[-1]))}
    tip = "drag <b>shown</b> from the first step to the last. Which classes does the network find alike, and when?"
    alt = f"{title}: heat maps of the classes from which each class takes its negatives, {names[0]} and {names[-1]}."
    twin = relation_figure(ends, classes, title=title)
    return Explorer(stack(hint(tip), figure, *controls.values()), twin, alt, controls, {"relation": figure})


def relation_plane(
    prototypes: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[str],
    *,
    title: str = "Class means, and who is whose negative",
) -> Explorer:
    """Class means in the plane to turn and to stretch, and the heat map of where negatives come from.

    prototypes: (C,2) · colours: ``#rrggbb``, one per class. Controls: ``class`` (which to move), ``angle`` in degrees
    and ``length``. A click on a mean chooses it.
    """
    moved = np.array(prototypes, np.float64)
    if moved.ndim != 2 or moved.shape[1] != 2 or not len(moved) == len(classes) == len(colours) or len(moved) < 2:
        raise ValueError(
            f"prototypes must be (C,2) with C >= 2, one class and colour each, got {moved.shape}, {len(classes)} and "
            f"{len(colours)}"
        )
    palette, busy = [_BACKGROUND, *colours[1:]], [False]
    frame = make_subplots(1, 2, column_widths=[0.5, 0.5], horizontal_spacing=0.16)
    for c in range(len(moved)):
        frame.add_trace(
            go.Scatter(
                mode="lines+markers+text", showlegend=False, hoverinfo="skip", text=["", f" {classes[c]} "],
                line={"color": palette[c], "width": 4}, textfont={"color": INK},
                marker={"size": [0, 15], "color": palette[c], "line": {"color": INK, "width": 1}},
            ),
            row=1, col=1,
        )  # fmt: skip
    frame.add_trace(go.Heatmap(**_heat(np.zeros((len(moved), len(moved))), classes)), row=1, col=2)
    view = {"range": [-_REACH, _REACH], "showticklabels": False, "fixedrange": True, "zeroline": True}
    frame.update_layout(
        template=TEMPLATE,
        title=title,
        height=400,
        margin={"l": 20, "r": 20, "t": 66, "b": 62},
        xaxis={**view, "zerolinecolor": GRID},
        yaxis={**view, "zerolinecolor": GRID, "scaleanchor": "x"},
        xaxis2={"title": "negatives come from", "showgrid": False},
        yaxis2={"title": "class", "showgrid": False, "autorange": "reversed"},
    )
    figure = LiveFigure(frame)
    wide: dict[str, Any] = {"layout": ipywidgets.Layout(width="350px"), "style": {"description_width": "50px"}}
    radius, angle = np.linalg.norm(moved, axis=1), np.degrees(np.arctan2(moved[:, 1], moved[:, 0])) % 360
    chosen = len(moved) - 1
    controls: dict[str, Any] = {
        "class": ipywidgets.ToggleButtons(options=list(classes), value=classes[chosen], description="move",
                                          style={"description_width": "50px", "button_width": "auto"}),
        "angle": ipywidgets.FloatSlider(angle[chosen], min=0, max=360, step=1, description="angle", **wide),
        "length": ipywidgets.FloatSlider(radius[chosen], min=0, max=_REACH, step=0.05, description="length", **wide),
    }  # fmt: skip

    def show(change: object = None) -> None:
        if busy[0]:
            return
        turn, c = np.radians(controls["angle"].value), list(classes).index(controls["class"].value)
        moved[c] = controls["length"].value * np.array([np.cos(turn), np.sin(turn)])
        for trace, (x, y) in zip(figure.data, moved, strict=False):
            upright, ahead = abs(x) < abs(y) / 2, (y > 0 if abs(x) < abs(y) / 2 else x > 0)
            side = ("top center" if ahead else "bottom center") if upright else f"middle {'right' if ahead else 'left'}"
            redraw(trace, x=[0, round(x, 4)], y=[0, round(y, 4)], textposition=side)
        redraw(figure.data[-1], z=class_relation_distribution(torch.from_numpy(moved)).numpy().round(4))

    def choose(change: object = None) -> None:
        x, y = moved[list(classes).index(controls["class"].value)]
        busy[0] = True  # two sliders move: do not move the mean from half of the news
        controls["angle"].value, controls["length"].value = np.degrees(np.arctan2(y, x)) % 360, np.hypot(x, y)
        busy[0] = False

    def click(number: int) -> Callable:
        def answer(trace: Any, points: Any, state: Any) -> None:
            if points.point_inds:
                controls["class"].value = classes[number]

        return answer

    controls["class"].observe(choose, names="value")
    for name in ("angle", "length"):
        controls[name].observe(show, names="value")
    for number in range(len(moved)):
        figure.data[number].on_click(click(number))
    show()
    tip = "turn one mean towards another, then make both longer. What becomes of their rows?"
    alt = f"{title}: the means of {len(moved)} classes as arrows in the plane, and the heat map of their relation."
    sliders = ipywidgets.HBox([controls["angle"], controls["length"]])
    widget = stack(hint(tip), figure, controls["class"], sliders)
    return Explorer(widget, go.Figure(figure), alt, controls, {"relation": figure})


# ---- a warp, and both sides of the equivariance


def affine_warp(side: int, angle: float, zoom: float, shift: float, bend: float, mirror: bool = False) -> Warp:
    """A warp for one slice of ``side`` px: turned by ``angle`` degrees, ``zoom`` above 1 shows more, moved right.

    ``shift`` in parts of half the side; ``bend`` 0 to 1 adds a thin-plate spline through a grid of 5 x 5 points, always
    the same one, of moves up to a tenth of half the side.
    """
    flip = torch.tensor([[-zoom if mirror else zoom, zoom]], dtype=torch.float32)
    matrix = get_affine_matrix2d(torch.zeros(1, 2), torch.zeros(1, 2), flip, torch.tensor([float(angle)]))[
        :, :2
    ].clone()
    matrix[:, 0, 2] -= shift
    grid = F.affine_grid(matrix, [1, 1, side, side], align_corners=False)
    still = ThinPlateAugmentation(jitter=_BEND, mirror=0, rotation=0, scale=(1, 1), shift=0)
    bent = still.draw(1, side, generator(0, "bend")).grid
    straight = F.affine_grid(torch.eye(2, 3)[None], [1, 1, side, side], align_corners=False)
    return Warp(grid + bend * (bent - straight))


def warp_explorer(
    image: np.ndarray,
    networks: Mapping[str, Predict],
    classes: Sequence[str],
    colours: Sequence[str],
    *,
    title: str = "Both sides of the equivariance",
) -> Explorer:
    """A warp to move, the warped prediction, the prediction of the warped slice, and where the two differ.

    image: (S,S) · networks: name -> function of images (1,1,S,S) that returns logits (1,C,S,S) on the CPU; several
    names become a control. Controls: ``angle``, ``zoom``, ``shift``, ``bend``, ``mirror``, and ``shown``. The redder a
    pixel of the last picture, the larger its divergence (one nat and more: full colour); pixels from outside are dark.
    """
    image = np.asarray(image, np.float32)
    if image.ndim != 2 or image.shape[0] != image.shape[1]:
        raise ValueError(f"image must be (S,S), got {image.shape}")
    if not networks:
        raise ValueError("networks is empty: give at least one name with its function")
    side = len(image)
    plain, limits = torch.from_numpy(image)[None, None], tuple(np.percentile(image, (1, 99)))
    names = ["x", "F(x)", "T(F(x))", "T(x)", "F(T(x))", "where they differ"]
    cell, head = (WIDTH - 40) / 3, 24
    figure = LiveFigure(layout={"template": TEMPLATE, "height": round(84 + 44 + 2 * (cell + head))})
    for n, name in enumerate(names):
        x, y = n % 3 * cell, n // 3 * (cell + head) + head
        figure.add_layout_image(
            source="", x=x + 2, y=y, sizex=cell - 4, sizey=cell - 4, xref="x", yref="y", sizing="stretch", layer="above"
        )
        figure.add_annotation(x=x + cell / 2, y=y - head / 2, text=f"<b>{name}</b>", xref="x", yref="y")
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": 84, "b": 44},
        xaxis=bare_axis(range=[0, 3 * cell], fixedrange=True),
        yaxis=bare_axis(range=[2 * (cell + head), 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )
    for name, colour in zip([*classes[1:], "they differ"], [*colours[1:], DISAGREEMENT], strict=True):
        marker = {"symbol": "square", "size": 11, "color": colour}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)

    wide: dict[str, Any] = {"layout": ipywidgets.Layout(width="350px"), "style": {"description_width": "60px"}}
    controls: dict[str, Any] = {
        "angle": ipywidgets.FloatSlider(30, min=-180, max=180, step=1, description="angle", **wide),
        "zoom": ipywidgets.FloatSlider(1.0, min=0.6, max=1.6, step=0.02, description="zoom", **wide),
        "shift": ipywidgets.FloatSlider(0.0, min=-0.5, max=0.5, step=0.02, description="shift", **wide),
        "bend": ipywidgets.FloatSlider(0.0, min=0, max=1, step=0.05, description="bend", **wide),
        "mirror": ipywidgets.Checkbox(False, description="mirror"),
    }
    last = list(networks)[-1]
    if len(networks) > 1:
        controls["shown"] = ipywidgets.ToggleButtons(
            options=list(networks), value=last, description="shown",
            style={"description_width": "60px", "button_width": "auto"},
        )  # fmt: skip

    def tinted(of: Tensor, logits: Tensor, inside: np.ndarray | None = None) -> np.ndarray:
        gray = pixels.to_gray(of[0, 0].numpy(), limits)
        layer = pixels.label_overlay(logits[0].argmax(dim=0).numpy(), colours)
        if inside is not None:
            layer[~inside] = 0
        return pixels.blend(gray, layer)

    @torch.no_grad()
    def show(change: object = None) -> None:
        name = controls["shown"].value if "shown" in controls else last
        values = {key: controls[key].value for key in ("angle", "zoom", "shift", "bend", "mirror")}
        warp = affine_warp(side, **values)
        moved, inside = warp.images(plain), warp.inside()
        logits, second = networks[name](plain), networks[name](moved)
        first = warp.predictions(logits)
        loss = equivariance_loss(first, second, inside).item()
        logs = first.log_softmax(dim=1), second.log_softmax(dim=1)
        apart = ((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum(dim=1)[0].numpy()  # (S, S), in nats
        seen = inside[0].numpy()
        layer = np.zeros((side, side, 4), np.uint8)
        layer[..., :3] = pixels.rgb(DISAGREEMENT)
        layer[..., 3] = np.round(255 * np.clip(apart / _SURE, 0, 1))
        layer[~seen] = (*pixels.rgb(INK), 200)
        gray = [pixels.to_gray(one[0, 0].numpy(), limits) for one in (plain, moved)]
        pictures = [
            pixels.blend(gray[0]), tinted(plain, logits), tinted(moved, first, seen), pixels.blend(gray[1]),
            tinted(moved, second), pixels.blend(gray[1], layer),
        ]  # fmt: skip
        differ = (first.argmax(dim=1) != second.argmax(dim=1))[inside].float().mean().item() if inside.any() else 0.0
        which = f", {name}" if "shown" in controls else ""
        said = f"eq. 6: {loss:.3g} nats a pixel; {100 * differ:.1f} % of the pixels get another class"
        with figure.batch_update():
            for place, picture in zip(figure.layout.images, pictures, strict=True):
                place.source = pixels.data_uri(picture)
            figure.layout.title.text = f"{title}{which}<br><span style='font-size:13px'>{said}</span>"

    for control in controls.values():
        control.observe(show, names="value")
    show()
    tip = "turn the slice. Both ways lead to the same place: does the network give the same answer there?"
    alt = (
        f"{title}: a slice and its prediction, both warped, the prediction of the warped slice, and where the two "
        "predictions differ."
    )
    rows = [ipywidgets.HBox([controls[a], controls[b]]) for a, b in (("angle", "zoom"), ("shift", "bend"))]
    rest = [controls[key] for key in ("mirror", "shown") if key in controls]
    return Explorer(stack(hint(tip), figure, *rows, *rest), go.Figure(figure), alt, controls, {"warp": figure})


# ---- neighbours from the bank


def neighbour_explorer(
    images: np.ndarray,
    bank: np.ndarray,
    found: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    captions: Sequence[str] | None = None,
    bank_captions: Sequence[str] | None = None,
    title: str = "Nearest in the bank",
) -> Explorer:
    """A slice and its nearest neighbours in a bank as thumbnails, one line per network.

    images: (B,S,S) · bank: (M,S,S) · found: name -> (rows of the bank (B,k), best first, and their cosines (B,k)) ·
    captions, bank_captions: a text for each image and for each entry. Control: ``slice``, which of the images.
    """
    images, bank = np.asarray(images, np.float32), np.asarray(bank, np.float32)
    if not found:
        raise ValueError("found is empty: give at least one name with rows and cosines")
    lines = {name: (np.asarray(rows, int), np.asarray(cosines, float)) for name, (rows, cosines) in found.items()}
    shapes = {name: (rows.shape, cosines.shape) for name, (rows, cosines) in lines.items()}
    first = next(iter(lines.values()))[0]
    if any(shape != (first.shape, first.shape) for shape in shapes.values()) or len(first) != len(images):
        raise ValueError(f"found must hold rows and cosines (B,k) for {len(images)} images, all alike, got {shapes}")
    if any(rows.min() < 0 or rows.max() >= len(bank) for rows, _ in lines.values()):
        raise ValueError(f"found names rows beyond the {len(bank)} of the bank")
    for name, texts, wanted in (("captions", captions, len(images)), ("bank_captions", bank_captions, len(bank))):
        if texts is not None and len(texts) != wanted:
            raise ValueError(f"{name} must be {wanted} texts, got {len(texts)}")
    columns, left = first.shape[1] + 1, 116
    cell = min(118.0, (WIDTH - left - 20) / (columns + 0.25))
    foot = 8 + _LINE * (1 + max(_lines_of(captions or ()), _lines_of(bank_captions or ())))
    limits = tuple(np.percentile(np.concatenate([images, bank]), (1, 99)))
    pictures = [pixels.data_uri(pixels.blend(pixels.to_gray(pixels.shrink(one, 128), limits))) for one in bank]
    queries = [pixels.data_uri(pixels.blend(pixels.to_gray(pixels.shrink(one, 128), limits))) for one in images]
    figure = LiveFigure(
        layout={"template": TEMPLATE, "title": title, "height": round(66 + 10 + len(lines) * (cell + foot))}
    )
    for row, name in enumerate(lines):
        y = row * (cell + foot)
        figure.add_annotation(x=0, xshift=-8, y=y + cell / 2, text=name, xanchor="right", xref="x", yref="y")
        for column in range(columns):
            x = column * cell + (0.25 * cell if column else 0)
            figure.add_layout_image(
                source="", x=x + 2, y=y, sizex=cell - 4, sizey=cell - 4, xref="x", yref="y", sizing="stretch",
                layer="above",
            )  # fmt: skip
            figure.add_annotation(x=x + cell / 2, y=y + cell - 2, text="", yanchor="top", xref="x", yref="y",
                                  font={"size": 11})  # fmt: skip
    figure.update_layout(
        margin={"l": left, "r": 20, "t": 66, "b": 10},
        xaxis=bare_axis(range=[0, WIDTH - left - 20], fixedrange=True),
        yaxis=bare_axis(range=[len(lines) * (cell + foot), 0], fixedrange=True),
    )
    wide = {"layout": ipywidgets.Layout(width="420px"), "style": {"description_width": "60px"}}
    controls = {
        "slice": ipywidgets.IntSlider(value=len(images) // 2, min=0, max=len(images) - 1, description="slice", **wide)
    }

    def show(change: object = None) -> None:
        number = controls["slice"].value
        with figure.batch_update():
            for row, (rows, cosines) in enumerate(lines.values()):
                at = row * columns
                figure.layout.images[at].source = queries[number]
                texts = ["the slice" + (f"<br>{captions[number]}" if captions is not None else "")]
                for place, (entry, cosine) in enumerate(zip(rows[number], cosines[number], strict=True), start=1):
                    figure.layout.images[at + place].source = pictures[entry]
                    texts.append(
                        f"cos {cosine:.3f}" + (f"<br>{bank_captions[entry]}" if bank_captions is not None else "")
                    )
                for place, text in enumerate(texts):  # each line has its name first, then a text below each picture
                    figure.layout.annotations[row * (columns + 1) + 1 + place].text = text

    controls["slice"].observe(show, names="value")
    show()
    tip = "move <b>slice</b>. Are the neighbours at the same height of the heart? Are they of other patients?"
    alt = f"{title}: a slice and its {columns - 1} nearest neighbours in a bank of {len(bank)}, for {', '.join(lines)}."
    return Explorer(
        stack(hint(tip), figure, *controls.values()), go.Figure(figure), alt, controls, {"neighbours": figure}
    )
