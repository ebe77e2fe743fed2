"""Pictures of MONA: bars, marks and heat maps show the numbers they are given, and every control redraws them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medlib.explore import (
    Draw,
    affine_warp,
    anchor_explorer,
    long_tail_bars,
    neighbour_explorer,
    relation_explorer,
    relation_figure,
    relation_plane,
    warp_explorer,
)
from medlib.losses.mona import class_relation_distribution
from medlib.rng import numpy_generator

CLASSES, COLOURS = ("background", "MYO", "LV"), ("#000000", "#009E73", "#D55E00")
SLICES = numpy_generator(0, "slices").random((5, 16, 16)).astype(np.float32)


def by_name(figure, name):
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


# ---- the long tail


def test_bars_are_shares_of_all_pixels_the_largest_first():
    figure = long_tail_bars({"acdc": {"background": 980, "LV": 4, "MYO": 16}, "lits": {"background": 3, "liver": 1}})
    acdc, lits = figure.data
    assert acdc.y == ("background", "MYO", "LV") and acdc.x == pytest.approx((98, 1.6, 0.4))
    assert acdc.text == ("98 %", "1.6 %", "0.4 %")
    assert lits.x == pytest.approx((75, 25)) and figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert 10 ** figure.layout.xaxis.range[0] == pytest.approx(0.1)  # below the smallest bar
    assert acdc.marker.color[0] != acdc.marker.color[1] == acdc.marker.color[2]


def test_a_class_without_a_pixel_has_no_bar():
    (bars,) = long_tail_bars({"acdc": {"background": 99, "MYO": 1, "LV": 0}}).data
    assert bars.y[-1] == "LV" and bars.x[-1] is None and bars.text[-1] == "0 %"
    for empty in ({}, {"acdc": {"MYO": 0}}):
        with pytest.raises(ValueError, match="must hold pixels for each data set"):
            long_tail_bars(empty)


# ---- anchors and negatives


def toy_draws() -> tuple[np.ndarray, dict[str, Draw]]:
    labels = np.zeros((2, 16, 16), int)
    labels[0, 4:8, 4:8], labels[1, 2, 3] = 1, 2
    lone = 256 + 2 * 16 + 3  # the pixel of class 2, in the second slice
    tail = Draw(
        [np.array([0]), np.array([4 * 16 + 4]), np.array([lone, lone])],
        [np.array([False]), np.array([True]), np.array([True, False])],
        [np.array([lone]), np.array([0, 1]), np.array([4 * 16 + 4, 5 * 16 + 7, 7 * 16 + 5, 511])],
    )
    uniform = Draw([np.arange(3), np.array([], int), np.array([], int)], [np.zeros(3, bool)] + [np.zeros(0, bool)] * 2,
                   [np.array([], int)] * 3)  # fmt: skip
    return labels, {"uniform": uniform, "tailness": tail}


def test_marks_lie_on_the_slice_their_pixel_is_of():
    labels, draws = toy_draws()
    explorer = anchor_explorer(SLICES[:2], labels, draws, CLASSES, COLOURS, titles=["a", "b"], title="Draws")
    figure = explorer.figures["slices"]
    assert explorer.controls["class"].value == "LV" and explorer.controls["shown"].value == "tailness"  # the rarest
    step, top = 16 * 1.04, figure.layout.images[1].y  # of the slice below the first
    assert top == pytest.approx(figure.layout.images[0].y + step)
    hard, easy = by_name(figure, "hard queries"), by_name(figure, "easy queries")
    assert hard.x == pytest.approx((step + 3.5,)) and hard.y == pytest.approx((top + 2.5,)) and len(easy.x) == 1
    assert hard.marker.color == COLOURS[2]
    muscle, rest = by_name(figure, "negatives: MYO"), by_name(figure, "negatives: background")
    assert muscle.x == pytest.approx((4.5, 7.5, 5.5)) and rest.x == pytest.approx((step + 15.5,))
    assert muscle.y == pytest.approx((top + 4.5, top + 5.5, top + 7.5)) and rest.y == pytest.approx((top + 15.5,))
    assert muscle.marker.color == COLOURS[1] and rest.marker.color not in COLOURS
    assert len(by_name(figure, "negatives: LV").x) == 0
    said = figure.layout.title.text
    assert "LV: 2 queries, 50 % of them hard; 4 negatives: 75 % MYO, 25 % background" in said and "tailness" in said
    assert len(figure.layout.images) == 4 and {"a", "b"} <= {note.text for note in figure.layout.annotations}
    assert [len(trace.x) for trace in explorer.twin.data if "negatives" in trace.name] == [1, 3, 0]


def test_titles_of_two_lines_have_room():
    labels, draws = toy_draws()
    none, one, two = (
        anchor_explorer(SLICES[:2], labels, draws, CLASSES, COLOURS, titles=titles).twin.layout
        for titles in (None, ["a", "b"], ["a", "b<br>position 0.5"])
    )
    assert none.height < one.height < two.height and none.images[0].y < one.images[0].y < two.images[0].y


def test_class_and_draw_are_controls():
    def crosses():
        return sum(len(trace.x) for trace in figure.data if "negatives" in trace.name)

    labels, draws = toy_draws()
    explorer = anchor_explorer(SLICES[:2], labels, draws, CLASSES, COLOURS)
    figure = explorer.figures["slices"]
    explorer.controls["class"].value = "MYO"
    assert len(by_name(figure, "hard queries").x) == 1 and crosses() == 2
    explorer.controls["shown"].value = "uniform"
    assert len(by_name(figure, "hard queries").x) == 0 == crosses()
    assert "MYO: 0 queries" in figure.layout.title.text and "%" not in figure.layout.title.text.split("MYO")[1]
    explorer.controls["class"].value = "background"
    assert len(by_name(figure, "easy queries").x) == 3
    assert "shown" not in anchor_explorer(SLICES[:2], labels, {"a": draws["uniform"]}, CLASSES, COLOURS).controls


def test_anchors_refuse_what_does_not_fit():
    labels, draws = toy_draws()
    with pytest.raises(ValueError, match=r"N from 1 to 6, got \(2, 16, 16\) and \(3, 16, 16\)"):
        anchor_explorer(SLICES[:2], np.zeros((3, 16, 16), int), draws, CLASSES, COLOURS)
    with pytest.raises(ValueError, match="draw 'tailness' must have queries, hard and negatives for each of 2 classes"):
        anchor_explorer(SLICES[:2], labels, {"tailness": draws["tailness"]}, CLASSES[:2], COLOURS[:2])
    with pytest.raises(ValueError, match="draws is empty"):
        anchor_explorer(SLICES[:2], labels, {}, CLASSES, COLOURS)


# ---- the relation of classes


def test_the_heat_map_follows_the_slider():
    tables = {f"step {n}": np.full((3, 3), 0.1 * n) for n in range(4)}
    explorer = relation_explorer(tables, CLASSES)
    heat = explorer.figures["relation"].data[0]
    assert heat.z[0][0] == pytest.approx(0.3) and explorer.figures["relation"].layout.annotations[0].text == "step 3"
    explorer.controls["shown"].value = "step 1"
    assert heat.z[2][1] == pytest.approx(0.1) and explorer.figures["relation"].layout.annotations[0].text == "step 1"
    assert [trace.z[0][0] for trace in explorer.twin.data] == pytest.approx([0, 0.3])
    assert len(relation_explorer({"now": tables["step 1"]}, CLASSES).twin.data) == 1
    with pytest.raises(ValueError, match=r"relation 'a' must be \(3,3\), got \(2, 2\)"):
        relation_figure({"a": np.eye(2)}, CLASSES)
    with pytest.raises(ValueError, match="relations is empty"):
        relation_figure({}, CLASSES)


def test_turning_and_stretching_a_mean_changes_the_relation():
    means = np.array([[2.0, 0], [0, 1], [0, 2]])
    explorer = relation_plane(means, CLASSES, COLOURS)
    figure, controls = explorer.figures["relation"], explorer.controls

    def wanted():
        return class_relation_distribution(torch.from_numpy(means)).numpy().round(4)

    assert controls["class"].value == "LV" and (controls["angle"].value, controls["length"].value) == (90, 2)
    assert np.array(figure.data[-1].z) == pytest.approx(wanted())
    controls["angle"].value, controls["length"].value = 0, 1.5
    means[2] = 1.5, 0
    assert np.array(figure.data[-1].z) == pytest.approx(wanted()) and figure.data[2].x == pytest.approx((0, 1.5))
    controls["class"].value = "background"
    assert (controls["angle"].value, controls["length"].value) == (0, 2)
    assert np.array(figure.data[-1].z) == pytest.approx(wanted())  # choosing moves nothing
    controls["angle"].value = 180
    means[0] = -2, 0
    assert np.array(figure.data[-1].z) == pytest.approx(wanted(), abs=1e-4)
    assert [trace.textposition for trace in figure.data[:3]] == ["middle left", "top center", "middle right"]
    points = type("Points", (), {"point_inds": [1]})()
    figure.data[1]._click_callbacks[0](figure.data[1], points, None)
    assert controls["class"].value == "MYO" and controls["length"].value == 1
    with pytest.raises(ValueError, match=r"prototypes must be \(C,2\)"):
        relation_plane(means, CLASSES[:2], COLOURS)


def test_choosing_a_mean_that_is_longer_than_its_slider_leaves_it():
    means = np.array([[5.0, 0], [0, 1], [0, 2]])
    explorer = relation_plane(means, CLASSES, COLOURS)
    explorer.controls["class"].value = "background"
    explorer.controls["class"].value = "MYO"
    explorer.controls["length"].value = 1.5
    assert explorer.figures["relation"].data[0].x == (0, 5)


# ---- the warp


def test_a_warp_without_a_change_is_the_identity():
    image = torch.from_numpy(SLICES[:1])[None]
    still = affine_warp(16, angle=0, zoom=1, shift=0, bend=0)
    torch.testing.assert_close(still.images(image), image, atol=1e-5, rtol=0)
    assert still.inside().all()


def test_each_part_of_the_warp_does_what_it_says():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4, 10] = 1.0

    def where(**parts):
        moved = affine_warp(16, **{"angle": 0, "zoom": 1, "shift": 0, "bend": 0, **parts}).images(image)
        return divmod(int(moved.flatten().argmax()), 16)

    assert where(shift=0.25) == (4, 12)  # a quarter of half the side, 2 px to the right
    assert where(mirror=True) == (4, 5)
    assert where(angle=180) == (11, 5)
    corners = affine_warp(16, angle=0, zoom=1.5, shift=0, bend=0)
    assert not corners.inside()[0, 0, 0] and corners.inside()[0, 8, 8]  # more is shown than there is
    half, whole = (affine_warp(16, 0, 1, 0, bend).grid - affine_warp(16, 0, 1, 0, 0).grid for bend in (0.5, 1))
    torch.testing.assert_close(whole, 2 * half, atol=1e-6, rtol=1e-5)
    assert 0.02 < whole.abs().max() < 0.3 and torch.equal(
        whole, affine_warp(16, 0, 1, 0, 1).grid - affine_warp(16, 0, 1, 0, 0).grid
    )


def equivariant(images):
    """Logits by a threshold, pixel by pixel: a warp may come before or after."""
    return 4 * torch.cat([-images, images, 0 * images - 9], dim=1)


def by_place(images):
    """Logits that know the frame and not the image."""
    ramp = torch.linspace(-4, 4, images.shape[-1]).expand_as(images)
    return torch.cat([-ramp, ramp, 0 * ramp - 9], dim=1)


def test_the_two_ways_agree_for_a_pointwise_network_and_not_for_one_that_knows_the_frame():
    explorer = warp_explorer(SLICES[0], {"pointwise": equivariant, "by place": by_place}, CLASSES, COLOURS)
    figure, controls = explorer.figures["warp"], explorer.controls
    assert controls["shown"].value == "by place" and "by place" in figure.layout.title.text

    def value():
        return float(figure.layout.title.text.split("eq. 6: ")[1].split(" ")[0])

    assert value() > 0.3
    for control, moved in {"mirror": True, "angle": 90, "zoom": 1.2, "shift": 0.2, "bend": 0.5}.items():
        before = [one.source for one in figure.layout.images]
        controls[control].value = moved
        after = [one.source for one in figure.layout.images]
        changed = [a != b for a, b in zip(before, after, strict=True)]
        assert changed[:2] == [False, False] and changed[2] and changed[3], control  # x and F(x) stay
    controls["shown"].value = "pointwise"
    controls["bend"].value, controls["zoom"].value, controls["shift"].value = 0, 1, 0
    controls["angle"].value = 90
    assert value() == pytest.approx(0, abs=1e-3) and "0.0 % of the pixels" in figure.layout.title.text
    assert len(explorer.twin.layout.images) == 6 and all(one.source for one in explorer.twin.layout.images)


def test_the_last_picture_is_red_where_the_two_differ_and_dark_where_there_is_no_slice(monkeypatch):
    drawn = []

    def remember(picture):
        drawn.append(picture)
        return "data:,"

    monkeypatch.setattr("medlib.explore.pixels.data_uri", remember)
    explorer = warp_explorer(0 * SLICES[0], {"pointwise": equivariant, "by place": by_place}, CLASSES, COLOURS)
    explorer.controls["angle"].value, explorer.controls["zoom"].value = 180, 1.6
    red, green, blue = drawn[-1].astype(int).transpose(2, 0, 1)
    assert red[0, 0] < 60 and red[8, 0] < 60  # outside
    assert red[8, 12] > 150 > green[8, 12]  # 180 degrees turn the ramp round
    explorer.controls["shown"].value = "pointwise"
    assert (drawn[-1][8, 12] == drawn[-6][8, 12]).all() and drawn[-1][0, 0, 0] < 60


def test_the_warp_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match=r"image must be \(S,S\), got \(16, 8\)"):
        warp_explorer(SLICES[0, :, :8], {"a": equivariant}, CLASSES, COLOURS)
    with pytest.raises(ValueError, match="networks is empty"):
        warp_explorer(SLICES[0], {}, CLASSES, COLOURS)


# ---- neighbours


def test_thumbnails_are_those_that_were_found():
    rows = np.array([[0, 1], [2, 0]])
    cosines = np.array([[0.9, 0.8], [0.7, 0.125]])
    found = {"random": (rows, cosines), "trained": (rows[:, ::-1], cosines)}
    explorer = neighbour_explorer(
        SLICES[:2], SLICES[2:], found, captions=["p1", "p2"], bank_captions=["a", "b", "c"], title="Bank"
    )
    figure = explorer.figures["neighbours"]
    sources = [one.source for one in figure.layout.images]
    assert explorer.controls["slice"].value == 1 and len(sources) == 6
    assert sources[0] == sources[3] and sources[1] == sources[5] and sources[2] == sources[4] != sources[1]
    texts = [note.text for note in figure.layout.annotations]
    assert texts == [
        "random", "the slice<br>p2", "cos 0.700<br>c", "cos 0.125<br>a",
        "trained", "the slice<br>p2", "cos 0.700<br>a", "cos 0.125<br>c",
    ]  # fmt: skip
    explorer.controls["slice"].value = 0
    changed = [one.source for one in figure.layout.images]
    assert changed[1] == sources[2] and changed[0] != sources[0]
    assert figure.layout.annotations[3].text == "cos 0.800<br>b"


def test_neighbours_refuse_what_does_not_fit():
    rows, cosines = np.array([[0, 1]]), np.array([[0.9, 0.8]])
    with pytest.raises(ValueError, match="found is empty"):
        neighbour_explorer(SLICES[:1], SLICES[1:], {})
    with pytest.raises(ValueError, match=r"rows and cosines \(B,k\) for 2 images"):
        neighbour_explorer(SLICES[:2], SLICES[2:], {"a": (rows, cosines)})
    with pytest.raises(ValueError, match=r"rows and cosines \(B,k\) for 1 images"):
        neighbour_explorer(SLICES[:1], SLICES[1:], {"a": (rows, cosines[:, :1])})
    with pytest.raises(ValueError, match="beyond the 1 of the bank"):
        neighbour_explorer(SLICES[:1], SLICES[1:2], {"a": (rows, cosines)})
    with pytest.raises(ValueError, match="bank_captions must be 4 texts, got 1"):
        neighbour_explorer(SLICES[:1], SLICES[1:], {"a": (rows, cosines)}, bank_captions=["x"])


def test_a_resized_picture_is_small():
    """A notebook holds it: whatever the size of the bank's images, a thumbnail is at most 128 px."""
    large = F.interpolate(torch.from_numpy(SLICES)[None], size=(400, 400)).numpy()[0]
    found = {"a": (np.array([[0, 1]]), np.array([[0.9, 0.8]]))}
    explorer = neighbour_explorer(large[:1], large[1:], found)
    assert len(explorer.twin.to_json()) < 120_000
