import dataclasses
import errno
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medlib.data import (
    DataError,
    Protocol,
    VolumeProtocol,
    labelled_cases,
    learn_statistics,
    load_volume,
    prepare,
    read_dataset,
)
from medlib.data.prepare import Prepared, Statistics, cache_key, fit

from .trees import write_official, write_ssl4mis

module = importlib.import_module("medlib.data.prepare")  # medlib.data.prepare is the function
REAL = os.environ.get("MEDLIB_DATA")
PROTOCOL = Protocol(size=32, spacing=1.25)


@pytest.fixture
def cases(tmp_path):
    return read_dataset("acdc", write_official(tmp_path / "ACDC", training=2))


def one_hot(label: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(np.array(label)).long(), 4).movedim(-1, 0).float()


def dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    return 2 * np.sum((a == value) & (b == value)) / np.sum((a == value).astype(int) + (b == value))


# -------------------------------------------------------------------------------------------------- the arrays


def test_what_comes_out(cases, tmp_path):
    prepared = prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)
    assert [item.case for item in prepared] == cases
    for item in prepared:
        volume = load_volume(item.case)
        assert item.image.shape == (6, 32, 32) and item.image.dtype == np.float16
        assert (item.label is None) == (volume.label is None)
        assert item.native_shape == volume.image.shape and item.spacing == pytest.approx(volume.spacing)
        assert isinstance(item.image, np.memmap) and not item.image.flags.writeable
        np.testing.assert_array_equal(item.positions, volume.positions)
        if item.label is not None:
            assert item.label.dtype == np.uint8 and set(np.unique(item.label)) == {0, 1, 2, 3}


def test_in_plane_resampling_goes_by_the_spacing(cases, tmp_path):
    case = cases[0]  # 24 x 20 px at 1.4 x 1.5 mm
    item = prepare([case], Protocol(size=64, spacing=0.7), tmp_path, progress=False)[0]
    seen = item.image[0] != 0
    assert (seen.any(1).sum(), seen.any(0).sum()) == (48, 43)
    assert np.flatnonzero(seen.any(1))[0] == 8, "not centred"


def test_z_scoring_comes_before_padding():
    image = np.random.default_rng(0).normal(500, 40, (4, 20, 20)).astype(np.float32)
    out = Protocol(size=40, spacing=1).arrays(image, None, (8, 1, 1))[0].astype(np.float32)
    inside = out[:, 10:30, 10:30]
    assert inside.mean() == pytest.approx(0, abs=1e-3) and inside.std() == pytest.approx(1, abs=1e-3)
    out[:, 10:30, 10:30] = 0
    assert not out.any(), "the padding is not the mean"


def test_minmax_clip_and_none():
    image = np.linspace(0, 1000, 4 * 16 * 16, dtype=np.float32).reshape(4, 16, 16)
    scaled = Protocol(16, normalise="minmax").arrays(image, None, None)[0]
    assert (scaled.min(), scaled.max()) == (0, 1)
    kept = Protocol(16, normalise="none", clip=(10, 90)).arrays(image, None, None)[0]
    assert kept.dtype == np.float32
    assert (kept.min(), kept.max()) == (pytest.approx(100), pytest.approx(900))
    np.testing.assert_array_equal(Protocol(16, normalise="none").arrays(image, None, None)[0], image)


def test_without_a_spacing_the_whole_field_of_view_is_resized():
    image = np.zeros((1, 20, 40), np.float32)
    image[:, :, 20:] = 1
    for spacing, protocol in ((None, Protocol(16, 1.0, normalise="none")), ((8, 1, 1), Protocol(16, normalise="none"))):
        out = protocol.arrays(image, None, spacing)[0][0]
        assert out.shape == (16, 16)
        np.testing.assert_allclose(out[:, :7], 0, atol=1e-6)
        np.testing.assert_allclose(out[:, 9:], 1, atol=1e-6)


def test_a_coarser_grid_averages():
    image = np.random.default_rng(1).integers(0, 2, (1, 64, 64)).astype(np.float32)
    coarse = Protocol(8, normalise="none").arrays(image, None, None)[0]
    assert coarse.std() < 0.15, "pixels were skipped, not averaged"


def test_a_label_follows_its_image():
    label = np.zeros((3, 50, 60), np.uint8)
    label[:, 10:30, 20:44] = 3
    image = np.where(label == 3, 100.0, 0).astype(np.float32)
    out, mask = Protocol(96, 0.7, normalise="none").arrays(image, label, (8, 1.1, 0.9))
    assert mask is not None
    np.testing.assert_array_equal(mask == 3, out > 50)


@settings(deadline=None, max_examples=20)
@given(
    st.tuples(st.integers(100, 260), st.integers(100, 260)),
    st.floats(1.0, 1.9),
    st.sampled_from([None, 1.0, 1.25, 1.5]),
    st.sampled_from([96, 128, 191, 256]),
)
def test_a_label_prepared_and_restored_is_itself(shape, pixel, spacing, size):
    height, width = shape
    assume(spacing is not None or max(shape) / size < 2)
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2) * pixel
    label = np.stack([np.where(distance < 25, 3, np.where(distance < 37, 2, 0))] * 2).astype(np.uint8)
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    native = (8.0, pixel, pixel)
    prepared, mask = Protocol(size, spacing).arrays(image, label, native)
    item = Prepared(None, Protocol(size, spacing), prepared, mask, label.shape, native)  # type: ignore[arg-type]
    back = item.restore(one_hot(mask))
    assert back.shape == label.shape and back.dtype == np.uint8
    assert dice(back, label, 3) > 0.97 and dice(back, label, 2) > 0.95


@settings(deadline=None, max_examples=50)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(8, 40), st.integers(8, 40))
def test_fit_undoes_itself(height, width, high, wide):
    array = torch.rand(1, 1, height, width) + 1
    there = fit(array, high, wide)
    assert there.shape == (1, 1, high, wide)
    back = fit(there, height, width)
    kept = back != 0
    assert kept.sum() == min(height, high) * min(width, wide)
    torch.testing.assert_close(back[kept], array[kept])


def test_what_was_cropped_away_is_background():
    label = np.full((2, 40, 40), 3, np.uint8)
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    protocol = Protocol(20, 1.0)
    out, mask = protocol.arrays(image, label, (8, 1, 1))
    item = Prepared(None, protocol, out, mask, label.shape, (8, 1, 1))  # type: ignore[arg-type]
    probabilities = one_hot(mask)
    before = probabilities.clone()
    back = item.restore(probabilities)
    assert (back[:, 10:30, 10:30] == 3).all()
    assert (back == 3).sum() == 2 * 20 * 20
    torch.testing.assert_close(probabilities, before)


def test_restore_interpolates_probabilities_not_labels():
    protocol = Protocol(8, None)
    item = Prepared(None, protocol, np.zeros((1, 8, 8)), None, (1, 8, 16), None)  # type: ignore[arg-type]
    probabilities = torch.zeros(2, 1, 8, 8)
    probabilities[0], probabilities[1, ..., 4:] = 0.2, 1.0
    edge = item.restore(probabilities)[0, 0].tolist().index(1)
    assert edge == 7, "a quarter of 1.0 beats 0.2 one native pixel before the edge of the label map"


def test_restore_refuses_another_shape(cases, tmp_path):
    item = prepare(cases[:1], PROTOCOL, tmp_path, progress=False)[0]
    with pytest.raises(ValueError, match=r"must be \(C, 6, 32, 32\), got \(4, 5, 32, 32\)"):
        item.restore(torch.zeros(4, 5, 32, 32))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"size": 4}, "size must be at least 8"),
        ({"size": 32, "spacing": 0.0}, "spacing must be > 0"),
        ({"size": 32, "normalise": "z"}, "normalise must be one of zscore"),
        ({"size": 32, "clip": (99, 1)}, "clip must be two rising"),
        ({"size": 32, "window": (250, -125)}, r"window must be two rising intensities.*\(250, -125\)"),
        ({"size": 32, "window": (-125, float("nan"))}, "window must be two rising"),
        ({"size": 32, "window": (-125, 275), "clip": (1, 99)}, r"not both: \(-125, 275\), \(1, 99\)"),
        ({"size": 32, "statistics": Statistics(None, 0, 1)}, "statistics are for normalise='dataset', got .*'zscore'"),
    ],
)
def test_a_protocol_refuses_nonsense(settings_, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings_)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 0, 1), (1, 1, float("nan"))])
def test_a_volume_protocol_refuses_nonsense(spacing):
    with pytest.raises(ValueError, match=r"spacing must be \(z, y, x\)"):
        VolumeProtocol(spacing)


# ---------------------------------------------------------------------------------------------------- intensities


def test_a_window_cuts_in_hounsfield_units_and_minmax_then_means_the_same_everywhere():
    image = np.linspace(-1000, 1000, 4 * 16 * 16, dtype=np.float32).reshape(4, 16, 16)
    cut = Protocol(16, normalise="none", window=(-125, 275)).arrays(image, None, None)[0]
    np.testing.assert_array_equal(cut, np.clip(image, -125, 275))
    for volume in (image, image[1:3]):  # the second never reaches the ends of the window
        scaled = Protocol(16, normalise="minmax", window=(-500, 1500)).arrays(volume, None, None)[0]
        np.testing.assert_allclose(scaled, (np.clip(volume, -500, 1500) + 500) / 2000, atol=1e-3)
    scored = Protocol(16, window=(-125, 275)).arrays(image, None, None)[0].astype(np.float64)
    expected = np.clip(image, -125, 275)
    np.testing.assert_allclose(scored, (expected - expected.mean()) / expected.std(), atol=2e-3)


def test_a_window_in_hounsfield_units_leaves_the_mr_scans_of_a_mixed_data_set_alone(cases, tmp_path):
    mixed = [
        dataclasses.replace(case, case=f"{case.case}_{kind}", info={"modality": kind})
        for case in labelled_cases(cases)[:2]
        for kind in ("CT", "MR")
    ]
    middle = float(np.median(load_volume(mixed[0]).image))
    cut = prepare(mixed, Protocol(32, 1.25, normalise="none", window=(0.0, middle)), tmp_path, progress=False)
    bare = prepare(mixed, Protocol(32, 1.25, normalise="none"), tmp_path, progress=False)
    for one, other in zip(cut, bare, strict=True):
        if one.case.info["modality"] == "MR":
            np.testing.assert_array_equal(one.image, other.image)
        else:
            assert one.image.max() <= middle < other.image.max()


def test_dataset_statistics_cut_shift_and_scale():
    image = np.linspace(-1000, 1000, 4 * 16 * 16, dtype=np.float32).reshape(4, 16, 16)
    protocol = Protocol(16, normalise="dataset", clip=(0.5, 99.5))
    with pytest.raises(ValueError, match="needs statistics: take them from learn_statistics"):
        protocol.arrays(image, None, None)
    learnt = dataclasses.replace(protocol, statistics=Statistics((-20.0, 320.0), 214.0, 100.0))
    expected = (np.clip(image, -20, 320) - 214) / 100
    np.testing.assert_allclose(learnt.arrays(image, None, None)[0], expected, atol=2e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.floats(-5e3, 5e3), st.floats(1e-3, 1e3), st.integers(0, 9))
def test_moments_are_those_of_numpy(depth, mean, std, seed):
    grid = np.random.default_rng(seed).normal(mean, std, (depth, 9, 11)).astype(np.float32)
    expected = grid.mean(dtype=np.float64), grid.std(dtype=np.float64)
    assert module._moments(grid) == pytest.approx(expected, rel=1e-12)


LEARNT = Protocol(32, normalise="dataset", clip=(0.5, 99.5))


def foreground_of(cases) -> list[np.ndarray]:
    volumes = [load_volume(case) for case in cases]
    return [volume.image[volume.label > 0].astype(np.float64) for volume in volumes]


def test_statistics_are_those_of_the_foreground_and_each_scan_counts_the_same(cases, tmp_path):
    labelled = labelled_cases(cases)
    found = learn_statistics(labelled, LEARNT, tmp_path, progress=False)
    values = [
        np.quantile(v, (np.arange(10_000) + 0.5) / 10_000, method="inverted_cdf") for v in foreground_of(labelled)
    ]
    pooled = np.concatenate(values)
    assert found.cut == pytest.approx(tuple(np.percentile(pooled, (0.5, 99.5))), abs=1e-3)
    cut = np.clip(pooled, *found.cut)
    assert (found.mean, found.std) == (pytest.approx(cut.mean(), rel=1e-4), pytest.approx(cut.std(), rel=1e-3))
    windowed = learn_statistics(labelled, Protocol(32, normalise="dataset", window=(50, 100)), tmp_path, progress=False)
    assert windowed.cut == (50, 100) and 50 <= windowed.mean <= 100
    plain = learn_statistics(labelled[:1], Protocol(32, normalise="dataset"), tmp_path, progress=False)
    (only,) = foreground_of(labelled[:1])
    assert plain == Statistics(None, pytest.approx(only.mean(), rel=1e-4), pytest.approx(only.std(), rel=1e-3))


def test_statistics_are_learnt_once_in_any_order_and_are_part_of_the_key(cases, tmp_path, monkeypatch):
    labelled = labelled_cases(cases)
    loaded = count_loads(monkeypatch)
    found = learn_statistics(labelled, LEARNT, tmp_path, progress=False)
    assert len(loaded) == len(labelled)
    assert learn_statistics(labelled[::-1], LEARNT, tmp_path, progress=False) == found
    assert len(loaded) == len(labelled)
    other = learn_statistics(labelled[:1], LEARNT, tmp_path, progress=False)
    assert other != found
    keys = {cache_key(cases[0], dataclasses.replace(LEARNT, statistics=one)) for one in (None, found, other)}
    assert len(keys) == 3
    os.utime(labelled[0].images[0], ns=(1, 1))
    learn_statistics(labelled, LEARNT, tmp_path, progress=False)
    assert len(loaded) == 2 * len(labelled) + 1
    assert not [path for path in tmp_path.glob("*/.*")]


def test_statistics_refuse_what_nothing_can_be_learnt_from(cases, tmp_path, monkeypatch):
    bare = [case for case in cases if not case.labels][:1]
    for wrong, message in ((bare, bare[0].case), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            learn_statistics(wrong, LEARNT, tmp_path, progress=False)
    original = module.load_volume

    def empty(case):
        volume = original(case)
        volume.label[:] = 0
        return volume

    monkeypatch.setattr(module, "load_volume", empty)
    with pytest.raises(DataError, match=r"no voxel of 1 labels is foreground \(.*patient001"):
        learn_statistics(labelled_cases(cases)[:1], LEARNT, tmp_path, progress=False)
    with pytest.raises(ValueError, match="needs statistics"):
        prepare(cases, LEARNT, tmp_path, progress=False)


# -------------------------------------------------------------------------------------------------- whole volumes


def test_a_volume_is_resampled_along_all_axes_and_keeps_its_shape(cases, tmp_path):
    case = cases[0]  # 6 x 24 x 20 voxels
    native = load_volume(case)
    item = prepare([case], VolumeProtocol((2.5, 1.2, 1.0)), tmp_path, progress=False)[0]
    expected = tuple(
        round(n * mm / to) for n, mm, to in zip(native.image.shape, native.spacing, (2.5, 1.2, 1), strict=True)
    )
    assert item.image.shape == item.label.shape == expected and item.image.dtype == np.float16
    assert item.inputs().shape == (1, 1, *expected) and item.inputs().dtype == torch.float32
    with pytest.raises(ValueError, match=r"must be \(C, "):
        item.restore(torch.zeros(4, *native.image.shape))
    back = item.restore(one_hot(item.label))
    assert back.shape == native.label.shape
    assert min(dice(back, native.label, value) for value in (1, 2, 3)) > 0.85


def test_without_a_spacing_a_volume_stays_as_it_is(cases, tmp_path):
    native = load_volume(cases[0])
    protocol = VolumeProtocol(None, normalise="none")
    image, label = protocol.arrays(native.image, native.label, native.spacing)
    np.testing.assert_array_equal(image, native.image)
    np.testing.assert_array_equal(label, native.label)


def test_a_volume_without_spacing_cannot_be_resampled(tmp_path):
    cases = read_dataset("acdc", write_ssl4mis(tmp_path / "ssl"))
    with pytest.raises(
        DataError, match=r"\.h5: a scan without voxel spacing cannot be resampled.*VolumeProtocol\(None\)"
    ):
        prepare(cases[:1], VolumeProtocol((1, 1, 1)), tmp_path / "cache", progress=False)
    assert prepare(cases[:1], VolumeProtocol(None), tmp_path / "cache", progress=False)[0].spacing is None


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 40), st.integers(3, 40))
def test_depth_is_resampled_as_the_plane_is(depth, target):
    image = np.random.default_rng(depth).normal(size=(depth, 5, 4)).astype(np.float32)
    spacing = (target / depth, 1.0, 1.0)
    along = VolumeProtocol((1, 1, 1), normalise="none").arrays(image, None, spacing)[0]
    turned = torch.from_numpy(image).permute(1, 0, 2)[None]  # the slice axis as rows
    expected = module.resample(turned, target, 4)[0].permute(1, 0, 2).numpy()
    np.testing.assert_allclose(along, expected, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(12, 40), st.integers(16, 48), st.integers(16, 48)),
    st.tuples(*[st.floats(0.7, 3.0)] * 3),
    st.floats(0.6, 1.0),
)
def test_a_volume_prepared_and_restored_is_itself(shape, spacing, finer):
    """Two balls that touch: on a grid no coarser than the scan's, little is lost (0.90 is the least of 1,200 draws)."""
    z, y, x = (np.arange(n) + 0.5 for n in shape)
    middle = [n / 2 for n in shape]
    away = np.sqrt(sum(((g - m) / m) ** 2 for g, m in zip(np.meshgrid(z, y, x, indexing="ij"), middle, strict=True)))
    label = np.where(away < 0.5, 2, np.where(away < 0.85, 1, 0)).astype(np.uint8)
    image = label.astype(np.float32)
    protocol = VolumeProtocol(tuple(mm * finer for mm in spacing), normalise="none")
    prepared, mask = protocol.arrays(image, label, spacing)
    assert prepared.shape == mask.shape == protocol.grid(shape, spacing)
    assert np.abs(prepared - mask)[1:-1, 1:-1, 1:-1].max() <= 1.5, "image and label lie on different grids"
    item = Prepared(None, protocol, prepared, mask, shape, spacing)  # type: ignore[arg-type]
    back = item.restore(torch.nn.functional.one_hot(torch.from_numpy(mask).long(), 3).movedim(-1, 0).float())
    assert back.shape == shape and min(dice(back, label, 1), dice(back, label, 2)) > 0.85


def test_labels_are_linear_one_hot_maps_of_which_the_largest_wins():
    label = np.random.default_rng(3).choice([0, 1, 5, 9], (9, 20, 22)).astype(np.uint8)
    spacing, protocol = (1.7, 0.9, 1.3), VolumeProtocol((1.1, 1.0, 1.0))
    mask = protocol.arrays(label.astype(np.float32), label, spacing)[1]
    maps = torch.nn.functional.one_hot(torch.from_numpy(label).long(), 10).movedim(-1, 0).float()  # (10, Z, H, W)
    plane = module.resample(maps, *mask.shape[1:])
    depth = module.resample(plane.permute(2, 0, 1, 3), mask.shape[0], mask.shape[2]).permute(1, 2, 0, 3)
    two = depth.topk(2, dim=0).values
    clear = (two[0] - two[1] > 1e-5).numpy()
    np.testing.assert_array_equal(mask[clear], depth.argmax(dim=0).numpy()[clear])
    assert clear.mean() > 0.98


MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from medlib.data import VolumeProtocol
torch.set_num_threads(1)
def memory(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
depth, side = int(sys.argv[1]), int(sys.argv[2])
rows = np.repeat(np.arange(14, dtype=np.uint8), -(-side // 14))[:side, None]
label = np.broadcast_to(rows, (depth, side, side)).copy()
image = np.random.default_rng(0).random(label.shape, np.float32)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = memory("VmRSS")
protocol = VolumeProtocol((1.1, 0.9, 0.9), **eval(sys.argv[3]))  # in plane nothing gets smaller
protocol.arrays(image, label, (1, 0.9, 0.9))
print((memory("VmHWM") - before) / image.size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc, which only Linux has")
@pytest.mark.parametrize("intensities", ["{'clip': (0.5, 99.5)}", "{'window': (0.1, 0.9)}"])
def test_memory_above_the_volume_stays_within_its_share_of_two_gigabytes(intensities):
    """2 GiB for 400 x 512 x 512 are 20 bytes a voxel; one float64 copy would add 8, one-hot maps of 14 classes 56."""
    command = [sys.executable, "-c", MEMORY, "100", "320", intensities]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 4 < float(done.stdout) < 13.5, "bytes a voxel"


# --------------------------------------------------------------------------------------------------- the cache


def count_loads(monkeypatch, fail_at: int | None = None, error: BaseException | None = None) -> list[str]:
    """Record which cases are loaded; the `fail_at`-th raises `error`."""
    loaded: list[str] = []
    original = module.load_volume

    def load(case):
        if error is not None and len(loaded) == fail_at:
            raise error
        loaded.append(case.case)
        return original(case)

    monkeypatch.setattr(module, "load_volume", load)
    return loaded


def test_a_second_run_reads_no_voxel(cases, tmp_path, monkeypatch):
    loaded = count_loads(monkeypatch)
    first = prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)
    assert len(loaded) == len(cases)
    second = prepare(cases[::-1], PROTOCOL, tmp_path / "cache", progress=False)
    assert len(loaded) == len(cases)
    for one, other in zip(first, second[::-1], strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_another_protocol_or_content_is_prepared_anew(cases, tmp_path, monkeypatch):
    loaded = count_loads(monkeypatch)
    prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)
    prepare(cases[:1], Protocol(size=32, spacing=1.3), tmp_path / "cache", progress=False)
    assert len(loaded) == len(cases) + 1
    path = cases[0].images[0]
    key = cache_key(cases[0], PROTOCOL)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert cache_key(cases[0], PROTOCOL) != key
    prepare(cases[:1], PROTOCOL, tmp_path / "cache", progress=False)
    assert len(loaded) == len(cases) + 2


def test_frames_of_one_file_have_keys_of_their_own(cases):
    assert len({cache_key(case, PROTOCOL) for case in cases}) == len(cases)


def test_an_interrupted_run_goes_on_where_it_stopped(cases, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        loaded = count_loads(patch, fail_at=4, error=KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(cases, PROTOCOL, tmp_path / "cache", workers=1, progress=False)
    assert not list(tmp_path.glob("cache/*/.unfinished-*"))
    rest = count_loads(monkeypatch)
    assert len(prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)) == len(cases)
    assert sorted(loaded + rest) == sorted(case.case for case in cases)


def test_a_damaged_cache_is_made_again(cases, tmp_path):
    first = prepare(cases[:1], PROTOCOL, tmp_path / "cache", progress=False)
    content = np.array(first[0].image)
    for name, damage in (("image.npy", b"\x93NUMPY"), ("case.json", b"{"), ("label.npy", b"")):
        (path,) = tmp_path.glob(f"cache/acdc/*/{name}")
        path.write_bytes(damage)
        again = prepare(cases[:1], PROTOCOL, tmp_path / "cache", progress=False)
        np.testing.assert_array_equal(again[0].image, content)
    assert len(list(tmp_path.glob("cache/acdc/*"))) == 1


def test_what_a_killed_process_left_is_swept_and_what_another_writes_is_not(cases, tmp_path):
    old, fresh = (tmp_path / "cache/acdc" / f".unfinished-{name}" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 7200,) * 2)
    prepare(cases[:1], PROTOCOL, tmp_path / "cache", progress=False)
    assert fresh.exists() and not old.exists()


def test_every_broken_case_is_named(cases, tmp_path):
    for case in cases:
        if case.case in ("patient001_frame01", "patient002_frame04"):
            case.labels[0].write_bytes(case.labels[0].read_bytes()[:120])
    with pytest.raises(
        DataError, match=r"2 of 10 scans cannot be prepared:\n.*patient001_frame01.*\n.*patient002_frame04"
    ):
        prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)
    assert len(list(tmp_path.glob("cache/acdc/*"))) == 8, "the others are kept"


def test_a_full_disk_says_so_and_leaves_nothing_half_written(cases, tmp_path, monkeypatch):
    def full(path, array):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="cannot write patient.* to the cache .*No space left.*make room") as caught:
        prepare(cases, PROTOCOL, tmp_path / "cache", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("cache/acdc/*"))
    assert not list(tmp_path.glob("cache/acdc/.*"))


def test_a_cache_that_cannot_be_made_says_so(cases, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the cache"):
        prepare(cases, PROTOCOL, tmp_path / "file", progress=False)


def test_no_cases_and_no_workers(tmp_path, cases):
    assert prepare([], PROTOCOL, tmp_path, progress=False) == []
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        prepare(cases, PROTOCOL, tmp_path, workers=0)


def test_two_processes_may_start_together(cases, tmp_path):
    code = (
        "import sys; from medlib.data import Protocol, prepare, read_dataset\n"
        "cases = read_dataset('acdc', sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "items = prepare(cases, Protocol(size=32, spacing=1.25), sys.argv[2], progress=False)\n"
        "print(sum(float(abs(item.image).sum()) for item in items))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ACDC"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    outputs = [process.communicate("go\n", timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    folders = list((tmp_path / "cache/acdc").iterdir())
    assert len(folders) == len(cases)


def test_the_loser_of_a_race_keeps_the_winners_folder(cases, tmp_path, monkeypatch):
    original, inner = module.load_volume, []

    def race(case):
        volume = original(case)
        if not inner:  # another process prepares the same case meanwhile
            inner.append(True)
            prepare([case], PROTOCOL, tmp_path / "cache", progress=False)
            inner.append((next(tmp_path.glob("cache/acdc/*/image.npy"))).stat().st_ino)
        return volume

    monkeypatch.setattr(module, "load_volume", race)
    prepare(cases[:1], PROTOCOL, tmp_path / "cache", progress=False)
    (path,) = tmp_path.glob("cache/acdc/*/image.npy")
    assert path.stat().st_ino == inner[1]
    assert not list(tmp_path.glob("cache/acdc/.*"))


def test_ssl4mis_files_are_prepared_too(tmp_path):
    cases = read_dataset("acdc", write_ssl4mis(tmp_path / "ssl"))
    items = prepare(cases, Protocol(size=40), tmp_path / "cache", progress=False)
    for item in items:
        assert item.spacing is None and item.image.shape == (12, 40, 40)
        label = load_volume(item.case).label
        assert dice(item.restore(one_hot(item.label)), label, 3) > 0.97


@pytest.mark.skipif(not REAL, reason="MEDLIB_DATA does not point at real data")
def test_the_real_slices_start_warm_within_two_seconds(tmp_path):
    cases = read_dataset("acdc", Path(REAL or "") / "acdc")
    items = prepare(cases, Protocol(size=96), tmp_path, progress=False)
    assert sum(len(item.image) for item in items if item.case.part == "train") == 1312
    start = time.process_time()
    again = prepare(cases, Protocol(size=96), tmp_path, progress=False)
    assert time.process_time() - start < 2
    for item in again[::40]:
        label = load_volume(item.case).label
        back = item.restore(one_hot(item.label))
        assert min(dice(back, label, value) for value in (1, 2, 3)) > 0.8, "more than 96 pixels across can cost"
