"""One look for every figure: the palettes and the plotly template ``medlib``.

A figure is a card: near-white paper with dark ink, so that text and colours keep their contrast on a light page, on a
dark page and in a printed one. It is 720 pixels wide, which fits a notebook cell.
"""

from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

WIDTH = 720
INK, MUTED, GRID, CARD = "#1f2933", "#5b6672", "#e4e7eb", "#fbfbf8"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'

# Okabe and Ito's colours, told apart with the common colour vision deficiencies, the faint yellow left out.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b6672")
# Paul Tol's "muted" set, for many categories of which only "same" or "other" matters (patients).
CATEGORIES = (
    "#332288",
    "#88CCEE",
    "#44AA99",
    "#117733",
    "#999933",
    "#DDCC77",
    "#CC6677",
    "#882255",
    "#AA4499",
    "#5b6672",
)
# Viridis without its palest tenth, which a near-white card would swallow. For the position of a slice, 0 to 1.
POSITION_SCALE = ("#440154", "#472f7d", "#39568c", "#2a788e", "#1f988b", "#35b779", "#79d152", "#c2df23")
DISAGREEMENT = "#E5007D"


def method_colours(names: list[str]) -> dict[str, str]:
    """One colour per method, by its place in ``names``: give every figure of a notebook the same list."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}


def category_colours(values: list[str]) -> dict[str, str]:
    """One colour per distinct value, in sorted order. More than ten values share colours."""
    return {value: CATEGORIES[i % len(CATEGORIES)] for i, value in enumerate(sorted(set(values)))}


def position_scale() -> list[tuple[float, str]]:
    """``POSITION_SCALE`` as plotly takes it: (fraction, colour) pairs."""
    return [(i / (len(POSITION_SCALE) - 1), colour) for i, colour in enumerate(POSITION_SCALE)]


def bare_axis(**settings: Any) -> dict:
    """Settings of an axis that is not drawn."""
    return {"visible": False, "showgrid": False, "zeroline": False, **settings}


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "ticks": "",
        "title": {"standoff": 8, "font": {"size": 13, "color": MUTED}},
        "tickfont": {"size": 12, "color": MUTED},
    }
    return go.layout.Template(
        layout={
            "width": WIDTH,
            "height": 400,
            "paper_bgcolor": CARD,
            "plot_bgcolor": CARD,
            "font": {"family": FONT, "size": 13, "color": INK},
            "title": {"x": 0, "xref": "container", "pad": {"l": 20}, "xanchor": "left", "font": {"size": 17}},
            "margin": {"l": 60, "r": 24, "t": 58, "b": 52},
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"font": {"size": 12}, "bgcolor": "rgba(0,0,0,0)"},
            "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
            "colorscale": {"sequential": position_scale()},
            "annotationdefaults": {"font": {"size": 12, "color": MUTED}, "showarrow": False},
        }
    )


TEMPLATE = "medlib"
pio.templates[TEMPLATE] = _template()
