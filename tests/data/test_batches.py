"""Slices on the device: whose labels are seen, and that every row comes once an epoch."""

import hashlib

import numpy as np
import pytest
import torch

from medlib.data.batches import UNLABELLED, ShuffledRows, Slices
from medlib.rng import generator
from tests.tiny import SIDE, training_data, volume


def test_labels_of_unlabelled_patients_are_not_there():
    slices = training_data(labelled=1).slices("cpu")
    assert len(slices) == 15 and slices.labelled.sum() == 5
    assert (slices.labels[~slices.labelled] == UNLABELLED).all()
    assert set(slices.labels[slices.labelled].unique().tolist()) == {0, 2, 3}


def test_what_a_row_knows_of_its_place():
    slices = Slices.of([volume("patient001", depth=4), volume("patient002", depth=2)], [], "cpu")
    assert slices.positions.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.5, 1.0])
    assert slices.index.tolist() == [0, 1, 2, 3, 0, 1] and slices.depth.tolist() == [4, 4, 4, 4, 2, 2]
    assert slices.volume.tolist() == slices.patient.tolist() == [0, 0, 0, 0, 1, 1]
    images, labels = slices.batch(torch.tensor([5, 0]))
    assert images.shape == (2, 1, SIDE, SIDE) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_transductive_slices_add_images_but_no_labels():
    data = training_data(labelled=1)
    everything = data.slices("cpu", everything=True)
    assert len(everything) == 20 and everything.labelled.sum() == 5
    assert data.slices("cpu") is data.slices("cpu")


@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (10, 10), (3, 7)])
def test_every_row_once_an_epoch(rows, batch):
    sampler = ShuffledRows(torch.arange(100, 100 + rows), batch, generator(0, "rows"))
    drawn = torch.cat([sampler.draw() for _ in range(3 * rows)])
    for epoch in drawn[: rows * (len(drawn) // rows)].view(-1, rows):
        assert sorted(epoch.tolist()) == list(range(100, 100 + rows))


def test_an_empty_or_impossible_draw_is_refused():
    with pytest.raises(ValueError, match="nothing to draw from"):
        ShuffledRows(torch.arange(0), 2, generator(0, "rows"))
    with pytest.raises(ValueError, match="batch_size"):
        ShuffledRows(torch.arange(3), 0, generator(0, "rows"))
    with pytest.raises(ValueError, match="no volume"):
        Slices.of([], [], "cpu")


def test_fingerprint_changes_with_what_a_stage_sees_and_with_nothing_else():
    one, two = training_data(labelled=1), training_data(labelled=2)
    assert one.fingerprint(labels=False) == two.fingerprint(labels=False)
    assert one.fingerprint(labels=True) != two.fingerprint(labels=True)
    assert one.fingerprint(labels=False) != one.fingerprint(labels=False, everything=True)
    changed = training_data(labelled=1)
    changed.train[2].image[0, 0, 0] += 1
    assert changed.fingerprint(labels=False) != one.fingerprint(labels=False)


def test_fingerprint_is_of_the_bytes_in_c_order_wherever_they_lie(tmp_path):
    data = training_data(labelled=1)
    expected = hashlib.sha256()
    for number, one in enumerate(data.train):
        expected.update(f"{one.case.case} {one.image.shape}".encode() + one.image.tobytes())
        expected.update(one.label.tobytes() if number == 0 else b"")
    assert data.fingerprint(labels=True) == expected.hexdigest()
    np.save(tmp_path / "image.npy", data.train[0].image)
    data.train[0].image = np.load(tmp_path / "image.npy", mmap_mode="r")
    data.train[1].image = np.asfortranarray(data.train[1].image)
    assert data.fingerprint(labels=True) == expected.hexdigest()
