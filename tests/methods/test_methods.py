"""Methods are looked up by name, refuse what they do not know, and their settings reach the training."""

import dataclasses
import math

import pytest
import torch

from medlib.data import dataset_info
from medlib.methods import Streams, available, build
from medlib.methods.baselines import slice_partition
from tests.tiny import SETTINGS, SIDE, training_data

CONTRASTIVE = ["coral", "pcl", "gcl", "simclr"]


def begin(name: str, stage: int = 0, **settings):
    method = build(name, **{**SETTINGS, **settings})
    data = training_data(labelled=2)
    networks = method.networks(data.classes)
    work = method.stages(data)[stage].begin(networks, data, Streams(0, "test", "cpu"))
    return work.train(), networks


def test_every_method_of_the_foundation_is_known():
    assert {"supervised", "random_encoder", *CONTRASTIVE} <= set(available())


@pytest.mark.parametrize("name", ["supervised", "random_encoder", *CONTRASTIVE])
@pytest.mark.parametrize("scale", ["ci", "laptop", "paper"])
def test_every_method_builds_at_every_scale(name, scale):
    method = build(name, scale=scale)
    assert method.image_size % 16 == 0 and method.protocol(dataset_info("acdc")).size == method.image_size


def test_defaults_are_those_of_the_paper():
    coral = build("coral")
    assert (coral.image_size, coral.spacing, coral.width, coral.projection_dim) == (352, 1.25, 48, 512)
    assert (coral.pretrain_epochs, coral.pretrain_batch, coral.pretrain_learning_rate) == (300, 32, 0.1)
    assert (coral.finetune_epochs, coral.finetune_batch, coral.finetune_learning_rate) == (100, 5, 5e-5)
    assert (coral.temperature, coral.soft_weight, coral.frozen) == (0.1, 0.0, True)
    assert build("pcl").threshold == 0.35


def test_a_scale_changes_sizes_and_lengths_only():
    sizes = {"image_size", "spacing", "width", "projection_dim"}
    lengths = {f"{stage}_{what}" for stage in ("pretrain", "finetune") for what in ("steps", "batch")}
    for scale in ("ci", "laptop"):
        changed = {
            field.name
            for field in dataclasses.fields(build("coral"))
            if getattr(build("coral", scale=scale), field.name) != getattr(build("coral"), field.name)
        }
        assert changed <= sizes | lengths | {"pretrain_learning_rate", "finetune_learning_rate"}, changed


def test_released_variant_is_the_code_and_a_setting_overrules_it():
    released = build("coral", variant="released")
    assert (released.soft_weight, released.frozen, released.separate_views) == (1.0, False, True)
    assert build("coral", variant="released", frozen=True).frozen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(name="corral"), "unknown method 'corral'"),
        (dict(name="coral", scale="huge"), "unknown scale 'huge'"),
        (dict(name="coral", temprature=1), "did you mean 'temperature'"),
        (dict(name="coral", variant="mine"), "no variant 'mine'"),
        (dict(name="coral", image_size=100), "multiple of 16"),
        (dict(name="coral", width=0), "width"),
        (dict(name="supervised", finetune_learning_rate=0.0), "finetune_learning_rate"),
    ],
)
def test_wrong_settings_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        build(**call)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_pretraining_reaches_encoder_head_and_loss_but_not_the_decoder(name):
    work, networks = begin(name)
    terms = work(**work.draw())
    terms["total"].backward()
    touched = {
        part for part, module in networks.items() for p in module.parameters() if p.grad is not None and p.grad.any()
    }
    assert touched == ({"unet", "head", "contrast"} if name == "coral" else {"unet", "head"})
    assert all(p.grad is None for p in networks["unet"].decoder.parameters())
    names = [name for name, _ in work.named_parameters()]
    assert not any("decoder" in name for name in names)


def test_the_terms_of_coral_add_up_and_can_be_left_out():
    for relational, ordinal in [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]:
        work, _ = begin("coral", relational_weight=relational, ordinal_weight=ordinal)
        terms = work(**work.draw())
        expected = relational * terms["relational"] + ordinal * terms["ordinal"]
        torch.testing.assert_close(terms["total"], expected)


def test_separate_views_have_their_own_batch_statistics():
    joint, _ = begin("simclr")
    batch = joint.draw()
    scaled = {**batch, "second": 10 * batch["second"]}  # what batch statistics of this view alone take away
    apart, networks = begin("simclr", separate_views=True)
    apart.load_state_dict(joint.state_dict())
    torch.testing.assert_close(apart(**scaled)["total"], apart(**batch)["total"], atol=1e-3, rtol=0)
    assert abs(joint(**scaled)["total"] - joint(**batch)["total"]) > 5e-3


@pytest.mark.parametrize(("name", "frozen"), [("coral", True), ("random_encoder", True), ("supervised", False)])
def test_a_frozen_encoder_does_not_move_not_even_its_statistics(name, frozen):
    work, networks = begin(name, stage=-1)
    before = {key: value.clone() for key, value in networks["unet"].state_dict().items()}
    for _ in range(3):
        work.optimizer.zero_grad()
        work(**work.draw())["total"].backward()
        work.optimizer.step()
    moved = {key for key, value in networks["unet"].state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith("encoder") for key in moved) != frozen
    assert any(key.startswith("decoder") for key in moved)


def test_finetuning_draws_from_labelled_patients_only():
    work, _ = begin("supervised", stage=-1)
    for _ in range(20):
        assert (work.draw()["labels"] >= 0).all()


def test_predictions_are_probabilities_and_embeddings_have_the_heads_size():
    method = build("coral", **SETTINGS)
    networks = method.networks(4).eval()
    images = torch.rand(2, 1, SIDE, SIDE)
    torch.testing.assert_close(method.predict(networks, images).sum(dim=1), torch.ones(2, SIDE, SIDE))
    assert method.embed(networks, images).shape == (2, 8)
    supervised = build("supervised", **SETTINGS)
    assert supervised.embed(supervised.networks(4).eval(), images).shape == (2, 32)


def test_epochs_count_where_no_steps_are_given():
    data = training_data(labelled=2)
    settings = {k: v for k, v in SETTINGS.items() if not k.endswith("steps")}
    method = build("pcl", **{**settings, "pretrain_epochs": 10, "finetune_epochs": 7})
    assert [stage.steps for stage in method.stages(data)] == [10 * (15 // 4), 7 * (10 // 3)]


def test_partitions_of_a_volume():
    """Notes A4: w = round-half-up(Z/4), part = min(i // w, 3)."""

    def parts(depth: int) -> list[int]:
        return slice_partition(torch.arange(depth), torch.full((depth,), depth)).tolist()

    assert parts(8) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert parts(10) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert parts(6) == [0, 0, 1, 1, 2, 2]  # the fourth partition is empty, as in the code
    assert parts(1) == [0]  # where the code divides by zero


@pytest.mark.parametrize(
    "setting",
    [
        dict(frozen=1),
        dict(width=2.5),
        dict(width="16"),
        dict(temperature="0.1"),
        dict(finetune_steps=True),
        dict(momentum=None),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"coral: {name} must be"):
        build("coral", **setting)


def test_a_whole_number_is_a_number_and_none_an_option_where_the_field_says_so():
    assert build("coral", temperature=1, pretrain_steps=None).temperature == 1


@pytest.mark.parametrize("name", sorted(available()))
def test_no_method_takes_a_temperature_that_its_loss_would_refuse(name):
    fields = {entry.name for entry in dataclasses.fields(available()[name])}
    for setting in sorted(field for field in fields if field.endswith("temperature") or field == "sharpening"):
        for wrong in (-1.0, 0.0, 1e-8, math.nan):
            with pytest.raises(ValueError, match=f"{setting} must be at least"):
                build(name, scale="ci", **{setting: wrong})
    if "momentum" in fields:
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got -3"):
            build(name, scale="ci", momentum=-3.0)
