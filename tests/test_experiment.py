"""What a notebook does with a finished run: embeddings of slices, a table, and what it refuses to mix."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from medlib.data import Case, DatasetInfo, Split, VolumeProtocol, dataset_info, read_dataset
from medlib.data.batches import ShuffledRows, TrainingData
from medlib.data.prepare import Prepared
from medlib.evaluate import CaseMetrics, Evaluation, volume_metrics
from medlib.experiment import Outcome, dice_table, embed_slices, load, prepared_dice, run
from medlib.losses.segmentation import cross_entropy_loss
from medlib.methods import build
from medlib.methods.base import Method, Stage, Streams, Work
from medlib.train import make_fabric, predictor, train
from tests.data.trees import write_official
from tests.tiny import SETTINGS, training_data, volume


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


# ---- volumes and 3D methods


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchFitting(Stage):
    """Cross-entropy on patches of the labelled volumes."""

    patch: tuple[int, int, int]

    def begin(self, networks: nn.ModuleDict, data: TrainingData, streams: Streams) -> Work:
        return PatchWork(self, networks, data, streams)


class PatchWork(Work):
    def __init__(self, stage: PatchFitting, networks: nn.ModuleDict, data: TrainingData, streams: Streams):
        super().__init__()
        self.streams, self.network = streams, networks["network"]
        self.patches = data.patches(streams.device, stage.patch)
        rows = self.patches.labelled.nonzero().squeeze(1)
        self.samplers = {"labelled": ShuffledRows(rows, 4, streams["sample"])}
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    def draw(self) -> dict[str, torch.Tensor]:
        images, labels = self.patches.batch(self.samplers["labelled"].draw(), self.streams.own("patches"))
        return {"images": images, "labels": labels}

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"total": cross_entropy_loss(self.network(images), labels)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Volumes(Method):
    """The smallest 3D method there is: one convolution behind another."""

    name: ClassVar[str] = "volumes"
    title: ClassVar[str] = "volumes"
    image_size: int = 0
    spacing: float | None = None
    patch: tuple[int, int, int] = (4, 16, 16)

    def protocol(self, info: DatasetInfo) -> VolumeProtocol:
        return VolumeProtocol((5.0, 1.5, 1.5), normalise="dataset", clip=(0.5, 99.5))

    def networks(self, classes: int) -> nn.ModuleDict:
        layers = nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, classes, 1)
        return nn.ModuleDict({"network": nn.Sequential(*layers)})

    def stages(self, data: TrainingData) -> list[Stage]:
        return [PatchFitting(name="fit", steps=40, uses_labels=True, patch=self.patch)]

    def predict(self, networks: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[2:] == self.patch, "a network must see windows of the patch size, nothing else"
        return networks["network"](images).softmax(dim=1)


SPLIT = Split("tiny", ("patient001",), ("patient002",), ("patient003",), ("patient004",))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("medlib.experiment.CACHE", tmp_path / "cache")
    return write_official(tmp_path / "ACDC", training=4)


def load_tree(tree: Path) -> TrainingData:
    return load(read_dataset("acdc", tree), SPLIT, Volumes(), progress=False)


def plant(tree: Path, patient: str) -> None:
    """An outlier in the foreground of both frames of a patient."""
    for path in tree.rglob(f"{patient}_frame*_gt.nii.gz"):
        scan = path.with_name(path.name.replace("_gt", ""))
        image = nibabel.load(scan)
        voxels = np.asarray(image.dataobj, np.float32)
        voxels[np.asarray(nibabel.load(path).dataobj) > 0] = 30_000
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine), scan)


def test_statistics_come_from_the_labelled_training_patients_alone(tree: Path) -> None:
    before = load_tree(tree).train[0].protocol.statistics
    assert before is not None and before.mean < 1000
    for patient in ("patient002", "patient003", "patient004"):  # unlabelled, validation, test
        plant(tree, patient)
        data = load_tree(tree)
        assert {item.protocol.statistics for item in data.train + data.val + data.test} == {before}
    plant(tree, "patient001")
    assert load_tree(tree).train[0].protocol.statistics.mean > 1000


def test_a_method_gets_the_window_of_the_data_set() -> None:
    info = dataclasses.replace(dataset_info("acdc"), window=(-125.0, 275.0))
    method = build("supervised", scale="ci")
    assert method.protocol(info).window == (-125, 275) and method.protocol(dataset_info("acdc")).window is None


def test_slices_fill_the_picture_on_every_data_set() -> None:
    laptop = build("supervised", scale="laptop")  # 80 px of 3 mm, for hearts
    assert laptop.protocol(dataset_info("acdc")).spacing == 3.0
    assert build("supervised").protocol(dataset_info("acdc")).spacing == 1.25
    small = dataclasses.replace(dataset_info("msd"), size=48, spacing=1.0)
    assert laptop.protocol(small).spacing == 48 / 80
    assert laptop.protocol(dataset_info("btcv")).spacing is None, "the whole field of view"


def test_a_3d_method_is_trained_validated_and_measured_like_any_other(tree: Path, tmp_path: Path) -> None:
    data = load_tree(tree)
    lines = []
    outcome = run(
        Volumes(), data, seed=0, output_dir=tmp_path / "runs", device="cpu", open_test=True, progress=False,
        callback=lambda stage, step, terms: lines.append(terms),
    )  # fmt: skip
    validated = [terms["val_dice"] for terms in lines if "val_dice" in terms]
    assert len(validated) == 4 and set(validated[0]) == {"RV", "MYO", "LV"}
    assert outcome.test is not None and outcome.val.summary["unit"] == "mm"
    assert outcome.val.summary["mean"]["dice"] > 0.5
    native = np.mean(list(validated[-1].values()))
    assert outcome.val.summary["mean"]["dice"] == pytest.approx(native, abs=0.1), "the same on another grid"
    assert outcome.record(scale="ci", root=None, command="").settings["patch"] == (4, 16, 16)


def test_validation_is_dice_per_volume_over_volumes_of_any_shape() -> None:
    def scan(shape: tuple[int, int, int], seed: int, highest: int) -> Prepared:
        label = np.random.default_rng(seed).integers(0, highest + 1, shape).astype(np.uint8)
        case = Case(dataset_info("acdc"), f"p{seed}", f"p{seed}", (), (), "acdc_nifti")
        return Prepared(case, VolumeProtocol(None), label.astype(np.float16), label, shape, None)

    volumes = [scan((3, 4, 5), 0, 3), scan((5, 8, 6), 1, 2)]  # class 3 is absent from the second

    def wrong_where_two(images: torch.Tensor) -> torch.Tensor:
        labels = images[:, 0].round().long()
        labels = torch.where((labels == 0) & (labels.max() < 3), 3, labels)  # class 3 where there is none: no matter
        return nn.functional.one_hot(torch.where(labels == 2, 1, labels), 4).movedim(-1, 1).float()

    names = ("background", "RV", "MYO", "LV")
    found = prepared_dice(volumes, names, torch.device("cpu"))(wrong_where_two)
    ones = [(int((v.label == 1).sum()), int((v.label == 2).sum())) for v in volumes]
    assert found["RV"] == pytest.approx(np.mean([2 * a / (2 * a + b) for a, b in ones]))
    assert (found["MYO"], found["LV"]) == (0, 1)
    slices = [volume("patient001", depth=4), volume("patient002", depth=7)]
    perfect = {image.tobytes(): label for one in slices for image, label in zip(one.image, one.label, strict=True)}

    def knows(images: torch.Tensor) -> torch.Tensor:
        labels = np.stack([perfect[image[0].numpy().astype(np.float16).tobytes()] for image in images])
        return nn.functional.one_hot(torch.from_numpy(labels).long(), 4).movedim(-1, 1).float()

    dice = prepared_dice(slices, names, torch.device("cpu"))(knows)
    assert dice["MYO"] == dice["LV"] == 1 and np.isnan(dice["RV"]), "no volume has an RV"
