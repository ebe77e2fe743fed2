"""An embedding over training: pictures that follow each other, numbers from the full space, controls that move both."""

from types import SimpleNamespace

import numpy as np
import pytest

from medlib.explore import (
    align,
    cluster_scores,
    direction_alignment,
    history_explorer,
    history_figure,
    measure_history,
    nearest,
    position_probe_error,
    project,
    project_history,
    rank_correlation,
)
from medlib.rng import numpy_generator

POSITIONS = np.tile(np.arange(1, 9) / 8, 5)
PATIENTS = np.repeat([f"patient{i}" for i in range(5)], 8)
GROUPS = ["low" if p <= 0.5 else "high" for p in POSITIONS]
STEPS = (0, 2, 8)


def snapshots(order: float = 1.0) -> dict[int, np.ndarray]:
    """Noise at first; more and more of an arc."""
    rng = numpy_generator(0, "history")
    noise, turn = rng.normal(size=(40, 10)), rng.normal(size=(2, 10))
    arc = np.stack([np.cos(2 * POSITIONS), np.sin(2 * POSITIONS)], axis=1) @ turn
    return {step: noise + order * i * 2 * arc for i, step in enumerate(STEPS)}


def thumbnails() -> np.ndarray:
    return numpy_generator(0, "thumbnails").integers(0, 255, (40, 16, 16), np.uint8)


def test_align_undoes_a_turn_and_a_mirror_and_changes_no_distance():
    flat = numpy_generator(0, "flat").normal(size=(30, 2)).astype(np.float32)
    turn = np.array([[np.cos(1.0), np.sin(1.0)], [-np.sin(1.0), np.cos(1.0)]])
    for how in (turn, turn * [1, -1]):  # the second with a mirror in it
        np.testing.assert_allclose(align(flat @ how, flat), flat, atol=1e-5)
    other = numpy_generator(1, "flat").normal(size=(30, 2))
    moved = align(flat, other)
    np.testing.assert_allclose(np.linalg.norm(moved[3] - moved[8]), np.linalg.norm(flat[3] - flat[8]), rtol=1e-5)
    assert np.square(moved - other).sum() < np.square(flat - other).sum()
    with pytest.raises(ValueError, match="one shape"):
        align(flat, flat[:-1])


@pytest.mark.parametrize("kind", ["PCA", "t-SNE"])
def test_each_picture_lies_like_the_next(kind):
    many = snapshots()
    flats = project_history(dict(reversed(many.items())), kind)
    assert list(flats) == list(STEPS)
    np.testing.assert_array_equal(flats[8], project(many[8], kind))
    for step, following in ((0, 2), (2, 8)):
        np.testing.assert_allclose(align(flats[step], flats[following]), flats[step], atol=1e-5)
    turned = {step: features @ np.linalg.qr(numpy_generator(step, "turn").normal(size=(10, 10)))[0]
              for step, features in many.items()}  # fmt: skip
    if kind == "PCA":  # a turn of the full space is nothing that happened
        for step, flat in project_history(turned, kind).items():
            np.testing.assert_allclose(align(flat, flats[step]), flats[step], atol=1e-4)


def test_measures_are_those_of_the_full_space():
    many = snapshots()
    found = measure_history(many, POSITIONS, PATIENTS, GROUPS)
    assert all(tuple(line) == STEPS for line in found.values())
    assert found["rank correlation"][2] == rank_correlation(many[2], POSITIONS)
    assert found["alignment"][8] == direction_alignment(many[8], POSITIONS, PATIENTS)
    assert found["probe error"][0] == position_probe_error(many[0], POSITIONS, PATIENTS)[0]
    scores = cluster_scores(many[8], np.array([group == "low" for group in GROUPS]).astype(int))
    assert [found[name][8] for name in ("silhouette", "Davies-Bouldin", "V-measure")] == pytest.approx(list(scores))
    assert found["rank correlation"][0] < 0.1 < 0.5 < found["rank correlation"][8]
    assert list(measure_history(many, POSITIONS, np.repeat("one", 40), ["same"] * 40)) == ["rank correlation"]


def test_the_slider_moves_picture_curves_and_neighbours():
    methods = {"arc": snapshots(), "noise": snapshots(0.1)}
    explorer = history_explorer(methods, POSITIONS, PATIENTS, GROUPS, thumbnails())
    picture, curves, controls = explorer.figures["picture"], explorer.figures["measures"], explorer.controls
    flats = project_history(methods["arc"])
    np.testing.assert_array_equal(picture.data[0].x, flats[8][:, 0])
    controls["step"].value = 2
    np.testing.assert_array_equal(picture.data[0].x, flats[2][:, 0])
    np.testing.assert_array_equal(picture.data[1].y, project_history(methods["noise"])[2][:, 1])
    assert {line.x0 for line in curves.layout.shapes} == {1} and "step 2" in picture.layout.title.text
    assert controls["play"].value == 1
    controls["play"].value = 0  # what pressing play sends
    assert controls["step"].value == 0 and curves.layout.shapes[0].x0 == 0
    line = next(t for t in curves.data if t.name == "arc")
    assert list(line.x) == [0, 1, 2]
    assert line.y[1] == pytest.approx(rank_correlation(methods["arc"][2], POSITIONS), abs=1e-4)
    picture.data[1]._dispatch_on_click(SimpleNamespace(point_inds=[11]), None)
    assert controls["point"].value == 11 and "patient1" in controls["strip"].value
    controls["step"].value = 2
    np.testing.assert_allclose(picture.data[2].x, [flats[step][11, 0] for step in STEPS[:2]])
    controls["step"].value = 8
    np.testing.assert_allclose(picture.data[2].x, [flats[step][11, 0] for step in STEPS])  # the way of the point
    np.testing.assert_allclose(picture.data[3].x, flats[8][[11], 0])
    others = sum(PATIENTS[i] != PATIENTS[11] for i in nearest(methods["arc"][8], 11))
    assert f"{others} of 6 from other patients" in controls["strip"].value


def test_colour_and_projection_of_the_film():
    explorer = history_explorer({"arc": snapshots()}, POSITIONS, PATIENTS, GROUPS)
    picture, controls = explorer.figures["picture"], explorer.controls
    controls["colour"].value = "group"
    assert len(set(picture.data[0].marker.color)) == 2 and picture.layout.coloraxis.showscale is False
    assert "low" in controls["legend"].value
    controls["colour"].value = "position"
    assert picture.data[0].marker.color[0] == pytest.approx(0.125) and picture.layout.coloraxis.showscale
    assert "distance between clusters" not in controls["note"].value
    controls["projection"].value = "t-SNE"
    np.testing.assert_array_equal(picture.data[0].x, project_history(snapshots(), "t-SNE")[8][:, 0])
    assert "distance between clusters" in controls["note"].value


def test_methods_recorded_at_other_steps_show_their_last_one():
    late = {step + 1: features for step, features in snapshots(0.5).items()}  # 1, 3, 9
    explorer = history_explorer({"arc": snapshots(), "late": late}, POSITIONS, PATIENTS)
    assert list(explorer.controls["step"].options) == [0, 1, 2, 3, 8, 9]
    explorer.controls["step"].value = 2
    np.testing.assert_array_equal(explorer.figures["picture"].data[1].x, project_history(late)[1][:, 0])
    explorer.controls["step"].value = 0  # before its first
    np.testing.assert_array_equal(explorer.figures["picture"].data[1].x, project_history(late)[1][:, 0])


def test_the_twin_shows_moments_and_measures():
    methods = {"arc": snapshots(), "noise": snapshots(0.1)}
    figure = history_figure(methods, POSITIONS, PATIENTS)
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(dots) == 2 * len(STEPS)
    np.testing.assert_array_equal(dots[0].x, project_history(methods["arc"])[0][:, 0])
    assert len([trace for trace in figure.data if trace.mode == "lines+markers"]) == 2 * 3
    texts = [note.text for note in figure.layout.annotations]
    assert "<b>noise</b>, step 0" in texts and "rank correlation ↑" in texts
    assert len(figure.to_json()) < 60_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}}, "one to three"),
        ({"methods": {"a": {0: np.ones((40, 3))}}}, "two or more"),
        ({"methods": {"a": {0: np.ones((40, 3)), 1: np.ones((39, 3))}}}, r"\(39, 3\)"),
        ({"patients": PATIENTS[:-1]}, "lengths differ.*patients"),
        ({"groups": GROUPS[:-1]}, "lengths differ.*groups"),
        ({"thumbnails": thumbnails()[:-1]}, "lengths differ.*thumbnails"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    given = {"methods": {"arc": snapshots()}, "positions": POSITIONS, "patients": PATIENTS}
    with pytest.raises(ValueError, match=message):
        history_explorer(**{**given, **change})
