"""Every figure and widget: a bounded size, a static twin, and controls that do something when Python sets them."""

import inspect
import json
import pkgutil
import struct
import zlib
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import medlib.explore
from medlib.explore import (
    embedding_explorer,
    live_curves,
    loss_explorer,
    loss_slider,
    nearest,
    pixels,
    project,
    show,
    slice_grid,
    training_curves,
    volume_viewer,
)
from medlib.explore.losses import _springs, pair_pulls
from medlib.explore.style import DISAGREEMENT, INK, TEMPLATE, WIDTH
from medlib.losses.contrastive import info_nce_loss, positional_contrastive_loss
from medlib.losses.coral import relational_loss
from medlib.losses.dacl import soft_density_guided_loss
from medlib.losses.dvcl import high_quality_contrastive_loss
from medlib.losses.ideal import local_contrastive_loss
from medlib.rng import numpy_generator

page = import_module("medlib.explore.show")  # the module: the package's own `show` is the function
CLASSES, COLOURS = ("background", "RV", "MYO", "LV"), ("#00000000", "#0072B2", "#009E73", "#D55E00")


@pytest.fixture
def displayed(monkeypatch) -> list[tuple[dict, dict]]:
    """What went to the page, in a process without a browser."""
    monkeypatch.setenv("MEDLIB_PNG", "0")
    sent: list[tuple[dict, dict]] = []

    def display(bundle: dict, metadata: dict | None = None, raw: bool = False) -> None:
        assert raw
        sent.append((bundle, metadata or {}))

    monkeypatch.setattr(page, "display", display)
    monkeypatch.setattr("medlib.explore.curves.display", display)
    return sent


def heart() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten noisy slices of rings that shrink, with a label and a prediction that is shifted by two pixels."""
    y, x = np.mgrid[:128, :128]
    radius = np.hypot(y - 64, x - 70)[None] * np.linspace(1, 2, 10)[:, None, None]
    label = np.select([radius < 14, radius < 22, (radius < 34) & (x < 60)], [3, 2, 1], 0).astype(np.uint8)
    image = np.choose(label, [0.2, 0.8, 0.3, 0.9]) + numpy_generator(0, "noise").normal(0, 0.1, label.shape)
    return image.astype(np.float32), label, np.roll(label, 2, axis=2)


def cloud() -> tuple[dict[str, np.ndarray], np.ndarray, list[str], np.ndarray]:
    positions = np.tile(np.arange(1, 9) / 8, 5)
    rng = numpy_generator(0, "cloud")
    line = positions[:, None] * rng.normal(size=(1, 12)) * 3 + rng.normal(size=(40, 12))
    patients = [f"patient{i // 8:03d}" for i in range(40)]
    return (
        {"noise": rng.normal(size=(40, 12)), "line": line},
        positions,
        patients,
        rng.integers(0, 255, (40, 32, 32), np.uint8),
    )


def attraction(features: torch.Tensor, positions: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """A loss with a known slope: half the squared distance of the points from the origin, over the temperature."""
    return features.square().sum() / (2 * temperature)


def json_size(figure) -> int:
    return len(figure.to_json())


def history() -> list[dict]:
    lines = [{"stage": "pretrain", "step": s, "time": 0.1, "lr": 1e-3, "relational": 2 / (s + 1)} for s in range(3000)]
    lines += [{"stage": "finetune", "step": s, "time": 0.1, "dice": 1 / (s + 1)} for s in range(50)]
    return [
        *lines,
        *({"stage": "finetune", "step": s, "val_dice": {"RV": 0.2, "MYO": 0.5, "LV": 0.8}} for s in (10, 40)),
    ]


def test_png_is_lossless_with_and_without_palette():
    few = np.zeros((5, 7, 4), np.uint8)
    few[2:, 3:] = (10, 20, 30, 128)
    many = numpy_generator(0, "pixels").integers(0, 255, (40, 30, 3), np.uint8)
    for picture, colour_type in ((few, 3), (many, 2)):
        png = pixels.encode_png(picture)
        chunks, at = {}, 8
        while at < len(png):
            length, kind = struct.unpack(">I4s", png[at : at + 8])
            chunks[kind] = png[at + 8 : at + 8 + length]
            assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + chunks[kind])
            at += 12 + length
        width, height, _, found, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)[:, 1:]
        assert (height, width, found) == (*picture.shape[:2], colour_type)
        if colour_type == 3:
            palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
            alpha = np.frombuffer(chunks[b"tRNS"], np.uint8)
            np.testing.assert_array_equal(np.dstack([palette[rows], alpha[rows]]), picture)
        else:
            np.testing.assert_array_equal(rows.reshape(picture.shape), picture)


def test_disagreement_is_where_the_maps_differ():
    label, prediction = np.array([[0, 1, 1, 0]]), np.array([[0, 1, 2, 3]])
    layer = pixels.disagreement_overlay(label, prediction, COLOURS)
    assert [tuple(layer[0, i, :3]) == pixels.rgb("#E5007D") for i in range(4)] == [False, False, True, True]
    assert layer[0, 0, 3] == 0


def test_focus_holds_the_structures_and_a_margin():
    maps = np.zeros((2, 100, 80), int)
    maps[0, 40:50, 20:30], maps[1, 45:60, 25:30] = 1, 2
    assert pixels.focus(maps) == (slice(30, 70), slice(10, 40))
    assert pixels.focus(maps * 0) == (slice(0, 100), slice(0, 80))


def test_montage_is_small_and_checks_its_input():
    image, label, prediction = heart()
    figure = slice_grid(image[:6], label[:6], prediction[:6], [str(i) for i in range(6)], CLASSES, COLOURS)
    assert len(figure.layout.images) == 24
    assert figure.layout.template.layout.width == WIDTH and TEMPLATE == "medlib"
    assert json_size(figure) < 250_000
    assert len(slice_grid(image).layout.images) == 10
    with pytest.raises(ValueError, match="labels must have the shape"):
        slice_grid(image, label[:3], classes=CLASSES, colours=COLOURS)
    with pytest.raises(ValueError, match="label value 3 has no class"):
        slice_grid(image, label, classes=CLASSES[:2], colours=COLOURS[:2])


def test_volume_viewer_follows_its_controls():
    image, label, prediction = heart()
    viewer = volume_viewer(image, label, prediction, (10, 1.5, 1.5), CLASSES, COLOURS)
    figure = viewer.figures["volume"]
    before = [picture.source for picture in figure.layout.images]
    viewer.controls["slice"].value = 2
    assert all(picture.source != old for picture, old in zip(figure.layout.images, before, strict=True))
    assert "slice 2 of 10, position 0.20" in figure.layout.title.text
    assert figure.layout.shapes[0].y0 == 2
    tinted = figure.layout.images[2].source
    viewer.controls["overlay"].value = "label"
    assert figure.layout.images[2].source != tinted
    viewer.controls["opacity"].value = 0.25
    assert figure.layout.images[2].opacity == 0.25
    area = next(t for t in figure.data if t.name == "LV, label")
    assert area.x[0] == pytest.approx((label[0] == 3).sum() * 0.0225, abs=0.01)
    area._dispatch_on_click(SimpleNamespace(point_inds=[6]), None)
    assert viewer.controls["slice"].value == 7
    assert json_size(viewer.twin) < 250_000
    assert "overlay" not in volume_viewer(image).controls


def test_training_curves_thin_long_histories():
    figure = training_curves(history())
    assert max(len(trace.x) for trace in figure.data if trace.x is not None) <= 400
    assert json_size(figure) < 100_000
    assert {trace.name for trace in figure.data} == {"relational", "dice", "RV", "MYO", "LV", "mean"}
    assert any("best mean 0.500 at step 10" in (a.text or "") for a in figure.layout.annotations)
    with pytest.raises(ValueError, match="history is empty"):
        training_curves([])


def names_beside(dice: dict[str, float]) -> dict[str, float]:
    figure = training_curves(
        [{"stage": "cotrain", "step": 5, "total": 1.0}, {"stage": "cotrain", "step": 5, "val_dice": dice}]
    )
    return {a.text: a.y for a in figure.layout.annotations if a.text in (*dice, "<b>mean</b>")}


@pytest.mark.parametrize("ends", [np.linspace(0.8, 0.95, 13), np.zeros(13), np.ones(16), np.linspace(0, 1, 13)])
def test_names_of_many_organs_stand_apart_in_the_panel_and_in_order(ends):
    dice = {f"organ {i}": float(end) for i, end in enumerate(ends)}
    heights = names_beside(dice)
    assert list(heights) == sorted(heights, key=heights.__getitem__)
    told = [dice[name] for name in heights if name in dice]
    assert told == sorted(told)
    gaps = np.diff(list(heights.values()))
    assert gaps.min() > min(0.075, 1 / len(dice)) - 1e-9
    assert min(heights.values()) > -1e-9 and max(heights.values()) < 1 + 1e-9


def test_names_of_organs_that_end_apart_stand_at_their_curves():
    heights = names_beside({"liver": 0.9, "spleen": 0.1})
    assert heights == pytest.approx({"spleen": 0.1, "<b>mean</b>": 0.5, "liver": 0.9})


def test_live_curves_draw_while_running_and_end_as_a_picture(displayed):
    curves = live_curves(["relational", "dice"], interval=0.0)
    curves.update("pretrain", 1, {"relational": torch.tensor(2.0)})
    curves.update("pretrain", 2, {"relational": 1.0})
    curves.update("finetune", 3, {"dice": 0.5, "val_dice": {"LV": 0.5}})
    assert curves.figure is not None
    assert [list(trace.x) for trace in curves.figure.data] == [[1, 2], [5]]  # stages follow each other
    assert "finetune, step 3" in curves.figure.layout.title.text
    curves.finish()
    assert "application/vnd.jupyter.widget-view+json" in displayed[0][0]
    assert "application/vnd.plotly.v1+json" in displayed[1][0]
    assert len(displayed) == 2
    with pytest.raises(ValueError, match="nothing was logged"):
        live_curves(["a"]).finish()


def test_nearest_is_by_angle_and_leaves_the_point_out():
    angles = np.radians([0, 10, 40, 90, 180])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1], [9], [1], [5], [1]])
    assert nearest(features, 0, 3).tolist() == [1, 2, 3]
    assert len(nearest(features, 0, 10)) == 4


def test_embedding_explorer_follows_clicks_and_menus():
    methods, positions, patients, thumbnails = cloud()
    explorer = embedding_explorer(methods, positions, patients, thumbnails, groups=["ED", "ES"] * 20, projection="PCA")
    figure, controls = explorer.figures["embedding"], explorer.controls
    figure.data[1]._dispatch_on_click(SimpleNamespace(point_inds=[11]), None)
    assert controls["point"].value == 11
    assert "patient001" in controls["strip"].value and controls["strip"].value.count("<img") == 14
    plane = project(methods["line"].astype(np.float32), "PCA")
    rings = [(ring.xref, ring.xanchor, ring.yanchor, ring.line.color) for ring in figure.layout.shapes]
    near = nearest(methods["line"].astype(np.float32), 11)
    assert rings[7:13] == [("x2", *plane[row].tolist(), INK) for row in near]
    assert rings[13] == ("x2", *plane[11].tolist(), DISAGREEMENT) and len(rings) == 14
    assert "trustworthiness" in figure.layout.annotations[3].text
    controls["colour"].value = "patient"
    assert len(set(figure.data[0].marker.color)) == 5 and figure.layout.coloraxis.showscale is False
    controls["colour"].value = "position"
    assert figure.data[0].marker.color[0] == pytest.approx(0.125) and figure.layout.coloraxis.showscale
    before = np.array(figure.data[0].x)
    controls["projection"].value = "t-SNE"
    assert not np.array_equal(before, figure.data[0].x)
    assert "rank correlation" in explorer.twin.layout.annotations[2].text
    assert json_size(explorer.twin) < 60_000
    three = embedding_explorer(
        {**methods, "twice": methods["line"] * 2}, positions, patients, thumbnails, projection="PCA"
    )
    three.controls["left"].value = "twice"
    assert "twice" in three.figures["embedding"].layout.annotations[0].text
    with pytest.raises(ValueError, match="lengths differ"):
        embedding_explorer(methods, positions[:-1], patients, thumbnails)


def test_a_lasso_selects_in_both_panels_and_says_what_is_shared():
    methods, positions, patients, thumbnails = cloud()
    explorer = embedding_explorer(
        methods, positions, patients, thumbnails, ["ED", "ES"] * 20, projection="PCA", columns={"error": positions * 2}
    )
    figure, controls = explorer.figures["embedding"], explorer.controls
    assert "Draw a lasso" in controls["selection"].value
    rows = [0, 2, 8, 10]  # two of each of two patients, all ED
    for trace, found in zip(figure.data[:2], (rows, []), strict=True):  # a page tells every trace, most of nothing
        trace._dispatch_on_selection(SimpleNamespace(point_inds=found), None)
    assert list(figure.data[0].selectedpoints) == list(figure.data[1].selectedpoints) == rows
    for trace, found in zip(figure.data[:2], ([], rows[:3]), strict=True):  # a lasso in the other panel
        trace._dispatch_on_selection(SimpleNamespace(point_inds=found), None)
    assert list(figure.data[0].selectedpoints) == list(figure.data[1].selectedpoints) == rows[:3]
    figure.data[0]._dispatch_on_selection(SimpleNamespace(point_inds=rows), None)
    text = controls["selection"].value
    assert "4 of 40 points selected" in text and "patient001: 2 (50%; all 20%)" in text and "ED: 4 (100%" in text
    assert f"{positions[rows].mean():.3g} ± {positions[rows].std():.2g}" in text
    assert f"{2 * positions[rows].mean():.3g} ± {2 * positions[rows].std():.2g}" in text  # the further column
    unit = methods["line"][rows] / np.linalg.norm(methods["line"][rows], axis=1, keepdims=True)
    cosine = (unit @ unit.T)[np.triu_indices(4, 1)].mean()
    assert "mean cosine, line</th>" in text and f">{cosine:.2f}<" in text
    controls["selected only"].value = True
    assert np.isfinite(figure.data[1].x).sum() == 4 and "4 of 40 shown" in figure.layout.title.text
    for trace in figure.data[:2]:
        trace._dispatch_on_deselect(SimpleNamespace(point_inds=[]))
    assert figure.data[0].selectedpoints is None and np.isfinite(figure.data[1].x).all()


def test_filters_leave_out_points_but_not_their_numbers():
    methods, positions, patients, thumbnails = cloud()
    explorer = embedding_explorer(methods, positions, patients, thumbnails, ["ED", "ES"] * 20, projection="PCA")
    figure, controls = explorer.figures["embedding"], explorer.controls
    controls["only patient"].value = "patient002"
    assert np.flatnonzero(np.isfinite(figure.data[0].x)).tolist() == list(range(16, 24))
    assert "8 of 40 points shown" in controls["selection"].value
    controls["only group"].value = "ES"
    assert np.flatnonzero(np.isfinite(figure.data[1].y)).tolist() == [17, 19, 21, 23]
    controls["only patient"].value = controls["only group"].value = "all"
    assert np.isfinite(figure.data[0].x).all() and "shown" not in figure.layout.title.text


def test_three_dimensions_have_their_own_figure():
    methods, positions, patients, thumbnails = cloud()
    explorer = embedding_explorer(methods, positions, patients, thumbnails, projection="PCA")
    assert set(explorer.figures) == {"embedding"}
    explorer.controls["colour"].value = "patient"
    explorer.controls["dimensions"].value = "3D"
    space = explorer.figures["space"]
    flat = project(methods["line"].astype(np.float32), "PCA", dimensions=3)
    np.testing.assert_array_equal(space.data[1].z, flat[:, 2])
    assert len(set(space.data[0].marker.color)) == 5 and "trustworthiness" in space.layout.annotations[2].text
    space.data[0]._dispatch_on_click(SimpleNamespace(point_inds=[7]), None)
    assert explorer.controls["point"].value == 7
    np.testing.assert_array_equal(space.data[5].z, flat[[7], 2])
    explorer.controls["dimensions"].value = "2D"
    ring = explorer.figures["embedding"].layout.shapes[-1]
    assert (ring.xanchor, ring.yanchor) == pytest.approx(tuple(flat[7, :2]), abs=1e-5)


def test_perplexity_and_seed_move_tsne_alone():
    methods, positions, patients, thumbnails = cloud()
    explorer = embedding_explorer(methods, positions, patients, thumbnails)
    figure, controls = explorer.figures["embedding"], explorer.controls
    assert controls["projection"].value == "t-SNE" and "cluster" in controls["note"].value
    before = np.array(figure.data[0].x)
    controls["perplexity"].value = 5
    moved = np.array(figure.data[0].x)
    assert not np.array_equal(before, moved)
    np.testing.assert_array_equal(moved, project(methods["noise"].astype(np.float32), "t-SNE", perplexity=5)[:, 0])
    controls["projection"].value = "PCA"
    assert controls["perplexity"].disabled and controls["seed"].disabled and "overlap" in controls["note"].value


def test_a_chosen_slice_shows_label_and_prediction():
    methods, positions, patients, thumbnails = cloud()
    label = np.zeros((40, 32, 32), np.uint8)
    label[:, 8:16, 8:16] = 1
    wrong = np.roll(label, 2, axis=2)  # 2 columns of 8 pixels on either side: 32 of 1024
    maps = {"labels": label, "classes": CLASSES, "colours": COLOURS}
    explorer = embedding_explorer(
        methods, positions, patients, thumbnails, projection="PCA", predictions={"line": wrong}, **maps
    )
    assert explorer.controls["strip"].value.count("<img") == 14 + 3  # slice, label, prediction
    assert "line, 3.1 % differ" in explorer.controls["strip"].value
    differences = pixels.disagreement_overlay(label[0], wrong[0], COLOURS)
    assert pixels.data_uri(pixels.blend(thumbnails[0], differences)) in explorer.controls["strip"].value
    alone = embedding_explorer(methods, positions, patients, thumbnails, projection="PCA", predictions=wrong, **maps)
    assert "prediction, 3.1 % differ" in alone.controls["strip"].value
    explorer.figures["embedding"].data[0]._dispatch_on_hover(SimpleNamespace(point_inds=[9]), None)
    assert "patient001" in explorer.controls["hover"].value and "<img" in explorer.controls["hover"].value


def test_columns_are_numbers_or_categories():
    methods, positions, patients, thumbnails = cloud()
    error = np.where(np.arange(40) % 7, positions, np.nan)
    columns = {"error": error, "site": ["a", "b"] * 20}
    explorer = embedding_explorer(
        methods, positions, patients, thumbnails, columns=columns, projection="PCA", colour="site"
    )
    figure, controls = explorer.figures["embedding"], explorer.controls
    assert list(controls["colour"].options) == ["position", "patient", "error", "site"]
    assert {trace.name for trace in explorer.twin.data[2:]} == {"a", "b"} and "coloured by site" in explorer.alt
    controls["colour"].value = "error"
    axis = figure.layout.coloraxis
    assert axis.showscale and axis.colorbar.title.text == "error"
    assert (axis.cmin, axis.cmax) == pytest.approx(np.nanpercentile(error, (1, 99)))
    assert "site b" in figure.data[0].text[1] and "error 0.25" in figure.data[0].text[1]


def test_a_palette_names_the_colours_of_a_column_that_it_covers():
    methods, positions, patients, thumbnails = cloud()
    given, table = {"a": "#010203", "b": "#040506", "c": "#070809"}, {"site": ["b", "a"] * 20, "arm": ["a", "z"] * 20}
    explorer = embedding_explorer(
        methods, positions, patients, thumbnails, columns=table, projection="PCA", palette=given, colour="site"
    )
    assert {trace.name: trace.marker.color for trace in explorer.twin.data[2:]} == {"a": "#010203", "b": "#040506"}
    axis, codes = explorer.twin.layout.coloraxis, explorer.twin.data[0].marker.color
    shades = [axis.colorscale[2 * int(code)][1] for code in codes[:2]]
    assert shades == ["#040506", "#010203"] and (axis.cmin, axis.cmax) == (-0.5, 1.5)
    explorer.controls["colour"].value = "arm"  # "z" has no colour there: none of the column's is taken from it
    assert "#010203" not in explorer.controls["legend"].value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"patient": [1] * 40}}, "another name"),
        ({"columns": {"error": [1.0] * 39}}, "'error' must hold one value"),
        ({"columns": {"error": [np.nan] * 40}}, "no finite number"),
        ({"colour": "group"}, "colour must be one of position, patient"),
        ({"projection": "UMAP"}, "projection must be one of"),
        ({"labels": np.zeros((40, 8, 8), int)}, "labels must have the shape"),
        ({"predictions": {"nobody": np.zeros((40, 32, 32), int)}}, "belong to no method"),
        ({"labels": np.ones((40, 32, 32), int)}, "label value 1 has no class"),
        ({"methods": {"bad": np.full((40, 5), np.inf)}}, "not finite"),
    ],
)
def test_an_embedding_that_cannot_be_drawn_is_refused(change, message):
    methods, positions, patients, thumbnails = cloud()
    given = {"methods": methods, "positions": positions, "patients": patients, "thumbnails": thumbnails}
    with pytest.raises(ValueError, match=message):
        embedding_explorer(**{**given, **change})


def test_many_points_are_drawn_by_webgl_and_sampled_for_tsne(monkeypatch):
    count = 10_000
    rng = numpy_generator(0, "many")
    positions, patients = rng.random(count), [f"p{i % 30:02d}" for i in range(count)]
    explorer = embedding_explorer(
        {"a": rng.normal(size=(count, 4))}, positions, patients, np.zeros((count, 4, 4), np.uint8)
    )
    figure, controls = explorer.figures["embedding"], explorer.controls
    assert controls["projection"].value == "PCA" and isinstance(figure.data[0], go.Scattergl)
    assert figure.data[0].text is None and np.isfinite(figure.data[0].x).all()
    module = import_module("medlib.explore.embedding")
    monkeypatch.setattr(module, "TSNE_POINTS", 60)
    controls["projection"].value = "t-SNE"
    shown = np.flatnonzero(np.isfinite(figure.data[0].x))
    assert len(shown) == 60 and "60 of 10,000 points drawn at random" in figure.layout.title.text
    controls["point"].value = 9_999
    assert "p09" in controls["strip"].value


def test_loss_explorer_moves_points_and_draws_the_slope():
    explorer = loss_explorer(attraction, np.array([[1.0, 0], [0, 0.5]]), [0, 1], {"temperature": (0.5, 2, 1)})
    figure, controls = explorer.figures["loss"], explorer.controls
    assert "loss 0.625" in figure.layout.title.text
    arrow = figure.layout.annotations[0]
    assert arrow.x < arrow.ax < 1 and arrow.y == pytest.approx(0)  # towards the origin
    controls["temperature"].value = 2.0
    assert "loss 0.312" in figure.layout.title.text
    controls["angle"].value = 90.0
    assert (figure.data[1].x[0], figure.data[1].y[0]) == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    figure.data[1]._dispatch_on_click(SimpleNamespace(point_inds=[1]), None)
    assert controls["point"].value == 1 and controls["angle"].value == pytest.approx(90)
    assert controls["radius"].value == pytest.approx(0.5)
    assert (figure.data[1].x[0], figure.data[1].y[0]) == (pytest.approx(0, abs=1e-12), pytest.approx(1))  # A stayed
    assert np.ptp(figure.data[2].y) == pytest.approx(0, abs=1e-4)  # turning does not change the distance
    assert json_size(explorer.twin) < 30_000
    with pytest.raises(ValueError, match="N <= 8"):
        loss_explorer(attraction, np.ones((9, 2)), [0.0] * 9)


def test_loss_explorer_says_what_its_colours_are_or_has_no_bar():
    two = np.array([[1.0, 0], [0, 0.5]])
    for shade in ("position", "weight", None):
        explorer = loss_explorer(attraction, two, [0, 1], shade=shade)
        axis, dots = explorer.twin.layout.coloraxis, explorer.twin.data[1]
        assert axis.showscale == bool(shade) and axis.colorbar.title.text == shade
        assert ((shade or "position") in dots.hovertemplate, "coloured by" in explorer.alt) == (bool(shade),) * 2


def test_loss_explorer_draws_a_parameter_that_is_a_direction():
    def along(features, positions, c):
        return (features[:, 0] * np.cos(np.radians(c)) + features[:, 1] * np.sin(np.radians(c))).sum()

    explorer = loss_explorer(along, np.eye(2), [0, 1], {"c": (0, 360, 0)}, bearing="c")
    compass = explorer.figures["loss"].layout.annotations[-1]
    assert (compass.ax, compass.ay) == (0, 0) and compass.x > 0.5 and compass.y == pytest.approx(0)
    explorer.controls["c"].value = 90.0
    compass = explorer.figures["loss"].layout.annotations[-1]
    assert compass.x == pytest.approx(0, abs=1e-9) and compass.y > 0.5
    with pytest.raises(ValueError, match="bearing must name a parameter"):
        loss_explorer(along, np.eye(2), [0, 1], {"c": (0, 360, 0)}, bearing="angle")
    with pytest.raises(ValueError, match="angle is a control"):
        loss_explorer(along, np.eye(2), [0, 1], {"angle": (0, 360, 0)})


SIX = np.stack([np.cos(turn := np.radians([200, 80, 140, 20, 310, 255])), np.sin(turn)], axis=1)
PLACES = [0.1, 0.3, 0.5, 0.7, 1.0, 0.2]


def one_query(features, positions, temperature=0.3):
    return info_nce_loss(features[:1], features[1:2], features[2:], temperature)


def one_anchor(features, positions, temperature=0.4):
    return soft_density_guided_loss(features[:1], features[1], features[2:], torch.ones(1), temperature)


def one_voxel(features, positions, temperature=1.0):
    return high_quality_contrastive_loss(features[:1], features[1], features[None, 2:], temperature)


def two_images(features, positions, temperature=0.2):
    """IDEAL's cells: two images of one row of three, each cell matched with itself in a turned copy."""
    maps = features.reshape(2, 3, 1, -1).permute(0, 3, 2, 1)
    return local_contrastive_loss(maps, maps.flip(3), torch.tensor([[2, 1, 0]] * 2), temperature)


def to_the_right(features, positions):
    return -features[:, 0].sum()


def test_two_losses_are_moved_as_one():
    both = {"RAL": relational_loss, "PCL": positional_contrastive_loss}
    ranges = {"threshold": (0.05, 0.95, 0.35), "temperature": (0.05, 1.0, 0.3)}
    explorer = loss_explorer(both, SIX, PLACES, ranges, title="Ranking or threshold")
    figure, controls = explorer.figures["loss"], explorer.controls

    def now() -> dict[str, float]:
        texts = [note.text for note in figure.layout.annotations if "loss" in (note.text or "")]
        return {name: float(text.split()[-1]) for name, text in zip(both, texts, strict=True)}

    def expected(points: np.ndarray, threshold: float, temperature: float) -> dict[str, float]:
        given = torch.tensor(points), torch.tensor(PLACES, dtype=torch.float64)
        ral = relational_loss(*given, temperature=temperature)
        pcl = positional_contrastive_loss(*given, threshold=threshold, temperature=temperature)
        return {"RAL": pytest.approx(ral.item(), abs=6e-4), "PCL": pytest.approx(pcl.item(), abs=6e-4)}

    assert now() == expected(SIX, 0.35, 0.3)
    arrows = [note for note in figure.layout.annotations if note.showarrow]
    assert {note.xref for note in arrows} == {"x", "x2"} and len(arrows) >= 8
    before = [list(figure.data[k].y) for k in (2, 6)], [line.to_plotly_json() for line in figure.layout.shapes]
    figure.data[5]._dispatch_on_click(SimpleNamespace(point_inds=[2]), None)  # C, in the second plane
    assert controls["point"].value == 2 and controls["angle"].value == pytest.approx(140)
    controls["angle"].value = 45.0
    moved = SIX.copy()
    moved[2] = np.cos(np.pi / 4)
    assert now() == expected(moved, 0.35, 0.3)
    for k in (0, 4):  # both planes, both curves
        assert (figure.data[k + 1].x[2], figure.data[k + 1].y[2]) == pytest.approx((moved[2, 0], moved[2, 1]))
        assert list(figure.data[k + 2].y) != before[0][k // 4] and figure.data[k + 3].x[0] == 45
    assert [line.to_plotly_json() for line in figure.layout.shapes] != before[1]
    controls["threshold"].value = 0.9
    assert now() == expected(moved, 0.9, 0.3)  # which RAL does not take
    given = torch.tensor(moved), torch.tensor(PLACES, dtype=torch.float64)
    pull = pair_pulls(lambda f: positional_contrastive_loss(f, given[1], threshold=0.9, temperature=0.3), moved)
    assert pull is not None and f">{pull[2, 0]:+.3f}<" in controls["readout"].value
    assert ">C-A</th>" in controls["readout"].value and "PCL</th>" in controls["readout"].value
    assert "for each of RAL, PCL" in explorer.alt and json_size(explorer.twin) < 60_000
    with pytest.raises(ValueError, match="no loss takes the parameter bound"):
        loss_explorer(both, SIX, PLACES, {"bound": (0, 1, 0.5)})
    with pytest.raises(ValueError, match="fit side by side, got 4"):
        loss_explorer(dict.fromkeys("abcd", relational_loss), SIX, PLACES)


def test_pair_pulls_are_slopes_by_the_cosine():
    """Against a loss written with the cosines themselves, and points that are not of length 1."""
    points = SIX * np.array([[1.0], [0.5], [2.0], [1.0], [1.3], [0.7]])
    unit = SIX @ SIX.T
    cosines = torch.tensor(unit, requires_grad=True)
    others = ~torch.eye(6, dtype=torch.bool)
    scores = (cosines / 0.3).masked_fill(~others, -torch.inf)
    close = (torch.tensor(PLACES)[:, None] - torch.tensor(PLACES)).abs().lt(0.35) & others
    terms = scores.logsumexp(1, keepdim=True) - scores
    anchors = close.any(1)
    value = ((terms.masked_fill(~close, 0).sum(1)[anchors]) / close.sum(1)[anchors]).mean()
    places = torch.tensor(PLACES, dtype=torch.float64)
    loss = positional_contrastive_loss(torch.tensor(points), places, threshold=0.35, temperature=0.3)
    assert value.item() == pytest.approx(loss.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(value, cosines)
    found = pair_pulls(lambda f: positional_contrastive_loss(f, places, threshold=0.35, temperature=0.3), points)
    expected = -(slope + slope.T).numpy()
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (found > 0.01).any() and (found < -0.01).any()
    assert pair_pulls(lambda f: to_the_right(f, places), points) is None  # a direction is no angle between points


@pytest.mark.parametrize("loss", [one_query, one_anchor, one_voxel, two_images, relational_loss])
def test_one_explorer_serves_the_losses_of_every_paper(loss):
    explorer = loss_explorer({"it": loss, "right": to_the_right}, SIX, PLACES, {"temperature": (0.05, 1.0, 0.5)})
    figure, controls = explorer.figures["loss"], explorer.controls
    places = torch.tensor(PLACES, dtype=torch.float64)

    def value(points: np.ndarray, temperature: float) -> float:
        return loss(torch.tensor(points), places, temperature=temperature).item()

    controls["temperature"].value = 0.4
    texts = [note.text for note in figure.layout.annotations if "loss" in (note.text or "")]
    assert texts[0] == f"<b>it</b>  loss {value(SIX, 0.4):.3f}"
    push = np.array([[n.x - n.ax, n.y - n.ay] for n in figure.layout.annotations if n.showarrow and n.xref == "x"])
    downhill = value(SIX, 0.4)
    features = torch.tensor(SIX, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(features, places, temperature=0.4), features)
    felt = -slope[slope.norm(dim=1) > 1e-6 * slope.norm(dim=1).max()].numpy()
    assert len(push) == len(felt) and (np.einsum("nd,nd->n", push, felt) > 0).all()
    assert value(SIX - 1e-3 * slope.numpy(), 0.4) < downhill
    assert any(line.xref == "x" for line in figure.layout.shapes)
    assert not any(line.xref == "x2" for line in figure.layout.shapes)
    assert "not a function of the angles" in controls["readout"].value


CORNER = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def test_a_loss_without_a_slope_somewhere_gets_its_arrows_back():
    def distance(features, positions):  # its slope is no number where the first two points lie on each other
        return (features[0] - features[1]).square().sum().sqrt() + (features[0] - features[2]).square().sum()

    explorer = loss_explorer({"distance": distance}, CORNER, [0.1, 0.5, 0.9])
    figure = explorer.figures[next(iter(explorer.figures))]
    before = sum(note.showarrow is True for note in figure.layout.annotations)
    explorer.controls["angle"].value = 40.0
    assert sum(note.showarrow is True for note in figure.layout.annotations) > before

    flat = loss_explorer({"flat": lambda features, positions: features.new_zeros(())}, CORNER, [0.1, 0.5, 0.9])
    flat.controls["angle"].value = 40.0  # constant: nowhere to go, and nothing to complain about


def test_a_pull_that_is_no_number_is_no_line():
    pull = np.array([[0.0, np.nan, 2.0], [np.nan, 0.0, -0.5], [2.0, -0.5, 0.0]])
    lines = _springs(CORNER, pull, "")
    assert [line["line"]["width"] for line in lines] == pytest.approx([6.8, 3.8])


def test_a_loss_explorer_refuses_what_is_no_loss():
    place = [0.1, 0.5, 0.9]
    for wrong in (None, "mona", [relational_loss], {"a": 3}, {1: relational_loss}):
        with pytest.raises(TypeError, match="loss must be a function, or a mapping"):
            loss_explorer(wrong, CORNER, place)
    for answer in (3.0, (torch.ones(()),), torch.ones(2)):
        with pytest.raises(TypeError, match="loss 'odd' must return a 0-d tensor"):
            loss_explorer({"odd": lambda features, positions, answer=answer: answer}, CORNER, place)
    for points, at in ((CORNER * np.nan, place), (CORNER, [0.1, 0.5, 2.0]), (CORNER, [0.1, 0.5, np.nan])):
        with pytest.raises(ValueError, match="points must be finite and positions in"):
            loss_explorer(relational_loss, points, at)


@pytest.mark.parametrize(
    ("limits", "step"),
    [((0.05, 0.95, 0.35), 0.01), ((1, 20, 10), 1), ((0.0, 360.0, 30.0), 1), ((0.05, 2.0, 1.0), 0.01)],
)
def test_a_slider_can_stand_where_it_begins(limits, step):
    words = {"title": "t", "x_title": "x", "y_title": "y"}
    control = loss_slider(lambda x: {"x": ([0, 1], [x, x])}, {"x": limits}, **words).controls["x"]
    assert control.step == pytest.approx(step)
    steps = (control.value - control.min) / control.step
    assert steps == pytest.approx(round(steps)) and control.value == limits[2]


def test_loss_slider_redraws():
    explorer = loss_slider(
        lambda slope: {"line": ([0, 1], [0, slope])}, {"slope": (0, 4, 1)}, title="t", x_title="x", y_title="y"
    )
    explorer.controls["slope"].value = 3.0
    assert list(explorer.figures["curves"].data[0].y) == [0, 3]
    assert list(explorer.twin.data[0].y) == [0, 1]


def test_a_page_is_told_about_one_trace_at_a_time(monkeypatch, displayed):
    """Of several traces in one message the page deletes what did not change: see ``show.redraw``."""
    told: list[list[int]] = []

    def send(self, *args, **kwargs) -> None:
        traces = kwargs.get("trace_indexes", args[1] if len(args) == 2 else args[2] if len(args) > 2 else None)
        told.append(list(np.atleast_1d(traces)) if traces is not None else [])

    for name in ("_send_restyle_msg", "_send_update_msg"):
        monkeypatch.setattr(go.FigureWidget, name, send)
    methods, positions, patients, thumbnails = cloud()
    loss = loss_explorer(attraction, np.eye(2), [0, 1], {"temperature": (0.5, 2, 1)})
    embedding = embedding_explorer(methods, positions, patients, thumbnails, projection="PCA")
    curves = live_curves(["relational", "dice"], interval=0.0)
    loss.controls["angle"].value = 33.0
    loss.controls["temperature"].value = 2.0
    embedding.controls["point"].value = 5
    embedding.controls["projection"].value = "t-SNE"
    curves.update("pretrain", 1, {"relational": 2.0})
    curves.update("finetune", 1, {"dice": 2.0})
    assert len(told) > 10 and max(map(len, told)) == 1


def test_without_a_browser_text_and_figure_remain(displayed):
    show(training_curves(history()), alt="Loss falls.")
    bundle, metadata = displayed[0]
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/plain"} and bundle["text/plain"] == "Loss falls."
    assert metadata == {}
    layout = json.loads(json.dumps(bundle))["application/vnd.plotly.v1+json"]["layout"]
    assert layout["width"] == WIDTH and layout["height"] > 100  # JupyterLab would give a figure without height 360 px
    loss_slider(lambda a: {"l": ([0], [a])}, {"a": (0, 1, 0)}, title="t", x_title="x", y_title="y")._ipython_display_()
    assert set(displayed[1][0]) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    with pytest.raises(ValueError, match="alt must be a sentence"):
        show(training_curves(history()), alt=" ")


def test_a_browser_that_fails_is_asked_once(monkeypatch):
    monkeypatch.delenv("MEDLIB_PNG", raising=False)
    calls = []
    monkeypatch.setattr(page, "_browser", [])
    monkeypatch.setattr(page, "_start_browser", lambda: True)
    monkeypatch.setattr(page, "_draw", lambda *a: calls.append(a) or (_ for _ in ()).throw(RuntimeError("no sandbox")))
    figure = training_curves(history())
    assert page.picture(figure) is None and page.picture(figure) is None
    assert len(calls) == 1


def test_picture_is_within_the_limit():
    if not page.browser_found():
        pytest.skip("no Chromium or Chrome here: figures go without a picture")
    image, label, prediction = heart()
    png = page.picture(slice_grid(image[:6], label[:6], prediction[:6], None, CLASSES, COLOURS))
    assert png is not None and png.startswith(b"\x89PNG") and len(png) <= page.PNG_LIMIT
    single = page.picture(training_curves(history()), scale=1)
    assert single is not None and struct.unpack(">I", single[16:20])[0] == WIDTH


def test_nothing_here_hangs_a_headless_run():
    for module in pkgutil.iter_modules(medlib.explore.__path__):
        source = inspect.getsource(import_module(f"medlib.explore.{module.name}"))
        assert "interact" not in source.replace("interactive where", "") and "Output(" not in source, module.name
