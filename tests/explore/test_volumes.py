"""Three linked planes with labels and maps over them, and a voxel's neighbours in the scan and in feature space."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medlib.explore import (
    CT_WINDOWS,
    Agreement,
    agreement,
    linked_planes,
    neighborhood_explorer,
    pixels,
    step_panels,
)
from medlib.explore.style import DISAGREEMENT
from medlib.explore.volumes import HEAT, PLANES, _cut, _heat
from medlib.methods import build
from medlib.methods.dvcl import Voxels
from medlib.rng import generator, numpy_generator

CLASSES, COLOURS = ("background", "liver", "spleen"), ("#00000000", "#882255", "#004488")
LOOK = {"classes": CLASSES, "colours": COLOURS}
SPACING = (5.0, 2.0, 2.0)


def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Air with a box of liver and one of spleen; the prediction has the spleen two columns further on."""
    label = np.zeros((8, 20, 30), np.uint8)
    label[2:5, 4:10, 3:12], label[4:7, 12:18, 20:26] = 1, 2
    image = np.choose(label, [-1000.0, 60.0, 40.0]).astype(np.float32)
    prediction = np.where(label == 1, 1, 0) + 2 * np.roll(label == 2, 2, axis=2)
    return image, label, prediction


def sampled(count: int = 40, queries: int = 12, **parts) -> Voxels:
    """``count`` unreliable and ``count`` reliable voxels of two scans (8, 20, 30), in three classes."""
    rng = numpy_generator(0, "voxels")
    classes = rng.integers(0, 3, 2 * count)
    features = torch.from_numpy(rng.normal(size=(2 * count, 5)) + 3 * np.eye(5)[classes])
    places = np.stack([rng.integers(0, n, 2 * count) for n in (2, 8, 20, 30)], axis=1)
    asked = torch.arange(queries)
    near = build("dvcl", scale="ci", pool=count, queries=queries, wide=10).neighborhoods(features[:count], asked)
    found = {
        "features": features, "probabilities": torch.rand(2 * count, 3, generator=generator(0, "p")).softmax(dim=1),
        "classes": torch.from_numpy(classes), "entropy": torch.linspace(1, 0, 2 * count),
        "places": torch.from_numpy(places), "reliable": torch.arange(2 * count) >= count, "queries": asked,
        **near._asdict(),
    }  # fmt: skip
    return Voxels(**{**found, **parts})


def trace_of(figure, name: str, end: str):
    return next(t for t in figure.data if t.name == name and t.xaxis == f"x{end}")


# ---- numbers


def test_agreement_by_hand():
    # Query 0 of class 1: neighbours 2 (class 1) and 3 (class 2), outsiders 1 (class 1) and 3. Query 1 of class 1:
    # neighbours 0 and 2 (class 1), of which 2 is predicted wrongly, outsiders 3 and 3. Query 4 is of unknown class.
    found = Voxels(
        features=torch.zeros(5, 2), probabilities=torch.eye(3)[[1, 1, 0, 2, 1]], classes=torch.tensor([1, 1, 1, 2, -1]),
        entropy=torch.zeros(5), places=torch.zeros(5, 4), reliable=torch.zeros(5, dtype=torch.bool),
        queries=torch.tensor([0, 1, 4]), neighbors=torch.tensor([[2, 3], [0, 2], [0, 1]]),
        outsiders=torch.tensor([[1, 3], [3, 3], [0, 0]]), affinity=torch.ones(3, 2),
        inlier=torch.ones(3, dtype=torch.bool),
    )  # fmt: skip
    assert agreement(found) == Agreement(outsiders=3 / 4, pairs=3 / 4, neighbours=1 / 2, right=0)
    sure = found._replace(probabilities=torch.eye(3)[[1, 1, 1, 2, 1]])
    assert agreement(sure).right == 1 / 2
    nobody = found._replace(queries=torch.tensor([4]), neighbors=torch.tensor([[0, 1]]), outsiders=torch.tensor([[0]]))
    assert all(math.isnan(value) for value in agreement(nobody))
    with pytest.raises(ValueError, match="no voxel has a known class"):
        agreement(found._replace(classes=torch.full((5,), -1)))


def test_lines_keep_their_colour_and_have_one_entry_in_the_legend():
    figure = step_panels({"a": {"CPS": ([0, 5], [0.1, 0.2])}, "b": {"CPS": ([0], [0.3]), "DVCL": ([5], [0.4])}},
                         title="t", y_title="share")  # fmt: skip
    assert [(t.name, list(t.x), list(t.y), t.xaxis) for t in figure.data] == [
        ("CPS", [0, 5], [0.1, 0.2], "x"), ("CPS", [0], [0.3], "x2"), ("DVCL", [5], [0.4], "x2")]  # fmt: skip
    assert [t.showlegend for t in figure.data] == [True, False, True]
    assert figure.data[0].line.color == figure.data[1].line.color != figure.data[2].line.color
    with pytest.raises(ValueError, match="panels is empty"):
        step_panels({}, title="t", y_title="y")


def test_a_map_is_clear_at_zero_and_ends_in_its_last_colour():
    layer = _heat(np.array([[0.0, 0.5, 2.0, 9.0]]), 2.0)
    assert layer[0, :, 3].tolist() == [0, 128, 255, 255]  # the square root of the share
    assert tuple(layer[0, 2, :3]) == tuple(layer[0, 3, :3]) == pixels.rgb(HEAT[-1])


def test_planes_are_cut_through_the_voxel_and_stand_upright():
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    at = (1, 2, 3)
    axial, coronal, sagittal = (_cut(volume, plane, at) for plane in PLANES)
    np.testing.assert_array_equal(axial, volume[1])
    np.testing.assert_array_equal(coronal, volume[::-1, 2, :])
    np.testing.assert_array_equal(sagittal, volume[::-1, :, 3])


# ---- three planes


def test_planes_share_one_scale_and_all_pictures_follow_a_click():
    image, label, prediction = scan()
    viewer = linked_planes(image, label, prediction, spacing=SPACING, at=(1, 2, 3), **LOOK)
    figure, controls = viewer.figures["planes"], viewer.controls
    wide = {}
    for end, (across, along) in {"": (60, 40), "2": (60, 40), "3": (40, 40)}.items():
        horizontal, vertical = figure.layout[f"xaxis{end}"], figure.layout[f"yaxis{end}"]
        assert horizontal.range == (0, across) and sorted(vertical.range) == [0, along]
        drawn = (figure.layout.width or 720) - figure.layout.margin.l - figure.layout.margin.r
        tall = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        wide[end] = (horizontal.domain[1] - horizontal.domain[0]) * drawn / across
        assert (vertical.domain[1] - vertical.domain[0]) * tall / along == pytest.approx(wide[end], rel=1e-6)
    assert len({round(scale, 6) for scale in wide.values()}) == 1
    assert figure.layout.yaxis.range == (40, 0) and figure.layout.yaxis2.range == (0, 40)  # row 0 on top, slice 0 below
    before = [one.source for one in figure.layout.images]
    figure.data[1]._dispatch_on_click(SimpleNamespace(xs=[41.0], ys=[27.4]), None)  # coronal: column 20, slice 5
    assert [controls[name].value for name in ("slice", "row", "column")] == [5, 2, 20]
    axial, coronal, sagittal = (now.source == then for now, then in zip(figure.layout.images, before, strict=True))
    assert coronal and not axial and not sagittal  # the row is still 2
    lines = [(s.x0, s.y0) for s in figure.layout.shapes if s.x0 == s.x1]
    assert lines == [(41.0, 0), (41.0, 0), (5.0, 0)]  # the middle of column 20, of column 20 and of row 2
    figure.data[0]._dispatch_on_click(SimpleNamespace(xs=[0.1], ys=[39.9]), None)
    assert [controls[name].value for name in ("slice", "row", "column")] == [5, 19, 0]
    figure.data[2]._dispatch_on_click(SimpleNamespace(xs=[], ys=[]), None)
    assert [controls[name].value for name in ("slice", "row", "column")] == [5, 19, 0]


def test_overlays_are_those_of_the_other_figures():
    image, label, prediction = scan()
    entropy = np.linspace(0, 1.5, image.size).reshape(image.shape)
    viewer = linked_planes(
        image, label, prediction, {"entropy": entropy}, SPACING, windows=CT_WINDOWS, at=(4, 14, 21), **LOOK
    )
    figure, controls = viewer.figures["planes"], viewer.controls
    assert controls["overlay"].options == ("none", "label", "prediction", "difference", "entropy")
    assert controls["overlay"].value == "difference"
    controls["opacity"].value = 1.0
    gray = pixels.to_gray(image[4], CT_WINDOWS["soft tissue"])
    layers = {
        "none": None, "label": pixels.label_overlay(label[4], COLOURS),
        "difference": pixels.disagreement_overlay(label[4], prediction[4], COLOURS), "entropy": _heat(entropy[4], 1.5),
    }  # fmt: skip
    for kind, layer in layers.items():
        controls["overlay"].value = kind
        assert figure.layout.images[0].source == pixels.data_uri(pixels.blend(gray, layer)), kind
        assert (figure.layout.coloraxis.cmax == 1.5) == (kind == "entropy")
    controls["overlay"].value, controls["window"].value = "none", "liver"
    liver = pixels.to_gray(image[4], (-45, 105))
    assert figure.layout.images[0].source == pixels.data_uri(pixels.blend(liver))
    controls["overlay"].value, controls["opacity"].value = "label", 0.0
    assert figure.layout.images[0].source == pixels.data_uri(pixels.blend(liver))
    text = controls["readout"].value
    assert "label <b>spleen</b>" in text and "prediction <b>background</b>" in text
    assert f"entropy {entropy[4, 14, 21]:.2f}" in text and "intensity 40" in text
    assert any(trace.marker.color == DISAGREEMENT for trace in figure.data if trace.type == "scatter")


def test_the_twin_shows_every_overlay_and_its_own_scale():
    image, label, prediction = scan()
    maps = {"entropy": np.abs(image) / 500, "probability of liver": (label == 1) * 0.9}
    twin = linked_planes(image, label, prediction, maps, SPACING, **LOOK).twin
    assert len(twin.layout.images) == 9  # the difference and two maps in three planes
    assert {"difference", "entropy", "probability<br>of liver"} <= {note.text for note in twin.layout.annotations}
    assert twin.layout.coloraxis2.cmax == 2 and twin.layout.coloraxis3.cmax == pytest.approx(0.9)
    assert len(twin.to_json()) < 60_000
    bare = linked_planes(image)
    assert len(bare.twin.layout.images) == 3 and bare.controls["overlay"].options == ("none",)
    assert [bare.controls[name].value for name in ("slice", "row", "column")] == [4, 10, 15]
    only = linked_planes(image, maps={"entropy": np.abs(image)}, spacing=SPACING)
    assert len(only.twin.layout.images) == 3 and only.controls["overlay"].value == "entropy"
    assert "with entropy" in only.alt


def test_planes_begin_in_a_structure_and_refuse_what_does_not_fit():
    image, label, _ = scan()
    controls = linked_planes(image, label, **LOOK).controls
    assert label[tuple(controls[name].value for name in ("slice", "row", "column"))] > 0
    with pytest.raises(ValueError, match=r"entropy must have the shape of the images, \(8, 20, 30\), got \(20, 30\)"):
        linked_planes(image, label, maps={"entropy": image[0]}, **LOOK)
    with pytest.raises(ValueError, match="at must be a voxel of the volume"):
        linked_planes(image, at=(8, 0, 0))
    with pytest.raises(ValueError, match="label value 2 has no class"):
        linked_planes(image, label, classes=CLASSES[:2], colours=COLOURS[:2])


# ---- neighbours


def explorer(voxels: Voxels | None = None, **settings):
    images = numpy_generator(1, "scans").normal(size=(2, 8, 20, 30)).astype(np.float32)
    return neighborhood_explorer(images, voxels or sampled(), SPACING, projection="PCA", **LOOK, **settings)


def test_partners_lie_where_they_lie_in_the_scan_and_in_feature_space():
    voxels = sampled()
    full = (voxels.affinity == 1).sum(dim=1)
    asked = int(((full > 2) & (full < 8)).nonzero()[0])
    figure = (shown := explorer(voxels, query=asked)).figures["neighbours"]
    row = int(voxels.queries[asked])
    scan, z, y, x = voxels.places[row].tolist()
    stars = [(t.x[0], t.y[0]) for t in figure.data if t.name == "query"]
    assert stars[:3] == [(2 * x + 1, 2 * y + 1), (2 * x + 1, 5 * z + 2.5), (2 * y + 1, 5 * z + 2.5)]
    near = voxels.neighbors[asked]
    mutual = [n for n, a in zip(near.tolist(), voxels.affinity[asked].tolist(), strict=True) if a == 1]
    assert len(trace_of(figure, "neighbour, mutual", "4").x) == len(mutual)
    assert len(trace_of(figure, "neighbour, ordinary", "4").x) == len(near) - len(mutual)
    assert len(trace_of(figure, "outsider", "4").x) == voxels.outsiders.shape[1]
    here = [n for n in mutual if voxels.places[n, 0] == scan]
    drawn = trace_of(figure, "neighbour, mutual", "2")  # coronal: columns and slices
    assert list(drawn.x) == [2 * int(voxels.places[n, 3]) + 1 for n in here]
    assert list(drawn.y) == [5 * int(voxels.places[n, 1]) + 2.5 for n in here]
    faint = [abs(int(voxels.places[n, 2]) - y) > 1 for n in here]
    assert [o < 1 for o in drawn.marker.opacity] == faint
    unreliable = trace_of(figure, "unreliable", "4")
    assert len(unreliable.x) == 40 and (unreliable.x[row], unreliable.y[row]) == stars[3]
    others = sum(int(voxels.places[n, 0]) != scan for n in near.tolist())
    same = sum(int(voxels.classes[n]) == int(voxels.classes[row]) for n in near.tolist())
    text = shown.controls["readout"].value
    assert f"{len(mutual)} mutual, {same} of its class, {others} in other scans" in text
    assert len(shown.twin.to_json()) < 120_000 and len(shown.twin.layout.images) == 3


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["background", "liver", "spleen"]),
        ({0: 1}, ["liver", "spleen"]),
        ({2: -1}, ["background or unknown", "liver"]),
        ({0: 1, 2: -1}, ["unknown", "liver"]),
    ],
)
def test_the_legend_names_every_colour_of_the_dots(change, names):
    voxels = sampled()
    classes = torch.tensor([change.get(c, c) for c in voxels.classes.tolist()])
    figure = explorer(voxels._replace(classes=classes)).figures["neighbours"]
    points = [t for t in figure.data if t.type == "scatter"]
    squares = [t for t in points if t.marker.symbol == "square" and list(t.x) == [None]]
    assert [t.name for t in squares] == names
    dots = {colour for t in points if t.name in ("reliable", "unreliable") for colour in t.marker.color}
    assert dots == {t.marker.color for t in squares}


def test_mutual_is_what_eq_13_says_whatever_the_affinity():
    voxels = sampled()
    figures = [explorer(v).figures["neighbours"] for v in (voxels, voxels._replace(affinity=voxels.affinity * 0 + 1))]
    first, second = (trace_of(f, "neighbour, mutual", "4").x for f in figures)
    np.testing.assert_array_equal(first, second)


def test_a_click_chooses_the_query_next_to_it():
    voxels = sampled()
    shown = explorer(voxels)
    figure, controls = shown.figures["neighbours"], shown.controls
    unreliable = trace_of(figure, "unreliable", "4")
    unreliable._dispatch_on_click(SimpleNamespace(xs=[unreliable.x[7]], ys=[unreliable.y[7]]), None)
    assert controls["query"].value == 7


def test_a_click_in_the_scan_stays_in_the_scan():
    places = sampled().places.clone()
    places[3], places[5] = torch.tensor([0, 2, 10, 10]), torch.tensor([1, 2, 10, 10])  # one place, in two scans
    shown = explorer(sampled(places=places), query=5)
    figure, controls = shown.figures["neighbours"], shown.controls
    figure.data[0]._dispatch_on_click(SimpleNamespace(xs=[21.3], ys=[20.8]), None)
    assert controls["query"].value == 5
    controls["query"].value = 3
    figure.data[0]._dispatch_on_click(SimpleNamespace(xs=[21.3], ys=[20.8]), None)
    assert controls["query"].value == 3
    there = next(q for q in range(12) if q != 3 and places[q, 0] == 0)
    z, y, x = places[there, 1:].tolist()
    controls["query"].value = there  # the planes go through it now: a click beside it keeps it
    figure.data[1]._dispatch_on_click(SimpleNamespace(xs=[2 * x + 1.4], ys=[5 * z + 2.0]), None)
    assert controls["query"].value == there
    figure.data[1]._dispatch_on_click(SimpleNamespace(xs=[], ys=[]), None)
    assert controls["query"].value == there


def test_outliers_are_called_so_and_menus_change_points_and_colours():
    inlier = torch.ones(12, dtype=torch.bool)
    inlier[4] = False
    shown = explorer(sampled(inlier=inlier), entropy=np.ones((2, 8, 20, 30)))
    figure, controls = shown.figures["neighbours"], shown.controls
    assert "no outlier" in controls["readout"].value
    controls["query"].value = 4
    assert "<b>an outlier</b>" in controls["readout"].value
    unreliable = trace_of(figure, "unreliable", "4")
    assert set(unreliable.marker.color) <= {"#5b6672", *COLOURS[1:]}
    controls["colour"].value = "entropy"
    assert unreliable.marker.color[0] == pytest.approx(1) and figure.layout.coloraxis.showscale
    before = np.array(unreliable.x)
    controls["projection"].value = "t-SNE"
    assert not np.array_equal(unreliable.x, before)


def test_a_neighbourhood_names_what_is_missing():
    voxels = sampled()
    with pytest.raises(ValueError, match="no voxel is a query"):
        explorer(voxels._replace(queries=voxels.queries[:0]))
    with pytest.raises(ValueError, match=r"places \(P,4\), got .* \(80, 3\)"):
        explorer(voxels._replace(places=voxels.places[:, 1:]))
    with pytest.raises(ValueError, match="query must be from 0 to 11, got 12"):
        explorer(voxels, query=12)
