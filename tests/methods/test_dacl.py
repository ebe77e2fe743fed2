"""DACL: every row of its tables trains, each term is the loss of its equation, each setting changes its own part."""

import dataclasses
import itertools
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from medlib.banks import ClassBanks
from medlib.losses.dacl import (
    class_mean_contrastive_loss_by_definition,
    class_prototypes_by_definition,
    feature_density_by_definition,
    gaussian_ramp,
    intra_class_variation_loss_by_definition,
    positiveness_weights_by_definition,
    soft_density_guided_loss_by_definition,
)
from medlib.methods import build
from medlib.methods.dacl import NOBODY, Dacl, Rows
from medlib.nets import UNet, pixel_head
from medlib.rng import generator
from medlib.train import make_fabric, predictor
from tests.methods.test_cotraining import PATCH, SETTINGS, begin, losses, run, same, step
from tests.no_waiting import NoWaiting
from tests.tiny import SIDE, training_data

ROWS: dict[str, dict[str, Any]] = {
    "I": dict(contrast="none"),
    "II": dict(contrast="plain"),
    "III": dict(neighbors=(16,), bank=0, positiveness=False),
    "IV": dict(bank=0, positiveness=False),
    "V": dict(positiveness=False),
    "VI": {},
}
RIVALS = {name: dict(contrast=name) for name in ("infonce", "class_means", "variation")}
READINGS: dict[str, dict[str, Any]] = {
    "prototype": dict(granularity="prototype"), "two banks": dict(shared_bank=False), "printed": dict(
        density_pool="bank and batch", include_positive=False, weight_inside=True, reduction="sum"),
    "DGCL": dict(negatives_from="pixels", background=True, level=2),
}  # fmt: skip
EVERY = {**ROWS, **RIVALS, **READINGS}
every_row = pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)
both_spaces = pytest.mark.parametrize("patch", [None, PATCH], ids=["2d", "3d"])
WHOLE = dict(samples=10**5, negatives=10**5)  # all pixels, and all negatives: nothing is left to chance


def stream(seed: int = 0) -> torch.Generator:
    return generator(seed, "test")


def dacl(**settings: Any) -> Dacl:
    return cast(Dacl, build("dacl", **{**SETTINGS, **settings}))


def some_rows(classes: int = 3, count: int = 12, dim: int = 4, seed: int = 0) -> Rows:
    """Unit features of which class c has ``count - 3 c``."""
    units = F.normalize(torch.randn(classes, count, dim, generator=stream(seed), dtype=torch.float64), dim=2)
    valid = torch.arange(count) < torch.tensor([[count - 3 * c] for c in range(classes)])
    return Rows(units, valid, None)


def some_bank(classes: int = 3, dim: int = 4, seed: int = 9) -> ClassBanks:
    """A bank of doubles with 5, 0 and 7 entries of random density."""
    bank = ClassBanks(classes, 8, {"feature": (dim,), "density": ()}).double()
    valid = torch.arange(7) < torch.tensor([5, 0, 7])[:, None]
    features = F.normalize(torch.randn(classes, 7, dim, generator=stream(seed), dtype=torch.float64), dim=2)
    bank.push(valid, feature=features, density=torch.rand(classes, 7, generator=stream(seed), dtype=torch.float64))
    return bank


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    method = build("dacl")
    assert (method.steps, method.learning_rate, method.momentum, method.weight_decay) == (30_000, 0.01, 0.9, 1e-4)
    assert (method.cross_weight, method.contrast_weight, method.delay) == (1, 0.1, 1000)
    assert (method.anchors, method.keys, method.negatives, method.temperature) == (256, 512, 512, 0.4)
    assert (method.bank, method.neighbors, method.image_size) == (1000, (8, 16, 32), 256)


def test_a_scale_changes_sizes_and_lengths_and_keeps_the_share_of_the_delay():
    paper = dataclasses.asdict(build("dacl"))
    floor = {"image_size", "spacing", "width", "steps", "batch_size", "learning_rate"}
    sizes = {"delay", "projection_dim", "samples", "bank", "bank_push", "anchors", "keys", "negatives"}
    for scale in ("ci", "laptop"):
        small = dataclasses.asdict(build("dacl", scale=scale))
        assert {n for n in paper if paper[n] != small[n]} <= floor | sizes
    laptop = build("dacl", scale="laptop")
    assert laptop.learning_rate == build("cps", scale="laptop").learning_rate
    assert laptop.delay / laptop.steps == build("dacl").delay / build("dacl").steps == 1 / 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cross_weight=-1.0), "cross_weight must be at least 0"),
        (dict(contrast_weight=math.nan), "contrast_weight must be"),
        (dict(delay=-1), "delay must be a whole number from 0, got -1"),
        (dict(delay=6, steps=6), "delay=6 of steps=6: the contrast would never begin"),
        (dict(contrast="supcon"), "contrast must be one of density, plain, .* got 'supcon'"),
        (dict(granularity="image"), "granularity must be one of"),
        (dict(granularity="prototype", contrast="plain"), "granularity='prototype' is for contrast='density'"),
        (dict(level=5), "level must be below 5, got 5"),
        (dict(level=-1), "level must be a whole number from 0"),
        (dict(projection_dim=0), "projection_dim must be"),
        (dict(samples=0), "samples must be"),
        (dict(threshold=1.5), "threshold must be at least 0 and at most 1"),
        (dict(neighbors=()), "neighbors must be whole numbers"),
        (dict(neighbors=(8, 0)), "neighbors must be"),
        (dict(neighbors=16), "neighbors must be"),
        (dict(density_pool="batch"), "density_pool must be one of bank, bank and batch"),
        (dict(bank=-1), "bank must be a whole number from 0"),
        (dict(bank_push=0), "bank_push must be"),
        (dict(anchors=0), "anchors must be"),
        (dict(keys=7), "keys must be even"),
        (dict(keys=0), "keys must be a whole number from 2"),
        (dict(negatives=0), "negatives must be"),
        (dict(negatives_from="bank"), "negatives_from must be one of"),
        (dict(weight_scale="min"), "weight_scale must be one of"),
        (dict(reduction="none"), "reduction must be one of"),
        (dict(temperature=0.0), "temperature must be at least 1e-06"),
        (dict(predicts="second"), "predicts must be one of first, mean"),
        (dict(positiveness=1), "positiveness must be bool"),
        (dict(dice_weight=-1.0), "dice_weight"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        build("dacl", **settings)


def test_one_class_beside_the_background_needs_the_background():
    for contrast in ("density", "plain", "infonce", "class_means"):
        with pytest.raises(ValueError, match="set background to true"):
            dacl(contrast=contrast).networks(2)
    assert "head" in dacl(background=True).networks(2)
    assert "head" not in dacl(contrast="variation").networks(2)


def test_heads_are_there_where_something_is_projected_and_the_networks_start_alike():
    def weights(**settings: Any) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return dacl(**settings).networks(4).state_dict()

    full = weights()
    assert not torch.equal(full["unet.classifier.weight"], full["second.classifier.weight"])
    assert not torch.equal(full["head.0.weight"], full["second_head.0.weight"])
    for name, settings in EVERY.items():
        state = weights(**settings)
        assert all(torch.equal(state[key], full[key]) for key in full if "head" not in key)
        assert ("head.0.weight" in state) == (name not in ("I", "variation"))
    assert weights(level=3)["head.0.weight"].shape == (8, 2 * 2**3)
    assert weights(projection_dim=5)["head.2.weight"].shape == (5, 5)


# --- the loop --------------------------------------------------------------------------------------------------------


@both_spaces
@every_row
def test_every_row_trains_and_predicts(tmp_path, settings, patch):
    method = dacl(patch=patch, **settings)
    trained = run("dacl", tmp_path, patch=patch, **settings)
    history = losses(trained)
    assert [line["step"] for line in history] == list(range(1, 7))
    assert all(math.isfinite(value) for line in history for value in line.values() if not isinstance(value, str))
    terms = {"cross"} if method.contrast == "none" else {"cross", "contrast"}
    assert set(history[0]) == {"stage", "step", "lr", "total", "supervised", *terms}
    if "contrast" in terms:
        assert history[-1]["contrast"] > 0
    predict = predictor(method, trained.networks, make_fabric("cpu"))
    images = torch.rand(2, 1, SIDE, SIDE) if patch is None else torch.rand(1, 1, 20, 40, SIDE)
    assert predict(images).shape == (len(images), 4, *images.shape[2:])


@pytest.mark.parametrize(
    "settings",
    [{}, dict(shared_bank=False), dict(contrast="plain"), dict(patch=PATCH), dict(granularity="prototype")],
    ids=lambda s: ",".join(s) or "paper",
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, settings):
    class Stop(Exception):
        pass

    def die(stage: str, at: int, terms: object) -> None:
        if at == 4:
            raise Stop

    # so that the bank and the draws show in the weights
    loud = dict(contrast_weight=10.0, learning_rate=0.05, **settings)
    whole = run("dacl", tmp_path / "whole", **loud)
    with pytest.raises(Stop):
        run("dacl", tmp_path / "cut", checkpoint_seconds=0.0, callback=die, **loud)
    resumed = run("dacl", tmp_path / "cut", **loud)
    assert same(whole.networks, resumed.networks) and losses(whole) == losses(resumed)


def test_a_hidden_label_decides_nothing(tmp_path):
    """Labels of unlabelled patients are poisoned with another anatomy, and the result stays what it was."""
    poisoned, seen = training_data(labelled=1), training_data(labelled=1)
    for volume in poisoned.train[1:]:
        volume.label = np.full_like(volume.label, 3)
    seen.train[0].label = np.full_like(seen.train[0].label, 3)
    first = run("dacl", tmp_path / "a", data=training_data(labelled=1))
    assert same(first.networks, run("dacl", tmp_path / "b", data=poisoned).networks)
    assert not same(first.networks, run("dacl", tmp_path / "c", data=seen).networks)


def test_where_every_image_is_labelled_training_is_supervised():
    work = begin("dacl", labelled=3)
    assert set(step(work)) == {"total", "supervised"}
    assert work.bank(0).pushed.sum() == 0


@both_spaces
@every_row
def test_a_step_never_waits_for_the_device(monkeypatch, settings, patch):
    def one_hot(ids: Tensor, classes: int) -> Tensor:
        return (ids[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr("torch.nn.functional.one_hot", one_hot)  # PyTorch's looks at the largest id, on a CPU only
    work = begin("dacl", patch=patch, **settings)
    step(work)
    batch = work.draw()
    with NoWaiting():
        work(**batch)["total"].backward()
        work.after_step()
    assert all(p.grad is not None for p in work.networks.parameters())


@every_row
def test_global_randomness_is_left_alone_but_for_dropout(settings):
    work = begin("dacl", **settings)
    for layer in work.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    before = torch.get_rng_state()
    step(work)
    assert torch.equal(torch.get_rng_state(), before)


# --- the weights of the terms (eq. 1) --------------------------------------------------------------------------------


def test_the_contrast_waits_then_follows_its_ramp_and_the_cross_term_does_neither():
    work = begin("dacl", steps=8, delay=3, cross_weight=2.0, contrast_weight=0.7)
    for t in range(8):
        terms = step(work)
        height = gaussian_ramp(t, 8, peak=0.7, delay=3)
        assert (height == 0) == (t < 3)
        expected = terms["supervised"] + 2 * terms["cross"] + height * terms["contrast"]
        torch.testing.assert_close(terms["total"], expected)
        if t < 3:
            assert terms["total"] == terms["supervised"] + 2 * terms["cross"]


def test_the_ramp_of_the_paper_in_numbers():
    work = begin("dacl", scale="paper", spacing=None, image_size=SIDE)
    for t, height in ((0, 0), (999, 0), (1000, 0.0093515), (15_000, 0.2865048), (30_000, 1)):
        work.done.fill_(t)
        assert work.ramp_of("contrast").item() == pytest.approx(height, rel=1e-4)
        assert work.ramp_of("cross").item() == 1


def test_the_cross_term_is_of_all_images():
    work = begin("dacl", contrast="none").eval()
    batch = work.draw()
    images = torch.cat([batch["images"], batch["unlabelled"]])
    a, b = (work.networks[name](images) for name in ("unet", "second"))
    expected = F.cross_entropy(a, b.argmax(dim=1)) + F.cross_entropy(b, a.argmax(dim=1))
    torch.testing.assert_close(work(**batch)["cross"], expected)


# --- who takes part --------------------------------------------------------------------------------------------------


def test_the_class_of_a_pixel_is_its_label_or_a_sure_decision():
    logits = torch.tensor([[[9.0, 0, 0]], [[0.0, 9, 0]], [[0.0, 0, 0.5]]])  # (3 classes, 1, 3 pixels)
    labels = torch.tensor([[[2, 2, 2]]])
    both = torch.stack([logits, logits])  # a labelled image and an unlabelled one
    assert torch.equal(dacl().class_ids(both, labels), torch.tensor([[[2, 2, 2]], [[0, 1, NOBODY]]]))
    assert dacl(threshold=0.4).class_ids(both, labels)[1].tolist() == [[0, 1, 2]]  # e^.5 / (e^.5 + 2) = 0.45
    assert dacl(threshold=1.0).class_ids(both, labels)[1].tolist() == [[NOBODY] * 3]
    even = torch.zeros(1, 2, 1, 1)  # a probability of 0.5 is not above 0.5
    assert dacl().class_ids(even, labels[:0, :, :1]).item() == NOBODY


def test_a_coarser_map_takes_the_class_in_the_middle_of_its_cells():
    ids = torch.arange(64).view(1, 8, 8)
    assert torch.equal(dacl().at_level(ids), ids)
    assert dacl(level=1).at_level(ids).tolist() == [[[r * 8 + c for c in (1, 3, 5, 7)] for r in (1, 3, 5, 7)]]
    assert dacl(level=2).at_level(ids).tolist() == [[[18, 22], [50, 54]]]
    volume = torch.arange(4 * 4 * 8).view(1, 4, 4, 8)
    assert dacl(level=2).at_level(volume).tolist() == [[[[2 * 32 + 2 * 8 + 2, 2 * 32 + 2 * 8 + 6]]]]


@pytest.mark.parametrize("space", [(6, 5), (3, 4, 5)], ids=["2d", "3d"])
@pytest.mark.parametrize("background", [False, True])
def test_sampled_pixels_are_projected_alone_and_exactly_as_all_of_them(space, background):
    """With small whole numbers sums are exact, so that a 1x1 convolution of the whole map must give the same bits."""
    features = torch.randint(-4, 5, (2, 3, *space), generator=stream()).float()
    ids = torch.randint(-1, 4, (2, *space), generator=stream(1))
    head = pixel_head(3, 4)
    for parameter in head.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=stream(2)).float()
    convolution = nn.functional.conv2d if len(space) == 2 else nn.functional.conv3d
    hidden, last = (cast(nn.Linear, head[n]) for n in (0, 2))
    ones = [1] * len(space)
    grid = convolution(features, hidden.weight.view(4, 3, *ones), hidden.bias).relu()
    grid = convolution(grid, last.weight.view(4, 4, *ones), last.bias)
    everyone = grid.movedim(1, -1).flatten(0, -2)  # (pixels, D)

    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method = dacl(samples=7, background=background)
    rows = method.rows(features, head, ids, 4, stream(3))
    first = 0 if background else 1
    assert [x.shape for x in seen] == [(4 - first, 7, 3)]  # nothing but the sample went through the head
    assert rows.pixel is not None and rows.units.shape == (4 - first, 7, 4)
    for c in range(4 - first):
        chosen = rows.pixel[c][rows.valid[c]]
        assert len(chosen) == len(set(chosen.tolist())) == min(7, int((ids == c + first).sum()))
        assert (ids.flatten()[chosen] == c + first).all()
        projected = everyone[chosen]
        assert torch.equal(projected, head(features.movedim(1, -1).flatten(0, -2)[chosen]))
        torch.testing.assert_close(rows.units[c][rows.valid[c]], F.normalize(projected, dim=1))


def test_prototypes_are_the_means_of_a_class_in_an_image():
    features = torch.randn(2, 3, 4, 5, generator=stream(), dtype=torch.float64)
    ids = torch.randint(-1, 3, (2, 4, 5), generator=stream(1))
    ids[1][ids[1] == 2] = 0
    head = pixel_head(3, 4).double()
    rows = dacl(granularity="prototype").rows(features, head, ids, 3, stream())
    masks = torch.stack([ids == 1, ids == 2], dim=1)
    expected, present = class_prototypes_by_definition(head(features.movedim(1, -1)).movedim(-1, 1), masks)
    assert rows.valid.tolist() == present.T.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(rows.units, F.normalize(expected, dim=2).transpose(0, 1).float())


@pytest.mark.parametrize(
    ("pool", "with_bank"), [("bank", True), ("bank and batch", True), ("bank", False), ("bank and batch", False)]
)
def test_density_is_measured_where_the_setting_says(pool, with_bank):
    rows, bank = some_rows(), some_bank() if with_bank else None
    density = dacl(density_pool=pool, neighbors=(2, 5)).density(rows, bank)
    for c in range(3):
        held = bank["feature"][c][bank.valid()[c]] if bank is not None else torch.zeros(0, 4).double()
        batch = rows.units[c][rows.valid[c]]
        neighbors = held if with_bank and pool == "bank" else torch.cat([held, batch])
        if len(neighbors):
            expected = feature_density_by_definition(batch, neighbors, (2, 5))
            torch.testing.assert_close(density[c][rows.valid[c]], expected)
        else:
            assert not density[c].any()


def test_anchors_are_the_sparsest_and_keys_the_densest():
    rows = some_rows()
    density = torch.rand(3, 12, generator=stream(4))
    roles = dacl(anchors=4, keys=10).roles(rows, density, stream())
    for c in range(3):
        order = sorted((n for n in range(12) if rows.valid[c, n]), key=lambda n: float(density[c, n]))
        assert roles.anchors[c][roles.anchors_valid[c]].tolist() == order[:4]
        assert roles.keys[c][roles.keys_valid[c]].tolist() == order[::-1][:5]
    assert torch.equal(stream().get_state(), (g := stream()).get_state())
    dacl(anchors=4, keys=10).roles(rows, density, g)
    assert torch.equal(stream().get_state(), g.get_state())  # nothing is drawn


def test_plain_contrast_takes_random_anchors_and_keys_independently():
    rows = some_rows(classes=1, count=6)
    method, draws = dacl(contrast="plain", anchors=1, keys=2), stream(5)
    roles = [method.roles(rows, None, draws) for _ in range(1800)]
    pairs = torch.zeros(6, 6)
    for one in roles:
        pairs[one.anchors[0, 0], one.keys[0, 0]] += 1
    assert stats.chisquare(pairs.flatten().numpy()).pvalue > 1e-4
    one_key = dacl(contrast="infonce", anchors=4, keys=10).roles(some_rows(), None, stream())
    assert one_key.keys.shape == (3, 1) and one_key.anchors.shape == (3, 4)


# --- the loss (eq. 8 to 10) ------------------------------------------------------------------------------------------


def by_definition(method: Dacl, rows: Rows, density: Tensor, bank: ClassBanks | None) -> Tensor:
    """The term of one network from eq. 6 to 10 as loops; all negatives are taken."""
    per_class, anchors_of, summed = [], {}, []
    classes = range(len(rows.valid))
    order = {}
    for c in classes:
        order[c] = sorted((n for n in range(rows.valid.shape[1]) if rows.valid[c, n]), key=lambda n: density[c, n])
        anchors_of[c] = rows.units[c][order[c][: method.anchors]]
    for c in classes:
        keys = [rows.units[c][n] for n in order[c][::-1][: method.keys // 2]]
        if bank is not None:
            held = [n for n in range(bank.capacity) if bank.valid()[c, n]]
            held.sort(key=lambda n: -float(bank["density"][c, n]))
            keys += [bank["feature"][c, n] for n in held[: method.keys // 2]]
        source = {k: anchors_of[k] if method.negatives_from == "anchors" else rows.units[k][order[k]] for k in classes}
        negatives = torch.cat([source[k] for k in classes if k != c])
        if not keys or not len(anchors_of[c]) or not len(negatives):
            continue
        center = torch.stack(keys).mean(dim=0)
        weights = positiveness_weights_by_definition(anchors_of[c], center)
        if method.weight_scale == "max":
            weights = weights / weights.max()
        elif method.weight_scale == "sum":
            weights = weights / weights.sum()
        if not method.positiveness:
            weights = torch.ones_like(weights)
        loss = soft_density_guided_loss_by_definition(
            anchors_of[c], center, negatives, weights, method.temperature, method.include_positive, method.weight_inside
        )
        per_class.append(loss)
        summed.append(loss * len(anchors_of[c]))
    return torch.stack(summed).sum() if method.reduction == "sum" else torch.stack(per_class).mean()


LOSS_SETTINGS: list[dict[str, Any]] = [
    {}, dict(positiveness=False), dict(weight_scale="max"), dict(weight_scale="sum"), dict(weight_inside=True),
    dict(include_positive=False), dict(reduction="sum"), dict(negatives_from="pixels"), dict(temperature=0.1),
    dict(include_positive=False, weight_inside=True, reduction="sum"), dict(anchors=2), dict(keys=2),
]  # fmt: skip


@pytest.mark.parametrize("with_bank", [True, False], ids=["bank", "batch"])
@pytest.mark.parametrize("settings", LOSS_SETTINGS, ids=str)
def test_the_loss_is_that_of_the_equations(settings, with_bank):
    rows, bank = some_rows(), some_bank() if with_bank else None
    method = dacl(**{"anchors": 5, "keys": 8, "negatives": 1000, **settings})
    density = torch.rand(rows.valid.shape, generator=stream(6))
    found = method.contrastive_loss(rows, method.roles(rows, density, stream()), bank, stream())
    torch.testing.assert_close(found, by_definition(method, rows, density, bank))


def test_every_setting_of_the_loss_changes_it():
    rows, bank, found = some_rows(), some_bank(), {}
    for settings in LOSS_SETTINGS:
        method = dacl(**{"anchors": 5, "keys": 8, "negatives": 1000, **settings})
        roles = method.roles(rows, torch.rand(rows.valid.shape, generator=stream(6)), stream())
        found[str(settings)] = method.contrastive_loss(rows, roles, bank, stream()).item()
    assert all(abs(a - b) > 1e-6 for a, b in itertools.combinations(found.values(), 2)), found


def test_negatives_are_drawn_at_random_from_the_other_classes():
    rows = some_rows()
    method = dacl(anchors=5, negatives=3)
    roles = method.roles(rows, method.density(rows, None), stream())
    values = [method.contrastive_loss(rows, roles, None, stream(seed)).item() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_only_anchors_learn():
    rows = some_rows()
    units = rows.units.clone().requires_grad_()
    method = dacl(anchors=3, keys=8, negatives_from="pixels")
    density = method.density(rows, None)
    roles = method.roles(rows, density, stream())
    method.contrastive_loss(rows._replace(units=units), roles, None, stream()).backward()
    assert units.grad is not None
    learnt = units.grad.abs().sum(dim=2) > 0
    expected = torch.zeros_like(rows.valid).scatter(1, roles.anchors, roles.anchors_valid)
    assert torch.equal(learnt, expected)


@pytest.mark.parametrize("present", [0, 1])
def test_with_fewer_than_two_classes_in_the_batch_there_is_nothing_to_compare(present):
    rows = some_rows()
    valid = rows.valid & (torch.arange(3)[:, None] < present)
    units = rows.units.clone().requires_grad_()
    method = dacl()
    rows = Rows(units, valid, None)
    loss = method.contrastive_loss(rows, method.roles(rows, method.density(rows, None), stream()), None, stream())
    loss.backward()
    assert loss == 0 and not units.grad.any()


# --- a step of training ----------------------------------------------------------------------------------------------


def maps_and_ids(work, batch: dict[str, Tensor]) -> list[tuple[UNet, Tensor, Tensor]]:
    """Of each network: itself, the map that its head reads, and the class of each of its cells."""
    images = torch.cat([batch["images"], batch["unlabelled"]])
    found = []
    for name in ("unet", "second"):
        unet = work.networks[name]
        probabilities = unet(images).softmax(dim=1)
        highest, ids = probabilities.max(dim=1)
        ids[highest <= work.method.threshold] = NOBODY
        ids[: len(batch["labels"])] = batch["labels"]
        maps = [unet.encoder(images)[-1], *unet.decoder(unet.encoder(images))]
        found.append((unet, maps[-1 - work.method.level], work.method.at_level(ids)))
    return found


def projected(work, batch: dict[str, Tensor], head: int) -> Rows:
    """The rows of all pixels of one network, class by class, ragged ends empty."""
    _, features, ids = maps_and_ids(work, batch)[head]
    vectors = F.normalize(work.networks[("head", "second_head")[head]](features.movedim(1, -1)), dim=-1)
    found = [vectors[ids == c] for c in range(work.method.first_class, 4)]
    longest = max(map(len, found))
    units = torch.stack([F.pad(rows, (0, 0, 0, longest - len(rows))) for rows in found])
    return Rows(units, torch.stack([torch.arange(longest) < len(rows) for rows in found]), None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(bank=0, level=2, samples=256),
        dict(shared_bank=False),
        dict(background=True),
        dict(level=1),
        dict(threshold=0.3),
    ],
    ids=str,
)
def test_the_term_of_a_step_is_that_of_the_equations(settings):
    """From images to eq. 10, with a bank that earlier steps have filled: the sum over both networks."""
    work = begin("dacl", anchors=6, keys=8, **{**WHOLE, **settings})
    for _ in range(2):
        step(work)
    work.eval()  # a second pass must give what the first gave
    batch = work.draw()
    found = work(**batch)["contrast"]
    expected = torch.zeros(())
    for head in range(2):
        rows, bank = projected(work, batch, head), work.bank(head)
        assert (bank is None) == (settings.get("bank") == 0)
        density = work.method.density(rows, bank)
        expected = expected + by_definition(work.method, rows, density, bank)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_settings_of_one_contrast_leave_the_others_alone():
    """The same batch, the same draws: what concerns the density changes nothing for the plain contrast."""

    def term(contrast: str, **settings: Any) -> float:
        return step(begin("dacl", contrast=contrast, **settings).eval())["contrast"].item()  # without dropout

    changes: list[dict[str, Any]] = [
        dict(neighbors=(3,)), dict(bank=0), dict(positiveness=False), dict(weight_scale="max"),
        dict(density_pool="bank and batch"),
    ]  # fmt: skip
    for change in changes:
        assert term("plain", **change) == term("plain")
    assert term("plain", keys=2) != term("plain")
    assert len({term(contrast) for contrast in ("plain", "infonce", "density", "class_means", "variation")}) == 5


@pytest.mark.parametrize(
    "settings",
    [dict(neighbors=(2,)), dict(bank=0), dict(bank_push=4), dict(density_pool="bank and batch"), dict(samples=16),
     dict(shared_bank=False), dict(threshold=0.0), dict(level=1), dict(projection_dim=16), dict(background=True),
     dict(anchors=4), dict(keys=4), dict(negatives=4), dict(negatives_from="pixels"), dict(temperature=1.0)],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_the_contrast_and_nothing_else(settings):
    """In the third step: with a weight of 0 for it, the networks are those of the default."""
    found = []
    for change in ({}, settings):
        work = begin("dacl", contrast_weight=0.0, **change).eval()  # without dropout
        found.append([step(work) for _ in range(3)][-1])
    default, other = found
    assert all(torch.equal(default[name], other[name]) for name in ("supervised", "cross", "total"))
    assert not torch.equal(default["contrast"], other["contrast"])


@pytest.mark.parametrize("contrast", ["density", "plain", "infonce", "class_means", "variation"])
def test_the_contrast_reaches_both_networks_and_heads_but_no_classifier(contrast):
    work = begin("dacl", contrast=contrast)
    step(work)
    work.optimizer.zero_grad()
    work(**work.draw())["contrast"].backward()
    for name, network in work.networks.items():
        learnt = any(p.grad is not None and p.grad.any() for p in network.parameters())
        assert learnt, name
    for name in ("unet", "second"):
        assert all(p.grad is None or not p.grad.any() for p in work.networks[name].classifier.parameters())
        assert any(p.grad.any() for p in work.networks[name].encoder.parameters())


def test_class_means_compare_pixels_with_the_means_of_the_batch():
    settings = dict(level=2, threshold=1.0, **WHOLE)  # few cells, for the loops
    work = begin("dacl", contrast="class_means", temperature=0.2, **settings).eval()
    batch = work.draw()
    expected = torch.zeros(())
    for head in range(2):
        rows = projected(work, batch, head)
        there = [c for c in range(3) if rows.valid[c].any()]
        assert there == [1, 2]  # only labels count, and class 1 of the tiny data is nowhere
        means = torch.stack([rows.units[c][rows.valid[c]].mean(dim=0) for c in there])
        features = torch.cat([rows.units[c][rows.valid[c]] for c in there])
        labels = torch.cat([torch.full((int(rows.valid[c].sum()),), n) for n, c in enumerate(there)])
        expected = expected + class_mean_contrastive_loss_by_definition(features, labels, means, 0.2)
    torch.testing.assert_close(work(**batch)["contrast"], expected, rtol=1e-4, atol=1e-5)


def test_variation_compares_the_maps_of_both_networks_each_at_its_own_classes():
    work = begin("dacl", contrast="variation", level=3).eval()
    batch = work.draw()
    (_, first, ids_first), (_, second, ids_second) = maps_and_ids(work, batch)
    masks = [torch.stack([ids == c for c in (1, 2, 3)], dim=1) for ids in (ids_first, ids_second)]
    expected = intra_class_variation_loss_by_definition(first, second, masks[0])
    expected = expected + intra_class_variation_loss_by_definition(second, first, masks[1])
    torch.testing.assert_close(work(**batch)["contrast"], expected)


# --- the bank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_bank_takes_features_and_densities_of_both_networks_after_the_step(shared):
    # Labels alone count, which know no class 1; the bank fills during the delay too.
    work = begin("dacl", shared_bank=shared, delay=100, steps=101, threshold=1.0)
    step(work)
    before = [work.bank(n)["feature"].clone() for n in range(2)]
    seen = []
    for n, name in enumerate(("head", "second_head")):
        work.networks[name].register_forward_hook(lambda _, __, out, n=n: seen.append((n, out.detach())))
    pushed = [work.bank(n).pushed.clone() for n in range(2)]
    work(**work.draw())
    assert all(torch.equal(work.bank(n)["feature"], before[n]) for n in range(2))  # not before the step is done
    work.after_step()
    assert (work.bank(0) is work.bank(1)) == shared
    assert [n for n, _ in seen] == [0, 1]
    for n, out in seen:
        bank = work.bank(n)
        new = bank.pushed - pushed[n]
        assert new.tolist() == [0, *[16 if shared else 8] * 2]  # 8 of each network
        for c in (1, 2):
            for vector in F.normalize(out[c, :8], dim=1):
                (slot,) = ((bank["feature"][c] - vector).abs().amax(dim=1) < 1e-6).nonzero()
                pool = before[n][c][: int(pushed[n][c].clamp(max=32))]
                expected = feature_density_by_definition(vector[None], pool, (8, 16, 32))
                torch.testing.assert_close(bank["density"][c, slot], expected)


def test_a_bank_is_there_for_the_density_alone_and_travels_with_the_checkpoint():
    work = begin("dacl", threshold=1.0)
    step(work)
    state = work.state_dict()
    assert state["banks.0.pushed"].tolist() == [0, 16, 16]
    other = begin("dacl", threshold=1.0)
    other.load_state_dict(state)
    assert same(other, work)
    banks = {name: len(begin("dacl", **settings).banks) for name, settings in EVERY.items()}
    assert banks == {name: 1 for name in EVERY} | {
        **dict.fromkeys(("I", "II", "III", "IV", *RIVALS), 0), "two banks": 2,
    }  # fmt: skip
    assert begin("dacl", background=True).bank(0).classes == 4


# --- predicting and looking ------------------------------------------------------------------------------------------


def test_the_first_network_predicts_or_the_mean_of_both():
    work = begin("dacl").eval()
    images = torch.rand(2, 1, SIDE, SIDE, generator=stream())
    first, second = (work.networks[name](images).softmax(dim=1) for name in ("unet", "second"))
    torch.testing.assert_close(dacl().predict(work.networks, images), first)
    torch.testing.assert_close(dacl(predicts="mean").predict(work.networks, images), (first + second) / 2)


@pytest.mark.parametrize("level", [0, 2])
@both_spaces
def test_pixels_show_what_the_term_sees(patch, level):
    work = begin("dacl", patch=patch, level=level).eval()
    method, networks = work.method, work.networks
    batch = work.draw()
    pixels = method.pixels(networks, batch["images"], batch["labels"], stream())
    count = len(pixels.classes)
    assert pixels.features.shape == (count, 8) and pixels.places.shape == (count, 3 if patch is None else 4)
    assert set(pixels.classes.tolist()) == {2, 3}
    assert torch.equal(batch["labels"][pixels.places.unbind(1)], pixels.classes)
    grid = networks["unet"].maps(batch["images"])[-1 - level].movedim(1, -1)
    cells = torch.cat([pixels.places[:, :1], pixels.places[:, 1:] // 2**level], dim=1)
    expected = F.normalize(networks["head"](grid[cells.unbind(1)]), dim=1)
    torch.testing.assert_close(pixels.features, expected)
    for c in (2, 3):
        mine = pixels.classes == c
        places = pixels.places[mine].tolist()
        assert len(places) == len({tuple(place) for place in places}) <= method.samples
        density = feature_density_by_definition(pixels.features[mine], pixels.features[mine], method.neighbors)
        torch.testing.assert_close(pixels.density[mine], density, rtol=1e-4, atol=1e-5)
        sparse, dense = pixels.anchor[mine], pixels.dense[mine]
        assert sparse.sum() == dense.sum() == min(8, len(places))
        assert density[sparse].max() <= density.sort().values[sparse.sum() - 1] + 1e-5
        assert density[dense].min() >= density.sort().values[-int(dense.sum())] - 1e-5


def test_pixels_without_labels_are_those_of_the_networks_decisions():
    work = begin("dacl").eval()
    images = work.draw()["unlabelled"]
    probability, decision = work.networks["unet"](images).softmax(dim=1).max(dim=1)
    work.method.__dict__["threshold"] = probability.median().item()
    pixels = work.method.pixels(work.networks, images, None, stream())
    assert len(pixels.classes) and torch.equal(decision[pixels.places.unbind(1)], pixels.classes)
    assert (probability[pixels.places.unbind(1)] > probability.median()).all()


def test_pixels_are_drawn_by_the_generator_and_measured_against_a_bank_where_one_is_given():
    work = begin("dacl")
    step(work)
    work.eval()
    batch = work.draw()

    def look(seed: int, **options: Any) -> Any:
        return work.method.pixels(work.networks, batch["images"], batch["labels"], stream(seed), **options)

    assert all(torch.equal(a, b) for a, b in zip(look(0), look(0), strict=True))
    assert not torch.equal(look(0).places[:50], look(1).places[:50])
    found, bank = look(0, bank=work.bank(0)), work.bank(0)
    for c in (2, 3):
        held = bank["feature"][c - 1][bank.valid()[c - 1]]
        density = feature_density_by_definition(found.features[found.classes == c], held, (8, 16, 32))
        torch.testing.assert_close(found.density[found.classes == c], density)
    assert not found.features.requires_grad


@pytest.mark.parametrize("settings", [dict(contrast="none"), dict(contrast="variation"), dict(granularity="prototype")])
def test_without_a_head_on_pixels_there_are_none_to_show(settings):
    method = dacl(**settings)
    with pytest.raises(ValueError, match="no pixels are projected with contrast="):
        method.pixels(method.networks(4).eval(), torch.rand(1, 1, SIDE, SIDE), None, stream())
