"""Training on labelled and unlabelled images together: batches, ramps, teachers, and the baselines on that floor."""

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from medlib.augment import GeometricAugmentation
from medlib.data import dataset_info
from medlib.data.batches import TrainingData
from medlib.data.patches import Patches
from medlib.losses.consistency import (
    cotraining_agreement_loss,
    cotraining_diversity_loss,
    cross_pseudo_supervision_loss,
    interpolation_consistency_loss,
    mean_teacher_loss,
    mixed,
    uncertainty_aware_loss,
)
from medlib.losses.dvcl import voxel_entropy
from medlib.losses.segmentation import supervised_loss
from medlib.methods import Streams, available, build
from medlib.methods.consistency import (
    PERTURBATIONS,
    adversarial,
    beta_shares,
    channel_dropout,
    feature_dropout,
    feature_noise,
)
from medlib.methods.cotraining import Cotrained, MirroredPatches, Teacher, ramp_up
from medlib.nets import ssl4mis_unet, ssl4mis_unet_3d
from medlib.rng import generator
from medlib.train import make_fabric, predictor, train
from tests.no_waiting import NoWaiting
from tests.tiny import SIDE, training_data

SETTINGS: dict[str, Any] = dict(scale="ci", image_size=SIDE, spacing=None, width=2)
PATCH = (16, 32, 32)
BASELINES = ["mean_teacher", "ua_mt", "cps", "entropy_minimization", "ict", "deep_cotraining", "urpc", "cct"]
EVERY = ["labelled_only", *BASELINES]
IN_3D = ["labelled_only", "mean_teacher", "ua_mt", "cps"]
TAUGHT = ["mean_teacher", "ua_mt", "ict"]
CASES = [*((name, None) for name in EVERY), *((name, PATCH) for name in IN_3D)]
every_case = pytest.mark.parametrize(("name", "patch"), CASES, ids=[f"{n}-{'3d' if p else '2d'}" for n, p in CASES])


def begin(name: str, *, labelled: int = 1, data: TrainingData | None = None, **settings: Any):
    method = build(name, **{**SETTINGS, **settings})
    data = data or training_data(labelled=labelled)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        networks = method.networks(data.classes)
    (stage,) = method.stages(data)
    return stage.begin(networks, data, Streams(0, "test", "cpu")).train()


def step(work, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    work.optimizer.zero_grad()
    terms = work(**(work.draw() if batch is None else batch))
    terms["total"].backward()
    work.optimizer.step()
    work.schedule.step()
    work.after_step()
    return terms


def run(name: str, folder, *, labelled: int = 1, data: TrainingData | None = None, **settings: Any):
    options = {key: settings.pop(key) for key in ("callback", "checkpoint_seconds", "seed") if key in settings}
    method = build(name, **{**SETTINGS, **settings})
    options = {"seed": 0, "log_every": 1, "progress": False, **options}
    return train(method, data or training_data(labelled), output_dir=folder, fabric=make_fabric("cpu"), **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def losses(trained) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "time"} for part in trained.stages for line in part.history()]


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_baselines_have_the_names_of_the_field():
    assert set(EVERY) <= set(available())


@pytest.mark.parametrize("scale", ["ci", "laptop", "paper"])
@pytest.mark.parametrize("name", EVERY)
def test_every_baseline_builds_at_every_scale(name, scale):
    method = build(name, scale=scale)
    assert method.protocol(dataset_info("acdc")).size == method.image_size


def test_defaults_are_those_of_ssl4mis():
    method = build("mean_teacher")
    assert (method.image_size, method.spacing, method.width, method.batch_size, method.steps) == (
        256,
        None,
        16,
        24,
        30000,
    )
    assert (method.learning_rate, method.momentum, method.weight_decay, method.power) == (0.01, 0.9, 1e-4, 0.9)
    assert (method.dice_weight, method.cross_entropy_weight) == (0.5, 0.5)
    assert (method.ema, method.noise, method.consistency_weight, method.noisy_teacher) == (0.99, 0.1, 0.1, True)
    assert build("ua_mt").passes == 8 and build("ict").alpha == 0.2


def test_a_scale_changes_sizes_lengths_and_learning_rates_only():
    for name, scale in itertools.product(EVERY, ("ci", "laptop")):
        small, paper = dataclasses.asdict(build(name, scale=scale)), dataclasses.asdict(build(name))
        changed = {field for field in paper if small[field] != paper[field]}
        assert changed <= {"image_size", "spacing", "width", "steps", "batch_size", "learning_rate"}, name


def test_prepared_caches_are_shared_with_the_other_methods():
    info = dataset_info("acdc")
    for scale in ("ci", "laptop"):
        assert build("cps", scale=scale).protocol(info) == build("coral", scale=scale).protocol(info)
    assert (build("cps", scale="laptop").width, build("cps", scale="laptop").steps) == (16, 600)


def test_volumes_are_prepared_as_the_data_set_or_the_setting_says():
    info = dataset_info("btcv")
    protocol = build("cps", patch=PATCH).protocol(info)
    assert (
        (protocol.spacing, protocol.window) == (info.volume_spacing, info.window) == ((2.5, 1.2225, 1.2225), (-75, 275))
    )
    assert build("cps", patch=PATCH, voxel_spacing=(3.0, 2.0, 2.0)).protocol(info).spacing == (3, 2, 2)
    assert build("cps", patch=PATCH).protocol(dataset_info("acdc")).spacing is None


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cps", dict(image_size=100), "image_size must be a multiple of 16"),
        ("cps", dict(width=0), "width must be a whole number from 1, got 0"),
        ("cps", dict(steps=0), "steps must be"),
        ("cps", dict(batch_size=5), "batch_size must be even"),
        ("cps", dict(batch_size=0), "batch_size must be a whole number from 2"),
        ("cps", dict(ramp_steps=0), "ramp_steps must be"),
        ("cps", dict(learning_rate=0.0), "learning_rate must be above 0, got 0.0"),
        ("cps", dict(learning_rate=math.inf), "learning_rate must be above 0"),
        ("cps", dict(power=-1.0), "power"),
        ("cps", dict(weight_decay=-1e-4), "weight_decay must be at least 0"),
        ("cps", dict(optimizer="adam"), "optimizer must be one of sgd, adamw, got 'adam'"),
        ("cps", dict(momentum=1.0), r"momentum must be in \[0, 1\)"),
        ("cps", dict(dice_weight=-1.0), "dice_weight"),
        ("cps", dict(dice_weight=0.0, cross_entropy_weight=0.0), "nothing is learnt from labels"),
        ("cps", dict(consistency_weight=math.nan), "consistency_weight"),
        ("cps", dict(foreground=1.5), "foreground must be at least 0 and at most 1, got 1.5"),
        ("cps", dict(mirror=-0.5), "mirror"),
        ("cps", dict(network="resnet"), "network must be one of unet, vnet, got 'resnet'"),
        ("cps", dict(network="vnet"), "give a patch"),
        ("cps", dict(voxel_spacing=(1.0, 1.0, 1.0)), "voxel_spacing is for 3D"),
        ("cps", dict(patch=PATCH, voxel_spacing=(1.0, 0.0, 1.0)), "voxel_spacing must be"),
        ("cps", dict(patch=(8, 32, 32)), r"patch must be multiples of 16 .*\(8, 32, 32\)"),
        ("cps", dict(patch=(16, 16, 16)), "one of them larger"),
        ("cps", dict(patch=(32, 32)), r"patch must be \(z, y, x\)"),
        ("cps", dict(patch=(32.0, 32, 32)), r"patch must be \(z, y, x\)"),
        ("urpc", dict(patch=PATCH), "urpc is 2D here"),
        ("cct", dict(patch=PATCH), "cct is 2D here"),
        ("mean_teacher", dict(ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        ("mean_teacher", dict(noise=-0.1), "noise must be at least 0"),
        ("mean_teacher", dict(noisy_teacher=1), "noisy_teacher must be bool"),
        ("ua_mt", dict(passes=1), "passes must be a whole number from 2, got 1"),
        ("ict", dict(alpha=0.0), "alpha must be above 0"),
        ("deep_cotraining", dict(epsilon=0.0), "epsilon must be above 0"),
        ("deep_cotraining", dict(diversity_weight=-1.0), "diversity_weight"),
        ("deep_cotraining", dict(consistency_weight=1.0), "no setting 'consistency_weight'"),
    ],
)
def test_wrong_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


# --- the loop --------------------------------------------------------------------------------------------------------


@every_case
def test_every_method_trains_and_predicts(tmp_path, name, patch):
    method = build(name, **SETTINGS, patch=patch)
    trained = run(name, tmp_path, patch=patch)
    history = losses(trained)
    assert [line["step"] for line in history] == list(range(1, 7))
    assert all(math.isfinite(value) for line in history for value in line.values() if not isinstance(value, str))
    assert set(history[0]) == {"stage", "step", "lr", "total", "supervised", *method.weights}
    predict = predictor(method, trained.networks, make_fabric("cpu"))
    images = torch.rand(2, 1, SIDE, SIDE) if patch is None else torch.rand(1, 1, 20, 40, SIDE)
    found = predict(images)
    assert found.shape == (len(images), 4, *images.shape[2:])
    torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))


@pytest.mark.parametrize("name", EVERY)
def test_training_lowers_the_supervised_loss(tmp_path, name):
    steady = GeometricAugmentation(mirror=0, deform=0)
    history = losses(run(name, tmp_path, steps=20, learning_rate=0.05, augmentation=steady))
    start, end = (np.mean([line["supervised"] for line in part]) for part in (history[:5], history[-5:]))
    assert end < 0.9 * start


@pytest.mark.parametrize(
    ("name", "patch"), [(name, None) for name in BASELINES] + [("mean_teacher", PATCH)], ids=lambda x: str(x)
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name, patch):
    class Stop(Exception):
        pass

    def die(stage: str, at: int, terms: object) -> None:
        if at == 4:
            raise Stop

    whole = run(name, tmp_path / "whole", patch=patch)
    with pytest.raises(Stop):
        run(name, tmp_path / "cut", patch=patch, checkpoint_seconds=0.0, callback=die)
    resumed = run(name, tmp_path / "cut", patch=patch)
    assert same(whole.networks, resumed.networks) and losses(whole) == losses(resumed)


def test_a_checkpoint_holds_the_teacher_and_the_steps(tmp_path):
    work = begin("mean_teacher")
    step(work)
    step(work)
    state = work.state_dict()
    assert state["done"] == state["teacher.updates"] == 2
    other = begin("mean_teacher")
    assert not same(other.teacher, work.teacher)
    other.load_state_dict(state)
    assert same(other.teacher, work.teacher)


@pytest.mark.parametrize("patch", [None, PATCH], ids=["2d", "3d"])
def test_a_hidden_label_decides_nothing(tmp_path, patch):
    """Labels of unlabelled patients are poisoned with another anatomy, and the result stays what it was."""
    clean, poisoned = training_data(labelled=1), training_data(labelled=1)
    for volume in poisoned.train[1:]:
        volume.label = np.full_like(volume.label, 3)
    first, second = (
        run("cps", tmp_path / name, data=data, patch=patch) for name, data in (("a", clean), ("b", poisoned))
    )
    assert same(first.networks, second.networks) and losses(first) == losses(second)
    seen = training_data(labelled=1)
    seen.train[0].label = np.full_like(seen.train[0].label, 3)
    assert not same(first.networks, run("cps", tmp_path / "c", data=seen, patch=patch).networks)


def test_a_batch_is_half_labelled_and_half_not():
    for patch in (None, PATCH):
        work = begin("cps", batch_size=6, patch=patch)
        rows = {half: torch.cat([sampler.draw() for _ in range(10)]) for half, sampler in work.samplers.items()}
        assert work.source.labelled[rows["labelled"]].all() and not work.source.labelled[rows["unlabelled"]].any()
        batch = work.draw()
        assert len(batch["images"]) == len(batch["labels"]) == len(batch["unlabelled"]) == 3
        assert set(batch) == {"images", "labels", "unlabelled"}
        assert (batch["labels"] >= 0).any()


@pytest.mark.parametrize("name", EVERY)
def test_where_every_image_is_labelled_training_is_supervised(tmp_path, name):
    work = begin(name, labelled=3)
    assert set(work.draw()) == {"images", "labels"}
    assert set(step(work)) == {"total", "supervised"}


def test_the_supervised_baseline_sees_no_unlabelled_image():
    assert set(begin("labelled_only").draw()) == {"images", "labels"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimiser_is_that_of_the_settings(optimizer):
    work = begin("cps", optimizer=optimizer, momentum=0.8, weight_decay=2e-4, learning_rate=0.02)
    (group,) = work.optimizer.param_groups
    assert type(work.optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    assert (group["lr"], group["weight_decay"]) == (0.02, 2e-4)
    if optimizer == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.8, False)
    else:
        assert group["betas"] == (0.8, 0.999)
    assert {id(p) for p in group["params"]} == {id(p) for p in work.networks.parameters()}


def test_the_first_step_of_adamw_is_the_learning_rate_whatever_the_gradient():
    work = begin("labelled_only", optimizer="adamw", learning_rate=0.01, weight_decay=0.0)
    before = [each.detach().clone() for each in work.networks.parameters()]
    step(work)
    for old, new in zip(before, work.networks.parameters(), strict=True):
        strong = new.grad.abs() > 1e-4  # against the 1e-8 of its denominator
        moved = (new - old).abs()[strong]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


def test_training_with_adamw_resumes_where_it_was(tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, step, terms):
        if step == 4:
            raise Stop

    settings = dict(optimizer="adamw", learning_rate=0.003)
    whole = run("cps", tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        run("cps", tmp_path / "halves", callback=stop, checkpoint_seconds=0, **settings)
    assert same(whole.networks, run("cps", tmp_path / "halves", **settings).networks)


def test_the_learning_rate_falls_as_a_polynomial_to_zero(tmp_path):
    rates = [line["lr"] for line in losses(run("labelled_only", tmp_path, learning_rate=0.02))]
    np.testing.assert_allclose(rates, [0.02 * (1 - t / 6) ** 0.9 for t in range(1, 7)], atol=1e-12)


def test_every_setting_and_the_name_are_part_of_the_stage():
    data = training_data()
    (first,), (second,) = (build(name, **SETTINGS).stages(data) for name in ("cps", "entropy_minimization"))
    assert first.describe() != second.describe()
    (other,) = build("cps", **SETTINGS, on_labelled=False).stages(data)
    assert json.dumps(first.describe(), default=str) != json.dumps(other.describe(), default=str)


@every_case
def test_a_step_never_waits_for_the_device(monkeypatch, name, patch):
    def one_hot(ids: Tensor, classes: int) -> Tensor:
        return (ids[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr("torch.nn.functional.one_hot", one_hot)  # PyTorch's looks at the largest id, on a CPU only
    work = begin(name, patch=patch)
    batch = work.draw()
    with NoWaiting():
        work(**batch)["total"].backward()
        work.after_step()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        batch["images"].sum().item()


@every_case
def test_global_randomness_is_left_alone_but_for_dropout(name, patch):
    work = begin(name, patch=patch)
    for layer in work.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
            layer.p = 0.0
    before = torch.get_rng_state()
    step(work)
    assert torch.equal(torch.get_rng_state(), before)


# --- schedules, sums -------------------------------------------------------------------------------------------------


def test_the_ramp():
    values = [ramp_up(torch.tensor(t), 10).item() for t in (0, 5, 10, 99)]
    assert values == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])


@pytest.mark.parametrize("ramp_steps", [None, 2])
@pytest.mark.parametrize("name", BASELINES)
def test_the_total_is_the_supervised_loss_and_the_ramped_weighted_terms(name, ramp_steps):
    work = begin(name, ramp_steps=ramp_steps, steps=4)
    for t in range(3):
        terms = step(work)
        height = math.exp(-5 * (1 - min(t / (ramp_steps or 4), 1)) ** 2)
        weighted = sum(weight * terms[term] for term, weight in work.method.weights.items())
        torch.testing.assert_close(terms["total"], terms["supervised"] + height * weighted)


def test_the_supervised_loss_is_half_dice_half_cross_entropy_of_the_labelled_half():
    work = begin("entropy_minimization").eval()
    batch = work.draw()
    logits = work.unet(batch["images"])
    expected = supervised_loss(logits, batch["labels"], 0.5, 0.5)
    torch.testing.assert_close(work(**batch)["supervised"], expected)
    other = begin("entropy_minimization", dice_weight=0.0, cross_entropy_weight=2.0).eval()
    torch.testing.assert_close(other(**batch)["supervised"], supervised_loss(logits, batch["labels"], 0, 2))


# --- teachers --------------------------------------------------------------------------------------------------------


def trained_a_little(network: nn.Module, seed: int) -> None:
    """Other weights, other statistics."""
    stream = generator(seed, "test")
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=stream))
            else:
                tensor.add_(1)


def test_a_teacher_is_the_running_mean_of_weights_and_buffers():
    network = ssl4mis_unet(3, 2)
    teacher = Teacher(network, decay=0.6, noisy=True)
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert all(torch.equal(expected[name], tensor) for name, tensor in teacher.network.state_dict().items())
    for n, a in enumerate([0, 1 / 2, 0.6, 0.6]):  # min(1 - 1/(n + 1), 0.6)
        trained_a_little(network, n)
        teacher.follow(network)
        for name, tensor in network.state_dict().items():
            counter = not tensor.is_floating_point()
            expected[name] = tensor.clone() if counter else a * expected[name] + (1 - a) * tensor
    for name, tensor in teacher.network.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    assert teacher.updates == 4


def test_a_teacher_learns_from_nothing_else():
    network = ssl4mis_unet(3, 2)
    teacher = Teacher(network, 0.9, noisy=True).train()
    floats = {name: x.clone() for name, x in teacher.network.state_dict().items() if x.is_floating_point()}
    found = teacher(torch.rand(2, 1, 16, 16, requires_grad=True))
    assert not found.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(teacher.network.state_dict()[name], x) for name, x in floats.items())
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.momentum == 0.1 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("noisy", [True, False])
def test_a_teacher_is_in_the_mode_that_was_asked_for(noisy):
    teacher = Teacher(ssl4mis_unet(3, 2), 0.9, noisy)
    assert not teacher.eval().network.training
    assert all(module.training == noisy for module in teacher.train().network.modules())
    work = begin("mean_teacher", noisy_teacher=noisy)
    assert work.teacher.network.training == noisy and work.unet.training
    images = torch.rand(2, 1, SIDE, SIDE)
    assert torch.equal(work.teacher(images), work.teacher(images)) != noisy


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_follows_each_step_and_gets_no_gradient(name):
    work = begin(name, ema=0.7)
    parts = {id(p) for p in work.teacher.parameters()}
    assert not any(id(p) in parts for group in work.optimizer.param_groups for p in group["params"])
    step(work)
    assert same(work.teacher.network, work.unet)  # the first update copies
    before = {key: x.clone() for key, x in work.teacher.network.state_dict().items()}
    step(work)
    key = "classifier.weight"
    expected = (before[key] + work.unet.state_dict()[key]) / 2
    torch.testing.assert_close(work.teacher.network.state_dict()[key], expected)
    assert all(p.grad is None for p in work.teacher.parameters())


@every_case
def test_every_weight_that_is_trained_gets_a_gradient(name, patch):
    work = begin(name, patch=patch)
    work(**work.draw())["total"].backward()
    missing = [key for key, p in work.networks.named_parameters() if p.grad is None]
    assert not missing
    assert any(p.grad.any() for p in work.networks.parameters())


# --- images in 3D ----------------------------------------------------------------------------------------------------


def patches_of(size: tuple[int, int, int]) -> Patches:
    return training_data(labelled=3).patches("cpu", size)


def test_patches_are_mirrored_in_plane_with_their_labels():
    plain = MirroredPatches(patches_of((5, 32, 32)), 1 / 3, 0.0, Streams(0, "test", "cpu"))
    always = MirroredPatches(patches_of((5, 32, 32)), 1 / 3, 1.0, Streams(0, "test", "cpu"))
    rows = torch.arange(3)
    images, labels = plain.batch(rows)
    mirrored, moved = always.batch(rows)
    assert torch.equal(mirrored, images.flip(-1, -2)) and torch.equal(moved, labels.flip(-1, -2))
    assert not torch.equal(mirrored, images)


def test_half_of_the_axes_are_mirrored_each_for_itself():
    source = MirroredPatches(patches_of((5, 32, 32)), 1 / 3, 0.5, Streams(0, "test", "cpu"))
    rows = torch.zeros(400, dtype=torch.long)
    images, labels = source.batch(rows)
    whole = source.patches.images[0].astype(np.float32)
    kinds = [torch.from_numpy(np.flip(whole, axes).copy()) for axes in ((), (1,), (2,), (1, 2))]
    counts = [sum(torch.equal(image[0], kind) for image in images) for kind in kinds]
    assert sum(counts) == 400
    assert stats.chisquare(counts).pvalue > 1e-4
    label = source.patches.labels[0]
    for image, mask in zip(images, labels, strict=True):
        number = next(n for n, kind in enumerate(kinds) if torch.equal(image[0], kind))
        assert np.array_equal(mask.numpy(), np.flip(label, ((), (1,), (2,), (1, 2))[number]))


def test_the_network_is_that_of_the_settings():
    assert type(build("cps", **SETTINGS).networks(4)["unet"].classifier) is nn.Conv2d
    unet = build("cps", **SETTINGS, patch=PATCH).networks(4)["unet"]
    assert unet.state_dict().keys() == ssl4mis_unet_3d(4, 2).state_dict().keys()
    vnet = build("cps", **SETTINGS, patch=PATCH, network="vnet").networks(4)["unet"]
    assert any(isinstance(layer, nn.ConvTranspose3d) for layer in vnet.modules())
    step(begin("mean_teacher", patch=PATCH, network="vnet"))


# --- one by one ------------------------------------------------------------------------------------------------------


def still(work) -> None:
    """No dropout and no batch statistics, so that a second pass gives what the first gave."""
    work.eval()


def test_mean_teacher_compares_unlabelled_images_with_noisy_ones(monkeypatch):
    work = begin("mean_teacher", noise=0.3)
    step(work)
    still(work)
    batch = work.draw()
    seen = []
    original = work.teacher.forward
    monkeypatch.setattr(work.teacher, "forward", lambda images: seen.append(images) or original(images))
    terms = work(**batch)
    (noisy,) = seen
    noise = noisy - batch["unlabelled"]
    assert 0 < noise.abs().max() <= 0.6 + 1e-5
    expected = mean_teacher_loss(work.unet(batch["unlabelled"]), original(noisy))
    torch.testing.assert_close(terms["consistency"], expected, atol=0, rtol=1e-3)


def test_the_noise_is_gaussian_and_cut_at_twice_its_deviation():
    work = begin("mean_teacher")
    noise = work.noisy(torch.zeros(100, 1, 32, 32), 0.1)
    assert noise.abs().max().item() == pytest.approx(0.2)
    cut = stats.norm.expect(lambda x: min(abs(x), 2) ** 2) ** 0.5  # a little below 1
    assert noise.std().item() == pytest.approx(0.1 * cut, rel=0.01)
    assert (noise.abs() == noise.abs().max()).float().mean().item() == pytest.approx(2 * stats.norm.sf(2), abs=3e-3)


def test_ua_mt_takes_the_entropy_of_the_mean_of_its_passes(monkeypatch):
    work = begin("ua_mt", passes=3, steps=10)
    for _ in range(4):
        step(work)
    still(work)
    batch, seen = work.draw(), []
    original = work.teacher.forward
    monkeypatch.setattr(work.teacher, "forward", lambda images: seen.append(images) or original(images))
    terms = work(**batch)
    assert len(seen) == 4 and not torch.equal(seen[1], seen[2])  # one for the target, three for the uncertainty
    mean = torch.stack([original(images) for images in seen[1:]]).mean(dim=0)
    threshold = (0.75 + 0.25 * math.exp(-5 * (1 - 4 / 10) ** 2)) * math.log(4)
    logits = work.unet(batch["unlabelled"])
    expected = uncertainty_aware_loss(logits, original(seen[0]), voxel_entropy(mean), threshold)
    torch.testing.assert_close(terms["consistency"], expected)


def test_cps_has_two_different_networks_and_the_first_predicts():
    work = begin("cps")
    first, second = work.networks["unet"], work.networks["second"]
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    still(work)
    batch = work.draw()
    images = torch.cat([batch["images"], batch["unlabelled"]])
    terms = work(**batch)
    a, b = first(images), second(images)
    half = len(batch["images"])
    parts = [cross_pseudo_supervision_loss(x, y) for x, y in ((a[:half], b[:half]), (a[half:], b[half:]))]
    torch.testing.assert_close(terms["consistency"], parts[0] + parts[1])
    sums = [supervised_loss(logits[:half], batch["labels"], 0.5, 0.5) for logits in (a, b)]
    torch.testing.assert_close(terms["supervised"], sums[0] + sums[1])
    other = begin("cps", on_labelled=False).eval()
    torch.testing.assert_close(other(**batch)["consistency"], parts[1])
    torch.testing.assert_close(work.method.predict(work.networks, images), a.softmax(dim=1))


def test_ict_mixes_images_and_targets_alike(monkeypatch):
    work = begin("ict", batch_size=6)
    step(work)
    still(work)
    batch = work.draw()
    seen, (first, second, share) = work.prepare(batch["unlabelled"])
    other = batch["unlabelled"][[2, 0, 1]]
    torch.testing.assert_close(seen, mixed(batch["unlabelled"], other, share))
    torch.testing.assert_close(first, work.teacher(batch["unlabelled"]))
    torch.testing.assert_close(second, work.teacher(other))
    assert share.shape == (3,) and len(share.unique()) == 3
    monkeypatch.setattr(work, "prepare", lambda unlabelled: (seen, (first, second, share)))
    expected = interpolation_consistency_loss(work.unet(seen), first, second, share)
    torch.testing.assert_close(work(**batch)["consistency"], expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_beta_distribution(alpha):
    shares = beta_shares(alpha, 4000, generator(0, "test")).double().numpy()
    assert shares.min() >= 0 and shares.max() <= 1 and np.isfinite(shares).all()
    assert stats.kstest(shares.clip(1e-12, 1 - 1e-7), stats.beta(alpha, alpha).cdf).statistic < 0.03
    again = beta_shares(alpha, 4000, generator(0, "test")).double().numpy()
    np.testing.assert_array_equal(shares, again)


def test_an_adversarial_example_lowers_the_networks_trust_in_its_decision():
    work = begin("deep_cotraining").eval()
    images = work.draw()["images"].requires_grad_()
    logits = work.unet(images)
    fooling = adversarial(logits, images, 0.05)
    change = (fooling - images).detach()
    torch.testing.assert_close(change.abs()[change != 0], torch.full_like(change[change != 0], 0.05), atol=1e-4, rtol=0)
    assert not fooling.requires_grad and all(p.grad is None for p in work.unet.parameters())
    decision = logits.argmax(dim=1)
    before, after = (nn.functional.cross_entropy(x, decision) for x in (logits, work.unet(fooling)))
    assert after > before


def test_deep_cotraining_shows_each_network_what_fools_the_other():
    work = begin("deep_cotraining", epsilon=0.1).eval()
    batch = work.draw()
    terms = work(**batch)
    images = torch.cat([batch["images"], batch["unlabelled"]]).requires_grad_()
    f, g = work.networks["unet"], work.networks["second"]
    a, b = f(images), g(images)
    fooling_f, fooling_g = adversarial(a, images, 0.1), adversarial(b, images, 0.1)
    torch.testing.assert_close(terms["diversity"], cotraining_diversity_loss(a, b, f(fooling_g), g(fooling_f)))
    half = len(batch["images"])
    torch.testing.assert_close(terms["agreement"], cotraining_agreement_loss(a[half:], b[half:]))


FEATURES = torch.rand(5, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5


def test_feature_noise_is_within_its_span():
    ratio = feature_noise(FEATURES, generator(0, "test")) / FEATURES - 1
    assert ratio.min() >= -0.3 - 1e-6 and ratio.max() <= 0.3 + 1e-6
    assert ratio.std().item() == pytest.approx(0.6 / math.sqrt(12), rel=0.05) and abs(ratio.mean()) < 0.02


def test_feature_dropout_takes_away_the_most_active_cells_of_each_image():
    found = feature_dropout(FEATURES, generator(0, "test"))
    gone = (found == 0).all(dim=1)  # (B, h, w)
    assert torch.equal(found, FEATURES * ~gone[:, None])
    for activity, cells in zip(FEATURES.mean(dim=1), gone, strict=True):
        share = activity / activity.max()
        assert share[cells].min() > share[~cells].max()  # a threshold
        assert share[cells].min() >= 0.6 and share[~cells].max() <= 0.9
        assert cells.any()


def test_channel_dropout_takes_away_whole_channels():
    features = torch.ones(50, 40, 3, 3)
    found = channel_dropout(features, generator(0, "test"))
    assert set(found.unique().tolist()) == {0, 2}
    assert (found == found[:, :, :1, :1]).all()
    assert found.mean().item() == pytest.approx(1, abs=0.05)


def test_cct_draws_the_auxiliary_decoders_to_the_main_one_on_unlabelled_images_only():
    work = begin("cct")
    batch = work.draw()
    terms = work(**batch)

    def touched(loss: Tensor) -> set[str]:
        work.zero_grad()
        loss.backward(retain_graph=True)
        named = work.networks["unet"].named_parameters()
        return {".".join(key.split(".")[:2]) for key, p in named if p.grad is not None and p.grad.any()}

    encoder = {f"encoder.{part}" for part in ("levels",)}
    assert touched(terms["supervised"]) == encoder | {"decoders.0", "classifiers.0"}
    others = {f"{part}.{number}" for part in ("decoders", "classifiers") for number in (1, 2, 3)}
    assert touched(terms["consistency"]) == encoder | others
    assert len(PERTURBATIONS) == 3
    main, *auxiliary = work.outputs(batch["images"], 1)
    assert len(main) == len(batch["images"]) and all(len(logits) == len(main) - 1 for logits in auxiliary)


def test_urpc_predicts_from_four_levels_at_full_resolution():
    work = begin("urpc")
    batch = work.draw()
    outputs = work.outputs(batch["images"], 2)
    assert [logits.shape for logits in outputs] == [(2, 4, SIDE, SIDE)] * 4
    expected = sum(supervised_loss(logits, batch["labels"], 0.5, 0.5) for logits in outputs) / 4
    torch.testing.assert_close(work.supervised(outputs, batch["labels"]), expected)
    images = batch["images"]
    work.eval()
    torch.testing.assert_close(work.method.predict(work.networks, images), work.unet(images).softmax(dim=1))
    assert not torch.equal(work.outputs(images, 2)[1], work.outputs(images, 2)[1])  # perturbed anew each time


def test_all_cotrained_methods_are_tested_here():
    cotrained = {name for name, cls in available().items() if cls.__module__ == "medlib.methods.consistency"}
    assert cotrained == set(EVERY) and all(issubclass(available()[name], Cotrained) for name in cotrained)
