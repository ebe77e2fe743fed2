"""A data set on one page, from the report of `medlib.data.check`: slices, intensities and how rare each class is."""

import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.ndimage import gaussian_filter1d

from medlib.data.check import Report, Summary
from medlib.explore import pixels
from medlib.explore.show import browser_found
from medlib.explore.style import FONT, INK, MUTED, TEMPLATE
from medlib.paths import make_folder, written_whole

FORMATS = (".html", ".png", ".pdf", ".svg")
_WIDTH, _LEFT, _TOP, _FOOT = 1000, 40, 96, 60
_COLUMNS, _ROWS, _CAPTION = 6, 2, 22
_PLOTS = 330  # px of the two plots
_BINS, _FEWEST = 60, 30  # of a curve, and of voxels that make one
_BACKGROUND = {"line": {"color": "#9aa5b1", "width": 2}, "fill": "tozeroy"}


def check_page(report: Report) -> go.Figure:
    """One page: up to twelve scans with their labels, the intensities of each class, and the share of each class.

    A scan is shown by the middle one of the slices that show a structure, true to scale. Raises `ValueError` where no
    scan could be read.
    """
    if not report.summaries:
        raise ValueError(f"no scan in {report.root} could be read, so there is nothing to draw: {report.problems[:1]}")
    chosen = _chosen(report)
    columns = max(2, min(_COLUMNS, len(chosen)))
    rows = -(-len(chosen) // columns)
    cell = (_WIDTH - 2 * _LEFT) / columns
    tall = _TOP + rows * (cell + _CAPTION) + 40
    height = tall + _PLOTS + _FOOT
    inner = height - _TOP - _FOOT
    share = _PLOTS / inner
    widest = max(map(len, report.info.classes))
    titles = f"Intensities of each class{_unit(report)[1]}", "Share of the labelled voxels, scans that hold it"
    figure = make_subplots(1, 2, horizontal_spacing=0.06 + 0.006 * widest, subplot_titles=titles)
    patients, labelled = len({case.patient for case in report.cases}), sum(bool(case.labels) for case in report.cases)
    facts = f"{len(report.cases)} scans, {patients} patients, {labelled} labels · {len(chosen)} scans shown · "
    facts += f"{len(report.anomalies)} anomalies, {len(report.problems)} problems"
    figure.update_layout(
        template=TEMPLATE,
        width=_WIDTH,
        height=round(height),
        title_font_size=15,
        title_text=f"{report.title}<br><span style='font-size:13px;color:{MUTED}'>{facts}</span>",
        margin={"l": _LEFT, "r": _LEFT, "t": _TOP, "b": _FOOT},
        font={"family": FONT, "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "y": -0.16 * share, "yanchor": "top"},
        bargap=0.25,
    )
    figure.update_layout({f"yaxis{n}": {"domain": [0, share - 0.03]} for n in ("", "2")})
    for title in figure.layout.annotations:
        title.update(y=share - 0.02, yanchor="bottom", font={"size": 13, "color": INK})
    side, gap = cell - 8, 1.0 / inner
    for number, (name, summary) in enumerate(chosen):
        x = (number % columns) * cell / (_WIDTH - 2 * _LEFT)
        top = 1 - (number // columns) * (cell + _CAPTION) * gap
        text = name if len(name) <= 20 else f"{name[:9]}…{name[-9:]}"
        figure.add_annotation(
            x=x, y=top, text=text, xref="paper", yref="paper", xanchor="left", yanchor="top", font={"size": 11}
        )
        ratio = summary.image.shape[0] * summary.aspect / summary.image.shape[1]
        figure.add_layout_image(
            source=pixels.data_uri(_tile(report, summary)), xref="paper", yref="paper",
            x=x, y=top - _CAPTION * gap, sizex=side * min(1, 1 / ratio) / (_WIDTH - 2 * _LEFT),
            sizey=side * min(1, ratio) * gap, sizing="stretch", layer="above",
        )  # fmt: skip
    _intensities(figure, report)
    _shares(figure, report)
    return figure


def _chosen(report: Report) -> list[tuple[str, Summary]]:
    """Scans from the first to the last, evenly, the labelled ones where there are some."""
    found = list(report.summaries.items())
    found = [item for item in found if item[1].label is not None] or found
    places = np.unique(np.linspace(0, len(found) - 1, min(len(found), _COLUMNS * _ROWS)).round().astype(int))
    return [found[place] for place in places]


def _tile(report: Report, summary: Summary) -> np.ndarray:
    gray = pixels.to_gray(summary.image, report.info.window if _unit(report)[0] else None)
    layer = None if summary.label is None else pixels.label_overlay(summary.label, report.info.colours, fill=0.35)
    return pixels.blend(gray, layer)


def _unit(report: Report) -> tuple[bool, str]:
    """Whether the scans share a unit (CT does), and the words that say so."""
    if report.info.modality == "CT":
        return True, ", in HU"
    return False, ", each scan's 1st to 99th percentile as 0 to 1"


def _intensities(figure: go.Figure, report: Report) -> None:
    shared = _unit(report)[0]
    values, classes = [], []
    for summary in report.summaries.values():
        low, width = (0.0, 1.0) if shared else (summary.low, max(summary.high - summary.low, 1e-12))
        if summary.sample_label is not None:
            values.append((summary.sample - low) / width)
            classes.append(summary.sample_label)
    if not values:
        return
    flat, owner = np.concatenate(values), np.concatenate(classes)
    structures = flat[owner > 0] if owner.any() else flat
    low, high = (float(value) for value in np.percentile(structures, (0.5, 99.5)))
    edges = np.linspace(low - (high - low) / 2, high + (high - low) / 2, _BINS + 1)
    for index, name in enumerate(report.info.classes):
        mine = flat[owner == index]
        if len(mine) < _FEWEST:
            continue
        look = {"line": {"color": report.info.colours[index], "width": 2}} if index else _BACKGROUND
        share = gaussian_filter1d(np.histogram(mine, edges)[0] / len(mine), 1.5)
        figure.add_scatter(x=(edges[1:] + edges[:-1]) / 2, y=share, name=name, mode="lines", **look, row=1, col=1)
    figure.update_yaxes(row=1, col=1, rangemode="tozero", showticklabels=False)


def _shares(figure: go.Figure, report: Report) -> None:
    counts = [summary.voxels for summary in report.summaries.values() if summary.voxels is not None]
    if not counts:
        return
    total = np.sum(counts, axis=0)
    share = 100 * total / total.sum()
    hold = [f"{sum(bool(count[i]) for count in counts)}/{len(counts)}" for i in range(len(total))]
    names, colours = list(report.info.classes[1:]), list(report.info.colours[1:])
    look = {"orientation": "h", "textposition": "outside", "cliponaxis": False, "showlegend": False}
    figure.add_bar(x=share[1:], y=names, text=hold[1:], marker={"color": colours}, **look, row=1, col=2)
    figure.update_xaxes(row=1, col=2, ticksuffix=" %", rangemode="tozero", range=[0, 1.15 * max(share[1:].max(), 1e-6)])
    figure.update_yaxes(row=1, col=2, autorange="reversed", showgrid=False)


def check_target(path: Path) -> None:
    """ValueError unless `write_page` knows the ending and the folder can be written to; OSError without a Chrome."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}")
    if path.suffix != ".html" and not browser_found():
        raise OSError(f"a {path.suffix} file needs a Chrome on this machine: write {path.with_suffix('.html')} instead")
    make_folder(path.parent, "figure")


def write_page(figure: go.Figure, path: Path) -> None:
    """The figure as a file: .html (always possible), .png, .pdf or .svg (drawn by a Chrome).

    Raises what `check_target` raises: ask it before a long computation.
    """
    check_target(path)
    if path.suffix == ".html":
        with written_whole(path) as unfinished:
            figure.write_html(unfinished, include_plotlyjs=True)
        return
    import kaleido  # type: ignore[import-untyped]

    size = {"width": figure.layout.width, "height": figure.layout.height, "scale": 2}
    picture = kaleido.calc_fig_sync(json.loads(figure.to_json()), opts={"format": path.suffix[1:], **size})
    with written_whole(path) as unfinished:
        unfinished.write_bytes(picture)
