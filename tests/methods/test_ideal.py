"""IDEAL and the methods of its table: every setting trains, labels stay hidden, runs resume bit for bit."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medlib.data.batches import TrainingData
from medlib.methods import SCALES, Streams, build
from medlib.train import Trained, make_fabric, train
from tests.tiny import SIDE, training_data

SETTINGS = dict(scale="ci", image_size=SIDE, spacing=None, width=2, pretrain_steps=3, finetune_steps=4)
ABLATIONS = [
    {}, dict(head="global"), dict(match="projections"), dict(match="geometric"), dict(decoders=1),
    dict(consistency_weight=0.0), dict(pretraining=False), dict(negatives="pooled", queue=16, ema=0.99),
    dict(global_weight=0.5, warmup_steps=1),
]  # fmt: skip
RIVALS = ("gcl_local", "self_training", "mutual_consistency")


class Stop(Exception):
    pass


def run(name: str, folder: Path, *, data: TrainingData | None = None, callback=None, **settings) -> Trained:
    method = build(name, **{**SETTINGS, **settings})
    return train(
        method, data or training_data(labelled=1), seed=0, output_dir=folder, fabric=make_fabric("cpu"), log_every=1,
        checkpoint_seconds=0.0, progress=False, callback=callback,
    )  # fmt: skip


def same(first: Trained, second: Trained) -> bool:
    mine, theirs = first.networks.state_dict(), second.networks.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("settings", ABLATIONS, ids=lambda s: ",".join(map(str, s)) or "paper")
def test_every_ablation_trains(tmp_path, settings):
    trained = run("ideal", tmp_path, **settings)
    lines = [line for stage in trained.stages for line in stage.history()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert [stage.name for stage in trained.stages] == ["pretrain", "finetune"][settings.get("pretraining") is False :]


@pytest.mark.parametrize("name", RIVALS)
def test_the_rivals_train(tmp_path, name):
    lines = [line for stage in run(name, tmp_path).stages for line in stage.history()]
    assert lines and all(math.isfinite(line["total"]) for line in lines)


@pytest.mark.parametrize("name", ("ideal", *RIVALS))
@pytest.mark.parametrize("scale", SCALES)
def test_they_build_at_every_scale(name, scale):
    assert build(name, scale=scale).image_size % 16 == 0


@pytest.mark.parametrize("name", ("ideal", *RIVALS))
def test_labels_of_unlabelled_patients_are_never_seen(tmp_path, name):
    poisoned = training_data(labelled=1)
    for volume in poisoned.train[1:]:
        volume.label = np.full_like(volume.label, 3)
    first = run(name, tmp_path / "a")
    assert same(first, run(name, tmp_path / "b", data=poisoned))
    seen = training_data(labelled=1)
    seen.train[0].label = np.full_like(seen.train[0].label, 3)
    assert not same(first, run(name, tmp_path / "c", data=seen))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ideal", dict(negatives="pooled", queue=16, ema=0.9, global_weight=0.5)), *((name, {}) for name in RIVALS)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name, settings):
    """The death comes at the second step of every stage in turn: each is resumed once from its checkpoint."""
    whole = run(name, tmp_path / "whole", **settings)

    def die(stage: str, step: int, terms: object) -> None:
        if step == 2 and stage not in died:
            died.add(stage)
            raise Stop

    died: set[str] = set()
    long = [stage for stage in whole.stages if stage.steps >= 2]
    for _ in long:
        with pytest.raises(Stop):
            run(name, tmp_path / "cut", callback=die, **settings)
    assert len(died) == len(long) and same(whole, run(name, tmp_path / "cut", callback=die, **settings))


def test_prediction_is_the_mean_of_the_branches():
    for name, count in (("ideal", 2), ("mutual_consistency", 2)):
        method = build(name, **SETTINGS)
        networks = method.networks(4).eval()
        images = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            branches = method.branches(networks, images)
            assert branches.shape == (count, 2, 4, SIDE, SIDE) and not torch.equal(branches[0], branches[1])
            torch.testing.assert_close(method.predict(networks, images), branches.mean(dim=0))


def test_without_consistency_the_unlabelled_slices_do_not_matter(tmp_path):
    other = training_data(labelled=1)
    for volume in other.train[1:]:
        volume.image = volume.image[:, ::-1].copy()
    settings = dict(pretraining=False, consistency_weight=0.0)
    assert same(run("ideal", tmp_path / "a", **settings), run("ideal", tmp_path / "b", data=other, **settings))
    settings["consistency_weight"] = 1.0
    assert not same(run("ideal", tmp_path / "c", **settings), run("ideal", tmp_path / "d", data=other, **settings))


def test_a_fully_labelled_split_trains_without_the_other_half(tmp_path):
    for name in ("ideal", "self_training", "mutual_consistency"):
        run(name, tmp_path / name, data=training_data(labelled=3))


@pytest.mark.parametrize(
    "setting",
    [
        dict(head="both"), dict(match="nearest"), dict(decoders=3), dict(pretrain_batch=1), dict(ema=1.0),
        dict(temperature=0.0), dict(warmup_steps=5), dict(image_size=40), dict(queue=-1),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        build("ideal", **{**SETTINGS, **setting})


def test_pseudo_labels_are_the_decisions_of_the_network_at_that_moment():
    method, data = build("self_training", **SETTINGS), training_data(labelled=1)
    networks = method.networks(4)
    stage = method.stages(data)[1]
    work = stage.begin(networks, data, Streams(0, stage.name, "cpu"))
    slices = data.slices("cpu")
    images, _ = slices.batch(torch.arange(len(slices)))
    with torch.no_grad():
        own = method.predict(networks.eval(), images).argmax(dim=1)
    hidden = ~slices.labelled
    assert hidden.any() and torch.equal(work.decisions[hidden].long(), own[hidden])
    assert torch.equal(work.decisions[~hidden], slices.labels[~hidden])
