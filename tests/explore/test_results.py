"""Figures of toy embeddings and of run records show every point they were given."""

import numpy as np
import pytest

from medlib.data.splits import Split
from medlib.explore import plane_figure, records_figure
from tests.results.test_records import record


def runs():
    """Two methods, two label counts, two seeds."""
    return [
        record(method=method, seed=seed, split=Split("s", ("p1", "p2", "p3")[:count], ("p4",), ("p7",), ("p8", "p9")))
        for method in ("coral", "pcl")
        for count in (1, 3)
        for seed in (0, 1)
    ]


def test_every_seed_is_a_point_and_the_line_is_their_mean():
    figure = records_figure(runs(), label=lambda r: r.method, part="val")
    points = [trace for trace in figure.data if trace.mode == "markers"]
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [trace.name for trace in points] == ["coral", "pcl"] and all(len(trace.x) == 4 for trace in points)
    assert all(len(trace.x) == 2 for trace in lines)
    dice = record().val.summary["mean"]["dice"]
    np.testing.assert_allclose(np.concatenate([trace.y for trace in points + lines]), dice, atol=1e-4)
    assert "seed 1" in points[0].text[1]
    assert list(figure.layout.xaxis.ticktext) == ["1", "3"]


def test_no_two_series_look_alike():
    many = [record(method=f"m{i}", split=Split("s", ("p1",), (), ("p7",), ())) for i in range(20)]
    points = [trace for trace in records_figure(many, label=lambda r: r.method).data if trace.mode == "markers"]
    assert len({(trace.marker.color, trace.marker.symbol) for trace in points}) == len(points) == 20


def test_a_series_looks_the_same_in_all_figures_of_a_notebook():
    both = runs()
    alone = [run for run in both if run.method == "pcl"]

    def look(records):
        figure = records_figure(records, label=lambda r: r.method, series=["coral", "pcl"])
        return {t.name: (t.marker.color, t.marker.symbol) for t in figure.data if t.mode == "markers"}

    assert look(alone)["pcl"] == look(both)["pcl"] != look(both)["coral"]
    assert list(look(both[::-1])) == ["coral", "pcl"]


def test_a_records_figure_needs_records_and_a_positive_axis():
    with pytest.raises(ValueError, match="no run"):
        records_figure([], label=lambda r: r.method)
    with pytest.raises(TypeError, match="series must be a sequence of names, got the text 'coral'"):
        records_figure(runs(), label=lambda r: r.method, series="coral")
    with pytest.raises(ValueError, match="positive"):
        records_figure(runs(), label=lambda r: r.method, x=lambda r: r.seed)


def test_a_plane_figure_draws_each_panel_with_its_arrow_and_note():
    points = {"left": np.eye(4)[:, :2], "right": -np.eye(4)[:, :2]}
    figure = plane_figure(
        points, [0.1, 0.4, 0.7, 1.0], groups=["a", "a", "b", "b"], arrows={"left": (0, 2)}, notes={"right": "loss 1"}
    )
    coloured = [trace for trace in figure.data if trace.text is not None]
    assert [len(trace.x) for trace in coloured] == [2, 2, 2, 2]
    assert {trace.marker.symbol for trace in coloured} == {"circle", "diamond"}
    assert sum(a.showarrow is True for a in figure.layout.annotations) == 1
    assert "loss 1" in [a.text for a in figure.layout.annotations]
    with pytest.raises(ValueError, match="'left' must be \\(3,2\\)"):
        plane_figure({"left": np.eye(4)[:, :2]}, [0.1, 0.5, 1.0])
