"""The cloud to drag, clouds over training, sparse places on the slice, and the scores of clusters."""

import math

import numpy as np
import pytest
import torch

from medlib.explore import (
    Cloud,
    ClusterScores,
    boundary_bars,
    boundary_distance,
    cloud_figure,
    cluster_scores,
    density_explorer,
    score_curves,
    sparse_places,
)
from medlib.explore.density import on_sphere
from medlib.losses.dacl import feature_density
from medlib.rng import numpy_generator

COLOURS = ("#00000000", "#0072B2", "#009E73")


def toy(**settings):
    """A core of 40 points, a tight group of 8 beside it, one stray point, and 10 of another class."""
    rng = numpy_generator(0, "toy")
    core, group = rng.normal(0, 0.25, (40, 2)), rng.normal(0, 0.02, (8, 2)) + [1.0, 0.3]
    points = np.concatenate([core, group, [[-0.2, 1.0]]])
    others = rng.normal(0, 0.1, (10, 2)) + [0, -1.2]
    handles = {"group": range(40, 48), "stray": [48]}
    settings = {"scales": ((4,), (24,)), "anchors": 6, "keys": 8, **settings}
    return points, others, density_explorer(points, others, handles, **settings)


def cloud(count: int = 20, **parts) -> Cloud:
    rng = numpy_generator(1, "cloud")
    mine = np.arange(count) < count // 2
    density = np.linspace(0.2, 1, count)
    return Cloud(**{
        "points": rng.normal(size=(count, 2)), "mine": mine, "density": density,
        "anchor": density < 0.4, "dense": np.arange(count) % 2 == 0, **parts,
    })  # fmt: skip


# ---- numbers


def test_scores_by_hand():
    # Four directions, 0 and 0 degrees against 90 and 90: distances within 0, between 1; silhouette 1, Davies-Bouldin 0.
    perfect = np.array([[1, 0], [3, 0], [0, 1], [0, 7.0]])
    assert cluster_scores(perfect, np.array([1, 1, 2, 2])) == ClusterScores(1, pytest.approx(0, abs=1e-9), 1)
    # At 0 and 60 degrees against 120 and 180, by cosine distance 1 - cos: the outer ones of a class have a = 1/2 and
    # b = (3/2 + 2)/2, the inner ones a = 1/2 and b = (1/2 + 3/2)/2: silhouettes 5/7 and 1/2.
    angle = np.radians([0, 60, 120, 180])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    found = cluster_scores(rows, np.array([0, 0, 1, 1]))
    assert found.silhouette == pytest.approx((5 / 7 + 1 / 2) / 2)
    # Chords: each lies sin 15 from its mean (halved chord of 60 degrees); the means lie cos 30 out, 120 degrees apart.
    assert found.davies_bouldin == pytest.approx(2 * math.sin(math.radians(30)) / (2 * 0.75))


def test_scores_ignore_length_and_tell_mixed_classes_apart():
    rng = numpy_generator(2, "scores")
    rows = rng.normal(size=(90, 5)) + 3 * np.eye(5)[np.repeat([0, 1, 2], 30)]
    classes = np.repeat([1, 2, 3], 30)
    sorted_, mixed = cluster_scores(rows, classes), cluster_scores(rows, rng.permutation(classes))
    longer = cluster_scores(rows * rng.uniform(0.1, 9, (90, 1)), classes)
    assert longer == pytest.approx(sorted_)
    assert sorted_.silhouette > mixed.silhouette and sorted_.v_measure > mixed.v_measure
    assert sorted_.davies_bouldin < mixed.davies_bouldin
    with pytest.raises(ValueError, match="2 to N - 1 classes, got 1"):
        cluster_scores(rows, np.ones(90))
    with pytest.raises(ValueError, match=r"classes \(N,\), got \(90, 5\) and \(3,\)"):
        cluster_scores(rows, np.ones(3))


def test_boundary_distance_by_hand():
    # Columns 0 0 0 1 1 in one slice, all 0 in the next, and two structures that touch in the last.
    maps = np.stack([np.tile(row, (3, 1)) for row in ([0, 0, 0, 1, 1], [0] * 5, [1, 1, 2, 2, 2])])
    places = np.array([[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3], [0, 1, 4], [1, 1, 1], [2, 1, 1], [2, 0, 4]])
    assert boundary_distance(maps, places).tolist() == [3, 2, 1, 1, 2, math.inf, 1, 3]
    with pytest.raises(ValueError, match=r"places \(M,3\)"):
        boundary_distance(maps, places[:, :2])


def test_the_map_is_a_window_on_the_sphere():
    features = on_sphere(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 4.0]], dtype=torch.float64))
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert (features[0] @ features[1]).item() == pytest.approx(math.sqrt(0.5))  # 45 degrees
    assert features[2].tolist() == pytest.approx([3 / math.sqrt(26), 4 / math.sqrt(26), 1 / math.sqrt(26)])


# ---- figures


def test_clouds_draw_each_pixel_once_and_mark_those_of_the_class():
    one = cloud()
    figure = cloud_figure({"early": one, "late": cloud(30)}, notes={"late": "tidier"})
    gray, coloured, anchors, keys = figure.data[:4]
    assert (len(gray.x), len(coloured.x)) == (10, 10)
    np.testing.assert_allclose(coloured.marker.color, one.density[:10], atol=1e-3)
    assert len(anchors.x) == (one.anchor & one.mine).sum() and len(keys.x) == (one.dense & one.mine).sum() == 5
    assert [trace.xaxis for trace in figure.data[4:]] == ["x2"] * 4
    assert any(a.text == "tidier" for a in figure.layout.annotations)
    with pytest.raises(ValueError, match="cloud 'bad': one row per pixel.*'anchor': 3"):
        cloud_figure({"bad": cloud(anchor=np.ones(3, bool))})
    with pytest.raises(ValueError, match="clouds is empty"):
        cloud_figure({})


def test_places_are_drawn_on_their_slice():
    maps = np.zeros((3, 20, 20), int)
    maps[:, 8:12, 6:10] = 1
    images = numpy_generator(3, "image").normal(size=maps.shape)
    places = np.array([[0, 8, 6], [2, 11, 9], [1, 9, 7], [2, 8, 8]])
    anchor, dense = np.array([1, 1, 1, 0], bool), np.array([0, 0, 0, 1], bool)
    figure = sparse_places(images, maps, places, anchor, dense, COLOURS, slices=[2, 0], titles=["two", "none"])
    sparse, thick = figure.data
    assert len(figure.layout.images) == 4
    # Cut to rows 6-13 and columns 4-11 (the square and half its size around it): 8 x 8, one slice 8.32 wide.
    assert list(sparse.x) == pytest.approx([9 - 4 + 0.5, 6 - 4 + 0.5 + 8.32])  # slice 2, then slice 0; slice 1 is out
    below = 0.12 * 8 + 1.04 * 8
    assert list(sparse.y) == pytest.approx([11 - 6 + 0.5 + below, 8 - 6 + 0.5 + below])
    assert list(thick.x) == pytest.approx([8 - 4 + 0.5])
    with pytest.raises(ValueError, match=r"places \(M,3\)"):
        sparse_places(images, maps, places[:, :2], anchor, dense, COLOURS, slices=[0])


def test_bars_are_shares_of_their_group():
    distances = np.array([1, math.sqrt(2), 2, 3, 4.1, 5, math.inf, 1])
    figure = boundary_bars({"all": distances, "anchors": distances[:2]})
    assert list(figure.data[0].y) == [37.5, 12.5, 25, 25] and list(figure.data[1].y) == [100, 0, 0, 0]
    with pytest.raises(ValueError, match="'anchors' is empty"):
        boundary_bars({"anchors": distances[:0]})


def test_curves_have_a_panel_per_score_and_a_line_per_method():
    scores = {"CPS": {0: ClusterScores(0.1, 3.0, 0.2), 9: ClusterScores(0.2, 2.0, 0.4)}, "DACL": {}}
    figure = score_curves(scores)
    assert len(figure.data) == 6
    assert [list(trace.y) for trace in figure.data if trace.name == "CPS"] == [[0.1, 0.2], [3, 2], [0.2, 0.4]]
    assert list(figure.data[0].x) == [0, 9]


# ---- the cloud to drag


def test_the_colours_are_the_librarys_density_and_the_marks_its_ends():
    points, _, explorer = toy()
    figure = explorer.figures["cloud"]
    _, _, drawn, anchors, keys, star = figure.data
    lifted = on_sphere(torch.from_numpy(points))
    density = feature_density(lifted, lifted, (24,)).numpy()
    np.testing.assert_allclose(drawn.marker.color, density, atol=1e-4)
    order = np.argsort(density)
    np.testing.assert_allclose(sorted(anchors.x), sorted(points[order[:6], 0]))
    np.testing.assert_allclose(sorted(keys.x), sorted(points[order[-8:], 0]))
    assert abs(star.x[0]) < 0.2 and abs(star.y[0]) < 0.2


def test_few_neighbours_take_a_small_group_for_the_centre():
    _, _, explorer = toy()
    figure, controls = explorer.figures["cloud"], explorer.controls
    assert "keys 0 · stray: anchors 1, keys 0" in figure.layout.title.text
    controls["scales"].value = (4,)
    assert "group: anchors 0, keys 8" in figure.layout.title.text
    assert figure.data[5].x[0] > 0.8  # the centre of the keys lies in the group


def test_a_drop_moves_the_group_and_what_follows_from_it():
    points, _, explorer = toy()
    figure, controls = explorer.figures["cloud"], explorer.controls
    before = figure.layout.title.text
    handle = figure.layout.annotations[0]
    x, y = handle.x, handle.y
    # what the page sends when a label is dropped
    message = {"annotations[0].x": x - 1.0, "annotations[0].y": y - 0.3}
    figure._js2py_relayout = {"relayout_data": message, "source_view_id": "page"}
    np.testing.assert_allclose(figure.data[2].x[40:48], points[40:48, 0] - 1.0)
    np.testing.assert_allclose(figure.data[2].y[40:48], points[40:48, 1] - 0.3)
    np.testing.assert_allclose(figure.data[2].x[:40], points[:40, 0])
    assert figure.layout.title.text != before and controls["x"].value == pytest.approx(points[40:48, 0].mean() - 1.0)
    assert (handle.x, handle.y) == (pytest.approx(x - 1.0), pytest.approx(y - 0.3))


def test_sliders_move_the_chosen_group_and_no_further_than_the_window():
    _, others, explorer = toy()
    figure, controls = explorer.figures["cloud"], explorer.controls
    controls["group"].value = "other class"
    assert controls["x"].value == pytest.approx(others[:, 0].mean())
    controls["x"].value = 1.0
    np.testing.assert_allclose(np.mean(figure.data[0].x), 1.0)
    np.testing.assert_allclose(figure.data[0].y, others[:, 1])
    message = {"annotations[1].x": 99.0, "annotations[1].y": 0.0}
    figure._js2py_relayout = {"relayout_data": message, "source_view_id": "page"}
    assert figure.data[2].x[48] == pytest.approx(1.6) and controls["group"].value == "stray"


def test_arrows_lead_from_the_anchors_away_from_the_other_class():
    points, _, explorer = toy()
    figure, controls = explorer.figures["cloud"], explorer.controls
    arrows = figure.data[1]
    steps = np.array(arrows.y).reshape(-1, 3)
    assert len(steps) == 6 and (steps[:, 1] - steps[:, 0]).sum() > 0  # the others lie below
    controls["anchors"].value = 3
    assert len(np.array(arrows.x).reshape(-1, 3)) == 3
    controls["keys"].value = 1
    assert len(figure.data[4].x) == 1
    assert len(explorer.twin.to_json()) < 40_000


def test_an_explorer_says_what_it_needs():
    with pytest.raises(ValueError, match=r"N <= 200.*\(201, 2\)"):
        density_explorer(np.zeros((201, 2)), np.zeros((3, 2)), {"a": [0]})
    with pytest.raises(ValueError, match="handles is empty"):
        density_explorer(np.zeros((20, 2)), np.zeros((3, 2)), {})
