"""How an embedding forms: the same slices after more and more steps of a training, and numbers that follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.linalg import orthogonal_procrustes

from medlib.explore import panels, pixels
from medlib.explore.density import cluster_scores
from medlib.explore.embedding import nearest
from medlib.explore.live import LiveFigure
from medlib.explore.measures import direction_alignment, position_probe_error, rank_correlation, unit
from medlib.explore.projection import MAY_NOT_BE_READ, PROJECTIONS, project
from medlib.explore.show import Explorer, hint, redraw, stack
from medlib.explore.style import DISAGREEMENT, INK, MUTED, TEMPLATE, category_colours, method_colours, position_scale

Snapshots = Mapping[int, np.ndarray]  # step -> features (N,D)

_MOMENTS = 4  # of a training that its static picture shows
_PLAY_MS = 900  # between two steps
_BOX = {"showgrid": False, "showticklabels": False, "range": [-1.12, 1.12], "showline": True, "mirror": True}
_TITLES = {
    "rank correlation": "rank correlation ↑",
    "alignment": "alignment ↑",
    "probe error": "probe error ↓",
    "silhouette": "silhouette ↑",
    "Davies-Bouldin": "Davies-Bouldin ↓",
    "V-measure": "V-measure ↑",
}


def align(flat: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """``flat`` (N,d), turned and mirrored about the origin to lie as near as it can to ``previous`` (N,d).

    Orthogonal Procrustes: the rotation R with the smallest sum of squares of flat R - previous. No distance changes.
    """
    if flat.shape != previous.shape or flat.ndim != 2:
        raise ValueError(f"flat and previous must have one shape (N,d), got {flat.shape} and {previous.shape}")
    turn, _ = orthogonal_procrustes(flat.astype(np.float64), previous.astype(np.float64))
    return (flat @ turn).astype(np.float32)


def project_history(
    snapshots: Snapshots, projection: str = "PCA", *, seed: int = 0, perplexity: float = 30.0
) -> dict[int, np.ndarray]:
    """A picture (N,2) of each step, the last one as `project` makes it, each earlier one aligned with the next.

    t-SNE of a step starts from the picture of the next, so that what moves has moved in the full space. Each picture
    has its own scale: the largest extent is 1.
    """
    flats: dict[int, np.ndarray] = {}
    following: np.ndarray | None = None
    for step in sorted(snapshots, reverse=True):
        start = following if projection == "t-SNE" else None
        flat = project(snapshots[step], projection, seed=seed, perplexity=perplexity, start=start)
        following = flat if following is None else align(flat, following)
        flats[step] = following
    return dict(sorted(flats.items()))


def measure_history(
    snapshots: Snapshots, positions: np.ndarray, patients: np.ndarray, groups: Sequence[str] | None = None
) -> dict[str, dict[int, float]]:
    """The numbers of the eye at each step, in the full space: measure -> step -> value.

    Rank correlation; with two patients or more, alignment and probe error (mean absolute error in position of a linear
    probe on patients left out); with two ``groups`` or more, silhouette, Davies-Bouldin and V-measure of the groups.
    """
    positions, patients = np.asarray(positions, np.float64), np.asarray(patients)
    found: dict[str, dict[int, float]] = {}
    for step, features in sorted(snapshots.items()):
        line = {"rank correlation": rank_correlation(features, positions)}
        if len(np.unique(patients)) > 1:
            line["alignment"] = direction_alignment(features, positions, patients)
            line["probe error"] = position_probe_error(features, positions, patients)[0]
        if groups is not None and 1 < len(set(groups)) < len(groups):
            classes = np.unique(np.asarray(groups), return_inverse=True)[1]
            scores = cluster_scores(features, classes)
            line["silhouette"], line["Davies-Bouldin"], line["V-measure"] = scores
        for name, value in line.items():
            found.setdefault(name, {})[step] = value
    return found


def _check(methods: Mapping[str, Snapshots], count: int) -> None:
    if not 1 <= len(methods) <= 3:
        raise ValueError(f"methods must be one to three, got {list(methods)}")
    for name, snapshots in methods.items():
        wrong = {step: f.shape for step, f in snapshots.items() if f.ndim != 2 or len(f) != count}
        if wrong or len(snapshots) < 2:
            raise ValueError(
                f"{name}: snapshots must be two or more (N,D) with N = {count}, got steps {list(snapshots)}"
                + (f", of shape {wrong}" if wrong else "")
            )


def _at(snapshots: Mapping[int, Any], step: int) -> int:
    """The last recorded step that is not after ``step``, else the first."""
    return max((one for one in snapshots if one <= step), default=min(snapshots))


def _axis_of_steps(steps: Sequence[int]) -> dict[str, Any]:
    """Steps at equal distances: most happens at the beginning, where they are close to each other."""
    every = max(1, -(-len(steps) // 6))
    shown = [i for i in range(len(steps)) if i % every == 0 or i == len(steps) - 1]
    if len(shown) > 1 and shown[-1] - shown[-2] < every:
        shown.pop(-2)
    return {"tickvals": shown, "ticktext": [str(steps[i]) for i in shown], "range": [-0.4, len(steps) - 0.6]}


def _curves(
    figure: go.Figure,
    measures: Mapping[str, Mapping[str, Mapping[int, float]]],
    steps: Sequence[int],
    places: Mapping[str, tuple[int, int]],
) -> None:
    """One panel per measure in ``places`` (row, column), one line per method."""
    colours = method_colours(list(measures))
    first = next(iter(places))
    for measure, (row, column) in places.items():
        for name, lines in measures.items():
            line = lines.get(measure, {})
            x = [steps.index(step) for step in line]
            hover = [f"{name}<br>step {step}" for step in line]
            figure.add_trace(
                go.Scatter(
                    x=x, y=np.round(list(line.values()), 4), mode="lines+markers", name=name, legendgroup=name,
                    showlegend=measure == first, line={"color": colours[name], "width": 2.2}, marker={"size": 5},
                    text=hover, hovertemplate="%{text}: %{y:.3f}<extra></extra>",
                ),
                row=row, col=column,
            )  # fmt: skip
        figure.update_xaxes(**_axis_of_steps(steps), row=row, col=column)


def _bar(where: Mapping[str, Any]) -> dict[str, Any]:
    title = {"text": "position", "side": "right", "font": {"size": 12, "color": MUTED}}
    ticks = {"tickvals": [0, 0.5, 1], "tickfont": {"color": MUTED}}
    bar = {"title": title, "thickness": 12, "outlinewidth": 0, **ticks, **where}
    return {"colorscale": position_scale(), "cmin": 0, "cmax": 1, "colorbar": bar}


def _dots(flat: np.ndarray, positions: np.ndarray, size: float) -> go.Scatter:
    marker = {"color": positions.round(3), "coloraxis": "coloraxis", "size": size, "opacity": 0.9}
    return go.Scatter(x=flat[:, 0], y=flat[:, 1], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def history_figure(
    methods: Mapping[str, Snapshots],
    positions: np.ndarray,
    patients: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    title: str = "An embedding forms",
) -> go.Figure:
    """Four moments of each method as pictures (PCA), coloured by position, and up to three measures below them.

    Arguments as in `history_explorer`. Steps stand at equal distances on the axis of the measures.
    """
    places, owners = np.asarray(positions, np.float64), np.asarray([str(p) for p in patients])
    _check(methods, len(places))
    measures = {name: measure_history(one, places, owners, groups) for name, one in methods.items()}
    steps = sorted({step for snapshots in methods.values() for step in snapshots})
    kept = [name for name in _TITLES if any(name in lines for lines in measures.values())][:3]
    count = len(methods)
    moments = [
        steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(_MOMENTS, len(steps))).round().astype(int))
    ]
    wide, narrow = 12 // len(moments), 12 // len(kept)
    line = [{"colspan": wide} if c % wide == 0 and c // wide < len(moments) else None for c in range(12)]
    specs = [list(line) for _ in methods] + [[{"colspan": narrow} if c % narrow == 0 else None for c in range(12)]]
    figure = make_subplots(
        count + 1, 12, specs=specs, horizontal_spacing=0.02, vertical_spacing=0.09,
        row_heights=[1.0] * count + [0.85],
    )  # fmt: skip
    size = float(np.clip(70 / np.sqrt(len(places)), 3, 7))
    for row, (name, snapshots) in enumerate(methods.items(), start=1):
        flats = project_history(snapshots)
        for i, step in enumerate(moments):
            column = 1 + i * wide
            figure.add_trace(_dots(flats[_at(flats, step)], places, size), row=row, col=column)
            figure.update_xaxes(**_BOX, row=row, col=column)
            figure.update_yaxes(**_BOX, row=row, col=column)
            axis = len(moments) * (row - 1) + i + 1
            where = {"xref": f"x{axis if axis > 1 else ''} domain", "yref": f"y{axis if axis > 1 else ''} domain"}
            text = f"<b>{name}</b>, step {step}" if i == 0 else f"step {step}"
            figure.add_annotation(x=0, y=1.01, xanchor="left", yanchor="bottom", text=text, **where)
    spots = {measure: (count + 1, 1 + i * narrow) for i, measure in enumerate(kept)}
    _curves(figure, measures, steps, spots)
    for i, measure in enumerate(kept):
        axis = len(moments) * count + i + 1
        left, right = figure.layout[f"xaxis{axis}"].domain
        figure.layout[f"xaxis{axis}"].domain = left + (0.035 if i else 0), right  # room for the numbers beside it
        where = {"xref": f"x{axis} domain", "yref": f"y{axis} domain"}
        figure.add_annotation(x=0, y=1.02, xanchor="left", yanchor="bottom", text=_TITLES[measure], **where)
    height = 150 + 165 * count + 170
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=height,
        margin={"l": 44, "r": 20, "t": 84, "b": 74},
        coloraxis=_bar({"len": count / (count + 0.9), "y": 1, "yanchor": "top"}),
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    return figure


class _Film:
    """The state behind a history explorer."""

    def __init__(
        self,
        methods: Mapping[str, Snapshots],
        positions: np.ndarray,
        owners: np.ndarray,
        groups: Sequence[str] | None,
        thumbs: np.ndarray | None,
        title: str,
        seed: int,
    ):
        self.methods, self.positions, self.owners, self.title, self.seed = methods, positions, owners, title, seed
        self.thumbs = thumbs
        self.steps = sorted({step for snapshots in methods.values() for step in snapshots})
        self.measures = {name: measure_history(one, positions, owners, groups) for name, one in methods.items()}
        self.flats: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        self.colours: dict[str, tuple[np.ndarray | list[str], dict[str, str]]] = {"position": (positions.round(3), {})}
        for name, values in (("patient", owners.tolist()), ("group", list(groups) if groups is not None else None)):
            if values is not None:
                palette = category_colours(values)
                self.colours[name] = [palette[value] for value in values], palette
        self.controls: dict[str, Any] = {}
        self.figures = {"picture": LiveFigure(self._picture()), "measures": LiveFigure(self._measures())}

    def _picture(self) -> go.Figure:
        count = len(self.methods)
        figure = make_subplots(
            1, count, column_titles=[f"<b>{name}</b>" for name in self.methods], horizontal_spacing=0.04
        )
        nothing = np.zeros((len(self.positions), 2), np.float32)
        size = float(np.clip(160 / np.sqrt(len(self.positions)), 4, 9))
        hover = [f"{owner}<br>position {p:.2f}" for owner, p in zip(self.owners, self.positions, strict=True)]
        for column in range(1, count + 1):
            dots = _dots(nothing, self.positions, size)
            dots.update(text=hover, hoverinfo=None, hovertemplate="%{text}<extra></extra>")
            figure.add_trace(dots, row=1, col=column)
        path = {"mode": "lines+markers", "hoverinfo": "skip", "showlegend": False, "x": [], "y": []}
        ring = {"size": 19, "symbol": "circle-open", "color": DISAGREEMENT, "line": {"width": 3.5}}
        for column in range(1, count + 1):
            thin = {"color": INK, "width": 1.2}
            figure.add_trace(go.Scatter(**path, line=thin, marker={"size": 4, "color": INK}), row=1, col=column)
            figure.add_trace(go.Scatter(**{**path, "mode": "markers"}, marker=ring), row=1, col=column)
        figure.update_xaxes(**_BOX)
        figure.update_yaxes(**_BOX)
        figure.update_layout(
            template=TEMPLATE,
            height={1: 560, 2: 420, 3: 330}[count],
            margin={"l": 20, "r": 20, "t": 84, "b": 20},
            coloraxis=_bar({"len": 1, "y": 0.5}),
        )
        return figure

    def _measures(self) -> go.Figure:
        names = [name for name in _TITLES if any(name in lines for lines in self.measures.values())]
        rows = -(-len(names) // 3)
        figure = make_subplots(
            rows, min(3, len(names)), subplot_titles=[_TITLES[name] for name in names],
            horizontal_spacing=0.08, vertical_spacing=0.3,
        )  # fmt: skip
        places = {name: (1 + i // 3, 1 + i % 3) for i, name in enumerate(names)}
        _curves(figure, self.measures, self.steps, places)
        for i in range(len(names)):
            axis = i + 1 if i else ""
            where = {"xref": f"x{axis}", "yref": f"y{axis} domain", "y0": 0, "y1": 1, "x0": 0, "x1": 0}
            figure.add_shape(type="line", line={"color": DISAGREEMENT, "width": 2}, **where)
        figure.update_layout(
            template=TEMPLATE,
            height=130 + 125 * rows,
            margin={"l": 44, "r": 20, "t": 40, "b": 74},
            legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        )
        return figure

    def flat(self, name: str) -> dict[int, np.ndarray]:
        kind = self.controls["projection"].value
        if (name, kind) not in self.flats:
            self.flats[name, kind] = project_history(self.methods[name], kind, seed=self.seed)
        return self.flats[name, kind]

    @property
    def step(self) -> int:
        return self.controls["step"].value

    def draw(self, change: object = None) -> None:
        picture, curves, step = self.figures["picture"], self.figures["measures"], self.step
        for trace, name in zip(picture.data, self.methods, strict=False):
            flats = self.flat(name)
            now = flats[_at(flats, step)]
            redraw(trace, x=now[:, 0], y=now[:, 1])
        with picture.batch_update():
            picture.layout.title.text = f"{self.title} ({self.controls['projection'].value}), step {step}"
            for note, (name, snapshots) in zip(picture.layout.annotations, self.methods.items(), strict=True):
                alike = panels.mean_cosine(unit(snapshots[_at(snapshots, step)]))  # each picture has a scale of its own
                note.text = f"<b>{name}</b>, mean cosine {alike:.2f}"
        self.say()
        at = self.steps.index(step)
        with curves.batch_update():
            for line in curves.layout.shapes:
                line.x0 = line.x1 = at
        self.follow()

    def say(self) -> None:
        """What the pictures and curves show at this step, as sentences: their twin for a reader who does not see it."""
        told = [f"{self.figures['picture'].layout.title.text}."]
        for note, lines in zip(self.figures["picture"].layout.annotations, self.measures.values(), strict=True):
            numbers = [f"{measure} {line[_at(line, self.step)]:.2f}" for measure, line in lines.items()]
            told.append(", ".join([note.text.replace("<b>", "").replace("</b>", ""), *numbers]) + ".")
        self.controls["spoken"].value = panels.spoken(" ".join(told))

    def follow(self, change: object = None) -> None:
        """The way of the chosen point up to this step, and its picture with what lies nearest to it now."""
        point, count = self.controls["point"].value, len(self.methods)
        found = {}
        for i, (name, snapshots) in enumerate(self.methods.items()):
            flats = self.flat(name)
            way = np.stack([flat[point] for step, flat in flats.items() if step <= max(self.step, min(flats))])
            redraw(self.figures["picture"].data[count + 2 * i], x=way[:, 0], y=way[:, 1])
            redraw(self.figures["picture"].data[count + 2 * i + 1], x=way[-1:, 0], y=way[-1:, 1])
            found[name] = nearest(snapshots[_at(snapshots, self.step)], point)
        if self.thumbs is not None:
            hover = [f"{owner}, position {p:.2f}" for owner, p in zip(self.owners, self.positions, strict=True)]
            strip = panels.neighbour_strip(point, found, self.thumbs, self.positions, self.owners, hover)
            self.controls["strip"].value = panels.block(strip)

    def paint(self, change: object = None) -> None:
        name = self.controls["colour"].value
        colours, palette = self.colours[name]
        self.figures["picture"].layout.coloraxis.showscale = name == "position"
        for trace in self.figures["picture"].data[: len(self.methods)]:
            redraw(trace, **{"marker.color": colours})
        self.controls["legend"].value = panels.block(panels.chips(palette))

    def change_projection(self, change: object = None) -> None:
        self.controls["note"].value = panels.block(f"<i>{MAY_NOT_BE_READ[self.controls['projection'].value]}</i>")
        self.draw()


def history_explorer(
    methods: Mapping[str, Snapshots],
    positions: np.ndarray,
    patients: Sequence[str],
    groups: Sequence[str] | None = None,
    thumbnails: np.ndarray | None = None,
    *,
    seed: int = 0,
    title: str = "An embedding forms",
) -> Explorer:
    """The same slices after more and more steps, as a film, with the numbers of the full space below it.

    methods: one to three names, each with step -> features (N,D) · positions: (N,) in [0, 1] · patients: N names ·
    groups: N names whose clusters are scored, optional · thumbnails: (N,h,w) uint8, for the neighbours of the chosen
    point. Pictures are aligned from step to step (`project_history`), each with a scale of its own: the mean cosine
    above it says how far all points lie in one direction (1 at collapse). Where methods were recorded at different
    steps, each shows its last one so far.

    Play, or move ``step``; a click (or ``point``) follows one slice: its way up to this step, and its nearest
    neighbours now. Controls: ``play``, ``step``, ``projection``, ``colour``, ``point``. The twin is `history_figure`.
    """
    places, owners = np.asarray(positions, np.float64), np.asarray([str(p) for p in patients])
    _check(methods, len(places))
    kinds = [str(group) for group in groups] if groups is not None else None
    lengths = {"patients": len(owners), "groups": len(places) if kinds is None else len(kinds)}
    lengths["thumbnails"] = len(places) if thumbnails is None else len(thumbnails)
    if wrong := {name: length for name, length in lengths.items() if length != len(places)}:
        raise ValueError(f"lengths differ: {len(places)} positions, but {wrong}")
    thumbs = None if thumbnails is None else pixels.shrink(np.asarray(thumbnails, np.uint8), 96)
    film = _Film(methods, places, owners, kinds, thumbs, title, seed)
    menu: dict[str, Any] = {"layout": ipywidgets.Layout(width="236px"), "style": {"description_width": "84px"}}
    last = len(film.steps) - 1
    film.controls = {
        "play": ipywidgets.Play(value=last, min=0, max=last, interval=_PLAY_MS, description="play the training"),
        "step": ipywidgets.SelectionSlider(options=film.steps, value=film.steps[-1], description="step",
                                           layout=ipywidgets.Layout(width="420px")),
        "projection": ipywidgets.Dropdown(options=PROJECTIONS, description="projection", **menu),
        "colour": ipywidgets.Dropdown(options=list(film.colours), description="colour by", **menu),
        "point": ipywidgets.IntSlider(value=0, min=0, max=len(places) - 1, description="point",
                                      continuous_update=False, **menu),
        **{name: ipywidgets.HTML() for name in ("legend", "note", "spoken", "strip")},
    }  # fmt: skip
    controls = film.controls
    film.change_projection()
    film.paint()
    ipywidgets.link((controls["play"], "value"), (controls["step"], "index"))
    controls["step"].observe(film.draw, names="value")
    controls["projection"].observe(film.change_projection, names="value")
    controls["colour"].observe(film.paint, names="value")
    controls["point"].observe(film.follow, names="value")

    def click(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:
            controls["point"].value = points.point_inds[0]

    for trace in film.figures["picture"].data[: len(methods)]:
        trace.on_click(click)
    tip = (
        "press play. When does position begin to run along the cloud, and do the numbers agree with your eye? Click a "
    )
    tip += "point to follow it."
    alt = (
        f"{title}: {len(places)} slices as points on a plane at {min(_MOMENTS, len(film.steps))} moments of training, "
        f"coloured by position, for {' and '.join(methods)}, with curves of measures over the steps below."
    )
    rows = [
        ipywidgets.HBox([controls[name] for name in names], layout={"align_items": "center"})
        for names in (("play", "step"), ("projection", "colour", "point"))
    ]
    above = [hint(tip), *rows, *(controls[name] for name in ("note", "legend", "spoken"))]
    widget = stack(*above, *film.figures.values(), controls["strip"])
    twin = history_figure(methods, places, owners.tolist(), kinds, title=title)
    return Explorer(widget, twin, alt, controls, film.figures)
