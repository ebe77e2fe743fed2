"""From a name and a folder to a measured result: read, split, prepare, train, evaluate, record."""

import copy
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from medlib.data import Case
from medlib.data.batches import Slices, TrainingData
from medlib.data.prepare import Prepared, prepare
from medlib.data.splits import Split
from medlib.evaluate import Evaluation, evaluate
from medlib.methods.base import Method
from medlib.nets import parameter_count
from medlib.paths import DATA
from medlib.results import RunRecord, versions
from medlib.results.records import Part
from medlib.train import Callback, Predict, Trained, Validate, make_fabric, predictor, train

CACHE = DATA / "cache"


def load(cases: Sequence[Case], split: Split, method: Method, *, progress: bool = True) -> TrainingData:
    """Prepare ``cases`` as ``method`` wants them and divide them by patient.

    Validation and test hold only scans with a label; training holds every scan of its patients, cine frames included.
    """
    prepared = prepare(cases, method.protocol(), CACHE, progress=progress)

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

    Quick and on the device; the numbers that are reported come from `medlib.evaluate`, in native space.
    """
    images = torch.from_numpy(np.concatenate([volume.image for volume in volumes])).unsqueeze(1).to(device)
    masks = [volume.label for volume in volumes if volume.label is not None]
    labels = torch.from_numpy(np.concatenate(masks)).to(device)
    owner = torch.cat([torch.full((len(volume.image),), i) for i, volume in enumerate(volumes)]).to(device)
    classes = range(1, len(names))

    def validate(predict: Predict) -> Mapping[str, float]:
        predicted = torch.cat([predict(chunk.float()).argmax(dim=1) for chunk in images.split(32)])
        dice = []
        for c in classes:
            mine, theirs = predicted == c, labels == c
            counts = torch.stack([(mine & theirs).sum((1, 2)), mine.sum((1, 2)), theirs.sum((1, 2))], dim=1).float()
            volume = torch.zeros(len(volumes), 3, device=device).index_add_(0, owner, counts)
            there = volume[:, 2] > 0
            dice.append((2 * volume[there, 0] / volume[there, 1:].sum(dim=1)).mean())
        return dict(zip((names[c] for c in classes), torch.stack(dice).tolist(), strict=True))

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
    open_test: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> Outcome:
    """Train ``method`` on ``data``, then measure the last networks on validation and, when asked, on test.

    Args:
        seed: of the training; the split is the data's.
        open_test: also measure on the test patients: for the number that is reported, not for choosing.
        callback: see `medlib.train.train`.
    """
    fabric = make_fabric(device)
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
    )

    predict = predictor(method, trained.networks, fabric)

    def measure(volumes: list[Prepared]) -> Evaluation:
        return evaluate(predict, volumes, data.info.classes, device=fabric.device)

    return Outcome(
        method=method,
        data=data,
        seed=seed,
        trained=trained,
        val=measure(data.val),
        test=measure(data.test) if open_test and data.test else None,
        predict=predict,
        device=torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else fabric.device.type,
        seconds=time.monotonic() - started,
    )
