"""IDEAL and the methods of its table: every setting trains, labels stay hidden, runs resume bit for bit."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medlib.data.batches import TrainingData
from medlib.losses.ideal import (
    NO_MATCH,
    cross_consistency_loss,
    dense_correspondence,
    distinct_match_fraction,
    local_contrastive_loss,
)
from medlib.methods import SCALES, Streams, Work, build
from medlib.methods.gcl import regions
from medlib.train import Trained, make_fabric, train
from tests.tiny import SIDE, training_data

SETTINGS = dict(scale="ci", image_size=SIDE, spacing=None, width=2, pretrain_steps=3, finetune_steps=4)
ABLATIONS = [
    {}, dict(head="global"), dict(match="projections"), dict(match="geometric"), dict(decoders=1),
    dict(consistency_weight=0.0), dict(pretraining=False),
    dict(ramp_steps=4, confidence=0.3), dict(negatives="pooled", queue=16, ema=0.99),
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
        dict(spacing=0.0), dict(spacing=math.inf), dict(augmentation=3),
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


# --- the stages from inside ------------------------------------------------------------------------------------------


def begin(name: str, stage: int = 0, labelled: int = 1, **settings) -> tuple[Work, nn.ModuleDict]:
    method, data = build(name, **{**SETTINGS, **settings}), training_data(labelled=labelled)
    networks = method.networks(data.classes)
    one = method.stages(data)[stage]
    return one.begin(networks, data, Streams(0, one.name, "cpu")).train(), networks


def step(work: Work) -> dict[str, Tensor]:
    work.optimizer.zero_grad()
    terms = work(**work.draw())
    terms["total"].backward()
    work.optimizer.step()
    work.after_step()
    return terms


def moved_by_a_step(work: Work, networks: nn.ModuleDict) -> set[str]:
    """The parts of the networks ("unet.encoder", "head", ...) whose weights or buffers a step changes."""
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    step(work)
    changed = [name for name, tensor in networks.state_dict().items() if not torch.equal(tensor, before[name])]
    return {".".join(name.split(".")[: 2 if name.startswith("unet") else 1]) for name in changed}


def test_defaults_are_those_of_the_paper():
    ideal = build("ideal")
    assert (ideal.encoder, ideal.head, ideal.decoders, ideal.consistency_weight) == ("resnet50", "dense", 2, 1.0)
    assert ideal.pretrain_learning_rate == ideal.finetune_learning_rate == 1e-5
    assert (ideal.match, ideal.negatives, ideal.temperature) == ("features", "cells", 0.2)
    assert (ideal.queue, ideal.ema, ideal.global_weight) == (0, 0.0, 0.0)
    assert (ideal.ramp_steps, ideal.confidence) == (0, 0.0)


def test_laptop_shares_its_slices_and_its_encoder_with_the_other_two_stage_methods():
    ideal, supervised = build("ideal", scale="laptop"), build("supervised", scale="laptop")
    names = ("image_size", "spacing", "width", "finetune_steps", "finetune_batch", "finetune_learning_rate")
    assert [getattr(ideal, name) for name in names] == [getattr(supervised, name) for name in names]
    about = training_data().info
    assert ideal.protocol(about) == supervised.protocol(about)
    assert ideal.encoder == "unet"


def test_pretraining_moves_encoder_and_heads_and_finetuning_all_but_them():
    assert moved_by_a_step(*begin("ideal")) == {"unet.encoder", "head"}
    work, networks = begin("ideal", global_weight=0.5)
    assert moved_by_a_step(work, networks) == {"unet.encoder", "head", "global_head"}
    assert moved_by_a_step(*begin("ideal", stage=1)) == {"unet.encoder", "unet.decoders", "unet.classifiers"}


def test_the_local_stage_of_gcl_moves_the_first_blocks_on_a_frozen_encoder():
    work, networks = begin("gcl_local", stage=1, blocks=2)
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    step(work)
    changed = {n for n, tensor in networks.state_dict().items() if not torch.equal(tensor, before[n])}
    levels = {name.split(".")[3] for name in changed if name.startswith("unet.decoder.levels")}
    assert levels == {"0", "1"}  # not 2 and 3
    assert {name.split(".")[0] for name in changed} == {"unet", "local_head"}
    assert not any("encoder" in name or "classifier" in name for name in changed)  # nor the encoder's statistics


def test_regions_of_a_map_are_its_patches():
    maps = torch.arange(2 * 81.0).view(1, 2, 9, 9)
    vectors = regions(maps)
    assert vectors.shape == (1, 13, 18)
    assert torch.equal(vectors[0, 4], maps[0, :, 3:6, 3:6].flatten())  # the centre
    assert torch.equal(vectors[0, 8], maps[0, :, 6:, 6:].flatten())  # the last corner
    with pytest.raises(ValueError, match=r"3 x 3 cells.*\(1, 2, 2, 9\)"):
        regions(maps[:, :, :2])


@pytest.mark.parametrize("match", ["features", "projections", "geometric"])
def test_the_loss_is_that_of_equation_2_with_the_chosen_match(match):
    work, networks = begin("ideal", match=match)
    batch = work.draw()
    encoder, head = networks["unet"].encoder, networks["head"]
    features = encoder(torch.cat([batch["first"], batch["second"]]))[-1]  # batch statistics of both views together
    projected = head(features)
    if match == "geometric":
        pools = [torch.nn.functional.adaptive_avg_pool2d(batch[f"{which}_places"], 2) for which in ("first", "second")]
        q, k = (pool.flatten(2) for pool in pools)
        distance = (q[:, :, :, None] - k[:, :, None, :]).norm(dim=1)
        nearest, expected = distance.min(dim=2)
        shown = (q.abs() <= 1).all(dim=1) & (nearest <= 1)
        expected = expected.masked_fill(~shown, NO_MATCH)
    else:
        expected = dense_correspondence(*(features if match == "features" else projected).chunk(2))
    terms = work(**batch)
    query, key = projected.chunk(2)
    loss = local_contrastive_loss(query, key, expected, 0.2, images=batch["rows"])
    torch.testing.assert_close(terms["local"], loss)
    torch.testing.assert_close(terms["total"], terms["local"])
    torch.testing.assert_close(terms["distinct"], distinct_match_fraction(expected))


def test_correspond_is_the_match_of_pretraining():
    for match in ("features", "projections", "geometric"):
        method, networks = build("ideal", **SETTINGS, match=match), begin("ideal", match=match)[1].eval()
        images = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        warps = [method.augmentation.draw(3, SIDE, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        first, second = (warp.images(images) for warp in warps)
        with torch.no_grad():
            found = method.correspond(networks, first, second, tuple(warps))
            features, projections = zip(*(method.cells(networks, view) for view in (first, second)), strict=True)
        assert found.shape == (3, 4)
        if match != "geometric":
            expected = dense_correspondence(*(features if match == "features" else projections))
            assert torch.equal(found, expected)


def test_a_slice_drawn_twice_is_not_its_own_negative():
    work, _ = begin("ideal", head="global")
    batch = work.draw()
    same = {**batch, "rows": torch.zeros_like(batch["rows"])}  # as if every row showed one slice: nobody has a negative
    assert work(**batch)["local"] > 0.1
    assert work(**same)["local"].item() == 0


def test_the_queue_holds_earlier_slices_and_never_the_slice_itself():
    work, _ = begin("ideal", queue=10, pretrain_batch=4)
    assert not work._queued(torch.arange(4))["queue_valid"].any()  # still empty
    batches = []
    for _ in range(2):
        batch = work.draw()
        work(**batch)["total"].backward()
        work.after_step()
        batches.append(batch["rows"])
    assert work.queue.valid().sum() == 8
    pushed = torch.cat(batches)
    valid = work._queued(pushed[:1])["queue_valid"][0, :8]
    assert torch.equal(valid, pushed != pushed[0]) and not valid[0]
    assert work._queued(torch.tensor([999]))["queue_valid"].sum() == 8
    assert work.queue.rows[:8].abs().sum(dim=1).min() > 0 and not work.queue.rows.requires_grad


def test_the_key_branch_follows_slowly_and_gets_no_gradient():
    work, networks = begin("ideal", ema=0.9)
    start = [p.clone() for p in work.key.parameters()]
    step(work)
    assert all(p.grad is None for p in work.key.parameters())
    for key, first, query in zip(work.key.parameters(), start, work.query.parameters(), strict=True):
        torch.testing.assert_close(key, 0.9 * first + 0.1 * query)
    assert any(not torch.equal(key, first) for key, first in zip(work.key.parameters(), start, strict=True))
    assert begin("ideal")[0].key is None
    trained = [*networks["unet"].encoder.parameters(), *networks["head"].parameters()]
    (group,) = work.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in trained}


def test_during_the_warm_up_the_global_term_trains_alone():
    work, networks = begin("ideal", global_weight=0.5, warmup_steps=2)
    for number in range(4):
        terms = step(work)
        local = terms["local"] if number >= 2 else 0
        torch.testing.assert_close(terms["total"], local + 0.5 * terms["global"])


def test_the_two_kinds_of_slices_have_their_own_half_of_the_batch():
    work, _ = begin("ideal", stage=1)
    batch = work.draw()
    assert (batch["labels"] >= 0).all()
    assert len(batch["images"]) == len(batch["unlabelled"]) == 4
    terms = work(**batch)
    torch.testing.assert_close(terms["total"], terms["cross_entropy"] + terms["consistency"])
    assert "unlabelled" not in begin("ideal", stage=1, decoders=1)[0].draw()
    assert "unlabelled" not in begin("ideal", stage=1, consistency_weight=0.0)[0].draw()
    slices = training_data(labelled=1).slices("cpu")
    for rows, labelled in (("labelled", True), ("unlabelled", False)):
        assert (slices.labelled[work.samplers[rows].draw()] == labelled).all()


def test_the_consistency_ramps_up_where_it_is_asked_to():
    for ramp_steps, heights in ((0, (1, 1, 1)), (10, (math.exp(-5), math.exp(-1.25), 1))):
        work, _ = begin("ideal", stage=1, ramp_steps=ramp_steps, consistency_weight=0.7)
        batch = work.draw()
        for done, height in zip((0, 5, 12), heights, strict=True):
            work.done.fill_(done)
            terms = work(**batch)
            expected = terms["cross_entropy"] + 0.7 * height * terms["consistency"]
            torch.testing.assert_close(terms["total"], expected)
        work.after_step()
        assert work.done == 13


def test_only_confident_pseudo_labels_count_where_it_is_asked_to():
    terms = {}
    for confidence in (0.0, 0.6):
        work, _ = begin("ideal", stage=1, confidence=confidence)
        batch = work.draw()
        terms[confidence] = work(**batch)["consistency"]
        first, second = (
            logits[len(batch["images"]) :] for logits in work.unet(torch.cat([batch["images"], batch["unlabelled"]]))
        )
        torch.testing.assert_close(terms[confidence], cross_consistency_loss(first, second, confidence=confidence))
    assert terms[0.0] != terms[0.6]


def test_mutual_consistency_ramps_up():
    work, _ = begin("mutual_consistency", finetune_steps=10)
    for done in (0, 5, 10):
        work.done.fill_(done)
        terms = work(**work.draw())
        weight = 0.1 * math.exp(-5 * (1 - done / 10) ** 2)
        torch.testing.assert_close(terms["total"], 0.5 * terms["dice"] + weight * terms["consistency"])


def test_the_rounds_of_self_training_share_the_steps_of_finetuning():
    stages = build("self_training", **SETTINGS, rounds=3).stages(training_data())
    assert [stage.steps for stage in stages] == [1, 1, 1, 1]
    stages = build("self_training", **{**SETTINGS, "finetune_steps": 602}, rounds=2).stages(training_data())
    assert [stage.steps for stage in stages] == [202, 200, 200]
    assert [stage.name for stage in stages] == ["finetune", "round 1", "round 2"]


def test_embeddings_are_the_mean_of_the_cells():
    images = torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for settings, dim in (({}, 16), (dict(head="global"), 16), (dict(pretraining=False), 32)):
        method = build("ideal", **SETTINGS, **settings)
        networks = method.networks(4).eval()
        with torch.no_grad():
            embedded = method.embed(networks, images)
            assert embedded.shape == (3, dim)
            if settings.get("pretraining") is False:
                with pytest.raises(ValueError, match="pretraining=False"):
                    method.cells(networks, images)
            else:
                features, projections = method.cells(networks, images)
                assert features.shape == (3, 32, 2, 2)
                assert projections.shape[2:] == ((1, 1) if settings else (2, 2))
                torch.testing.assert_close(embedded, projections.mean(dim=(2, 3)))


def test_the_papers_network_takes_a_step_in_both_stages():
    settings = dict(encoder="resnet50", image_size=64, pretrain_batch=2, finetune_batch=2)
    data = training_data(labelled=1)
    method = build("ideal", **{**SETTINGS, **settings})
    networks = method.networks(data.classes)
    slices = data.slices("cpu")
    slices.images = torch.nn.functional.interpolate(slices.images.float()[:, None], size=64)[:, 0]
    slices.labels = torch.nn.functional.interpolate(slices.labels.float()[:, None], size=64)[:, 0].to(torch.int8)
    for stage in method.stages(data):
        terms = step(stage.begin(networks, data, Streams(0, stage.name, "cpu")).train())
        assert all(value.isfinite() for value in terms.values())
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(method.predict(networks.eval(), images).sum(dim=1), torch.ones(1, 64, 64))
