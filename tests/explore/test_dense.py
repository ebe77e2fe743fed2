"""Dense pictures: lines end where the match says, sliders redraw, measures have the values worked out by hand."""

import numpy as np
import pytest
import torch

from medlib.explore import (
    cell_classes,
    cluster_grid,
    correspondence_explorer,
    correspondence_figure,
    decoder_grid,
    neighbour_agreement,
)
from medlib.explore.dense import NO_MATCH
from medlib.losses.ideal import NO_MATCH as THEIRS

CLASSES, COLOURS = ("background", "MYO", "LV"), ("#000000", "#009E73", "#D55E00")
VIEWS = np.random.default_rng(0).random((4, 16, 16)).astype(np.float32)
CELLS = (2, 2)


def segments(trace) -> list[tuple[float, float]]:
    """The start and end of each stroke, as columns of the two views: -1 left, +1 right half of a view."""
    xs = [x for x in trace.x if x is not None]
    return list(zip(xs[::2], xs[1::2], strict=True))


def by_name(figure, name):
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def test_no_match_is_the_number_of_the_losses():
    assert NO_MATCH == THEIRS == -1


def test_lines_are_coloured_by_the_truth():
    match, truth = np.array([0, 0, 2, 1]), np.array([0, 1, 2, NO_MATCH])
    figure = correspondence_figure(VIEWS[0], VIEWS[1], {"step 0": match}, CELLS, truth=truth)
    assert [len(segments(by_name(figure, name))) for name in ("right", "wrong", "shown in one view only")] == [2, 1, 1]
    (start, end), _ = segments(by_name(figure, "right"))
    assert start == 0.25 and end == pytest.approx(1.16 + 0.25)  # cell 0 to cell 0: left column of both views
    (start, end) = segments(by_name(figure, "wrong"))[0]
    assert start == 0.75 and end == pytest.approx(1.16 + 0.25)  # cell 1 to cell 0
    assert any(note.text == "step 0: 2 of 3 right" for note in figure.layout.annotations)


def test_cells_without_a_match_have_no_line():
    figure = correspondence_figure(VIEWS[0], VIEWS[1], {"a": np.array([3, -1, -1, 0])}, CELLS)
    assert sum(len(segments(trace)) for trace in figure.data[1:]) == 2


def test_four_pairs_stand_in_two_rows():
    match = np.arange(4)
    one, four = (
        correspondence_figure(VIEWS[0], VIEWS[1], {f"step {i}": match for i in range(n)}, CELLS) for n in (2, 4)
    )
    assert len(four.layout.images) == 8 and four.layout.height > 1.5 * one.layout.height


@pytest.mark.parametrize("match", [np.arange(3), np.array([0, 1, 2, 4]), np.array([0, 1, 2, -2])])
def test_a_match_that_names_no_cell_is_refused(match):
    with pytest.raises(ValueError, match="match 'a' must name a cell"):
        correspondence_figure(VIEWS[0], VIEWS[1], {"a": match}, CELLS)


def tables() -> dict[str, np.ndarray]:
    """Two cell tables: before, all cells take cell 0; after, each takes itself, and one distractor is closer."""
    before, after = np.full((4, 12), 0.1), np.full((4, 12), 0.1)
    before[:, 0] = 0.9
    after[:, :4] += 0.7 * np.eye(4)
    after[2, 9] = 0.95  # cell 1 of the second other slice
    return {"step 0": before, "step 9": after}


def test_the_explorer_follows_cell_and_step():
    explorer = correspondence_explorer(
        VIEWS[0], VIEWS[1], tables(), CELLS, others=VIEWS[2:], truth=np.array([0, 1, 2, NO_MATCH]), title="Views"
    )
    figure = explorer.figures["views"]
    assert explorer.controls["shown"].value == "step 9" and explorer.controls["cell"].value == 2
    assert "cell 2, cosine with its match 0.80; 1 of 8 distractors are closer" in figure.layout.title.text
    match = by_name(figure, "match")
    assert match.x[1] == pytest.approx(1.16 + 0.25) and match.y[1] == 0.75  # cell 2: left, below
    assert by_name(figure, "true place").x[0] == match.x[1]
    crosses = by_name(figure, "distractors")
    assert len(crosses.x) == 3 and crosses.x[0] == pytest.approx(0.54 + 0.375) and crosses.y[0] == pytest.approx(1.245)
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(heat) == 3 and heat[0].z[1][0] == 0.8 and heat[2].z[0][1] == 0.95
    assert len(segments(by_name(figure, "match, right"))) == 3
    assert len(segments(by_name(figure, "no true place"))) == 1

    explorer.controls["shown"].value = "step 0"
    assert len(segments(by_name(figure, "match, wrong"))) == 2 and heat[0].z[0][0] == 0.9
    assert match.y[1] == 0.25 and "0 of 8 distractors" in figure.layout.title.text
    explorer.controls["cell"].value = 3
    assert len(by_name(figure, "true place").x) == 0 and match.x[0] == 0.75


def test_hovering_over_a_dot_chooses_its_cell():
    explorer = correspondence_explorer(VIEWS[0], VIEWS[1], {"a": np.eye(4)}, CELLS)
    assert "shown" not in explorer.controls
    (dots,) = [trace for trace in explorer.figures["views"].data if trace.text is not None]
    points = type("Points", (), {"point_inds": [3]})()
    dots._hover_callbacks[0](dots, points, None)
    assert explorer.controls["cell"].value == 3
    assert explorer.twin.layout.width is None and len(explorer.twin.to_json()) < 200_000


def test_the_explorer_refuses_tables_of_another_size():
    with pytest.raises(ValueError, match=r"similarities 'a' must be \(4, 8\): cells of 2 pictures, got \(4, 4\)"):
        correspondence_explorer(VIEWS[0], VIEWS[1], {"a": np.eye(4)}, CELLS, others=VIEWS[2:3])
    with pytest.raises(ValueError, match="similarities is empty"):
        correspondence_explorer(VIEWS[0], VIEWS[1], {}, CELLS)


def test_what_is_no_match_no_picture_and_no_number_is_refused_by_name():
    view, match = np.zeros((4, 4)), np.arange(4)
    for odd in (match + 0.5, match * np.nan):
        with pytest.raises(ValueError, match="match 'a' must name a cell"):
            correspondence_figure(view, view, {"a": odd}, (2, 2))
    with pytest.raises(ValueError, match="match 'a' must name a cell"):
        correspondence_figure(view, view, {"a": match[:0]}, (0, 0))
    for other in (view[:2], view[None, None]):
        with pytest.raises(ValueError, match="second must be a picture"):
            correspondence_figure(view, other, {"a": match}, (2, 2))
    with pytest.raises(ValueError, match="others must be a picture"):
        correspondence_explorer(view, view, {"": np.zeros((4, 8))}, (2, 2), others=np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="similarities 'a' must be finite"):
        correspondence_explorer(view, view, {"a": np.full((4, 4), np.nan)}, (2, 2))
    with pytest.raises(ValueError, match="features hold values"):
        neighbour_agreement(np.full((2, 2), np.nan), np.zeros(2), np.arange(2))
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        cell_classes(np.zeros((0, 4, 4), int), (2, 2))
    with pytest.raises(ValueError, match="cells at least 1 x 1"):
        cell_classes(np.zeros((1, 4, 4), int), (0, 2))
    with pytest.raises(ValueError, match=r"images and labels must be \(N,H,W\)"):
        cluster_grid(view[None], {}, view[:2][None], ["none"], ["#000000"], ["1"])
    with pytest.raises(ValueError, match="image must be of the label's size"):
        decoder_grid(view[:2], {}, view.astype(int), ["none"], ["#000000"])


def test_tensors_and_lists_are_drawn_like_arrays():
    view, match = np.eye(4), np.arange(4)
    figure = correspondence_figure(view, view, {"a": match}, (2, 2))
    for same in (torch.from_numpy, np.ndarray.tolist):
        assert correspondence_figure(same(view), same(view), {"a": same(match)}, (2, 2)) == figure


def test_decoders_differ_in_the_parts_that_the_title_says():
    label = np.zeros((16, 16), int)
    label[4:8, 4:8] = 2
    shifted = np.roll(label, 1, axis=1)
    figure = decoder_grid(VIEWS[0], {"step 0": np.stack([label, shifted]), "end": np.stack([label, label])}, label,
                          CLASSES, COLOURS)  # fmt: skip
    texts = [note.text for note in figure.layout.annotations]
    assert "step 0: 3.1 %" in texts and "end: 0.0 %" in texts and "label" in texts  # 8 of 256 pixels
    assert len(figure.layout.images) == 9
    first, same = figure.layout.images[6].source, figure.layout.images[7].source  # the row "they differ"
    assert first != same
    with pytest.raises(ValueError, match=r"decisions 'a' must be \(2,16,16\), got \(16, 16\)"):
        decoder_grid(VIEWS[0], {"a": label}, label, CLASSES, COLOURS)


def test_one_row_per_clustering():
    labels = np.zeros((4, 16, 16), int)
    clusters = {"dense": np.arange(16).reshape(4, 2, 2) % 3, "global": np.zeros((4, 2, 2), int)}
    figure = cluster_grid(VIEWS, clusters, labels, CLASSES, COLOURS, list("abcd"))
    assert len(figure.layout.images) == 12
    sources = [image.source for image in figure.layout.images]
    assert sources[4] != sources[8]
    with pytest.raises(ValueError, match=r"clusters 'dense' must have one map .*for each of 4 slices, got \(2, 2, 2\)"):
        cluster_grid(VIEWS, {"dense": clusters["dense"][:2]}, labels, CLASSES, COLOURS, list("abcd"))
    with pytest.raises(ValueError, match=r"clusters .dense. must have one map \(h,w\)"):
        cluster_grid(VIEWS, {"dense": clusters["dense"].reshape(4, 4)}, labels, CLASSES, COLOURS, list("abcd"))
    with pytest.raises(ValueError, match="row 'label' has 4 pictures for 2 titles"):
        cluster_grid(VIEWS, clusters, labels, CLASSES, COLOURS, list("ab"))


def test_a_cell_shows_the_structure_that_fills_a_quarter_of_it():
    labels = np.zeros((1, 4, 8), int)
    labels[0, :2, :2] = 1  # a quarter of the left cell
    labels[0, :1, 4:7] = 2  # 3 of 16 pixels of the right cell
    assert cell_classes(labels, (1, 2)).tolist() == [[[1, 0]]]
    labels[0, 3, 4:8] = 1  # 7 of 16, more of class 1
    assert cell_classes(labels, (1, 2)).tolist() == [[[1, 1]]]
    assert cell_classes(labels * 0, (2, 4)).tolist() == [[[0] * 4] * 2]
    with pytest.raises(ValueError, match=r"multiples of the cells \(3, 3\)"):
        cell_classes(labels, (3, 3))


def test_agreement_counts_neighbours_of_other_owners():
    angles = np.radians([0, 10, 90, 80, 45, 0.5])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    kinds = np.array(["LV", "LV", "RV", "RV", "RV", "LV"])
    owners = np.array(["a", "b", "a", "b", "b", "a"])
    # LV: each has an LV of the other owner within 10 degrees, and 0 is not asked of 5, which has the same owner.
    # RV: 90 and 80 find each other; 45 finds the LV at 0.5, nearer by half a degree than the RV at 90.
    assert neighbour_agreement(features, kinds, owners) == pytest.approx((1 + 2 / 3) / 2)
    assert neighbour_agreement(3 * features, kinds, owners) == neighbour_agreement(features, kinds, owners)


def test_a_kind_of_one_owner_is_left_out():
    features = np.eye(4)
    assert np.isnan(neighbour_agreement(features, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])))
    with pytest.raises(ValueError, match="one kind and owner per row"):
        neighbour_agreement(features, np.array([0, 0, 1]), np.array([0, 0, 1]))
