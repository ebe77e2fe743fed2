"""What a notebook does with a finished run: embeddings of slices, a table, and what it refuses to mix."""

import dataclasses

import numpy as np
import pytest
import torch

from medlib.evaluate import CaseMetrics, Evaluation, volume_metrics
from medlib.experiment import Outcome, dice_table, embed_slices
from medlib.methods import build
from medlib.train import make_fabric, predictor, train
from tests.tiny import SETTINGS, training_data


def evaluation(shift: int, case: str = "patient099_frame01") -> Evaluation:
    label = np.zeros((2, 8, 8), np.uint8)
    label[:, 2:5, 2:6] = 1
    names = ("background", "heart")
    metrics = volume_metrics(np.roll(label, shift, axis=2), label, names, None, distances=False)
    return Evaluation((CaseMetrics(case, "patient099", {}, metrics),), {"heart": 1.0})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    method = build("coral", scale="ci", frozen=False, **{k: v for k, v in SETTINGS.items() if k != "spacing"})
    data = training_data()
    folder = tmp_path_factory.mktemp("runs")
    trained = train(method, data, seed=0, output_dir=folder, fabric=make_fabric("cpu"), progress=False)
    predict = predictor(method, trained.networks, make_fabric("cpu"))
    return Outcome(method, data, 0, trained, evaluation(0), None, predict, "cpu", 1.0)


def test_embeddings_tell_which_slice_they_are(outcome: Outcome) -> None:
    found = embed_slices(outcome, outcome.data.val)
    assert found.features.shape == (5, SETTINGS["projection_dim"])
    np.testing.assert_allclose(found.positions, [0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(found.patients) == {"patient099"} and set(found.cases) == {"patient099_frame01"}
    assert found.images.shape == found.thumbnails.shape == (5, 32, 32)
    assert found.thumbnails.dtype == np.uint8 and (found.thumbnails.min(), found.thumbnails.max()) == (0, 255)


def test_a_stage_is_embedded_as_it_ended_and_the_head_can_be_left_out(outcome: Outcome) -> None:
    pretrained = embed_slices(outcome, outcome.data.val, stage="pretrain").features
    now = embed_slices(outcome, outcome.data.val).features
    assert not np.allclose(pretrained, now)  # fine-tuning moved the encoder, which is not frozen
    np.testing.assert_array_equal(now, embed_slices(outcome, outcome.data.val, stage="finetune").features)
    assert embed_slices(outcome, outcome.data.val, head=False).features.shape == (5, 16 * SETTINGS["width"])
    with pytest.raises(ValueError, match="no stage 'cotrain'; there are pretrain, finetune"):
        embed_slices(outcome, outcome.data.val, stage="cotrain")
    assert isinstance(outcome.trained.state("pretrain")["contrast.loss.direction"], torch.Tensor)


def test_a_table_says_which_split_it_shows_and_does_not_mix_scans(outcome: Outcome) -> None:
    other = dataclasses.replace(outcome, val=evaluation(2))
    table = dice_table({"a": outcome, "b": other})
    assert table.columns.name == "Dice, val" and list(table.columns) == ["heart", "mean"]
    np.testing.assert_allclose(table["mean"], [1.0, 0.5])
    tested = dataclasses.replace(outcome, test=evaluation(0))
    assert tested.reported[0] == "test" and dice_table({"a": tested}).columns.name == "Dice, test"
    with pytest.raises(ValueError, match="different scans"):
        dice_table({"a": outcome, "b": tested})
    with pytest.raises(ValueError, match="different scans"):
        dice_table({"a": outcome, "b": dataclasses.replace(outcome, val=evaluation(0, "patient098_frame01"))})
