"""From a name and a folder to a measured result: read, split, prepare, train, evaluate, record."""

import copy
import dataclasses
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from medlib.data import Case, labelled_cases
from medlib.data.batches import Slices, TrainingData
from medlib.data.prepare import Prepared, learn_statistics, prepare
from medlib.data.splits import Split
from medlib.evaluate import Evaluation, evaluate, predict_volume
from medlib.methods.base import Method
from medlib.nets import parameter_count
from medlib.paths import DATA
from medlib.results import RunRecord, versions
from medlib.results.records import Part
from medlib.train import PRECISIONS, Callback, Predict, Trained, Validate, make_fabric, precision_of, predictor, train

CACHE = DATA / "cache"


def load(cases: Sequence[Case], split: Split, method: Method, *, progress: bool = True) -> TrainingData:
    """Prepare ``cases`` as ``method`` wants them and divide them by patient.

    Validation and test hold only scans with a label; training holds every scan of its patients, cine frames included.
    Where intensities are normalised by what is learnt over the data set, it is learnt from the labelled training
    patients alone.
    """
    protocol = method.protocol(cases[0].about)
    if protocol.normalise == "dataset":
        labelled = [case for case in labelled_cases(cases) if case.patient in split.labelled]
        statistics = learn_statistics(labelled, protocol, CACHE, progress=progress)
        protocol = dataclasses.replace(protocol, statistics=statistics)
    prepared = prepare(cases, protocol, CACHE, progress=progress)

    def of(patients: Sequence[str], labelled_only: bool) -> list[Prepared]:
        chosen = set(patients)
        return [one for one in prepared if one.case.patient in chosen and (one.case.labels or not labelled_only)]

    return TrainingData(
        info=cases[0].about,
        split=split,
        train=of(split.train, labelled_only=False),
        val=of(split.val, labelled_only=True),
        test=of(split.test, labelled_only=True),
    )


def prepared_dice(volumes: Sequence[Prepared], names: Sequence[str], device: torch.device) -> Validate:
    """A validation for the training loop: Dice per class on the prepared grid, mean over volumes that hold the class.

    Quick and one volume at a time, of whatever shape; the numbers that are reported come from `medlib.evaluate`, in
    native space.
    """
    labels = [torch.from_numpy(np.array(volume.label)) for volume in volumes]
    count = len(names)

    def validate(predict: Predict) -> Mapping[str, float]:
        confusions = []
        for volume, label in zip(volumes, labels, strict=True):
            predicted = predict_volume(predict, volume.inputs().to(device), batch_size=32).argmax(dim=0)
            pairs = predicted.to(device) * count + label.to(device)
            confusions.append(torch.bincount(pairs.flatten(), minlength=count * count).view(count, count).float())
        confusion = torch.stack(confusions)  # (volumes, predicted, true)
        mine, theirs = confusion.sum(dim=2), confusion.sum(dim=1)
        dice = 2 * confusion.diagonal(dim1=1, dim2=2) / (mine + theirs)  # (volumes, classes)
        dice[theirs == 0] = torch.nan  # a volume without the class says nothing about it
        return dict(zip(names[1:], dice.nanmean(dim=0)[1:].tolist(), strict=True))

    return validate


@dataclass
class Outcome:
    """A trained and measured method. ``test`` is None where it was not opened or there is no labelled test scan."""

    method: Method
    data: TrainingData
    seed: int
    trained: Trained
    val: Evaluation
    test: Evaluation | None
    predict: Predict
    device: str
    seconds: float

    @property
    def reported(self) -> tuple[Part, Evaluation]:
        """The evaluation to report and its name: "test" where it was opened, else "val"."""
        return ("test", self.test) if self.test is not None else ("val", self.val)

    def record(self, *, scale: str, root: str | os.PathLike[str] | None, command: str) -> RunRecord:
        """What this run leaves behind.

        Args:
            root: the folder of the real data (only its last name is kept), or None for phantoms.
            command: the command that repeats the run.
        """
        missing = {}
        if self.test is None:
            here = "was not opened" if self.data.test else "is empty: these data hold no labelled test scan"
            missing["test"] = f"the test split {here}"
        return RunRecord(
            method=self.method.name,
            variant=getattr(self.method, "variant", "paper"),
            settings=dataclasses.asdict(self.method),
            scale=scale,
            seed=self.seed,
            dataset=self.data.info.name,
            data={"kind": "phantom"} if root is None else {"kind": "real", "root": Path(root).name},
            split=self.data.split,
            versions=versions(),
            device=self.device,
            command=command,
            seconds={stage.name: stage.seconds for stage in self.trained.stages},
            parameters=parameter_count(self.trained.networks),
            val=self.val,
            test=self.test,
            missing=missing,
        )


@dataclass(frozen=True)
class SliceEmbeddings:
    """What a network makes of N slices, and which slices they are.

    ``features`` (N, D); ``positions`` (N,) in (0, 1]; ``patients`` and ``cases``, N names; ``images`` (N, S, S).
    """

    features: np.ndarray
    positions: np.ndarray
    patients: tuple[str, ...]
    cases: tuple[str, ...]
    images: np.ndarray

    @property
    def thumbnails(self) -> np.ndarray:
        """The slices in gray, (N, S, S) uint8: the 1st to the 99th percentile of all of them, from black to white."""
        low, high = np.percentile(self.images, (1, 99))
        return (255 * np.clip((self.images - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)


def embed_slices(
    outcome: Outcome, volumes: Sequence[Prepared], *, stage: str | None = None, head: bool = True
) -> SliceEmbeddings:
    """Every slice of ``volumes`` through the encoder of ``outcome``, whose method must have ``embed``.

    Args:
        stage: take the networks as they were at the end of that stage ("pretrain"); None: as they are now.
        head: with the projection head, where the method has one; else the encoder's pooled output.
    """
    networks = outcome.trained.networks
    if stage is not None:
        networks = copy.deepcopy(networks)
        networks.load_state_dict(outcome.trained.state(stage))
    if not head:
        networks = nn.ModuleDict({name: network for name, network in networks.items() if name != "head"})
    device = next(networks.parameters()).device
    slices = Slices.of(volumes, (), "cpu")
    embed = outcome.method.embed  # type: ignore[attr-defined]
    with torch.inference_mode():
        chunks = slices.images.float().unsqueeze(1).split(32)
        features = torch.cat([embed(networks, chunk.to(device)).float().cpu() for chunk in chunks])
    return SliceEmbeddings(
        features=features.numpy(),
        positions=slices.positions.numpy(),
        patients=tuple(slices.patients[i] for i in slices.patient.tolist()),
        cases=tuple(slices.cases[i] for i in slices.volume.tolist()),
        images=slices.images.float().numpy(),
    )


def dice_table(outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """A row per outcome: Dice of every structure and their mean, on test where it was opened, else on validation.

    The columns' name says which. Raises ValueError where outcomes were not measured on the same scans.
    """
    parts = {outcome.reported[0] for outcome in outcomes.values()}
    scans = {tuple(case.case for case in outcome.reported[1].cases) for outcome in outcomes.values()}
    if len(parts) != 1 or len(scans) != 1:
        raise ValueError(f"the outcomes were measured on different scans ({', '.join(sorted(parts))}): no one table")
    rows = {}
    for name, outcome in outcomes.items():
        found = outcome.reported[1].summary
        rows[name] = {c: values["dice"] for c, values in found["classes"].items()} | {"mean": found["mean"]["dice"]}
    table = pd.DataFrame.from_dict(rows, orient="index").round(3)
    table.columns.name = f"Dice, {parts.pop()}"
    return table


def run(
    method: Method,
    data: TrainingData,
    *,
    seed: int,
    output_dir: Path,
    device: str = "auto",
    precision: str | None = None,
    recompute: int = 0,
    open_test: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
    keep: Collection[int] = (),
) -> Outcome:
    """Train ``method`` on ``data``, then measure the last networks on validation and, when asked, on test.

    Args:
        seed: of the training; the split is the data's.
        device, precision: see `medlib.train.make_fabric`.
        open_test: also measure on the test patients: for the number that is reported, not for choosing.
        recompute, callback, keep: see `medlib.train.train`.
    """
    fabric = make_fabric(device, precision=precision)
    started = time.monotonic()
    trained = train(
        method,
        data,
        seed=seed,
        output_dir=output_dir,
        fabric=fabric,
        validate=prepared_dice(data.val, data.info.classes, fabric.device) if data.val else None,
        progress=progress,
        callback=callback,
        keep=keep,
        recompute=recompute,
    )

    predict = predictor(method, trained.networks, fabric)

    def measure(volumes: list[Prepared]) -> Evaluation:
        return evaluate(predict, volumes, data.info.classes, device=fabric.device)

    name = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type
    return Outcome(
        method=method,
        data=data,
        seed=seed,
        trained=trained,
        val=measure(data.val),
        test=measure(data.test) if open_test and data.test else None,
        predict=predict,
        device=name if (used := precision_of(fabric)) == PRECISIONS[0] else f"{name}, {used}",
        seconds=time.monotonic() - started,
    )
