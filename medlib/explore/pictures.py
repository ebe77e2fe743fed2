"""Pictures that explain: scans true to scale, small masks pixel by pixel, the shapes inside a U-Net, a split."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from medlib.data.splits import Split
from medlib.explore import pixels
from medlib.explore.style import INK, MUTED, SERIES, TEMPLATE, WIDTH, bare_axis

_GAP = 12.0  # mm between two images
_PARTS = {"labelled": SERIES[0], "unlabelled": "#b7d3e6", "val": SERIES[4], "test": SERIES[2]}
_ENLARGED = 2  # drawn pixels per mm, so that a thick voxel keeps its corners


def _place(figure: go.Figure, cut: np.ndarray, size: tuple[float, float], x: float, y: float) -> None:
    """``cut`` (A,B) uint8 with its top left corner at (x, y), ``size`` (height, width) in mm, voxels as boxes."""
    rows, columns = (max(1, round(_ENLARGED * mm)) for mm in size)
    row = (np.arange(rows) * cut.shape[0] // rows).clip(max=cut.shape[0] - 1)
    column = (np.arange(columns) * cut.shape[1] // columns).clip(max=cut.shape[1] - 1)
    figure.add_layout_image(
        source=pixels.data_uri(pixels.blend(cut[np.ix_(row, column)])), x=x, y=y, sizex=size[1], sizey=size[0],
        xref="x", yref="y", sizing="stretch", layer="above",
    )  # fmt: skip


def stack_to_scale(
    image: np.ndarray, spacing: tuple[float, float, float], through: tuple[int, int, int], *, title: str
) -> go.Figure:
    """Two cuts through a stack, both in mm at one scale: a slice as it was taken, and all slices seen from the side.

    image: (Z,H,W) · spacing: (z,y,x) in mm · through: the voxel (z,row,column) that both cuts hold. The side view is
    the plane of that column: rows of the slices run to the right, slice 0 lies at the bottom. Voxels keep their
    corners.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be (Z,H,W), got {image.shape}")
    if not all(0 <= at < size for at, size in zip(through, image.shape, strict=True)):
        raise ValueError(f"through must be a voxel of the image {image.shape}, got {through}")
    gray = pixels.to_gray(image)
    deep, tall, wide = (n * mm for n, mm in zip(image.shape, spacing, strict=True))
    side = wide + _GAP  # where the second cut begins
    scale = (WIDTH - 40) / (side + tall)  # px per mm
    head, foot = 84, 40
    height = max(tall, deep)
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(head + foot + height * scale)})
    _place(figure, gray[through[0]], (tall, wide), 0, (height - tall) / 2)
    _place(figure, gray[::-1, :, through[2]], (deep, tall), side, (height - deep) / 2)
    names = {wide / 2: f"slice {through[0] + 1}: voxels of {spacing[1]:.1f} x {spacing[2]:.1f} mm",
             side + tall / 2: f"from the side: {len(image)} slices, {spacing[0]:.1f} mm apart"}  # fmt: skip
    for x, name in names.items():
        figure.add_annotation(x=x, y=0, yshift=14, text=name, font={"size": 13, "color": INK})
    bar = height + 12 / scale
    figure.add_shape(type="line", x0=0, x1=50, y0=bar, y1=bar, line={"color": INK, "width": 3})
    figure.add_annotation(x=50, y=bar, text="50 mm", xanchor="left", xshift=8)
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": head, "b": 10},
        xaxis=bare_axis(range=[0, side + tall], fixedrange=True),
        yaxis=bare_axis(range=[height + (foot - 10) / scale, 0], fixedrange=True),
    )
    return figure


def image_row(
    images: Sequence[np.ndarray], spacings: Sequence[tuple[float, float]], titles: Sequence[str], *, title: str
) -> go.Figure:
    """Images (H,W) of any size beside each other, all at one scale, each from its own black to its own white.

    spacings: (row,column) in mm of each image's pixels · titles: one text per image.
    """
    if not len(images) == len(spacings) == len(titles):
        raise ValueError(f"need one spacing and title per image: {len(images)}, {len(spacings)}, {len(titles)}")
    sizes = [(image.shape[0] * mm[0], image.shape[1] * mm[1]) for image, mm in zip(images, spacings, strict=True)]
    height, width = max(size[0] for size in sizes), sum(size[1] + _GAP for size in sizes) - _GAP
    head, scale = 84, (WIDTH - 40) / width  # px per mm
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(head + 20 + height * scale)})
    x = 0.0
    for image, size, name in zip(images, sizes, titles, strict=True):
        _place(figure, pixels.to_gray(image.astype(np.float32)), size, x, (height - size[0]) / 2)
        figure.add_annotation(x=x + size[1] / 2, y=0, yshift=14, text=name, font={"size": 13, "color": INK})
        x += size[1] + _GAP
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": head, "b": 20},
        xaxis=bare_axis(range=[0, width], fixedrange=True),
        yaxis=bare_axis(range=[height, 0], fixedrange=True),
    )
    return figure


def mask_squares(masks: Sequence[np.ndarray], titles: Sequence[str], *, title: str) -> go.Figure:
    """Small masks (H,W) bool or int beside each other, one square per pixel: 0 light, other values coloured."""
    if len(masks) != len(titles) or any(np.ndim(mask) != 2 for mask in masks):
        raise ValueError(f"need one title per mask (H,W): got {len(titles)} titles, {[np.shape(m) for m in masks]}")
    tall, wide = (max(np.shape(mask)[axis] for mask in masks) for axis in (0, 1))
    step = wide + 1.0  # a square is 1 wide; one square of room between masks
    scale = min((WIDTH - 40) / (step * len(masks) - 1), 40.0)
    head, foot, dark = 92, 20, {"size": 13, "color": INK}
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": round(head + foot + tall * scale)})
    for number, (mask, name) in enumerate(zip(masks, titles, strict=True)):
        left = number * step
        figure.add_annotation(x=left + np.shape(mask)[1] / 2, y=0, yshift=16, text=name, font=dark)
        for row, column in np.ndindex(*np.shape(mask)):
            value = int(mask[row, column])
            figure.add_shape(
                type="rect", x0=left + column + 0.04, x1=left + column + 0.96, y0=row + 0.04, y1=row + 0.96,
                fillcolor=SERIES[(value - 1) % len(SERIES)] if value else "#e8ebee", line={"width": 0},
            )  # fmt: skip
    used = (step * len(masks) - 1) * scale
    figure.update_layout(
        margin={"l": 20, "r": round(WIDTH - 20 - used), "t": head, "b": foot},
        xaxis=bare_axis(range=[0, step * len(masks) - 1], fixedrange=True),
        yaxis=bare_axis(range=[tall, 0], fixedrange=True),
    )
    return figure


def unet_picture(encoder: Sequence[tuple[int, int]], decoder: Sequence[tuple[int, int]], *, title: str) -> go.Figure:
    """A U-Net as boxes: width shows the side of a feature map, height (roughly) how many maps there are.

    encoder: (maps, side) of each level, finest first, the last being the bottleneck · decoder: the same, coarsest
    first.
    """
    if len(decoder) != len(encoder) - 1:
        raise ValueError(f"{len(encoder)} encoder levels need {len(encoder) - 1} decoder levels, got {len(decoder)}")
    side, maps, levels = encoder[0][1], encoder[0][0], len(encoder)
    figure = go.Figure(layout={"template": TEMPLATE, "title": title, "height": 92 + 62 * levels})

    def box(x: float, level: int, size: tuple[int, int], colour: str) -> None:
        half = 1.4 * (size[1] / side) + 0.06
        tall = 0.09 + 0.045 * np.log2(size[0] / maps)
        corners = {"x0": x - half, "x1": x + half, "y0": level - tall, "y1": level + tall}
        figure.add_shape(type="rect", **corners, fillcolor=colour, line={"width": 0})
        text = f"{size[0]} maps of {size[1]} x {size[1]}"
        figure.add_annotation(x=x, y=level + tall, yshift=-11, text=text, font={"color": INK})

    def arrow(x: float, y: float, from_x: float, from_y: float, faint: bool = False) -> None:
        axes = {"xref": "x", "yref": "y", "axref": "x", "ayref": "y"}
        look = {"arrowhead": 2, "arrowwidth": 1.4, "arrowcolor": MUTED, "opacity": 0.55 if faint else 1.0}
        figure.add_annotation(x=x, y=y, ax=from_x, ay=from_y, **axes, **look, showarrow=True, text="")

    for level, size in enumerate(encoder[:-1]):
        box(1.6, level, size, SERIES[0])
        box(7.4, level, decoder[-1 - level], SERIES[1])
        arrow(5.9, level, 3.1, level, faint=True)
        if level:
            arrow(0.1, level, 0.1, level - 1)
            arrow(8.9, level - 1, 8.9, level)
    box(4.5, levels - 1, encoder[-1], SERIES[2])
    arrow(3.7, levels - 1, 2.7, levels - 1.6)
    arrow(6.3, levels - 1.6, 5.3, levels - 1)
    for x, text in {1.6: "<b>encoder</b>", 4.5: "copied across", 7.4: "<b>decoder</b>"}.items():
        figure.add_annotation(x=x, y=-0.42, text=text, font={"size": 13})
    figure.update_layout(
        margin={"l": 20, "r": 20, "t": 52, "b": 16},
        xaxis=bare_axis(range=[-0.2, 9.2], fixedrange=True),
        yaxis=bare_axis(range=[levels - 0.45, -0.6], fixedrange=True),
    )
    return figure


def split_picture(splits: Mapping[str, Split], *, title: str) -> go.Figure:
    """One square per patient and one row per split, by name: who is labelled, unlabelled, in validation and in test.

    The splits divide the same patients; the order is that of the last one, so that rows of rising ratio line up.
    """
    last = list(splits.values())[-1]
    order = {patient: n for n, patient in enumerate((*last.train, *last.val, *last.test), start=1)}
    if any(set(order) != {*split.train, *split.val, *split.test} for split in splits.values()):
        raise ValueError("the splits must divide the same patients")
    figure = go.Figure()
    for part, colour in _PARTS.items():
        at = [(order[patient], row) for row, split in splits.items() for patient in getattr(split, part)]
        marker = {"symbol": "square", "color": colour, "size": min(14.0, 500 / len(order))}
        x, y = [x for x, _ in at], [y for _, y in at]
        figure.add_scatter(x=x, y=y, mode="markers", name=part, marker=marker)
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=110 + 34 * len(splits),
        margin={"t": 72, "l": 88},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yref": "container", "yanchor": "top"},
        xaxis={"title": "patient", "showgrid": False},
        yaxis={"categoryorder": "array", "categoryarray": list(splits)[::-1]},
    )
    return figure
