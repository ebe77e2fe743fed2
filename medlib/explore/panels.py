"""What stands beside an embedding, as HTML: the chosen point, its neighbours, and what a group of points has in common.

Pure functions of arrays; colours of text and lines follow the reader's theme.
"""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from medlib.explore import pixels
from medlib.explore.measures import unit
from medlib.explore.style import CATEGORIES, DISAGREEMENT, SERIES

TEXT = "color:var(--jp-ui-font-color1,#1f2933);font-size:12px;line-height:1.35;max-width:720px"
_FAINT = "color:var(--jp-ui-font-color2,#5b6672)"
_RULE = "var(--jp-border-color1,#8a94a0)"
_SHOWN = 6  # values of a category in a breakdown


def block(html: str) -> str:
    """``html`` in the size and the colours of a panel."""
    return f'<div style="{TEXT}">{html}</div>'


def spoken(text: str) -> str:
    """``text`` for a reader who listens to the page; it takes no room on it."""
    away = "position:absolute;width:1px;height:1px;margin:0;overflow:hidden;clip-path:inset(50%)"
    return f'<p style="{away}">{escape(text)}</p>'


def chips(colours: Mapping[str, str]) -> str:
    """A legend; nothing where there are too many entries to tell their colours apart."""
    if not 0 < len(colours) <= len(CATEGORIES):
        return ""
    dot = "display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:5px;background:"
    entry = (
        '<span style="white-space:nowrap;display:inline-block;margin-right:14px"><span style="{}{}"></span>{}</span>'
    )
    return "".join(entry.format(dot, colour, escape(name)) for name, colour in colours.items())


def picture_cell(pixels_rgb: np.ndarray, caption: str, alt: str, colour: str = _RULE, side: int = 76) -> str:
    """One (h,w,3) picture of ``side`` px in a frame, with a ``caption`` (HTML) below it."""
    frame = f"width:{side}px;height:{side}px;border-radius:6px;border:2px solid {colour};display:block"
    return (
        f'<figure style="margin:0;width:{side + 4}px">'
        f'<img src="{pixels.data_uri(pixels_rgb)}" alt="{escape(alt)}" style="{frame}">'
        '<figcaption style="font-size:11px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis">'
        f"{caption}</figcaption></figure>"
    )


def hovered(thumb: np.ndarray, lines: Sequence[str]) -> str:
    """The point under the mouse: its (h,w) uint8 picture beside its ``lines``."""
    cell = picture_cell(pixels.blend(thumb), "", lines[0], side=64)
    text = "".join(f"<div>{escape(line)}</div>" for line in lines)
    return block(f'<div style="display:flex;gap:10px;align-items:flex-start">{cell}<div>{text}</div></div>')


def chosen(
    thumb: np.ndarray,
    label: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    colours: Sequence[str],
    name: str,
) -> str:
    """The chosen slice alone, then with its label, then with each prediction; where a prediction errs it is magenta.

    All (h,w). Empty without a label and a prediction.
    """
    if label is None and not predictions:
        return ""
    cells = [picture_cell(pixels.blend(thumb), "slice", f"{name}, slice", side=112)]
    if label is not None:
        tinted = pixels.blend(thumb, pixels.label_overlay(label, colours))
        cells.append(picture_cell(tinted, "label", f"{name}, label", side=112))
    for method, prediction in predictions.items():
        if label is None:
            layer, note = pixels.label_overlay(prediction, colours), ""
        else:
            layer = pixels.disagreement_overlay(label, prediction, colours)
            note = f", {100 * np.mean(label != prediction):.1f} % differ"
        caption = f"{escape(method) or 'prediction'}{note}"
        alt = f"{name}, prediction of {method}{note}" if method else f"{name}, prediction{note}"
        cells.append(picture_cell(pixels.blend(thumb, layer), caption, alt, side=112))
    return f'<div style="display:flex;gap:10px;flex-wrap:wrap;margin-top:8px">{"".join(cells)}</div>'


def neighbour_strip(
    point: int,
    found: Mapping[str, np.ndarray],
    thumbs: np.ndarray,
    positions: np.ndarray,
    owners: np.ndarray,
    hover: Sequence[str],
) -> str:
    """The chosen slice and, one line per method, its neighbours with what they share with it."""

    def cell(index: int, colour: str = _RULE) -> str:
        caption = f"{escape(str(owners[index]))}<br>position {positions[index]:.2f}"
        return picture_cell(pixels.blend(thumbs[index]), caption, hover[index].replace("<br>", ", "), colour)

    lines = []
    for name, indices in found.items():
        away = np.abs(positions[indices] - positions[point]).mean()
        others = int((owners[indices] != owners[point]).sum())
        shared = f"neighbours {away:.2f} away in position, {others} of {len(indices)} from other patients"
        pictures = "".join(cell(int(i)) for i in indices)
        lines.append(
            f'<div style="margin:8px 0 3px"><b>{escape(name)}</b>: {shared}</div>'
            f'<div style="display:flex;gap:10px">{cell(point, DISAGREEMENT)}'
            f'<span style="align-self:center;margin-top:-24px">&rarr;</span>{pictures}</div>'
        )
    return "".join(lines)


def mean_cosine(rows: np.ndarray) -> float:
    """Mean cosine over all pairs of two different rows of length 1, (N,D): |sum|^2 holds every pair twice."""
    count = len(rows)
    if count < 2:
        return float("nan")
    return float((np.square(rows.sum(axis=0)).sum() - np.square(rows).sum()) / (count * (count - 1)))


def group_panel(
    rows: np.ndarray,
    numbers: Mapping[str, np.ndarray],
    texts: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    what: str = "selected",
) -> str:
    """What the points ``rows`` (int) have in common, beside all points.

    numbers: name -> (N,), as mean and standard deviation; not-a-numbers are left out · texts: name -> (N,) texts, as
    shares · features: method -> (N,D), whose mean cosine within the group is of the full space, not of the picture.
    """
    count = len(next(iter(features.values())))
    parts = [f"<b>{len(rows):,} of {count:,} points {escape(what)}</b>"]
    lines = [("", what, "all")]
    for name, values in numbers.items():
        inside, whole = values[rows][np.isfinite(values[rows])], values[np.isfinite(values)]
        mine, all_of_them = (f"{v.mean():.3g} ± {v.std():.2g}" if len(v) else "-" for v in (inside, whole))
        lines.append((name, mine, all_of_them))
    for name, values in features.items():
        directions = unit(values)
        inside, whole = mean_cosine(directions[rows]), mean_cosine(directions)
        lines.append((f"mean cosine, {name}", "-" if np.isnan(inside) else f"{inside:.2f}", f"{whole:.2f}"))
    right = f"padding:1px 0 1px 14px;text-align:right;border-top:1px solid {_RULE}"
    left = f"padding:1px 0;text-align:left;border-top:1px solid {_RULE}"
    body = "".join(
        f'<tr><th scope="row" style="{left};font-weight:normal">{escape(a)}</th>'
        f'<td style="{right}">{escape(b)}</td><td style="{right};{_FAINT}">{escape(c)}</td></tr>'
        for a, b, c in lines
    )
    tables = [f'<table style="border-collapse:collapse;{TEXT}">{body}</table>']
    tables += [_breakdown(name, values, rows) for name, values in texts.items()]
    parts.append(f'<div style="display:flex;gap:22px;flex-wrap:wrap;margin-top:4px">{"".join(tables)}</div>')
    return block("".join(parts))


def _breakdown(name: str, values: np.ndarray, rows: np.ndarray) -> str:
    """Shares of each value among ``rows``, most frequent first, as bars; a tick marks its share among all."""
    found, counts = np.unique(values[rows], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_SHOWN]
    rest = len(found) - len(order)
    lines = []
    for value, count in zip(found[order], counts[order], strict=True):
        share, overall = count / max(len(rows), 1), float(np.mean(values == value))
        bar = (
            f'<span style="position:relative;display:inline-block;width:90px;height:10px;vertical-align:middle;'
            f'background:var(--jp-border-color3,#e4e7eb)">'
            f'<span style="position:absolute;left:0;top:0;height:10px;width:{90 * share:.0f}px;'
            f'background:{SERIES[0]}"></span>'
            f'<span style="position:absolute;left:{90 * overall:.0f}px;top:-2px;height:14px;width:2px;'
            f'background:var(--jp-ui-font-color1,#1f2933)"></span></span>'
        )
        lines.append(f"<div>{bar} {escape(str(value))}: {count:,} ({share:.0%}; all {overall:.0%})</div>")
    lines += [f'<div style="{_FAINT}">and {rest} more</div>'] if rest else []
    return f"<div><div><b>{escape(name)}</b></div>{''.join(lines)}</div>"
