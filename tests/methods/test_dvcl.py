"""DVCL and U2PL: sampling, banks and queues, each term against its definition, every setting, whole trainings."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medlib.data import dataset_info, read_dataset, write_phantoms
from medlib.data.splits import Split
from medlib.experiment import load
from medlib.losses import dvcl as losses_of_dvcl
from medlib.losses.consistency import cross_pseudo_supervision_loss
from medlib.losses.contrastive import info_nce_loss, nt_xent_loss, unit_vectors
from medlib.losses.dvcl import (
    complementary_label_loss,
    distance_aware_loss,
    distance_aware_loss_by_definition,
    entropy_selection_by_definition,
    high_quality_contrastive_loss,
    high_quality_contrastive_loss_by_definition,
    inlier_queries_by_definition,
    nearest_and_farthest_by_definition,
    neighbor_affinity_by_definition,
    nnclr_loss,
    reverse_rank,
    similarity_affinity,
    snclr_loss,
    voxel_entropy_by_definition,
)
from medlib.losses.segmentation import supervised_loss
from medlib.methods import SCALES, build, u2pl
from medlib.methods import dvcl as method_module
from medlib.methods.dvcl import (
    CandidateQueue,
    class_centres,
    sample_unreliable,
)
from medlib.methods.sampling import spread_by_class, spread_sample, voxels_of
from medlib.nets import pixel_head
from medlib.rng import generator
from medlib.train import make_fabric, predictor, train
from tests.methods.test_cotraining import begin, losses, run, same, step
from tests.no_waiting import NoWaiting
from tests.tiny import SIDE, training_data

PATCH = (16, 32, 32)
CLASSES = 4
RIVALS = ("info_nce", "simclr", "nnclr", "snclr")
TABLE_2 = [
    dict(hqcl=False, dvcl=False), dict(dvcl=False), dict(affinity="equal", qds=False), dict(qds=False), {},
]  # fmt: skip
TABLE_3 = [*(dict(loss=name, qds=False) for name in RIVALS), dict(affinity="snclr", qds=False)]
READINGS = [
    dict(banks="per_network", pools="per_network"), dict(threshold="all", on_labelled=True),
    dict(negative_bank=0, without_negatives="other_classes", class_mean="all", normalised_centre=False),
    dict(partition="exact", reduction="mean", detach_partners=False), dict(queue=0, warmup_steps=2),
    dict(second_weights="kaiming", predicts="mean"), dict(partition="jensen", hqcl=False),
    dict(patch=None, pool=32),
]  # fmt: skip


def shown(settings: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in settings.items()) or "all" if isinstance(settings, dict) else str(settings)


every_setting = pytest.mark.parametrize("settings", [*TABLE_2, *TABLE_3, *READINGS], ids=shown)


# --- settings --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_paper():
    method = build("dvcl")
    assert (method.alpha, method.temperature, method.anchors, method.negatives) == (0.5, 1.0, 256, 50)
    assert (method.consistency_weight, method.contrastive_weight, method.beta, method.ordinary) == (0.1, 0.1, 0.3, 0.5)
    assert (method.neighbors, method.outsiders, method.wide) == (10, 15, 50)
    assert (method.hqcl, method.dvcl, method.affinity, method.qds, method.loss) == (
        True,
        True,
        "nps",
        True,
        "log_likelihood",
    )
    assert (method.patch, method.steps, method.batch_size, method.network) == ((64, 128, 128), 20_000, 8, "unet")
    assert (method.dice_weight, method.cross_entropy_weight) == (0.5, 0.5)
    assert (method.on_labelled, method.partition, method.reduction) == (False, "none", "sum")
    rival = build("u2pl")
    assert (rival.anchors, rival.negatives, rival.temperature, rival.confidence) == (256, 50, 0.5, 0.3)
    assert (rival.low_rank, rival.high_rank, rival.drop, rival.contrastive_weight) == (3, 20, 0.2, 0.1)


@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_a_scale_changes_sizes_and_lengths_only(name):
    sizes = {"patch", "width", "steps", "batch_size", "ramp_steps", "feature_dim", "anchors", "negatives", "bank"}
    sizes |= {"negative_bank", "pool", "queries", "queue"}
    for scale in SCALES:
        small, paper = dataclasses.asdict(build(name, scale=scale)), dataclasses.asdict(build(name))
        assert {field for field in paper if small[field] != paper[field]} <= sizes
        method = build(name, scale=scale)
        assert method.protocol(dataset_info("btcv")).spacing == dataset_info("btcv").volume_spacing


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dvcl", dict(loss="triplet"), "loss must be one of log_likelihood, info_nce"),
        ("dvcl", dict(affinity="cosine"), "affinity must be one of nps"),
        ("dvcl", dict(partition="upper"), "partition must be"),
        ("dvcl", dict(reduction="max"), "reduction must be"),
        ("dvcl", dict(banks="own"), "banks must be"),
        ("dvcl", dict(pools="own"), "pools must be"),
        ("dvcl", dict(threshold="labelled"), "threshold must be"),
        ("dvcl", dict(without_negatives="zero"), "without_negatives must be"),
        ("dvcl", dict(class_mean="some"), "class_mean must be"),
        ("dvcl", dict(second_weights="he"), "second_weights must be"),
        ("dvcl", dict(predicts="both"), "predicts must be"),
        ("dvcl", dict(neighbors=0), "neighbors must be a whole number from 1"),
        ("dvcl", dict(pool=7, queries=4), "outsiders must be below the 14"),
        ("dvcl", dict(pool=15, queries=4, pools="per_network"), "outsiders must be below the 15"),
        ("dvcl", dict(queries=8193), "queries must be at most the 8192"),
        ("dvcl", dict(queries=9, pools="per_network"), "queries must be even"),
        ("dvcl", dict(queue=0, loss="nnclr"), "queue=0 leaves nnclr"),
        ("dvcl", dict(queue=-1), "queue must be a whole number from 0"),
        ("dvcl", dict(temperature=0.0), "temperature must be at least 1e-06"),
        ("dvcl", dict(rival_temperature=0.0), "rival_temperature must be at least 1e-06"),
        ("dvcl", dict(beta=-0.1), "beta must be at least 0"),
        ("dvcl", dict(ordinary=1.1), "ordinary must be at least 0 and at most 1"),
        ("dvcl", dict(alpha=math.inf), "alpha must be"),
        ("dvcl", dict(patch=(64, 100, 128)), "patch must be multiples of 16"),
        ("u2pl", dict(low_rank=20), "low_rank must be below high_rank=20"),
        ("u2pl", dict(drop=1.5), "drop must be at least 0 and at most 1"),
        ("u2pl", dict(confidence=-0.1), "confidence must be"),
        ("u2pl", dict(temperature=0.0), "temperature must be at least 1e-06"),
        ("u2pl", dict(bank=0), "bank must be a whole number from 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_what_only_the_data_can_tell_is_refused_too():
    with pytest.raises(ValueError, match="low_rank=3 leaves none of 3 classes complementary"):
        build("u2pl", scale="ci").networks(3)
    work = begin("dvcl", pool=2**14 + 1, patch=PATCH)  # two unlabelled patches of 2**14 voxels each
    with pytest.raises(ValueError, match=f"pool must be at most half of the {2**15} voxels"):
        work(**work.draw())


# --- sampling --------------------------------------------------------------------------------------------------------


def test_each_member_is_drawn_as_often_as_any_other_and_none_twice():
    member = torch.rand(200, generator=generator(0, "test")) < 0.4
    count = 30
    drawn: Counter[int] = Counter()
    for start in torch.arange(0.0005, 1, 0.001):
        positions, new = spread_sample(member, count, start)
        assert new.all() and len(positions.unique()) == count and member[positions].all()
        drawn.update(positions.tolist())
    expected = 1000 * count / int(member.sum())
    assert set(drawn) == set(member.nonzero()[:, 0].tolist())
    assert all(abs(times - expected) <= 15 for times in drawn.values())


def test_a_small_class_comes_whole_and_again_and_an_empty_one_never():
    member = torch.zeros(10, dtype=torch.bool)
    member[[2, 7, 9]] = True
    positions, new = spread_sample(member, 8, torch.tensor(0.3))
    assert positions.tolist() == [2, 7, 9, 2, 7, 9, 2, 7] and new.tolist() == [True] * 3 + [False] * 5
    assert spread_sample(member, 3, torch.tensor(0.99))[0].tolist() == [2, 7, 9]
    positions, new = spread_sample(torch.zeros(10, dtype=torch.bool), 4, torch.tensor(0.3))
    assert not new.any() and positions.max() < 10
    positions, new = spread_by_class(torch.tensor([1, -1, 1, 0]), 2, torch.tensor([0.9, 0.5, 0.0]))
    assert positions[:2].tolist() == [[3, 3], [0, 2]] and new.tolist() == [[True, False], [True, True], [False, False]]


@pytest.mark.parametrize("unreliable", [0, 1, 5, 8, 20])
def test_a_pool_has_no_voxel_twice_and_says_which_are_unreliable(unreliable):
    mask = torch.zeros(20, dtype=torch.bool)
    mask[torch.randperm(20, generator=generator(0, "test"))[:unreliable]] = True
    for start in (0.0, 0.4, 0.99):
        positions, truly = sample_unreliable(mask, 8, torch.tensor(start))
        assert len(positions.unique()) == 8 and torch.equal(mask[positions], truly)
        assert truly.sum() == min(unreliable, 8)


@pytest.mark.parametrize("space", [(5, 4, 6), (7, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_a_head_sees_sampled_voxels_alone_and_gives_them_what_all_would_get(space, last):
    """Weights and maps are small whole numbers, so that sums are exact in any order: equal to the last bit."""
    stream = generator(0, "test")
    maps = torch.randint(-8, 9, (3, 5, *space), generator=stream).float()
    if last and len(space) == 3:
        maps = maps.contiguous(memory_format=torch.channels_last_3d)
    head = pixel_head(5, 7)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randint(-8, 9, p.shape, generator=stream))
    dense = head(maps.movedim(1, -1))  # (3, *space, 7)
    places = torch.randint(0, maps[:, 0].numel(), (50,), generator=stream)
    assert torch.equal(head(voxels_of(maps, places)), dense.reshape(-1, 7)[places])


def test_heads_see_no_more_voxels_than_are_sampled():
    work = begin("dvcl", patch=PATCH)
    seen: list[int] = []
    for name in ("head", "second_head"):
        work.networks[name].register_forward_hook(lambda module, rows, out: seen.append(len(rows[0])))
    work(**work.draw())
    method = work.method
    each = [CLASSES * method.anchors, CLASSES * method.negatives, 2 * method.pool]  # of both networks' voxels
    assert sorted(seen) == sorted(2 * each)


def test_a_queue_holds_what_was_pushed_and_no_more(tmp_path):
    queue = CandidateQueue(5, 2)
    assert queue.held().shape == (0, 2)
    queue.push(torch.ones(3, 2))
    assert torch.equal(queue.held(), torch.ones(3, 2))
    state = {key: value.clone() for key, value in queue.state_dict().items()}
    queue.push(torch.full((3, 2), 2.0))
    assert queue.held()[:, 0].sort().values.tolist() == [1, 1, 2, 2, 2]
    other = CandidateQueue(5, 2)
    other.load_state_dict(state)
    assert torch.equal(other.held(), torch.ones(3, 2))
    other.push(torch.full((3, 2), 2.0))
    assert torch.equal(other.held(), queue.held())
    whole = nn.ModuleDict({"queue": CandidateQueue(5, 2)})
    whole.load_state_dict({f"queue.{key}": value for key, value in state.items()})
    assert len(whole["queue"].held()) == 3


# --- terms -----------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a function and keeps what it was given and what it gave."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        as_given = tuple(x.clone() if isinstance(x, Tensor) else x for x in args)  # a bank goes on
        self.calls.append((as_given, kwargs, result))
        return result


class Designed:
    """A work whose networks are replaced by given logits and maps, so that what it makes of them can be checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "dvcl", seed: int = 0, **settings: Any):
        self.work = begin(name, **{**dict(patch=PATCH, width=4, pool=64), **settings})
        self.batch = self.work.draw()
        self.labels = self.batch["labels"]
        self.labelled = len(self.labels)
        stream = generator(seed, "designed")
        shape = (4, CLASSES, *self.labels.shape[1:])
        truth = torch.zeros(4, *self.labels.shape[1:], dtype=torch.long)
        truth[: self.labelled] = self.labels.clamp(min=0)
        boost = 2.0 * nn.functional.one_hot(truth, CLASSES).movedim(-1, 1)
        self.logits = [(2 * torch.randn(shape, generator=stream) + boost).requires_grad_() for _ in range(2)]
        width = (4, 4, *shape[2:])
        self.maps = [torch.randn(width, generator=stream).requires_grad_() for _ in range(2)]
        outputs = [*self.logits, *self.maps]
        monkeypatch.setattr(self.work, "outputs", lambda images, labelled: outputs)
        self.heads = [self.work.networks[name] for name in ("head", "second_head") if name in self.work.networks]
        self.recorders: dict[str, Recorder] = {}
        for function in (high_quality_contrastive_loss, distance_aware_loss, info_nce_loss,
                         nt_xent_loss, nnclr_loss, snclr_loss):  # fmt: skip
            recorder = Recorder(function)
            monkeypatch.setattr(method_module, function.__name__, recorder)
            self.recorders[function.__name__] = recorder

    def __call__(self) -> dict[str, Tensor]:
        return self.work(**self.batch)

    def calls(self, function: Callable[..., Any]) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
        return self.recorders[function.__name__].calls

    def features(self, i: int) -> Tensor:
        """Of all voxels of network i: (4, V, d)."""
        return self.heads[i](self.maps[i].flatten(2).movedim(1, -1)).detach()

    def masks(self, i: int, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
        """Reliable and unreliable voxels of network i: (2, V) each, by definition."""
        probabilities = self.logits[i][self.labelled :].detach().softmax(dim=1).flatten(2)
        return entropy_selection_by_definition(probabilities, alpha)

    def right(self, i: int, c: int) -> Tensor:
        """The features of the anchors of class c (eq. 7)."""
        reliable, _ = self.masks(i)
        decision = self.logits[i].argmax(dim=1).flatten(1)
        known = (self.labels.flatten(1) == c) & (decision[: self.labelled] == c)
        return self.features(i)[torch.cat([known, reliable & (decision[self.labelled :] == c)])]

    def wrong(self, i: int, c: int) -> Tensor:
        """The features of the false positives of class c (eq. 9)."""
        truth, decision = self.labels.flatten(1), self.logits[i].argmax(dim=1).flatten(1)[: self.labelled]
        return self.features(i)[: self.labelled][(decision == c) & (truth != c) & (truth >= 0)]


def among(rows: Tensor, population: Tensor) -> Tensor:
    """(n,) bool: which rows (n, d) are rows of the population (N, d)."""
    return torch.cdist(rows.double(), population.double()).amin(dim=1) < 1e-5


def test_the_masks_are_those_of_the_entropy(monkeypatch):
    designed = Designed(monkeypatch)
    for threshold, of in (("unlabelled", 2), ("all", 0)):
        work = begin("dvcl", patch=PATCH, threshold=threshold, alpha=0.2)
        found = work._select(designed.logits[0].detach(), 2)
        expected = entropy_selection_by_definition(designed.logits[0][of:].detach().softmax(dim=1).flatten(2), 0.2)
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine == theirs[-2:].flatten()).float().mean() > 0.9999  # float32 on one side


def test_hqcl_contrasts_anchors_of_both_networks_with_centre_and_false_positives(monkeypatch):
    designed = Designed(monkeypatch)
    terms = designed()
    calls = designed.calls(high_quality_contrastive_loss)
    assert len(calls) == CLASSES
    bank = designed.work.anchor_banks[0]
    for c, (given, _, value) in enumerate(calls):
        anchors, centre, negatives, temperature = given
        assert anchors.shape == (16, 8) and negatives.shape == (16, 8, 8) and temperature == 1.0
        of = [among(anchors, designed.right(i, c)) for i in range(2)]
        assert (of[0] | of[1]).all() and of[0].any() and of[1].any()
        of = [among(negatives.flatten(0, 1), designed.wrong(i, c)) for i in range(2)]
        assert (of[0] | of[1]).all() and of[0].any() and of[1].any()
        torch.testing.assert_close(centre, unit_vectors(anchors).mean(dim=0).detach())  # all that is in the bank
        assert not centre.requires_grad and not negatives.requires_grad and anchors.requires_grad
        torch.testing.assert_close(
            value, high_quality_contrastive_loss_by_definition(anchors, centre, negatives, 1.0), atol=1e-5, rtol=1e-5
        )
        assert bank.pushed[c] == 16
    torch.testing.assert_close(terms["hqcl"], torch.stack([value for _, _, value in calls]).mean())


def test_the_banks_remember(monkeypatch):
    designed = Designed(monkeypatch)
    designed()
    first = [given[0].detach() for given, _, _ in designed.calls(high_quality_contrastive_loss)]
    designed()
    for c, (given, _, _) in enumerate(designed.calls(high_quality_contrastive_loss)[CLASSES:]):
        both = torch.cat([first[c], given[0].detach()])
        torch.testing.assert_close(given[1], unit_vectors(both).mean(dim=0))
    assert (designed.work.wrong_banks[0].pushed == 16).all() and (designed.work.anchor_banks[0].pushed == 32).all()
    for _ in range(3):
        designed()
    assert designed.work.anchor_banks[0].valid().all()


def test_raw_centres_weigh_by_length(monkeypatch):
    designed = Designed(monkeypatch, normalised_centre=False)
    designed()
    for given, _, _ in designed.calls(high_quality_contrastive_loss):
        torch.testing.assert_close(given[1], given[0].mean(dim=0).detach())
    bank = designed.work.anchor_banks[0]
    bank.pushed.zero_()
    assert (class_centres(bank) == 0).all()


def test_networks_may_have_banks_of_their_own(monkeypatch):
    designed = Designed(monkeypatch, banks="per_network")
    terms = designed()
    calls = designed.calls(high_quality_contrastive_loss)
    assert len(calls) == 2 * CLASSES and len(designed.work.anchor_banks) == 2
    for number, (given, _, _) in enumerate(calls):
        i, c = divmod(number, CLASSES)
        assert among(given[0], designed.right(i, c)).all()
        assert among(given[2].flatten(0, 1), designed.wrong(i, c)).all()
    torch.testing.assert_close(terms["hqcl"], torch.stack([value for _, _, value in calls]).mean())


def without_false_positives(designed: Designed, c: int) -> None:
    """Wherever a labelled voxel is not of class c, no network says so."""
    with torch.no_grad():
        for logits in designed.logits:
            logits[: designed.labelled, c][designed.labels != c] = -50


def test_a_class_without_false_positives_is_left_out_or_has_anchors_of_others(monkeypatch):
    for settings in (dict(), dict(class_mean="all"), dict(without_negatives="other_classes")):
        designed = Designed(monkeypatch, **settings)
        without_false_positives(designed, 2)
        hqcl = designed()["hqcl"]
        calls = designed.calls(high_quality_contrastive_loss)
        values = torch.stack([value for _, _, value in calls])
        others = values[[0, 1, 3]].sum()
        if "without_negatives" in settings:
            torch.testing.assert_close(hqcl, values.mean())
            negatives = calls[2][0][2].flatten(0, 1)
            kinds = torch.cat([designed.right(i, c) for i in range(2) for c in (0, 1, 3)])
            assert among(negatives, unit_vectors(kinds)).all()
            assert among(calls[1][0][2].flatten(0, 1), torch.cat([designed.wrong(i, 1) for i in range(2)])).all()
        else:
            torch.testing.assert_close(hqcl, others / (4 if settings else 3))


def test_a_class_nobody_predicts_is_left_out(monkeypatch):
    designed = Designed(monkeypatch)
    with torch.no_grad():
        for logits in designed.logits:
            logits[:, 3] = -50
    hqcl = designed()["hqcl"]
    values = torch.stack([value for _, _, value in designed.calls(high_quality_contrastive_loss)])
    torch.testing.assert_close(hqcl, values[:3].mean())
    assert designed.work.anchor_banks[0].pushed.tolist() == [16, 16, 16, 0]
    designed.work.zero_grad()
    hqcl.backward()
    assert all(logits.grad is None for logits in designed.logits)  # features alone


def test_false_positives_of_earlier_steps_serve_unless_they_are_not_kept(monkeypatch):
    for size in (32, 0):
        designed = Designed(monkeypatch, negative_bank=size)
        designed()
        without_false_positives(designed, 2)
        hqcl = designed()["hqcl"]
        values = torch.stack([value for _, _, value in designed.calls(high_quality_contrastive_loss)[CLASSES:]])
        torch.testing.assert_close(hqcl, values.mean() if size else values[[0, 1, 3]].mean())


def test_padding_is_neither_anchor_nor_false_positive(monkeypatch):
    designed = Designed(monkeypatch)
    assert (designed.labels < 0).any()
    designed.work.labels = designed.labels
    reliable = torch.zeros(2 * math.prod(PATCH), dtype=torch.bool)
    right, wrong = designed.work._right_and_wrong(designed.logits[0], reliable)
    padding = designed.labels.flatten() < 0
    assert (right[: len(padding)][padding] == -1).all() and (wrong[padding] == -1).all()
    assert (right[: len(padding)][~padding] >= 0).any() and (wrong[~padding] >= 0).any()
    assert ((right[: len(padding)] >= 0) ^ (wrong >= 0))[~padding].all()
    assert (right[len(padding) :] == -1).all()


def check_neighborhoods(candidates: Tensor, given: tuple[Any, ...], method: Any) -> None:
    _, queries, neighbors, outsiders, affinity, keep = given
    near, far = nearest_and_farthest_by_definition(candidates, queries, method.neighbors, method.outsiders)
    assert torch.equal(neighbors, near) and torch.equal(outsiders, far)
    expected = torch.ones(near.shape)
    if method.affinity == "nps":
        expected = neighbor_affinity_by_definition(candidates, queries, near, method.ordinary)
    elif method.affinity == "snclr":
        expected = similarity_affinity(candidates, queries, near)
    torch.testing.assert_close(affinity, expected)
    inlier = inlier_queries_by_definition(candidates, queries, near, method.wide)
    assert torch.equal(keep, inlier if method.qds else torch.ones_like(inlier))
    if method.wide == 1:
        assert keep.any() and not keep.all()


DVCL = [
    {}, dict(affinity="equal", qds=False), dict(affinity="snclr"), dict(qds=False), dict(ordinary=0.1),
    dict(neighbors=1, outsiders=4, wide=1), dict(affinity="equal"), dict(queue=0),
]  # fmt: skip


@pytest.mark.parametrize("settings", DVCL, ids=shown)
def test_the_distance_aware_loss_is_that_of_unreliable_voxels_and_their_neighbours(monkeypatch, settings):
    designed = Designed(monkeypatch, **{**dict(pool=24, queries=12, queue=30, wide=6), **settings})
    method = designed.work.method
    past = torch.zeros(0, 8 + CLASSES)
    for number in range(2):
        terms = designed()
        ((given, options, value),) = designed.calls(distance_aware_loss)[number:]
        probabilities, queries = given[0], given[1]
        assert len(probabilities) == 48 + len(past) and queries.unique().numel() == 12 and queries.max() < 48
        rows = []
        for i in range(2):
            mine = probabilities[24 * i : 24 * (i + 1)]
            own = designed.logits[i][2:].detach().softmax(dim=1).flatten(2).movedim(1, -1)  # (2, V, C)
            distance = torch.cdist(mine.detach().double(), own.flatten(0, 1).double())
            assert distance.amin(dim=1).max() < 1e-6
            places = distance.argmin(dim=1)
            assert designed.masks(i)[1].flatten()[places].all() and len(places.unique()) == 24
            rows.append(designed.features(i)[2:].flatten(0, 1)[places])
        candidates = torch.cat([*rows, past[:, :8]])
        torch.testing.assert_close(probabilities[48:], past[:, 8:])
        check_neighborhoods(candidates, given, method)
        torch.testing.assert_close(value, distance_aware_loss_by_definition(*given))
        torch.testing.assert_close(terms["dvcl"], value)
        assert options == dict(partition="none", reduction="sum", detach_partners=True)
        if method.queue:
            pushed = torch.cat([torch.cat(rows), probabilities[:48].detach()], dim=1)
            past = designed.work.queues[0].held().clone()
            assert len(past) == 30 and among(past, pushed).all()


def test_networks_may_have_pools_of_their_own(monkeypatch):
    designed = Designed(monkeypatch, pools="per_network", pool=24, queries=12, queue=30)
    for _ in range(2):
        terms = designed()
    calls = designed.calls(distance_aware_loss)[2:]
    assert [len(given[1]) for given, _, _ in calls] == [6, 6]
    for i, (given, _, _) in enumerate(calls):
        probabilities = given[0]
        own = designed.logits[i].detach().softmax(dim=1).flatten(2).movedim(1, -1).flatten(0, 1)
        assert len(probabilities) == 24 + 15 and among(probabilities.detach(), own).all()
    torch.testing.assert_close(terms["dvcl"], (calls[0][2] + calls[1][2]) / 2)


@pytest.mark.parametrize("settings", [dict(partition="exact"), dict(reduction="mean"), dict(detach_partners=False)])
def test_readings_of_equation_18_reach_the_loss(monkeypatch, settings):
    designed = Designed(monkeypatch, **settings)
    designed()
    ((_, options, _),) = designed.calls(distance_aware_loss)
    assert options == {**dict(partition="none", reduction="sum", detach_partners=True), **settings}


def test_a_pool_that_is_filled_up_asks_nothing_of_reliable_voxels(monkeypatch):
    designed = Designed(monkeypatch, qds=False)
    with torch.no_grad():
        for logits in designed.logits:
            logits[2:] = 0
            logits[2:, 0] = 9
            logits[2, 1, 0, 0, :5] = 9  # five voxels between two classes
    designed()
    ((given, _, _),) = designed.calls(distance_aware_loss)
    probabilities, queries, keep = given[0], given[1], given[5]
    uncertain = probabilities[queries].amax(dim=1) < 0.6
    assert torch.equal(keep, uncertain) and len(probabilities) == 128
    assert (probabilities.amax(dim=1) < 0.6).sum() == 10


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_take_the_other_networks_features_of_the_same_voxels(monkeypatch, name):
    designed = Designed(monkeypatch, loss=name, pool=24, queries=12, queue=30)
    for _ in range(2):
        past = designed.work.queues[0].held().clone()
        terms = designed()
    function = {"info_nce": info_nce_loss, "simclr": nt_xent_loss, "nnclr": nnclr_loss, "snclr": snclr_loss}[name]
    calls = designed.calls(function)
    calls = calls[len(calls) // 2 :]
    assert len(calls) == (1 if name == "simclr" else 2) and len(past) == 30
    torch.testing.assert_close(terms["dvcl"], torch.stack([value for _, _, value in calls]).mean())
    first, second, *rest = calls[0][0]
    dense = [designed.features(i).flatten(0, 1) for i in range(2)]
    unreliable = [torch.cat([torch.zeros(2 * math.prod(PATCH), dtype=torch.bool), designed.masks(i)[1].flatten()])
                  for i in range(2)]  # fmt: skip
    networks = set()
    for one, other in zip(first.detach(), second.detach(), strict=True):
        i = int(not among(one[None], dense[0]).item())
        place = torch.cdist(one[None].double(), dense[i].double()).argmin()
        torch.testing.assert_close(other, dense[1 - i][place])
        assert unreliable[i][place]
        networks.add(i)
    assert networks == {0, 1} and first.requires_grad and second.requires_grad
    assert rest[-1] == 0.1
    if name in ("info_nce", "nnclr"):
        torch.testing.assert_close(rest[0], past[:, :8])
    if name == "snclr":
        candidates = torch.cat([second.detach(), past[:, :8]])
        near, _ = nearest_and_farthest_by_definition(candidates, torch.arange(12), 10, 0)
        torch.testing.assert_close(rest[0], candidates[near])
    if name != "simclr":
        torch.testing.assert_close(calls[1][0][0], second)


@pytest.mark.parametrize("on_labelled", [False, True])
def test_the_total_is_equation_3(monkeypatch, on_labelled):
    designed = Designed(monkeypatch, on_labelled=on_labelled, steps=20, ramp_steps=30, warmup_steps=1, beta=0.4)
    a, b = designed.logits
    expected = cross_pseudo_supervision_loss(a[2:], b[2:])
    if on_labelled:
        expected = expected + cross_pseudo_supervision_loss(a[:2], b[:2])
    supervised = sum(supervised_loss(logits[:2], designed.labels, 0.5, 0.5) for logits in (a, b))
    for t in range(3):
        terms = designed()
        torch.testing.assert_close(terms["consistency"], expected)
        torch.testing.assert_close(terms["supervised"], supervised)
        ramped = 0.1 * math.exp(-5 * (1 - t / 30) ** 2) * terms["consistency"]
        contrast = 0.1 * (terms["hqcl"] + 0.4 * terms["dvcl"]) if t >= 1 else 0
        torch.testing.assert_close(terms["total"], supervised + ramped + contrast)
        designed.work.after_step()


# --- networks and gradients ------------------------------------------------------------------------------------------


def touched(work, loss: Tensor) -> set[str]:
    work.zero_grad()
    loss.backward(retain_graph=True)
    found = set()
    for key, p in work.networks.named_parameters():
        if p.grad is not None and p.grad.any():
            found.add(".".join(key.split(".")[: 2 if key.startswith(("unet", "second.")) else 1]))
    return found


def parts(*names: str) -> set[str]:
    return {f"{network}.{part}" for network in ("unet", "second") for part in names}


def test_each_term_trains_what_it_should():
    work = begin("dvcl", patch=PATCH, width=8)
    work(**work.draw())  # fills the banks
    terms = work(**work.draw())
    body, heads = parts("encoder", "decoder"), {"head", "second_head"}
    assert touched(work, terms["supervised"]) == touched(work, terms["consistency"]) == body | parts("classifier")
    assert touched(work, terms["hqcl"]) == body | heads
    assert touched(work, terms["dvcl"]) == body | parts("classifier")
    rival = begin("dvcl", patch=PATCH, width=8, loss="simclr")
    assert touched(rival, rival(**rival.draw())["dvcl"]) == body | heads


@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_every_weight_that_is_trained_gets_a_gradient(name):
    work = begin(name, patch=PATCH)
    work(**work.draw())["total"].backward()
    assert not [key for key, p in work.networks.named_parameters() if p.grad is None]
    (group,) = work.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in work.networks.parameters()}


def test_the_switches_of_table_2():
    for settings, terms in zip(TABLE_2, [set(), {"hqcl"}, *[{"hqcl", "dvcl"}] * 3], strict=True):
        work = begin("dvcl", patch=PATCH, **settings)
        assert set(work(**work.draw())) == {"total", "supervised", "consistency", *terms}
        assert set(work.method.weights) == {"consistency", *terms}
        assert ("head" in work.networks) == bool(terms)
        assert any("bank" in key for key in work.state_dict()) == ("hqcl" in terms)
        assert any("queue" in key for key in work.state_dict()) == ("dvcl" in terms)


def test_both_networks_begin_differently():
    for weights, normal in (("xavier", False), ("kaiming", True)):
        torch.manual_seed(0)
        networks = build("dvcl", scale="ci", width=8, second_weights=weights).networks(3)
        first, second = (networks[name].encoder.levels[1] for name in ("unet", "second"))
        key = next(key for key, p in first.named_parameters() if p.dim() == 5)
        one, two = (dict(level.named_parameters())[key] for level in (first, second))
        assert not torch.equal(one, two)
        fan_out, fan_in = one.shape[0] * 27, one.shape[1] * 27
        assert one.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
        expected = (2 / fan_in) ** 0.5 if normal else (2 / (fan_in + fan_out)) ** 0.5
        assert two.std().item() == pytest.approx(expected, rel=0.1)


def test_which_network_predicts():
    networks = build("dvcl", scale="ci").networks(3).eval()
    images = torch.rand(1, 1, *PATCH)
    with torch.no_grad():
        first, second = (networks[name](images).softmax(dim=1) for name in ("unet", "second"))
        for name, expected in (("first", first), ("second", second), ("mean", (first + second) / 2)):
            torch.testing.assert_close(build("dvcl", scale="ci", predicts=name).predict(networks, images), expected)


# --- the loop --------------------------------------------------------------------------------------------------------


@every_setting
def test_every_row_and_every_reading_trains(tmp_path, settings):
    trained = run("dvcl", tmp_path, **{**dict(patch=PATCH, steps=2), **settings})
    values = [value for line in losses(trained) for value in line.values() if not isinstance(value, str)]
    assert values and all(map(math.isfinite, values))


@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_a_split_with_every_label_trains_without_the_terms(name):
    work = begin(name, labelled=3, patch=PATCH)
    assert set(step(work)) == {"total", "supervised"}


CUT = [("dvcl", {}), ("dvcl", dict(banks="per_network", pools="per_network")), ("u2pl", {})]


@pytest.mark.parametrize(("name", "settings"), CUT, ids=shown)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, name, settings):
    class Stop(Exception):
        pass

    def die(stage: str, at: int, terms: object) -> None:
        if at == 3:
            raise Stop

    settings = dict(patch=PATCH, steps=5, **settings)
    whole = run(name, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        run(name, tmp_path / "cut", checkpoint_seconds=0.0, callback=die, **settings)
    (checkpoint,) = (tmp_path / "cut").rglob("checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)
    assert state["step"] == 2
    kept = [key for key in state["work"] if "bank" in key or "queue" in key]
    assert kept and all(state["work"][key].any() for key in kept)
    resumed = run(name, tmp_path / "cut", **settings)
    assert same(whole.networks, resumed.networks) and losses(whole) == losses(resumed)


@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_a_hidden_label_decides_nothing(tmp_path, name):
    poisoned = training_data(labelled=1)
    for volume in poisoned.train[1:]:
        volume.label = np.full_like(volume.label, 3)
    settings = dict(patch=PATCH, steps=3)
    first = run(name, tmp_path / "a", **settings)
    second = run(name, tmp_path / "b", data=poisoned, **settings)
    assert same(first.networks, second.networks) and losses(first) == losses(second)


@pytest.mark.parametrize(
    ("name", "settings"), [*(("dvcl", s) for s in [*TABLE_2, *TABLE_3, *READINGS[:4]]), ("u2pl", {})], ids=shown
)
def test_a_step_never_waits_for_the_device(monkeypatch, name, settings):
    def one_hot(ids: Tensor, classes: int) -> Tensor:
        return (ids[..., None] == torch.arange(classes)).long()

    monkeypatch.setattr("torch.nn.functional.one_hot", one_hot)  # PyTorch's looks at the largest id, on a CPU only
    monkeypatch.setattr(losses_of_dvcl, "_distinct", repeated)  # what a GPU runs
    work = begin(name, patch=PATCH, **settings)
    step(work)
    batch = work.draw()
    with NoWaiting():
        work(**batch)["total"].backward()
        work.after_step()


def repeated(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows, torch.arange(len(rows))


def test_a_search_that_does_not_wait_finds_the_same(monkeypatch):
    stream = generator(0, "test")
    features = torch.randn(60, 5, generator=stream)
    queries = torch.randperm(60, generator=stream)[:50]
    neighbors, _ = losses_of_dvcl.nearest_and_farthest(features, queries, 8, 0)
    expected = reverse_rank(features, queries, neighbors)
    monkeypatch.setattr(losses_of_dvcl, "_distinct", repeated)
    assert torch.equal(reverse_rank(features, queries, neighbors), expected)
    on_gpu = torch.empty(3, dtype=torch.long, device="meta")  # any device but the CPU
    monkeypatch.undo()
    assert losses_of_dvcl._distinct(on_gpu)[0].shape == (3,)


@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_global_randomness_is_left_alone_but_for_dropout(name):
    work = begin(name, patch=PATCH)
    for layer in work.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout3d):
            layer.p = 0.0
    before = torch.get_rng_state()
    step(work)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("data", ["msd", "btcv"])
@pytest.mark.parametrize("name", ["dvcl", "u2pl"])
def test_phantom_volumes_from_files_to_a_prediction(tmp_path, monkeypatch, data, name):
    monkeypatch.setattr("medlib.experiment.CACHE", tmp_path / "cache")
    cases = read_dataset(data, write_phantoms(data, tmp_path / data, 3, 0))
    patients = sorted({case.patient for case in cases})
    split = Split("tiny", (patients[0],), (patients[1],), (patients[2],), ())
    spacing = (12.0, 8.0, 8.0) if data == "btcv" else None
    rank = dict(low_rank=1) if name == "u2pl" else {}
    method = build(name, scale="ci", steps=3, voxel_spacing=spacing, **rank)
    loaded = load(cases, split, method, progress=False)
    trained = train(method, loaded, seed=0, output_dir=tmp_path / "out", fabric=make_fabric("cpu"), log_every=1,
                    progress=False)  # fmt: skip
    values = [value for line in losses(trained) for value in line.values() if not isinstance(value, str)]
    assert all(map(math.isfinite, values)) and losses(trained)[0].keys() >= method.weights.keys()
    found = predictor(method, trained.networks, make_fabric("cpu"))(loaded.val[0].inputs())
    classes = 3 if data == "msd" else 14
    assert found.shape == (1, classes, *loaded.val[0].image.shape)


# --- for looking at --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [PATCH, None], ids=["3d", "2d"])
def test_voxels_show_what_the_first_network_makes_of_them(patch):
    method = build("dvcl", scale="ci", patch=patch, pool=40, queries=10, neighbors=4, outsiders=5, wide=8)
    torch.manual_seed(0)
    networks = method.networks(CLASSES).eval()
    space = patch or (SIDE, SIDE)
    stream = generator(0, "test")
    images = torch.rand(2, 1, *space, generator=stream)
    labels = torch.randint(-1, CLASSES, (2, *space), generator=stream)
    voxels = method.voxels(networks, images, labels, generator(0, "voxels"))
    again = method.voxels(networks, images, labels, generator(0, "voxels"))
    assert all(torch.equal(one, two) for one, two in zip(voxels, again, strict=True))
    assert voxels.features.shape == (80, 8) and voxels.places.shape == (80, 1 + len(space))
    with torch.no_grad():
        maps = networks["unet"].maps(images)[-1]
        logits = networks["unet"](images)
        features = networks["head"](maps.movedim(1, -1))
    where = tuple(voxels.places.T)
    torch.testing.assert_close(voxels.features, features[where])
    torch.testing.assert_close(voxels.probabilities, logits.softmax(dim=1).movedim(1, -1)[where])
    assert torch.equal(voxels.classes, labels[where])
    torch.testing.assert_close(voxels.entropy, voxel_entropy_by_definition(logits.softmax(dim=1))[where], atol=1e-5,
                               rtol=1e-5)  # fmt: skip
    assert voxels.reliable.tolist() == [False] * 40 + [True] * 40
    assert voxels.entropy[:40].min() > voxels.entropy[40:].max()
    assert len(voxels.queries) == 10 and voxels.queries.max() < 40
    pool = voxels.features[:40]
    near, far = nearest_and_farthest_by_definition(pool, voxels.queries, 4, 5)
    assert torch.equal(voxels.neighbors, near) and torch.equal(voxels.outsiders, far)
    torch.testing.assert_close(voxels.affinity, neighbor_affinity_by_definition(pool, voxels.queries, near))
    assert torch.equal(voxels.inlier, inlier_queries_by_definition(pool, voxels.queries, near, 8))


def test_voxels_refuses_what_it_cannot_show():
    method = build("dvcl", scale="ci")
    networks, images = method.networks(3), torch.rand(1, 1, *PATCH)
    with pytest.raises(ValueError, match="labels must be those of images"):
        method.voxels(networks, images, torch.zeros(1, 2, 2, 2), generator(0, "test"))
    with pytest.raises(ValueError, match="pool must be at most half"):
        dataclasses.replace(method, pool=10_000).voxels(networks, images, images[:, 0].long(), generator(0, "test"))
    plain = build("dvcl", scale="ci", hqcl=False, dvcl=False)
    with pytest.raises(ValueError, match="without features"):
        plain.voxels(plain.networks(3), images, images[:, 0].long(), generator(0, "test"))


# --- U2PL ------------------------------------------------------------------------------------------------------------


class Taught:
    """U2PL whose student and teacher are replaced by given logits and maps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any):
        self.work = begin("u2pl", **{**dict(patch=PATCH, width=4, steps=10, low_rank=2, high_rank=4), **settings})
        self.batch = self.work.draw()
        self.labels = self.batch["labels"]
        stream = generator(1, "designed")
        shape = (4, CLASSES, *self.labels.shape[1:])
        self.logits, self.taught = ((3 * torch.randn(shape, generator=stream)).requires_grad_() for _ in range(2))
        self.maps, self.taught_maps = (torch.randn(4, 4, *shape[2:], generator=stream) for _ in range(2))
        with torch.no_grad():  # the teacher's head is another one
            for p in self.work.head_teacher.network.parameters():
                p.add_(0.1)
        monkeypatch.setattr(self.work, "outputs", lambda images, labelled: [self.logits, self.maps])
        network = self.work.teacher.network
        monkeypatch.setattr(network, "maps", lambda images: [self.taught_maps])
        monkeypatch.setattr(network, "classifier", nn.Identity())
        network.classifier.forward = lambda maps: self.taught  # type: ignore[method-assign]
        self.recorder = Recorder(complementary_label_loss)
        monkeypatch.setattr(u2pl, "complementary_label_loss", self.recorder)

    def certain(self, share: float) -> Tensor:
        """(2, *space): the share of unlabelled voxels with the lowest entropy."""
        entropy = voxel_entropy_by_definition(self.taught[2:].detach().softmax(dim=1))
        return entropy <= entropy.flatten().sort().values[round(share * (entropy.numel() - 1))]


@pytest.mark.parametrize("done", [0, 5, 10])
def test_u2pl_learns_the_certain_decisions_of_its_teacher(monkeypatch, done):
    taught = Taught(monkeypatch)
    taught.work.done.fill_(done)
    terms = taught.work(**taught.batch)
    certain = taught.certain(1 - 0.2 * (1 - done / 10))
    wrong = nn.functional.cross_entropy(taught.logits[2:], taught.taught[2:].argmax(dim=1), reduction="none")
    torch.testing.assert_close(terms["consistency"], wrong[certain].mean(), atol=1e-4, rtol=1e-4)
    assert taught.taught.grad is None
    ramp = math.exp(-5 * (1 - done / 10) ** 2)
    expected = terms["supervised"] + ramp * terms["consistency"] + 0.1 * terms["complementary"]
    torch.testing.assert_close(terms["total"], expected)
    terms["total"].backward()
    assert taught.taught.grad is None


def test_u2pl_contrasts_with_complementary_labels(monkeypatch):
    taught = Taught(monkeypatch, confidence=0.5)
    terms = taught.work(**taught.batch)
    ((given, _, value),) = taught.recorder.calls
    anchors, classes, prototypes, negatives, complementary, temperature = given
    torch.testing.assert_close(terms["complementary"], value)
    assert temperature == 0.5 and anchors.requires_grad and not prototypes.requires_grad and not negatives.requires_grad
    chance = taught.taught.detach().softmax(dim=1).flatten(2).movedim(1, -1)  # (4, V, C)
    student, teacher = (
        head(maps.flatten(2).movedim(1, -1)).detach()
        for head, maps in (
            (taught.work.networks["head"], taught.maps),
            (taught.work.head_teacher.network, taught.taught_maps),
        )
    )
    truth = taught.labels.flatten(1)
    certain = taught.certain(0.8).flatten(1)
    rank = chance.argsort(dim=2, descending=True).argsort(dim=2)
    assert torch.equal(complementary.sum(dim=1), torch.ones(4 * 8)) and len(negatives) == 4 * 8
    for c in range(CLASSES):
        guess = certain & (chance[2:].argmax(dim=2) == c)
        eligible = torch.cat([truth == c, guess]) & (chance[..., c] > 0.5)
        mine = anchors[classes == c].detach()
        assert len(mine) == 16 and among(mine, student[eligible]).all()
        places = torch.cdist(mine.double(), student[eligible].double()).argmin(dim=1)
        torch.testing.assert_close(prototypes[c], teacher[eligible][places].mean(dim=0))
        known = (truth >= 0) & (truth != c) & (rank[:2, :, c] < 2)
        unknown = ~certain & (rank[2:, :, c] >= 2) & (rank[2:, :, c] < 4)
        entries = negatives[complementary[:, c]]
        assert len(entries) == 8
        of = [among(entries, teacher[:2][known]), among(entries, teacher[2:][unknown])]
        assert (of[0] | of[1]).all()
        bank = taught.work.bank["feature"][c][taught.work.bank.valid()[c]]
        of = [among(bank, teacher[:2][known]), among(bank, teacher[2:][unknown])]
        assert (of[0] | of[1]).all() and of[0].any() and of[1].any()


def test_u2pl_leaves_out_a_class_without_anchors(monkeypatch):
    taught = Taught(monkeypatch)
    with torch.no_grad():
        taught.taught[:, 1] = -50
    taught.work(**taught.batch)
    ((given, _, _),) = taught.recorder.calls
    complementary = given[4]
    assert not complementary[:, 1].any() and complementary[:, [0, 2, 3]].any(dim=0).all()


def test_the_heads_teacher_follows_too():
    work = begin("u2pl", patch=PATCH, ema=0.5)
    step(work)
    assert same(work.head_teacher.network, work.networks["head"]) and same(work.teacher.network, work.unet)
    before = work.head_teacher.network[0].weight.clone()
    step(work)
    expected = (before + work.networks["head"][0].weight) / 2
    torch.testing.assert_close(work.head_teacher.network[0].weight, expected)
