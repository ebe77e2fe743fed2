"""Slices with their labels: a montage, and a volume to scroll through."""

from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from medlib.explore import pixels
from medlib.explore.live import LiveFigure
from medlib.explore.show import Explorer, hint, stack
from medlib.explore.style import DISAGREEMENT, INK, TEMPLATE, WIDTH, bare_axis

_MONTAGE_PIXELS = 112  # about as large as a slice of a montage is shown


def check_maps(images: np.ndarray, **maps: np.ndarray | None) -> None:
    """ValueError unless images are (N,H,W) and all maps, where given, have their shape."""
    if images.ndim != 3:
        raise ValueError(f"images must be (N,H,W), got {images.shape}")
    for name, value in maps.items():
        if value is not None and value.shape != images.shape:
            raise ValueError(f"{name} must have the shape of the images, {images.shape}, got {value.shape}")


def check_classes(classes: Sequence[str], colours: Sequence[str], *maps: np.ndarray | None) -> None:
    """ValueError unless each class has a colour and each value in the maps a class."""
    if len(classes) != len(colours):
        raise ValueError(f"one colour per class: got {len(classes)} classes and {len(colours)} colours")
    highest = max((int(m.max()) for m in maps if m is not None and m.size), default=0)
    if highest >= max(1, len(classes)):
        raise ValueError(f"label value {highest} has no class; classes are {list(classes)}")


def class_legend(figure: go.Figure, classes: Sequence[str], colours: Sequence[str], disagreement: bool) -> None:
    """Add the colours of the foreground classes, and that of disagreement, to the legend of ``figure``."""
    entries = list(zip(classes, colours, strict=True))[1:]
    if disagreement:
        entries.append(("label and prediction differ", DISAGREEMENT))
    for name, colour in entries:
        marker = {"symbol": "square", "size": 11, "color": colour}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, showlegend=True))


def slice_grid(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    predictions: np.ndarray | None = None,
    titles: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[str] = (),
    *,
    title: str = "",
    columns: int = 6,
    aspect: float = 1.0,
) -> go.Figure:
    """A montage: one column per slice; below the image its label, its prediction and where those two differ, if given.

    images: (N,H,W) · labels, predictions: (N,H,W) int · titles: N texts · classes, colours: names and ``#rrggbb`` of
    the label values 0, 1, ... (0 is background and stays clear) · columns: slices per line · aspect: height of a pixel
    over its width. Gray runs from the 1st to the 99th percentile of all images together. With a label or a prediction
    all are cut to the structures and half their size around them.
    """
    images = np.asarray(images)
    check_maps(images, labels=labels, predictions=predictions)
    check_classes(classes, colours, labels, predictions)
    limits = tuple(np.percentile(images, (1, 99)))
    given = [np.asarray(m) for m in (labels, predictions) if m is not None]
    box = pixels.focus(np.concatenate(given)) if given else (slice(None), slice(None))
    gray = pixels.to_gray(pixels.shrink(images[:, *box].astype(np.float32), _MONTAGE_PIXELS), limits)
    truth, guess = (
        None if m is None else pixels.shrink(np.asarray(m)[:, *box], _MONTAGE_PIXELS) for m in (labels, predictions)
    )
    rows = ["image", *["label"] * (truth is not None), *["prediction"] * (guess is not None)]
    if truth is not None and guess is not None:
        rows.append("difference")

    def tile(row: str, n: int) -> np.ndarray:
        if row == "difference" and truth is not None and guess is not None:
            return pixels.blend(gray[n], pixels.disagreement_overlay(truth[n], guess[n], colours))
        shown = {"label": truth, "prediction": guess}.get(row)
        return pixels.blend(gray[n], None if shown is None else pixels.label_overlay(shown[n], colours))

    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    left, cell = 84 if len(rows) > 1 else 20, 0.0
    cell = (WIDTH - left - 20) / columns
    tall, head = cell * aspect * gray.shape[1] / gray.shape[2], 24.0 if titles is not None else 4.0
    block = head + tall * len(rows) + 8
    top, bottom = 58 if title else 14, 46 if len(rows) > 1 else 14
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(top + bottom + block * lines)})
    for n in range(len(images)):
        x, y = n % columns * cell, n // columns * block
        if titles is not None:
            figure.add_annotation(x=x + cell / 2, y=y + head / 2, text=titles[n], xref="x", yref="y")
        for r, row in enumerate(rows):
            figure.add_layout_image(
                source=pixels.data_uri(tile(row, n)),
                x=x + 1,
                y=y + head + r * tall + 1,
                sizex=cell - 2,
                sizey=tall - 2,
                xref="x",
                yref="y",
                sizing="stretch",
                layer="above",
            )
    if len(rows) > 1:
        for line in range(lines):
            for r, row in enumerate(rows):
                y = line * block + head + (r + 0.5) * tall
                figure.add_annotation(x=0, xshift=-8, y=y, text=row, xanchor="right", xref="x", yref="y")
        class_legend(figure, classes, colours, "difference" in rows)
    figure.update_layout(
        margin={"l": left, "r": 20, "t": top, "b": bottom},
        xaxis=bare_axis(range=[0, columns * cell], fixedrange=True),
        yaxis=bare_axis(range=[lines * block, 0], fixedrange=True),
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
    )
    return figure


def _areas(maps: np.ndarray, count: int, spacing: tuple[float, float, float] | None) -> np.ndarray:
    """(count,Z) area of each class in each slice: cm² with a spacing in mm, else pixels."""
    unit = 1.0 if spacing is None else spacing[1] * spacing[2] / 100
    return np.stack([(maps == value).sum(axis=(1, 2)) * unit for value in range(count)])


def volume_viewer(
    volume: np.ndarray,
    label: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
    spacing: tuple[float, float, float] | None = None,
    classes: Sequence[str] = (),
    colours: Sequence[str] = (),
    *,
    title: str = "A volume, slice by slice",
) -> Explorer:
    """A volume to scroll through: the slice, the slice with its overlay, and the area of each structure along the
    volume.

    volume: (Z,H,W) · label, prediction: (Z,H,W) int · spacing: (z,y,x) in mm or None · classes, colours: as in
    ``slice_grid``. Controls: ``slice``, ``overlay`` ("label", "prediction", "difference"; those that exist) and
    ``opacity``. A click on the area profile goes to that slice. The twin is a montage of six slices.
    """
    volume = np.asarray(volume)
    check_maps(volume, label=label, prediction=prediction)
    check_classes(classes, colours, label, prediction)
    depth, height, width = volume.shape
    gray = pixels.to_gray(pixels.shrink(volume.astype(np.float32), 256))
    maps = {
        n: pixels.shrink(np.asarray(m), 256)
        for n, m in {"label": label, "prediction": prediction}.items()
        if m is not None
    }
    kinds = [*maps, *["difference"] * (len(maps) == 2)]
    aspect = 1.0 if spacing is None else spacing[1] / spacing[2]

    def layer(z: int, kind: str) -> np.ndarray:
        if kind == "difference":
            return pixels.disagreement_overlay(maps["label"][z], maps["prediction"][z], colours)
        return pixels.label_overlay(maps[kind][z], colours)

    panels = 3 if maps else 1
    figure = LiveFigure(
        make_subplots(1, panels, column_widths=[0.38, 0.38, 0.24] if maps else None, horizontal_spacing=0.02)
    )
    stretch = {"x": 0, "y": 0, "sizex": width, "sizey": height * aspect, "sizing": "stretch"}
    scans = ["", "2"] if maps else [""]
    places = [
        {"source": pixels.data_uri(pixels.blend(gray[0])), "xref": f"x{s}", "yref": f"y{s}", **stretch} for s in scans
    ]
    if maps:
        # A hair wider than the scan below it: plotly takes two images of one place and size for the same image.
        places.append({**places[1], "source": "", "opacity": 0.8, "sizex": width * 1.0001})
    frame = {"range": [0, width], "constrain": "domain"}, {"range": [height * aspect, 0], "constrain": "domain"}
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=400,
        images=places,
        margin={"l": 20, "r": 52 if maps else 20, "t": 58, "b": 60},
    )
    for s in scans:
        figure.update_layout(
            {f"xaxis{s}": bare_axis(**frame[0]), f"yaxis{s}": bare_axis(**frame[1], scaleanchor=f"x{s}")}
        )
        figure.add_trace(
            go.Scatter(
                x=[0],
                y=[0],
                mode="markers",
                opacity=0,
                showlegend=False,
                hoverinfo="skip",
                xaxis=f"x{s}",
                yaxis=f"y{s}",
            )
        )
    if maps:
        class_legend(figure, classes, colours, "difference" in kinds)
        where = {"xaxis": "x3", "yaxis": "y3"}
        for name, values in {"label": label, "prediction": prediction}.items():
            if values is None:
                continue
            area = _areas(np.asarray(values), len(classes), spacing)
            for value in range(1, len(classes)):
                line = {"color": colours[value], "width": 2, "dash": "solid" if name == "label" else "dot"}
                figure.add_trace(
                    go.Scatter(
                        x=area[value].round(2),
                        y=np.arange(1, depth + 1),
                        mode="lines+markers",
                        line=line,
                        showlegend=False,
                        marker={"size": 5},
                        name=f"{classes[value]}, {name}",
                        **where,
                    )
                )
        unit = "pixels" if spacing is None else "cm²"
        figure.update_layout(
            xaxis3={"title": f"area ({unit})", "rangemode": "tozero", "nticks": 4},
            yaxis3={"title": "slice", "side": "right", "range": [0.5, depth + 0.5], "nticks": min(depth, 8)},
            shapes=[
                {
                    "type": "line",
                    "xref": "x3 domain",
                    "yref": "y3",
                    "x0": 0,
                    "x1": 1,
                    "line": {"color": INK, "width": 1.5},
                }
            ],
            legend={"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top"},
        )

    wide = ipywidgets.Layout(width="340px")
    controls: dict[str, ipywidgets.ValueWidget] = {
        "slice": ipywidgets.IntSlider(value=depth // 2 + 1, min=1, max=depth, description="slice", layout=wide)
    }
    if maps:
        controls["overlay"] = ipywidgets.ToggleButtons(
            options=kinds, value=kinds[-1], description="overlay", style={"button_width": "100px"}
        )
        controls["opacity"] = ipywidgets.FloatSlider(
            value=0.8, min=0, max=1, step=0.05, description="opacity", layout=wide
        )

    def draw(change: object = None) -> None:
        n = controls["slice"].value
        with figure.batch_update():
            for place in range(len(scans)):
                figure.layout.images[place].source = pixels.data_uri(pixels.blend(gray[n - 1]))
            if maps:
                figure.layout.images[2].source = pixels.data_uri(layer(n - 1, controls["overlay"].value))
                figure.layout.images[2].opacity = controls["opacity"].value
                figure.layout.shapes[0].update(y0=n, y1=n)
            figure.layout.title.text = (
                f"{title} <span style='font-size:13px'> slice {n} of {depth}, position {n / depth:.2f}</span>"
            )

    def jump(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            controls["slice"].value = points.point_inds[0] + 1

    for control in controls.values():
        control.observe(draw, names="value")
    for trace in figure.data:
        trace.on_click(jump)
    draw()
    picked = np.unique(np.linspace(0, depth - 1, min(depth, 6)).round().astype(int))
    truth, guess = (None if m is None else np.asarray(m)[picked] for m in (label, prediction))
    names = [f"slice {z + 1}" for z in picked]
    twin = slice_grid(volume[picked], truth, guess, names, classes, colours, title=title, aspect=aspect)
    tip = (
        "move the slice slider (or its arrow keys), or click a point of the area profile."
        if maps
        else "move the slice slider."
    )
    boxes = [ipywidgets.HBox([controls[k] for k in ("slice", "opacity") if k in controls])]
    boxes += [controls["overlay"]] if maps else []
    alt = (
        f"{title}: six of {depth} slices from one end to the other"
        + (", with " + ", ".join(kinds) if kinds else "")
        + "."
    )
    return Explorer(stack(hint(tip), figure, *boxes), twin, alt, controls, {"volume": figure})
