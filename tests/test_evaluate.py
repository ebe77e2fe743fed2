"""The metrics against closed forms, against MONAI, and on masks nobody would draw."""

import json
import math
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDistanceMetric

from medlib.data import Protocol, labelled_cases, load_volume, prepare, read_dataset, write_phantoms
from medlib.evaluate import (
    METRICS,
    Evaluation,
    evaluate,
    pooled_dice,
    predict_volume,
    segment,
    summarise,
    volume_metrics,
)
from medlib.rng import numpy_generator
from medlib.train import make_fabric, predictor

DISTANCES = ("assd", "hd95", "asd_directed_voxels", "hd95_pooled")
MM = (10.0, 1.25, 1.5)


def cube(shift=(0, 0, 0), size=4):
    """One class in a 16-voxel grid: a cube of ``size`` voxels, moved by ``shift``."""
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[tuple(slice(5 + s, 5 + s + size) for s in shift)] = 1
    return mask


def blobs(seed, classes=4, shape=(6, 40, 32)):
    """A smooth random label map with every class in it."""
    noise = torch.from_numpy(numpy_generator(seed, "blobs").standard_normal((1, classes, *shape)))
    smooth = torch.nn.functional.avg_pool3d(noise, (1, 7, 7), stride=1, padding=(0, 3, 3))
    return smooth[0].argmax(0).numpy()


# ---- volume_metrics: known answers


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_moved_cube_has_the_overlap_that_arithmetic_gives(step):
    found = volume_metrics(cube((0, step, 0)), cube(), 2, MM)["1"]
    share = (4 - step) / 4
    assert found["dice"] == pytest.approx(share)
    assert found["jaccard"] == pytest.approx(share / (2 - share))


def test_single_voxels_have_one_distance_and_the_spacing_decides_which():
    prediction, label = cube((1, 0, 0), size=1), cube((0, 0, 2), size=1)  # one slice and two columns apart
    found = volume_metrics(prediction, label, 2, MM)["1"]
    millimetres = math.hypot(1 * MM[0], 2 * MM[2])
    for name in ("assd", "hd95", "hd95_pooled"):
        assert found[name] == pytest.approx(millimetres)
    assert found["asd_directed_voxels"] == pytest.approx(math.hypot(1, 2))
    assert found["unit"] == "mm"
    unknown = volume_metrics(prediction, label, 2, None)["1"]
    assert unknown["unit"] == "voxel"
    for name in DISTANCES:
        assert unknown[name] == pytest.approx(math.hypot(1, 2))


def test_a_line_and_its_half_tell_the_four_distances_apart():
    label, prediction = np.zeros((1, 1, 20), int), np.zeros((1, 1, 20), int)
    label[0, 0, :20] = 1
    prediction[0, 0, :10] = 1  # every voxel of a one-voxel-thick line is surface
    found = volume_metrics(prediction, label, 2, (1, 1, 2.0))["1"]
    back = [0.0] * 10 + [2.0 * k for k in range(1, 11)]  # label to prediction, mm; the other way all are 0
    assert found["asd_directed_voxels"] == 0  # blind to the half that is missing
    assert found["assd"] == pytest.approx(sum(back) / 30)
    assert found["hd95"] == pytest.approx(np.percentile(back, 95))
    assert found["hd95_pooled"] == pytest.approx(np.percentile([0.0] * 10 + back, 95))
    assert found["hd95"] > found["hd95_pooled"]
    swapped = volume_metrics(label, prediction, 2, (1, 1, 2.0))["1"]
    assert swapped["asd_directed_voxels"] == pytest.approx(sum(back) / 2 / 20)


def test_nested_cubes_touch_only_at_the_surface():
    found = volume_metrics(cube(size=4), cube((-1, -1, -1), size=6), 2, None)["1"]
    assert found["asd_directed_voxels"] == pytest.approx(
        1
    )  # each face voxel of the inner lies 1 inside the outer's face
    corners, edges, faces = 8, 12 * 4, 6 * 16  # of the outer shell, at sqrt 3, sqrt 2 and 1 from the inner
    inner = 4**3 - 2**3
    total = inner + corners * math.sqrt(3) + edges * math.sqrt(2) + faces
    assert found["assd"] == pytest.approx(total / (inner + corners + edges + faces), rel=1e-6)


def test_a_mask_at_the_border_of_the_array_has_a_surface_there():
    full = np.ones((1, 8, 8), int)  # one slice thick: every voxel is surface
    half = full.copy()
    half[:, 4:] = 0
    found = volume_metrics(half, full, 2, None)["1"]
    assert found["asd_directed_voxels"] == 0
    assert found["hd95"] == pytest.approx(np.percentile([0] * 32 + [1, 2, 3, 4] * 8, 95))
    assert found["dice"] == pytest.approx(2 / 3)


# ---- volume_metrics: MONAI as the oracle


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), MM, (5.0, 0.7, 2.0)])
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*")  # MONAI's metrics warn of their own argument
def test_agrees_with_monai(spacing):
    prediction, label = blobs(1), blobs(2)
    ours = volume_metrics(prediction, label, ["background", "RV", "MYO", "LV"], spacing)
    first, second = (
        torch.nn.functional.one_hot(torch.from_numpy(m).long(), 4).movedim(-1, 0)[None] for m in (prediction, label)
    )
    given_spacing = {} if spacing is None else {"spacing": spacing}
    dice = DiceMetric(include_background=False)(first, second)[0]
    assd = SurfaceDistanceMetric(symmetric=True)(first, second, **given_spacing)[0]
    directed = SurfaceDistanceMetric(symmetric=False)(first, second)[0]
    hd95 = HausdorffDistanceMetric(percentile=95)(first, second, **given_spacing)[0]
    for i, name in enumerate(("RV", "MYO", "LV")):
        assert ours[name]["dice"] == pytest.approx(dice[i].item(), rel=1e-5)
        assert ours[name]["assd"] == pytest.approx(assd[i].item(), rel=1e-5)
        assert ours[name]["asd_directed_voxels"] == pytest.approx(directed[i].item(), rel=1e-5)
        assert ours[name]["hd95"] == pytest.approx(hd95[i].item(), rel=1e-5)


# ---- volume_metrics: properties

maps = hnp.arrays(np.uint8, (3, 6, 5), elements=st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(maps, maps, st.tuples(*[st.floats(0.2, 12)] * 3))
def test_properties_on_random_masks(prediction, label, spacing):
    forth, back = volume_metrics(prediction, label, 3, spacing), volume_metrics(label, prediction, 3, spacing)
    itself = volume_metrics(label, label, 3, spacing)
    diagonal = math.sqrt(sum(((n - 1) * s) ** 2 for n, s in zip(label.shape, spacing, strict=True)))
    for name, found in forth.items():
        if found["empty_label"]:
            assert all(math.isnan(found[metric]) for metric in METRICS)
            continue
        assert itself[name]["dice"] == itself[name]["jaccard"] == 1
        assert all(itself[name][metric] == 0 for metric in DISTANCES)
        assert 0 <= found["jaccard"] <= found["dice"] <= 1
        assert found["jaccard"] == pytest.approx(found["dice"] / (2 - found["dice"]))
        if found["empty_prediction"]:
            assert found["dice"] == 0 and all(math.isnan(found[metric]) for metric in DISTANCES)
            continue
        for metric in ("dice", "jaccard", "assd", "hd95", "hd95_pooled"):
            assert found[metric] == pytest.approx(back[name][metric])
        assert all(0 <= found[metric] <= diagonal * (1 + 1e-6) for metric in ("assd", "hd95", "hd95_pooled"))


@settings(max_examples=30, deadline=None)
@given(maps, maps)
def test_padding_changes_nothing_once_the_border_is_background(prediction, label):
    prediction, label = (np.pad(m, 1) for m in (prediction, label))
    wide = [np.pad(m, ((2, 0), (0, 5), (3, 1))) for m in (prediction, label)]
    np.testing.assert_equal(volume_metrics(*wide, 3, MM), volume_metrics(prediction, label, 3, MM))


def test_without_distances_only_the_overlap_is_left():
    with_distances, without = (volume_metrics(cube((1, 0, 0)), cube(), 2, MM, distances=d)["1"] for d in (True, False))
    assert without["dice"] == with_distances["dice"] and all(math.isnan(without[metric]) for metric in DISTANCES)


def test_takes_bool_and_torch_maps():
    prediction, label = torch.from_numpy(cube((1, 0, 0))), cube().astype(bool)
    assert volume_metrics(prediction, label, 2, None)["1"]["dice"] == 0.75


@pytest.mark.filterwarnings("error")
def test_empty_masks_warn_of_nothing_and_are_never_zero_distance():
    empty = np.zeros((3, 4, 4), int)
    label = empty.copy()
    label[1, 1, 1] = 1
    missed = volume_metrics(empty, label, 2, None)["1"]
    assert missed["dice"] == missed["jaccard"] == 0 and missed["empty_prediction"] and not missed["empty_label"]
    alarm = volume_metrics(label, empty, 2, None)["1"]
    assert math.isnan(alarm["dice"]) and alarm["empty_label"] and not alarm["empty_prediction"]
    both = volume_metrics(empty, empty, 2, None)["1"]
    assert math.isnan(both["dice"]) and both["empty_label"] and both["empty_prediction"]
    for found in (missed, alarm, both):
        assert all(math.isnan(found[metric]) for metric in DISTANCES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": np.zeros((2, 4, 5), int)}, r"\(2, 4, 5\).*\(2, 4, 4\)"),
        ({"prediction": np.zeros((4, 4), int)}, r"prediction.*\(4, 4\)"),
        ({"prediction": np.zeros((2, 4, 4))}, "prediction.*float64"),
        ({"label": np.full((2, 4, 4), 3)}, "label holds labels 3 to 3.*0 to 2"),
        ({"label": np.full((2, 4, 4), -1)}, "label holds labels -1"),
        ({"classes": 1}, "classes.*1"),
        ({"classes": "abc"}, "classes.*'abc'"),
        ({"classes": ["background", "LV", "LV"]}, "distinct"),
        ({"spacing": (1.0, -1.0, 1.0)}, r"spacing.*-1\.0"),
        ({"spacing": (1.0, 1.0)}, r"spacing.*\(1\.0, 1\.0\)"),
        ({"spacing": (1.0, math.nan, 1.0)}, "spacing.*nan"),
    ],
)
def test_nonsense_is_refused_by_name(change, message):
    good = {"prediction": np.zeros((2, 4, 4), int), "label": np.zeros((2, 4, 4), int), "classes": 3, "spacing": None}
    with pytest.raises(ValueError, match=message):
        volume_metrics(**(good | change))


# ---- averages


def line(length, of=10):
    """(1, 1, of) with the first ``length`` voxels in class 1."""
    return (np.arange(of) < length).astype(int)[None, None]


def test_pooled_dice_counts_voxels_over_all_volumes():
    pairs = [(line(8), line(8)), (line(0), line(2))]  # per volume 1 and 0, mean 0.5
    assert pooled_dice(pairs, 2) == {"1": pytest.approx(2 * 8 / (8 + 10))}
    # one of three classes present and perfect: the released code says 1/3
    assert np.mean(list(pooled_dice([(line(4), line(4))], 4).values())) == pytest.approx(1 / 3)


def test_summary_averages_volumes_then_classes_and_counts_what_is_empty():
    label = [np.concatenate([line(4), 2 * line(n)], axis=1) for n in (4, 4, 0)]  # class 2 is absent from the third
    prediction = [
        np.concatenate([line(n), 2 * line(m)], axis=1)
        for n, m in ((4, 4), (2, 0), (4, 1))  # hit and hit; half and missed; hit and false alarm
    ]
    pairs = zip(prediction, label, strict=True)
    summary = summarise([volume_metrics(p, g, ["background", "a", "b"], None) for p, g in pairs])
    a, b = summary["classes"]["a"], summary["classes"]["b"]
    assert a["dice"] == pytest.approx((1 + 2 / 3 + 1) / 3) and a["volumes"] == 3 and a["missed"] == 0
    assert b["dice"] == pytest.approx(0.5)
    assert (b["volumes"], b["missed"], b["absent"], b["false_alarms"]) == (2, 1, 1, 1)
    assert b["assd"] == 0  # from the one volume where it is defined: `missed` says so
    assert summary["mean"]["dice"] == pytest.approx((a["dice"] + b["dice"]) / 2)
    assert (summary["volumes"], summary["missed"], summary["absent"], summary["false_alarms"]) == (3, 1, 1, 1)
    assert summary["unit"] == "voxel"


def test_a_class_nobody_has_is_left_out_and_one_always_missed_is_not():
    nowhere = summarise([volume_metrics(line(3), line(3), 3, None)])
    assert math.isnan(nowhere["classes"]["2"]["dice"]) and nowhere["mean"]["dice"] == 1
    label = np.concatenate([line(3), 2 * line(3)], axis=1)
    missed = summarise([volume_metrics(np.where(label == 2, 0, label), label, 3, None)])
    assert missed["mean"]["dice"] == 0.5 and math.isnan(missed["mean"]["assd"])


def test_summary_refuses_what_cannot_be_averaged():
    found = volume_metrics(line(3), line(3), 2, None)
    with pytest.raises(ValueError, match="at least one volume"):
        summarise([])
    with pytest.raises(ValueError, match="same classes"):
        summarise([found, volume_metrics(line(3), line(3), 3, None)])
    with pytest.raises(ValueError, match="mm and some in voxels"):
        summarise([found, volume_metrics(line(3), line(3), 2, MM)])


# ---- whole volumes


def two_classes(images):
    """A "network": the probability of class 1 is the image itself."""
    return torch.cat([1 - images, images], dim=1)


def test_predict_volume_is_the_network_slice_by_slice():
    image = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for batch_size in (1, 2, 5, 64):
        probabilities = predict_volume(two_classes, image, batch_size=batch_size)
        assert probabilities.shape == (2, 5, 8, 8)
        torch.testing.assert_close(probabilities[1], image[:, 0])


@pytest.mark.parametrize("patch", [(2, 4, 4), (5, 8, 8), (8, 16, 16), (4, 16, 4)])
def test_a_3d_method_sees_windows_that_blend_to_the_same(patch):
    image = torch.rand(1, 1, 5, 8, 9, generator=torch.Generator().manual_seed(0))
    seen = []

    def network(_, images):
        seen.append(images.shape[2:])
        return two_classes(images)

    predict = predictor(SimpleNamespace(patch=patch, predict=network), torch.nn.ModuleDict(), make_fabric("cpu"))
    probabilities = predict_volume(predict, image)
    assert probabilities.shape == (2, 5, 8, 9)
    torch.testing.assert_close(probabilities[1], image[0, 0])
    assert set(seen) == {patch}, "a network sees windows of one size, a small volume padded"


def test_windows_are_blended_with_more_weight_on_their_middle():
    """A network that answers with where in its window a voxel lies."""

    def network(_, images):
        ramp = torch.linspace(0, 1, images.shape[2]).view(1, 1, -1, 1, 1).expand(images.shape)
        return two_classes(ramp)

    predict = predictor(SimpleNamespace(patch=(8, 4, 4), predict=network), torch.nn.ModuleDict(), make_fabric("cpu"))
    line = predict_volume(predict, torch.zeros(1, 1, 12, 4, 4))[1, :, 2, 2]  # windows at 0..7 and 4..11
    torch.testing.assert_close(line[:4], torch.linspace(0, 1, 8)[:4])
    plain = (torch.linspace(0, 1, 8)[4:] + torch.linspace(0, 1, 8)[:4]) / 2
    assert line[4] > plain[0] + 0.1 and line[7] < plain[3] - 0.1, "the window whose middle is nearer must win"


@pytest.mark.parametrize(
    "predict, image, message",
    [
        (two_classes, torch.zeros(5, 8, 8), r"image.*\(5, 8, 8\)"),
        (two_classes, torch.zeros(2, 1, 5, 8, 8), r"image.*\(2, 1, 5, 8, 8\)"),
        (lambda x: two_classes(x)[0], torch.zeros(1, 1, 5, 8, 8), r"grid.*\(2, 5, 8, 8\)"),
        (lambda x: 3 * two_classes(x), torch.zeros(2, 1, 4, 4), "softmax"),
        (lambda x: two_classes(x) * math.nan, torch.zeros(2, 1, 4, 4), "finite"),
        (lambda x: two_classes(x)[..., 1:], torch.zeros(2, 1, 4, 4), r"grid.*\(2, 2, 4, 3\)"),
    ],
)
def test_predict_volume_refuses(predict, image, message):
    with pytest.raises(ValueError, match=message):
        predict_volume(predict, image)


@dataclass
class Doubled:
    """A stand-in for a prepared scan: the network's grid has every second pixel of the scan's own grid."""

    label: np.ndarray
    name: str
    labels: tuple[str, ...] = ("a file",)
    case: SimpleNamespace = field(init=False)

    def __post_init__(self):
        self.case = SimpleNamespace(
            case=self.name, patient=self.name[:2], info={"phase": "ED"}, labels=self.labels, volume=self
        )
        self.image = self.label[:, ::2, ::2].astype(np.float16)

    def inputs(self):
        return torch.from_numpy(self.image.astype(np.float32))[:, None]

    def restore(self, probabilities):
        return probabilities.argmax(0).numpy().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)


@pytest.fixture
def scans(monkeypatch):
    monkeypatch.setattr(
        "medlib.evaluate.load_volume", lambda case: SimpleNamespace(label=case.volume.label, spacing=MM)
    )
    coarse = np.zeros((4, 6, 6), np.uint8)
    coarse[1:3, 2:4, 1:5] = 1
    fine = coarse.repeat(2, axis=1).repeat(2, axis=2)
    odd = fine.copy()
    odd[1, 5, 5] = 0  # a pixel between those that the network sees
    return [Doubled(fine, "p1_ED"), Doubled(odd, "p1_ES"), Doubled(np.zeros_like(fine), "p2_ED")]


def test_evaluation_measures_on_the_scans_own_grid(scans):
    found = evaluate(two_classes, scans, ["background", "LV"])
    inside = int(scans[0].label.sum())
    expected = 2 * (inside - 1) / (2 * inside - 1)
    assert [c.case for c in found.cases] == ["p1_ED", "p1_ES", "p2_ED"]
    assert found.cases[0].classes["LV"]["dice"] == 1 and found.cases[0].classes["LV"]["unit"] == "mm"
    assert found.cases[1].classes["LV"]["dice"] == pytest.approx(expected)
    assert found.summary["mean"]["dice"] == pytest.approx((1 + expected) / 2)
    assert found.summary["absent"] == 1
    maps = [(segment(two_classes, scan), scan.label) for scan in scans]
    assert found.pooled == pooled_dice(maps, ["background", "LV"])
    table = found.frame("dice")
    assert list(table.index) == [("p1", "p1_ED"), ("p1", "p1_ES"), ("p2", "p2_ED")] and list(table) == ["LV"]
    assert math.isnan(table.loc[("p2", "p2_ED"), "LV"])
    with pytest.raises(ValueError, match="'dize'"):
        found.frame("dize")


def test_evaluation_survives_json_with_null_for_what_is_undefined(scans):
    found = evaluate(two_classes, scans, 2)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["cases"][2]["classes"]["1"]["assd"] is None
    again = Evaluation.from_dict(json.loads(text))
    np.testing.assert_equal(again.to_dict(), found.to_dict())
    assert math.isnan(again.cases[2].classes["1"]["dice"])


def test_evaluation_without_labels_or_scans_says_so(scans):
    with pytest.raises(ValueError, match="at least one"):
        evaluate(two_classes, [], 2)
    scans.append(Doubled(scans[0].label, "p9_ED", labels=()))
    with pytest.raises(ValueError, match="p9_ED"):
        evaluate(two_classes, scans, 2)


def knows_the_answer(scans):
    """A "network" that recognises a slice and answers with its prepared label, one-hot."""
    known = {
        np.asarray(image, np.float32).tobytes(): label
        for s in scans
        for image, label in zip(s.image, s.label, strict=True)
    }

    def predict(images):
        labels = np.stack([known[image[0].numpy().tobytes()] for image in images])
        return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 4).movedim(-1, 1).float()

    return predict


def check_perfect_network(root, folder, worst):
    cases = labelled_cases(read_dataset("acdc", root))[:3]
    scans = prepare(cases, Protocol(size=256, spacing=None), folder, progress=False)
    found = evaluate(knows_the_answer(scans), scans, ["background", "RV", "MYO", "LV"], batch_size=4)
    assert found.frame("dice").shape == (3, 3)
    assert np.nanmin(found.frame("dice").to_numpy()) > worst  # what resampling there and back costs
    assert found.summary["missed"] == found.summary["false_alarms"] == 0
    known = load_volume(cases[0]).spacing is not None
    assert found.summary["unit"] == ("mm" if known else "voxel")
    assert found.summary["mean"]["assd"] < (1 if known else 0.5)


def test_a_perfect_network_is_near_perfect_in_native_space(tmp_path):
    root = write_phantoms("acdc", tmp_path / "acdc", patients=2, seed=0)
    check_perfect_network(root, tmp_path / "cache", worst=0.97)


@pytest.mark.skipif("MEDLIB_DATA" not in os.environ, reason="MEDLIB_DATA does not name a folder with real data")
def test_a_perfect_network_is_near_perfect_on_real_scans(tmp_path):
    check_perfect_network(os.path.join(os.environ["MEDLIB_DATA"], "acdc"), tmp_path / "cache", worst=0.95)
