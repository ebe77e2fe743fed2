"""3D patches: where they lie, what is hidden, and that a step reads its patches and not the volumes."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlib.data import Case, VolumeProtocol, dataset_info
from medlib.data import patches as module
from medlib.data.batches import UNLABELLED, ShuffledRows, TrainingData
from medlib.data.patches import Patches, foreground_voxels
from medlib.data.prepare import Prepared
from medlib.data.splits import Split
from medlib.rng import generator

SHAPE = (20, 30, 40)


def code(z, y, x):
    """A number that tells where a voxel lies, exact in float32."""
    return (z * 64 + y) * 64 + x + 1


def label_of(shape=SHAPE) -> np.ndarray:
    """A large class 1, and in one corner six voxels of class 3."""
    label = np.zeros(shape, np.uint8)
    label[2:-2, 2:-2, 2 : shape[2] // 2] = 1
    label[-3:-1, -3:, -1] = 3
    return label


def volume(patient: str, shape=SHAPE, label: np.ndarray | None = None, folder=None) -> Prepared:
    """An image whose every voxel says where it lies."""
    image = code(*np.ogrid[: shape[0], : shape[1], : shape[2]]).astype(np.float32)
    if folder is not None:
        folder.mkdir()
        arrays = {"image": image} if label is None else {"image": image, "label": label}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        image = np.load(folder / "image.npy", mmap_mode="r")
        label = None if label is None else np.load(folder / "label.npy", mmap_mode="r")
    case = Case(dataset_info("acdc"), f"{patient}_scan", patient, (), (), "acdc_nifti")
    return Prepared(case, VolumeProtocol(None, normalise="none"), image, label, shape, (1.0, 1.0, 1.0))


def corners(images: torch.Tensor) -> np.ndarray:
    """(B, 3): where in its volume each patch starts."""
    first = images[:, 0, 0, 0, 0].long().numpy() - 1
    return np.stack([first // 4096, first // 64 % 64, first % 64], axis=1)


def test_a_patch_is_cut_out_of_image_and_label_at_one_place():
    label = label_of()
    patches = Patches.of([volume("a"), volume("b", label=label)], ["b"], (6, 8, 10), "cpu")
    images, labels = patches.batch(torch.tensor([1, 0, 1]), generator(0, "patches"))
    assert images.shape == (3, 1, 6, 8, 10) and images.dtype == torch.float32
    assert labels.shape == (3, 6, 8, 10) and labels.dtype == torch.int64
    for i, (z, y, x) in enumerate(corners(images)):
        expected = code(*np.ogrid[z : z + 6, y : y + 8, x : x + 10])
        np.testing.assert_array_equal(images[i, 0], expected)
        if i != 1:
            np.testing.assert_array_equal(labels[i], label[z : z + 6, y : y + 8, x : x + 10])
    assert (labels[1] == UNLABELLED).all()


def test_labels_of_unlabelled_patients_are_not_even_looked_at():
    class Secret(np.ndarray):
        def __getitem__(self, index):
            raise AssertionError("a hidden label was read")

        def reshape(self, *shape, **kwargs):
            raise AssertionError("a hidden label was read")

    hidden = volume("a", label=label_of())
    hidden.label = hidden.label.view(Secret)
    patches = Patches.of([hidden, volume("b", label=label_of())], ["b"], (6, 8, 10), "cpu")
    assert patches.labelled.tolist() == [False, True] and patches.cases == ("a_scan", "b_scan")
    _, labels = patches.batch(torch.tensor([0, 0]), generator(0, "patches"), foreground=1)
    assert (labels == UNLABELLED).all()


def test_foreground_patches_are_balanced_over_the_classes_and_hold_their_voxel():
    patches = Patches.of([volume("a", label=label_of())], ["a"], (5, 7, 9), "cpu")
    rows = torch.zeros(400, dtype=torch.int64)
    images, labels = patches.batch(rows, generator(0, "patches"), foreground=1)
    rare = (labels == 3).flatten(1).any(dim=1)
    assert 0.4 < rare.float().mean() < 0.6, "6 voxels of 24,000 must draw as many patches as the large class"
    assert ((labels == 1).flatten(1).any(dim=1) | rare).all()
    assert (corners(images)[rare.numpy()] == [15, 23, 31]).all(), "at the border a patch stays inside"
    inner = ~rare & torch.tensor((corners(images) > 0).all(axis=1) & (corners(images) < [15, 23, 31]).all(axis=1))
    assert inner.sum() > 50 and (labels[inner][:, 2, 3, 4] == 1).all(), "the voxel is the middle one"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_foreground_patches_is_the_setting(share):
    label = np.zeros(SHAPE, np.uint8)
    label[10, 15, 20] = 2  # one voxel: a patch anywhere hardly has it in its middle
    patches = Patches.of([volume("a", label=label)], ["a"], (5, 7, 9), "cpu")
    _, labels = patches.batch(torch.zeros(600, dtype=torch.int64), generator(0, "patches"), foreground=share)
    assert (labels[:, 2, 3, 4] == 2).float().mean() == pytest.approx(share, abs=0.06)


def test_patches_elsewhere_reach_every_corner():
    patches = Patches.of([volume("a")], [], (18, 28, 38), "cpu")
    images, _ = patches.batch(torch.zeros(2000, dtype=torch.int64), generator(0, "patches"))
    starts, counts = np.unique(corners(images), axis=0, return_counts=True)
    np.testing.assert_array_equal(starts, np.argwhere(np.ones((3, 3, 3))))
    assert counts.min() > 40 and counts.max() < 115, "27 places, each as likely as any other"


@settings(deadline=None, max_examples=60)
@given(*[st.tuples(*[st.integers(1, 12)] * 3)] * 2, st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_any_volume_gives_a_patch_of_any_size(shape, size, share, seed):
    label = np.ones(shape, np.uint8)
    patches = Patches.of([volume("a", shape, label)], ["a"], size, "cpu")
    images, labels = patches.batch(torch.tensor([0]), generator(seed, "patches"), share)
    assert images.shape == (1, 1, *size)
    there = labels[0] == 1
    where = [slice((p - min(n, p)) // 2, (p - min(n, p)) // 2 + min(n, p)) for n, p in zip(shape, size, strict=True)]
    assert there[tuple(where)].all() and there.sum() == np.prod([w.stop - w.start for w in where])
    assert (labels[0][~there] == UNLABELLED).all() and (images[0, 0][~there] == 0).all()
    shown = images[0, 0][tuple(where)]
    start = corners(shown[None, None])[0]
    axes = (np.arange(s, s + n) for s, n in zip(start, shown.shape, strict=True))
    np.testing.assert_array_equal(shown, code(*np.meshgrid(*axes, indexing="ij")))


def test_a_step_reads_its_patches_and_not_the_volumes():
    read = []

    class Disk(np.ndarray):
        def __getitem__(self, index):
            part = super().__getitem__(index)
            read.append(part.nbytes)
            return part.view(np.ndarray)

    one = volume("a", label=label_of())
    one.image, one.label = one.image.view(Disk), one.label.view(Disk)
    patches = Patches.of([one], ["a"], (4, 5, 6), "cpu")
    read.clear()
    for _ in range(10):
        patches.batch(torch.tensor([0, 0]), generator(0, "patches"), foreground=0.5)
    assert sum(read) == 20 * 4 * 5 * 6 * (4 + 1), "image float32 and label uint8, each voxel of a patch once"


def test_the_places_of_each_class_are_few_enough_to_keep(monkeypatch):
    monkeypatch.setattr(module, "VOXELS", 50)
    label = label_of()
    found = foreground_voxels(label)
    assert found.dtype == np.uint16 and len(found) == 50 + 6
    for value, z, y, x in found.tolist():
        assert label[z, y, x] == value
    large = found[found[:, 0] == 1]
    assert len(np.unique(large, axis=0)) == 50 and len(np.unique(large[:, 1])) > 8, "spread over the volume"
    assert foreground_voxels(np.zeros((3, 4, 5), np.uint8)).shape == (0, 4)


def test_the_places_are_found_once_and_kept_beside_the_label(tmp_path, monkeypatch):
    one = volume("a", label=label_of(), folder=tmp_path / "a")
    first = Patches.of([one], ["a"], (4, 4, 4), "cpu")
    assert sorted(os.listdir(tmp_path / "a")) == ["foreground.npy", "image.npy", "label.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "foreground_voxels", lambda label: pytest.fail("looked for again"))
        again = Patches.of([one], ["a"], (4, 4, 4), "cpu")
    for mine, theirs in zip(first.foreground[0], again.foreground[0], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    (tmp_path / "a" / "foreground.npy").write_bytes(b"\x93NUMPY")
    assert len(Patches.of([one], ["a"], (4, 4, 4), "cpu").foreground[0]) == 2
    assert np.load(tmp_path / "a" / "foreground.npy").shape[1] == 4


def test_a_cache_that_cannot_be_written_does_not_stop_the_training(tmp_path, monkeypatch):
    def full(path, array):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    one = volume("a", label=label_of(), folder=tmp_path / "a")
    monkeypatch.setattr(module.np, "save", full)
    assert len(Patches.of([one], ["a"], (4, 4, 4), "cpu").foreground[0]) == 2
    assert sorted(os.listdir(tmp_path / "a")) == ["image.npy", "label.npy"]


def test_a_labelled_volume_without_foreground_gives_patches_from_anywhere():
    patches = Patches.of([volume("a", label=np.zeros(SHAPE, np.uint8))], ["a"], (4, 4, 4), "cpu")
    _, labels = patches.batch(torch.tensor([0]), generator(0, "patches"), foreground=1)
    assert patches.labelled.all() and (labels == 0).all()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="no volume"):
        Patches.of([], [], (4, 4, 4), "cpu")
    for size in ((4, 4), (4, 0, 4)):
        with pytest.raises(ValueError, match="size must be .*got"):
            Patches.of([volume("a")], [], size, "cpu")
    other = volume("b")
    other.image = np.zeros(SHAPE, np.float16)
    with pytest.raises(ValueError, match="different protocols.*float"):
        Patches.of([volume("a"), other], [], (4, 4, 4), "cpu")
    with pytest.raises(ValueError, match=r"foreground is a share.*1\.5"):
        Patches.of([volume("a")], [], (4, 4, 4), "cpu").batch(torch.tensor([0]), generator(0, "x"), 1.5)


# ---- as a method uses them


def data(labelled: int = 1) -> TrainingData:
    names = ("p1", "p2", "p3")
    split = Split("tiny", names[:labelled], names[labelled:], ("p9",), ())
    train = [volume(name, (8, 9, 10 + i), label_of((8, 9, 10 + i))) for i, name in enumerate(names)]
    return TrainingData(dataset_info("acdc"), split, train, [volume("p9", (8, 9, 10), label_of((8, 9, 10)))], [])


def test_training_data_hand_out_patches_as_they_hand_out_slices():
    one = data()
    patches = one.patches("cpu", (4, 4, 4))
    assert len(patches) == 3 and patches.labelled.tolist() == [True, False, False]
    assert one.patches("cpu", (4, 4, 4)) is patches and one.patches("cpu", (4, 4, 5)) is not patches
    everything = one.patches("cpu", (4, 4, 4), everything=True)
    assert everything.labelled.tolist() == [True, False, False, False]


def test_batches_of_labelled_and_unlabelled_patches_go_on_where_they_stopped():
    patches = data().patches("cpu", (4, 4, 4))

    def begin():
        streams = {name: generator(0, name) for name in ("labelled", "unlabelled", "patches")}
        rows = {"labelled": patches.labelled, "unlabelled": ~patches.labelled}
        return streams, {name: ShuffledRows(mask.nonzero().squeeze(1), 2, streams[name]) for name, mask in rows.items()}

    def draw(streams, samplers):
        rows = torch.cat([samplers["labelled"].draw(), samplers["unlabelled"].draw()])
        return patches.batch(rows, streams["patches"], foreground=0.5)

    streams, samplers = begin()
    for _ in range(3):
        _, labels = draw(streams, samplers)
        assert (labels[2:] == UNLABELLED).all() and (labels[:2] != UNLABELLED).all()
    states = {name: stream.get_state() for name, stream in streams.items()}
    waiting = {name: sampler.waiting for name, sampler in samplers.items()}
    expected = [draw(streams, samplers) for _ in range(4)]
    again, others = begin()
    for name, state in states.items():
        again[name].set_state(state)
    for name, rows in waiting.items():
        others[name].waiting = rows
    for images, labels in expected:
        found = draw(again, others)
        torch.testing.assert_close(found[0], images, rtol=0, atol=0)
        torch.testing.assert_close(found[1], labels, rtol=0, atol=0)


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data().patches("cpu", (4, 4, 4)).batch(torch.tensor([0, 1]), generator(0, "patches"))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
