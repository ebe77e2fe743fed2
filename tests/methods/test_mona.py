"""MONA: every row of its tables trains, each setting changes what it should and only that, nothing waits."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medlib.augment import (
    DiffeomorphicAugmentation,
    GeometricAugmentation,
    PhotometricAugmentation,
    StrongAugmentation,
    ThinPlateAugmentation,
)
from medlib.data.batches import TrainingData
from medlib.losses.consistency import pseudo_label_loss
from medlib.losses.contrastive import nt_xent_loss
from medlib.losses.instance import prediction_loss, queue_contrastive_loss
from medlib.losses.mona import (
    class_relation_distribution,
    equivariance_loss,
    instance_discrimination_loss,
    local_instance_discrimination_loss,
    local_windows,
    nearest_neighbor_loss,
)
from medlib.losses.segmentation import supervised_loss
from medlib.methods import SCALES, Streams, available, build, mona
from medlib.nets import ssl4mis_unet
from medlib.rng import generator
from medlib.train import Trained, make_fabric, predictor, train
from tests.methods.test_cotraining import losses, same
from tests.no_waiting import NoWaiting
from tests.tiny import SIDE, training_data

SETTINGS = dict(scale="ci", image_size=SIDE, spacing=None, width=2, pretrain_steps=3, steps=3)
FRAMEWORKS = ("glcon", "moco", "knn_moco", "simclr", "byol", "isd")
PRINCIPLES = ("tailness", "consistency", "diversity")
SUBSETS = [dict(zip(PRINCIPLES, on, strict=True)) for on in itertools.product((False, True), repeat=3)]
CALM = PhotometricAugmentation(probability=0.0)
LARGE = DiffeomorphicAugmentation(probability=1.0, cells=8, shift=0.04)


def run(folder: Path, *, data: TrainingData | None = None, name: str = "mona", callback=None, **settings) -> Trained:
    method = build(name, **{**SETTINGS, **settings})
    return train(
        method, data or training_data(labelled=1), seed=0, output_dir=folder, fabric=make_fabric("cpu"), log_every=1,
        checkpoint_seconds=0.0, progress=False, callback=callback,
    )  # fmt: skip


def begin(stage: str, *, labelled: int = 1, dropout: bool = False, data: TrainingData | None = None, **settings):
    """The work of one stage, by default without dropout: a second pass then gives what the first gave."""
    method = build("mona", **{**SETTINGS, **settings})
    data = data or training_data(labelled=labelled)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        networks = method.networks(data.classes)
        (one,) = [each for each in method.stages(data) if each.name == stage]
        work = one.begin(networks, data, Streams(0, stage, "cpu")).train()
    for layer in work.modules():
        if isinstance(layer, nn.Dropout) and not dropout:
            layer.p = 0.0
    return work


def step(work) -> dict[str, Tensor]:
    work.optimizer.zero_grad()
    terms = work(**work.draw())
    terms["total"].backward()
    work.optimizer.step()
    work.schedule.step()
    work.after_step()
    return terms


def stream(seed: int = 0) -> torch.Generator:
    return generator(seed, "test")


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    paper = build("mona")
    weights = (paper.contrast_weight, paper.equivariance_weight, paper.pseudo_weight, paper.neighbor_weight)
    assert weights == (0.01, 1.0, 1.0, 1.0)
    assert (paper.learning_rate, paper.momentum, paper.weight_decay, paper.batch_size) == (0.01, 0.9, 1e-4, 6)
    assert (paper.student_temperature, paper.teacher_temperature, paper.contrast_temperature) == (0.1, 0.01, 0.5)
    assert (paper.queue, paper.local_grid, paper.window, paper.neighbors) == (36, 6, 64, 5)
    assert (paper.projection_dim, paper.representation_dim, paper.queries, paper.keys) == (512, 512, 256, 512)
    assert (paper.threshold, paper.ema, paper.image_size, paper.spacing, paper.width) == (0.97, 0.99, 256, None, 16)
    assert (paper.student_view, paper.teacher_view, paper.framework) == ("strong", "weak", "glcon")
    assert paper.tailness and paper.consistency and paper.diversity and paper.pseudo_labels and paper.finetuning
    assert paper.ramp_steps is None and not paper.noisy_teacher


def test_the_paper_has_none_of_the_released_switches_and_the_variant_has_all():
    switches = (
        "noisy_teacher", "teacher_gradient", "scrambled_fragments", "released_contrast", "teacher_keys", "one_way",
        "swapped_roles", "unwarped_labels", "nesterov",
    )  # fmt: skip
    paper, released = build("mona"), build("mona", variant="released")
    assert not any(getattr(paper, name) for name in switches)
    assert all(getattr(released, name) for name in switches)
    assert (released.local_grid, released.dice_weight, released.cross_entropy_weight) == (7, 1.0, 1.0)
    assert not build("mona", variant="released", one_way=False).one_way


def test_a_scale_changes_sizes_lengths_and_learning_rates_only():
    sizes = {"image_size", "spacing", "width", "projection_dim", "representation_dim", "window", "window_cells"}
    lengths = {"steps", "pretrain_steps", "batch_size", "queue", "queries", "keys", "class_bank"}
    for scale in SCALES:
        method, paper = build("mona", scale=scale), build("mona")
        changed = {name for name in method.__dataclass_fields__ if getattr(method, name) != getattr(paper, name)}
        assert changed <= sizes | lengths | {"learning_rate"}
        assert 6 * method.window + method.window // 2 <= 2 * method.image_size  # the grid fills most of the picture


def test_the_frameworks_of_table_5_are_methods():
    for framework in FRAMEWORKS[1:]:
        assert build(f"mona_{framework}").framework == framework
    assert {f"mona_{framework}" for framework in FRAMEWORKS[1:]} | {"mona"} <= set(available())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(framework="mocov3"), "framework must be one of glcon, .* got 'mocov3'"),
        (dict(student_view="stronger"), "student_view must be one of weak, strong"),
        (dict(teacher_view="none"), "teacher_view must be"),
        (dict(window=10), "window .*10"),
        (dict(window=16), "windows of 16 px.* need 56 px"),
        (dict(queue=0), "queue must be"),
        (dict(queue=6, scrambled_fragments=True), "scrambled_fragments .*6 % 4"),
        (dict(batch_size=2), "batch_size must be a whole number from 4"),
        (dict(pretrain_steps=0), "pretrain_steps"),
        (dict(neighbors=0), "neighbors"),
        (dict(ema=1.0), r"ema must be in \[0, 1\)"),
        (dict(student_temperature=0.0), "student_temperature"),
        (dict(teacher_temperature=-1.0), "teacher_temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(contrast_temperature=0.0), "contrast_temperature"),
        (dict(contrast_weight=-0.1), "contrast_weight"),
        (dict(neighbor_weight=math.inf), "neighbor_weight"),
        (dict(threshold=1.5), "threshold must be at least 0 and at most 1"),
        (dict(contrast_confidence=-0.5), "contrast_confidence"),
        (dict(hard_share=2.0), "hard_share"),
        (dict(queries=0), "queries"),
        (dict(keys=0), "keys"),
        (dict(class_bank=-1), "class_bank"),
        (dict(class_bank=0, released_contrast=True), "class_bank"),
        (dict(framework="none", finetuning=False), "framework='none' with finetuning=False"),
        (dict(tailness=1), "tailness must be bool"),
        (dict(variant="mine"), "no variant 'mine'"),
        (dict(patch=(16, 32, 32)), "mona is 2D here"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        build("mona", **{**SETTINGS, **settings})


# --- whole trainings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_all_rows_of_table_6_train_on_one_pretraining(tmp_path, framework):
    outcomes = []
    for number, principles in enumerate(SUBSETS):
        trained = run(tmp_path, framework=framework, **principles)
        pretraining, finetuning = trained.stages
        assert pretraining.reused == (number > 0) and not finetuning.reused
        last = losses(trained)[-1]
        expected = {name for on, name in zip(principles.values(), TERMS, strict=True) if on}
        assert set(last) - {"stage", "step", "lr", "total", "supervised", "pseudo"} == expected
        assert all(math.isfinite(value) for value in last.values() if isinstance(value, float))
        outcomes.append(trained.networks)
    assert not any(same(*pair) for pair in itertools.combinations(outcomes, 2))


TERMS = ("contrast", "equivariance", "neighbor")


@pytest.mark.parametrize(
    "settings",
    [
        dict(variant="released"), dict(framework="none"), dict(finetuning=False), dict(pseudo_labels=False),
        dict(class_bank=0), dict(hard_share=0.5), dict(teacher_keys=True), dict(ramp_steps=2),
        *(dict(student_view=a, teacher_view=b) for a in ("weak", "strong") for b in ("weak", "strong")),
    ],
    ids=str,
)  # fmt: skip
def test_every_other_row_trains_and_predicts(tmp_path, settings):
    trained = run(tmp_path, **settings)
    assert all(math.isfinite(value) for line in losses(trained) for value in line.values() if isinstance(value, float))
    method = build("mona", **{**SETTINGS, **settings})
    found = predictor(method, trained.networks, make_fabric("cpu"))(torch.rand(2, 1, SIDE, SIDE))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, SIDE, SIDE))
    names = [stage.name for stage in trained.stages]
    assert names == ["pretrain"] * (settings.get("framework") != "none") + ["finetune"] * settings.get(
        "finetuning", True
    )


def test_training_lowers_the_supervised_loss_in_both_stages(tmp_path):
    settings = dict(learning_rate=0.05, augmentation=GeometricAugmentation(mirror=0, deform=0))
    for other in (dict(pretrain_steps=20, finetuning=False), dict(steps=20, framework="none")):
        (stage,) = run(tmp_path, **settings, **other).stages
        values = [line["supervised"] for line in stage.history()]
        assert np.mean(values[-5:]) < 0.9 * np.mean(values[:5]), stage.name


@pytest.mark.parametrize("settings", [{}, dict(variant="released"), dict(framework="byol")], ids=str)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, settings):
    """The death comes at the second step of every stage in turn: each is resumed once from its checkpoint."""

    class Stop(Exception):
        pass

    def die(stage: str, at: int, terms: object) -> None:
        if at == 2 and stage not in died:
            died.add(stage)
            raise Stop

    whole = run(tmp_path / "whole", **settings)
    died: set[str] = set()
    for _ in whole.stages:
        with pytest.raises(Stop):
            run(tmp_path / "cut", callback=die, **settings)
    resumed = run(tmp_path / "cut", callback=die, **settings)
    assert len(died) == 2 and same(whole.networks, resumed.networks) and losses(whole) == losses(resumed)


@pytest.mark.parametrize("settings", [{}, dict(variant="released")], ids=str)
def test_a_hidden_label_decides_nothing(tmp_path, settings):
    poisoned = training_data(labelled=1)
    for volume in poisoned.train[1:]:
        volume.label = np.full_like(volume.label, 3)
    first = run(tmp_path / "a", **settings)
    assert same(first.networks, run(tmp_path / "b", data=poisoned, **settings).networks)
    seen = training_data(labelled=1)
    seen.train[0].label = np.full_like(seen.train[0].label, 3)
    assert not same(first.networks, run(tmp_path / "c", data=seen, **settings).networks)


def test_where_every_image_is_labelled_the_second_stage_is_supervised(tmp_path):
    work = begin("pretrain", labelled=3)
    assert set(step(work)) == {"total", "supervised", "global", "local"}
    work = begin("finetune", labelled=3)
    assert set(step(work)) == {"total", "supervised"}
    run(tmp_path, data=training_data(labelled=3))


def test_pretraining_does_not_depend_on_the_settings_of_finetuning():
    data = training_data()

    def described(**settings) -> str:
        stage = build("mona", **{**SETTINGS, **settings}).stages(data)[0]
        return json.dumps(stage.describe(), default=str, sort_keys=True)

    later = dict(steps=5, tailness=False, threshold=0.9, queries=7, class_bank=0, one_way=True, contrast_weight=0.5)
    assert described() == described(**later)
    for setting in (
        dict(framework="byol"), dict(queue=12), dict(ema=0.9), dict(pretrain_steps=4), dict(batch_size=6),
        dict(teacher_gradient=True), dict(batch_statistics=False), dict(student_view="weak"), dict(window_cells=2),
        dict(strong=StrongAugmentation(photometric=CALM)), dict(teacher_temperature=0.1),
    ):  # fmt: skip
        assert described() != described(**setting), setting


WAYS = [("pretrain", dict(framework=framework)) for framework in FRAMEWORKS]
WAYS += [("pretrain", dict(variant="released"))]
WAYS += [("finetune", principles) for principles in SUBSETS]
WAYS += [("finetune", dict(class_bank=0)), ("finetune", dict(variant="released"))]
every_way = pytest.mark.parametrize(("stage", "settings"), WAYS, ids=str)


@every_way
def test_a_step_never_waits_for_the_device(monkeypatch, stage, settings):
    def one_hot(ids: Tensor, classes: int) -> Tensor:
        return (ids[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr("torch.nn.functional.one_hot", one_hot)  # PyTorch's looks at the largest id, on a CPU only
    work = begin(stage, **settings)
    step(work)
    batch = work.draw()
    with NoWaiting():
        work(**batch)["total"].backward()
        work.after_step()


@every_way
def test_global_randomness_is_left_alone(stage, settings):
    work = begin(stage, **settings)
    before = torch.get_rng_state()
    step(work)
    assert torch.equal(torch.get_rng_state(), before)


@every_way
def test_exactly_what_a_stage_trains_gets_a_gradient(stage, settings):
    work = begin(stage, **settings)
    step(work)  # banks are empty before
    work.optimizer.zero_grad()
    work(**work.draw())["total"].backward()
    moved = {name for name, part in work.networks.items() if any(p.grad is not None for p in part.parameters())}
    complete = {name for name in moved if all(p.grad is not None for p in work.networks[name].parameters())}
    if stage == "pretrain":
        framework = settings.get("framework", "glcon")
        expected = {"unet", "head"} | ({"predictor"} if framework in ("glcon", "isd", "byol") else set())
        expected |= {"local_head", "local_predictor"} if framework == "glcon" else set()
    else:
        expected = {"unet"} | ({"representation"} if settings.get("tailness", True) else set())
        # In the released code nobody learns from the neighbours: only an exact 0 reaches the heads.
        expected |= {"head", "predictor"} if settings.get("diversity", True) else set()
    assert moved == complete == expected
    pulled = stage == "pretrain" and settings.get("variant") == "released"
    assert any(p.grad is not None for p in work.teacher.parameters()) == pulled


# --- pre-training ----------------------------------------------------------------------------------------------------


def embedded(part: nn.Module, images: Tensor) -> Tensor:
    return part["head"](part["unet"].encoder(images)[-1])


@pytest.mark.parametrize("steps", [1, 3])  # a queue that is half full, and one that is full
def test_glcon_is_equations_1_and_2_for_the_whole_image_and_for_windows(steps):
    work = begin("pretrain")
    for _ in range(steps):
        step(work)
    batch = work.draw()
    images, others = batch["images"], batch["others"]
    student, teacher = work.networks, work.teacher.network
    found = work(**batch)
    u, v = student["predictor"](embedded(student, images)), embedded(teacher, others)
    valid = torch.arange(8) < 4 * steps
    expected = instance_discrimination_loss(u, v, work.queue.rows, 0.1, 0.01, valid=valid)
    torch.testing.assert_close(found["global"], expected)
    assert found["global"] > 1e-3

    own = nn.Sequential(student["local_head"], student["local_predictor"])
    window = dict(grid=6, size=8, stride=4, cells=4)
    first = local_windows(student["unet"](images), own, **window)
    second = local_windows(teacher["unet"](others), teacher["local_head"], **window)
    mined = work.local_queue.rows.view(8, 36, -1).transpose(0, 1)
    expected = local_instance_discrimination_loss(first, second, mined, 0.1, 0.01, valid=valid)
    torch.testing.assert_close(found["local"], expected)
    supervised = supervised_loss(student["unet"](images)[:2], batch["labels"], 0.5, 0.5)
    torch.testing.assert_close(found["supervised"], supervised)
    torch.testing.assert_close(found["total"], found["supervised"] + found["global"] + found["local"])
    work.after_step()
    torch.testing.assert_close(work.local_queue.rows[4 * (steps % 2)].view(36, -1), second[:, 0])  # slot of image 0


@pytest.mark.parametrize("framework", FRAMEWORKS[1:])
def test_the_rivals_compare_the_views_as_they_should(framework):
    work = begin("pretrain", framework=framework, neighbors=2)
    step(work)
    batch = work.draw()
    images, others = batch["images"], batch["others"]
    student, teacher = work.networks, work.teacher.network
    found = work(**batch)
    assert set(found) == {"total", "supervised", "global"}
    v, taught, queue = embedded(student, images), embedded(teacher, others), work.queue.rows[:4]
    every = torch.ones(4, dtype=torch.bool)
    if framework == "simclr":
        expected = nt_xent_loss(v, embedded(student, others), 0.2)
    elif framework == "byol":
        first = prediction_loss(student["predictor"](v), taught)
        other = prediction_loss(student["predictor"](embedded(student, others)), embedded(teacher, images))
        expected = (first + other) / 2
    elif framework == "isd":
        expected = instance_discrimination_loss(student["predictor"](v), taught, queue, 0.1, 0.01)
    else:
        neighbors = 2 if framework == "knn_moco" else 0
        expected = queue_contrastive_loss(v, taught, queue, 0.2, valid=every, neighbors=neighbors)
    torch.testing.assert_close(found["global"], expected)


def test_glcon_warps_both_views_alike_and_the_others_do_not():
    for framework in FRAMEWORKS:
        batch = begin("pretrain", framework=framework, student_view="weak").draw()
        assert torch.equal(batch["images"], batch["others"]) == (framework == "glcon")
        assert len(batch["images"]) == len(batch["others"]) == 4 and len(batch["labels"]) == 2


@pytest.mark.parametrize("student", ["weak", "strong"])
@pytest.mark.parametrize("teacher", ["weak", "strong"])
def test_intensities_change_in_strong_views_alone(student, teacher):
    always = StrongAugmentation(photometric=PhotometricAugmentation(probability=1.0))
    batches = [
        begin("pretrain", student_view=a, teacher_view=b, strong=always).draw()
        for a, b in ((student, teacher), ("weak", "weak"))
    ]
    for view, key in ((student, "images"), (teacher, "others")):
        assert torch.equal(batches[0][key], batches[1][key]) == (view == "weak")
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


def test_labels_of_pretraining_lie_on_their_images():
    """The tiny patients have a value of 2 inside and 1 in the ring around it: they must have it after the warp."""
    batch = begin("pretrain", student_view="weak", batch_size=20, queue=20).draw()
    for image, label in zip(batch["images"][:10, 0], batch["labels"], strict=True):
        assert 1.5 < image[label == 3].median() < 2.5 and 0.5 < image[label == 2].median() < 1.6


def test_queues_hold_embeddings_of_the_teacher_and_never_a_zero_row():
    work = begin("pretrain")
    assert not work.queue.valid().any() and not work.local_queue.valid().any()
    batch = work.draw()
    taught = embedded(work.teacher.network, batch["others"])
    terms = work(**batch)
    assert terms["global"].item() == 0 and terms["local"].item() == 0  # nothing to relate to yet
    work.after_step()
    torch.testing.assert_close(work.queue.rows[:4], taught)
    for bank in (work.queue, work.local_queue):
        assert bank.valid().sum() == 4 and bank.rows[:4].abs().sum(dim=1).min() > 0 and not bank.rows.requires_grad


@pytest.mark.parametrize("by_batch", [True, False])
def test_the_teacher_has_no_dropout_and_the_statistics_that_were_asked_for(by_batch):
    work = begin("pretrain", batch_statistics=by_batch, dropout=True)
    images = 5 + work.draw()["others"]
    (first, *_), (second, *_), (part, *_) = (work.taught(x) for x in (images, images, images[:2]))
    assert torch.equal(first, second)  # no dropout
    assert torch.allclose(first[:2], part, atol=1e-4) != by_batch
    assert not begin("finetune").teacher.network.training
    noisy = begin("pretrain", noisy_teacher=True, dropout=True)
    assert not torch.equal(noisy.taught(images)[0], noisy.taught(images)[0])


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_teacher_is_the_mean_of_weights_buffers_and_heads_and_learns_nothing_else(stage):
    work = begin(stage, ema=0.4)
    trained = {id(p) for group in work.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in work.teacher.parameters()}
    before = {}
    for number, share in enumerate((0, 0.4, 0.4)):  # min(1 - 1/(n + 1), 0.4)
        step(work)
        student = work._student().state_dict()
        for key, tensor in work.teacher.network.state_dict().items():
            mean = tensor if not number else share * before[key] + (1 - share) * student[key]
            torch.testing.assert_close(tensor, mean if tensor.is_floating_point() else student[key], msg=key)
        before = {key: tensor.clone() for key, tensor in work.teacher.network.state_dict().items()}
    assert any("running_mean" in key for key in before) and any(key.startswith("head.") for key in before)
    assert all(p.grad is None for p in work.teacher.parameters())


def test_released_pretraining_pulls_the_teachers_heads_and_scrambles_the_windows():
    settings = dict(teacher_gradient=True, scrambled_fragments=True, ema=0.99)
    work = begin("pretrain", **settings)
    heads = {id(p) for name in ("head", "local_head") for p in work.teacher.network[name].parameters()}
    (group,) = work.optimizer.param_groups
    assert heads <= {id(p) for p in group["params"]}
    assert step(work)["local"].item() == 0 and step(work)["local"].item() == 0  # until the queue is full
    batch = work.draw()
    found = work(**batch)
    window = dict(grid=6, size=8, stride=4, cells=4)
    own = nn.Sequential(work.networks["local_head"], work.networks["local_predictor"])
    teacher = work.teacher.network
    sides = (
        local_windows(work.unet(batch["images"]), own, **window),
        local_windows(teacher["unet"](batch["others"]), teacher["local_head"], **window),
        work.local_queue.rows.view(8, 36, -1).transpose(0, 1),
    )
    expected = local_instance_discrimination_loss(*sides, 0.1, 0.01, scrambled_fragments=True)
    torch.testing.assert_close(found["local"], expected)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    found["total"].backward()
    work.optimizer.step()
    moved = {name.split(".")[0] for name, p in teacher.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head", "local_head"}


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def only(principle: str, **settings):
    """Fine-tuning by one principle, calm: no change of intensities."""
    chosen = {name: name == principle for name in PRINCIPLES}
    strong = StrongAugmentation(photometric=CALM)
    return begin("finetune", **{**chosen, "pseudo_labels": False, "strong": strong, **settings})


def test_weights_are_constant_unless_a_ramp_is_asked_for():
    for settings, heights in (({}, (1, 1, 1)), (dict(ramp_steps=2), (math.exp(-5), math.exp(-1.25), 1))):
        work = begin("finetune", **settings)
        for height in heights:
            terms = step(work)
            sums = terms["equivariance"] + terms["pseudo"] + terms["neighbor"] + 0.01 * terms["contrast"]
            torch.testing.assert_close(terms["total"], terms["supervised"] + height * sums)


def test_each_weight_is_that_of_its_term():
    settings = dict(contrast_weight=2.0, equivariance_weight=3.0, pseudo_weight=5.0, neighbor_weight=7.0)
    assert build("mona", **settings).weights == {"contrast": 2, "equivariance": 3, "pseudo": 5, "neighbor": 7}
    assert build("mona", **settings, tailness=False, diversity=False).weights == {"equivariance": 3, "pseudo": 5}
    assert build("mona", pseudo_labels=False).weights.keys() == set(TERMS)


def test_the_supervised_loss_is_that_of_the_labelled_half():
    work = begin("finetune", dice_weight=0.3, cross_entropy_weight=0.9)
    batch, seen = work.draw(), []
    original = work.unet.classifier.forward
    work.unet.classifier.forward = lambda maps: seen.append(original(maps)) or seen[-1]
    found = work(**batch)["supervised"]
    torch.testing.assert_close(found, supervised_loss(seen[0][:2], batch["labels"], 0.3, 0.9))


def bright_is_one(work) -> list[Tensor]:
    """The teacher says 1 where the image is above 0, sure of it where it is far above; returns what it sees."""
    seen: list[Tensor] = []

    def taught(images: Tensor) -> list[Tensor]:
        seen.append(images)
        logits = torch.cat([-20 * images, 20 * images, torch.full_like(images, -99), torch.full_like(images, -99)], 1)
        return [logits, torch.zeros(len(images), 32, 2, 2)]

    work.taught = taught
    return seen


def blobs(count: int) -> Tensor:
    noise = torch.randn(count, 1, 4, 4, generator=stream(4))
    return F.interpolate(noise, size=SIDE, mode="bicubic", align_corners=False)


STRONG = StrongAugmentation(photometric=CALM, diffeomorphic=LARGE)


@pytest.mark.parametrize("teacher_view", ["weak", "strong"])
def test_labels_move_with_the_images_of_a_strong_student(teacher_view):
    work = begin("finetune", strong=STRONG, teacher_view=teacher_view)
    images = blobs(6)
    seen = bright_is_one(work)
    student, targets = work.prepare(images)
    assert not torch.equal(student, images)
    assert torch.equal(seen[0], images if teacher_view == "weak" else student)
    inside = targets.labels >= 0
    agreement = (targets.labels == (student[:, 0] > 0).long())[inside].float().mean()
    assert agreement > 0.95 and 0.8 < inside.float().mean() < 1
    assert ((student[:, 0] > 0) != (images[:, 0] > 0)).float().mean() > 0.1  # they did move
    doubtful = (targets.confidence < 0.9) & inside
    assert student[:, 0][doubtful].abs().mean() < 0.5 * student[:, 0][inside].abs().mean()


def test_in_the_released_code_they_stay():
    work = begin("finetune", strong=STRONG, unwarped_labels=True)
    bright_is_one(work)
    student, targets = work.prepare(blobs(6))
    assert (targets.labels >= 0).all()
    assert (targets.labels != (student[:, 0] > 0).long()).float().mean() > 0.08


@pytest.mark.parametrize("teacher_view", ["weak", "strong"])
def test_a_weak_student_sees_the_images_as_they_are(teacher_view):
    always = StrongAugmentation(photometric=PhotometricAugmentation(probability=1.0), diffeomorphic=LARGE)
    work = begin("finetune", strong=always, student_view="weak", teacher_view=teacher_view)
    images = blobs(6)
    seen = bright_is_one(work)
    student, targets = work.prepare(images)
    assert torch.equal(student, images)
    assert torch.equal(seen[0], images) == (teacher_view == "weak")
    assert torch.equal(targets.labels, (seen[0][:, 0] > 0).long())


def test_the_pseudo_label_term_is_its_loss_on_the_unlabelled_half():
    work = begin("finetune", tailness=False, consistency=False, diversity=False, threshold=0.6)
    targets = mona.PseudoLabels(
        torch.randint(-1, 4, (2, SIDE, SIDE), generator=stream()), torch.rand(2, SIDE, SIDE), None
    )
    batch = work.draw()
    work.prepare = lambda unlabelled: (unlabelled, targets)
    logits = work.unet(torch.cat([batch["images"], batch["unlabelled"]]))[2:]
    expected = pseudo_label_loss(logits, targets.labels, targets.confidence, 0.6)
    found = work(**batch)["pseudo"]
    torch.testing.assert_close(found, expected)
    assert found > 0


def watched(monkeypatch, name: str) -> list[tuple]:
    """What a function of `medlib.methods.mona` is called with."""
    calls: list[tuple] = []
    original = getattr(mona, name)

    def call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(mona, name, call)
    return calls


def dense(maps: list[Tensor], head: nn.Module) -> Tensor:
    """Representations (B * H * W, D) of all pixels, the slow way."""
    full = [F.interpolate(level, size=(SIDE, SIDE), mode="bilinear", align_corners=False) for level in maps]
    return head(torch.cat(full, dim=1).permute(0, 2, 3, 1).flatten(0, 2))


def far(rows: Tensor, others: Tensor) -> Tensor:
    """The largest distance of one of the rows from the nearest of the others."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1).max()


@pytest.mark.parametrize("keys_of", ["student", "teacher"])
@pytest.mark.parametrize("class_bank", [0, 32])
def test_the_contrast_is_equation_3_on_pixels_of_their_classes(monkeypatch, class_bank, keys_of):
    work = only("tailness", class_bank=class_bank, contrast_confidence=0.0, teacher_keys=keys_of == "teacher")
    step(work)
    step(work)
    calls, pixels = watched(monkeypatch, "anatomical_contrastive_loss"), watched(monkeypatch, "sample_queries")
    weighed = watched(monkeypatch, "class_relation_distribution")
    stored = work.class_banks["feature"].clone() if class_bank else None
    batch = work.draw()
    student, targets = work.prepare(batch["unlabelled"])
    work.prepare = lambda unlabelled: (student, targets)
    images = torch.cat([batch["images"], student])
    labels = torch.cat([batch["labels"], targets.labels])
    found = work(**batch)["contrast"]

    ((rows, positives, keys, temperature, valid),) = calls
    ((seen_labels, probabilities, *_, count, threshold, hard_share),) = pixels
    assert (temperature, count, threshold, hard_share) == (0.5, 8, 0.97, 1.0)
    assert torch.equal(seen_labels, labels)
    torch.testing.assert_close(probabilities, work.unet(images).softmax(dim=1))
    own, taught = work.networks, work.teacher.network
    all_rows = dense(own["unet"].maps(images), own["representation"])
    side = own if keys_of == "student" else taught
    key_rows = dense(side["unet"].maps(images), side["representation"])
    flat = labels.flatten()
    there = [c for c in range(4) if (flat == c).any()]
    assert valid.nonzero().flatten().tolist() == there and len(there) >= 3
    for c in there:
        members = flat == c
        torch.testing.assert_close(positives[c], key_rows[members].mean(dim=0), atol=1e-4, rtol=1e-4)
        assert far(rows[c], all_rows[members]) < 1e-3
        others = torch.cat([stored[v] for v in there if v != c]) if class_bank else key_rows[~members]
        assert far(keys[c], others) < 1e-3
        assert len(rows[c]) == 8 and len(keys[c]) == 16
    assert rows.requires_grad and not positives.requires_grad and not keys.requires_grad
    ((prototypes, present),) = weighed
    torch.testing.assert_close(prototypes, positives)
    assert present.nonzero().flatten().tolist() == there
    assert found.item() > 0


def test_class_banks_take_pixels_of_their_class_and_never_a_zero_row():
    work = only("tailness", contrast_confidence=0.0)
    for _ in range(3):
        batch = work.draw()
        student, targets = work.prepare(batch["unlabelled"])
        targets = dataclasses.replace(targets, labels=targets.labels.masked_fill(targets.labels == 1, 0))  # 1 is absent
        work.prepare = lambda unlabelled, both=(student, targets): both
        work(**batch)
        images, labels = torch.cat([batch["images"], student]), torch.cat([batch["labels"], targets.labels]).flatten()
        every = dense(work.unet.maps(images), work.networks["representation"])
        before = work.class_banks.pushed.clone()
        work.after_step()
        del work.prepare
        assert (work.class_banks.pushed - before).tolist() == [8 * bool((labels == c).any()) for c in range(4)]
        for c in range(4):
            if (labels == c).any():
                slots = torch.arange(int(before[c]), int(before[c]) + 8) % 32
                new = work.class_banks["feature"][c, slots]
                assert far(new, every[labels == c]) < 1e-3
    filled = work.class_banks.valid()
    assert not filled[1].any()
    assert work.class_banks["feature"][filled].abs().sum(dim=1).min() > 0 and filled.sum() >= 3 * 24


def test_the_first_step_has_no_negatives_and_no_contrast():
    assert step(only("tailness"))["contrast"].item() == 0
    assert step(only("tailness", class_bank=0))["contrast"].item() > 0


def test_unsure_pseudo_labels_take_no_part_in_the_contrast(monkeypatch):
    calls = watched(monkeypatch, "sample_queries")
    work = only("tailness", contrast_confidence=0.7)
    targets = mona.PseudoLabels(torch.full((2, SIDE, SIDE), 1), torch.rand(2, SIDE, SIDE, generator=stream()), None)
    work.prepare = lambda unlabelled: (unlabelled, targets)
    batch = work.draw()
    work(**batch)
    labels = calls[0][0]
    assert torch.equal(labels[:2], batch["labels"])
    assert torch.equal(labels[2:] == -1, targets.confidence < 0.7) and (labels[2:] == 1).any()


def test_the_released_contrast_has_negatives_of_zero_and_easy_anchors(monkeypatch):
    masks, calls = watched(monkeypatch, "released_contrast_masks"), watched(monkeypatch, "anatomical_contrastive_loss")
    work = only("tailness", released_contrast=True, teacher_keys=True, steps=4)
    for number in range(3):
        found = step(work)["contrast"]
        assert number or found > 0
        *_, given, percent = masks[number]
        assert percent == pytest.approx(20 * (1 - number / 4)) and given.tolist() == [True, True, False, False]
    _, _, keys, _, valid = calls[0]
    assert torch.equal(keys, torch.zeros_like(keys)) and valid.any()  # nothing was pushed


@pytest.mark.parametrize("one_way", [False, True])
def test_the_equivariance_is_equation_6(one_way):
    work = only("consistency", one_way=one_way, warp=ThinPlateAugmentation(rotation=20.0))
    step(work)
    batch = work.draw()
    student, targets = work.prepare(batch["unlabelled"])
    work.prepare = lambda unlabelled: (student, targets)
    images = torch.cat([batch["images"], student])
    state = work.streams.own("warp").get_state()
    found = work(**batch)["equivariance"]
    warp = work.method.warp.draw(4, SIDE, torch.Generator().set_state(state))
    first, second = warp.predictions(work.unet(images)), work.unet(warp.images(images))
    if one_way:
        labels = torch.cat([batch["labels"], targets.labels])
        confidence = torch.cat([torch.ones(2, SIDE, SIDE), targets.confidence])
        shown = ((labels > 0) & (confidence >= 0.7)).float()
        mask = warp.images(shown[:, None])[:, 0]
        expected = equivariance_loss(first, second, mask, one_way=True, per_image=True)
    else:
        expected = equivariance_loss(first, second, warp.inside())
    torch.testing.assert_close(found, expected)
    assert found > 0


def test_the_nearest_neighbour_term_pulls_the_student_to_the_teachers_neighbours():
    work = only("diversity", queue=12, neighbors=2)
    assert step(work)["neighbor"].item() == 0  # the bank is empty
    step(work)
    batch = work.draw()
    student, targets = work.prepare(batch["unlabelled"])
    work.prepare = lambda unlabelled: (student, targets)
    found = work(**batch)["neighbor"]
    own = work.networks
    u = own["predictor"](embedded(own, torch.cat([batch["images"], student])))
    v = embedded(work.teacher.network, torch.cat([batch["images"], batch["unlabelled"]]))  # what it saw: weak views
    torch.testing.assert_close(found, nearest_neighbor_loss(u, v, work.bank.rows[:8], 2))
    work.after_step()
    torch.testing.assert_close(work.bank.rows[8:12], v)
    assert work.bank.valid().all() and work.bank.rows.abs().sum(dim=1).min() > 0


def test_the_released_nearest_neighbours_teach_nobody():
    for swapped in (False, True):
        work = only("diversity", swapped_roles=swapped)
        step(work)
        work.optimizer.zero_grad()
        work(**work.draw())["neighbor"].backward()
        assert any(p.grad.any() for p in work.networks["predictor"].parameters()) != swapped


def test_the_optimiser_is_that_of_the_settings():
    (group,) = begin("finetune", momentum=0.8, weight_decay=2e-4, learning_rate=0.02).optimizer.param_groups
    assert (group["momentum"], group["weight_decay"], group["lr"], group["nesterov"]) == (0.8, 2e-4, 0.02, False)
    assert begin("finetune", nesterov=True).optimizer.param_groups[0]["nesterov"]
    assert type(begin("finetune", optimizer="adamw").optimizer) is torch.optim.AdamW
    with pytest.raises(ValueError, match="nesterov is of optimizer='sgd', got 'adamw'"):
        build("mona", nesterov=True, optimizer="adamw")
    with pytest.raises(ValueError, match="nesterov needs a momentum above 0"):
        build("mona", variant="released", momentum=0)
    rates = []
    work = begin("pretrain", pretrain_steps=4, steps=9)
    for _ in range(4):
        step(work)
        rates.append(work.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.01 * (1 - t / 4) ** 0.9 for t in range(1, 5)], atol=1e-12)


def test_a_checkpoint_holds_teacher_banks_and_steps():
    for stage, banks in (("pretrain", ("queue", "local_queue")), ("finetune", ("bank", "class_banks"))):
        work = begin(stage)
        step(work)
        state = {key: tensor.clone() for key, tensor in work.state_dict().items()}
        assert state["done"] == state["teacher.updates"] == 1
        other = begin(stage)
        other.load_state_dict(state)
        assert same(other.teacher, work.teacher)
        for bank in banks:
            assert same(getattr(other, bank), getattr(work, bank)) and getattr(work, bank).pushed.sum() > 0


def test_the_network_is_that_of_ssl4mis_and_the_same_for_every_row():
    networks = build("mona", **SETTINGS).networks(4)
    assert networks["unet"].state_dict().keys() == ssl4mis_unet(4, 2).state_dict().keys()
    assert networks["representation"].in_features == 31 * 2
    for settings in (dict(framework="byol"), dict(framework="none", tailness=False, diversity=False)):
        assert build("mona", **SETTINGS, **settings).networks(4).state_dict().keys() == networks.state_dict().keys()


# --- what a notebook looks at ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked_at():
    method, data = build("mona", **{**SETTINGS, "queries": 40, "hard_share": 0.5}), training_data(labelled=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = method.networks(4).eval()
    images, labels = data.slices("cpu").batch(torch.arange(6))
    return method, networks, images, labels


def test_relation_of_classes(looked_at):
    method, networks, images, labels = looked_at
    with torch.no_grad():
        relation, present = method.relation(networks, images, labels)
        rows = dense(networks["unet"].maps(images), networks["representation"])
        flat = labels.flatten()
        means = torch.stack([rows[flat == c].mean(dim=0) if c != 1 else torch.zeros(16) for c in range(4)])
    assert present.tolist() == [True, False, True, True]
    torch.testing.assert_close(relation, class_relation_distribution(means, present), atol=1e-4, rtol=1e-4)


def test_drawn_queries_and_their_places(looked_at):
    method, networks, images, labels = looked_at
    with torch.no_grad():
        probabilities = method.predict(networks, images)
        threshold = probabilities.gather(1, labels[:, None]).median().item()  # so that both kinds are there
        method = build("mona", **{**SETTINGS, "queries": 40, "hard_share": 0.5, "threshold": threshold})
        found = method.draw_queries(networks, images, labels, stream())
    assert found.valid.tolist() == [True, False, True, True] and found.image.shape == (4, 40)
    for c in (0, 2, 3):
        place = (found.image[c], found.y[c], found.x[c])
        assert (labels[place] == c).all()
        torch.testing.assert_close(found.probability[c], probabilities[place[0], c, place[1], place[2]])
        assert torch.equal(found.hard[c], found.probability[c] <= threshold)
    assert found.hard[0].sum() == 20  # background has both kinds


def test_both_sides_of_the_equivariance(looked_at):
    method, networks, images, _ = looked_at
    warp = method.warp.draw(6, SIDE, stream())
    still = ThinPlateAugmentation(jitter=0.0, mirror=0.0, rotation=0.0, scale=(1.0, 1.0), shift=0.0)
    with torch.no_grad():
        first, second, inside = method.equivariance(networks, images, warp)
        torch.testing.assert_close(first, warp.predictions(networks["unet"](images)).softmax(dim=1))
        torch.testing.assert_close(second, networks["unet"](warp.images(images)).softmax(dim=1))
        same_sides = method.equivariance(networks, images, still.draw(6, SIDE, stream()))
    assert torch.equal(inside, warp.inside())
    torch.testing.assert_close(*same_sides[:2], atol=1e-3, rtol=0)


def test_nearest_images_of_a_bank(looked_at):
    method, networks, *_ = looked_at
    networks, images = copy.deepcopy(networks).train(), torch.randn(6, 1, SIDE, SIDE, generator=stream())
    for layer in networks.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.momentum = 1.0  # statistics of these images, without which a new network embeds all alike
    with torch.no_grad():
        method.embed(networks, images)
        networks.eval()
        rows, cosines = method.nearest(networks, images[:2], images)
        embeddings = method.embed(networks, images)
    assert rows.shape == cosines.shape == (2, 5) and embeddings.shape == (6, 16)
    assert rows[:, 0].tolist() == [0, 1]  # each is nearest to itself
    expected = torch.cosine_similarity(embeddings[:2, None], embeddings[rows], dim=2)
    torch.testing.assert_close(cosines, expected)
    assert (cosines.diff(dim=1) <= 0).all()
