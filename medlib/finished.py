"""A finished run from its folder: networks, data and numbers as they were, without training anything."""

import copy
import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medlib import data
from medlib.data.batches import TrainingData
from medlib.data.prepare import Prepared
from medlib.experiment import Outcome, SliceEmbeddings, embed_slices, load
from medlib.methods import Method
from medlib.methods.base import available
from medlib.nets import channels_last, seeded_init
from medlib.paths import DATA, resolve, shorten
from medlib.results import RunRecord
from medlib.results.records import full_settings, read_record
from medlib.train import CHECKPOINT, StageResult, Trained, make_fabric, predictor, stage_key


def method_of(record: RunRecord, source: str = "record") -> Method:
    """The method with the settings of ``record``. ValueError names ``source`` and what this version does not know."""
    methods = available()
    if record.method not in methods:
        raise ValueError(f"{source}: there is no method {record.method!r}; there are {', '.join(sorted(methods))}")
    cls = methods[record.method]
    method = typing.cast(Method, _built(cls, full_settings(record), source))
    now = method.plain()
    if changed := sorted(name for name, value in record.settings.items() if now[name] != value):
        raise ValueError(f"{source}: settings {', '.join(changed)} cannot be read back by this version")
    return method


def _built(cls: type, settings: Mapping[str, Any], source: str) -> Any:
    """The dataclass ``cls`` from what ``dataclasses.asdict`` and JSON made of it."""
    hints = typing.get_type_hints(cls)
    known = {entry.name for entry in dataclasses.fields(cls)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{source}: {cls.__name__} has no setting {', '.join(unknown)} in this version")
    values = {}
    for name, value in settings.items():
        kinds = [hints[name], *typing.get_args(hints[name])]
        inner = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if inner and isinstance(value, Mapping):
            value = _built(typing.cast(type, inner[0]), value, source)
        elif isinstance(value, list) and any(typing.get_origin(kind) is tuple or kind is tuple for kind in kinds):
            value = tuple(tuple(one) if isinstance(one, list) else one for one in value)
        values[name] = value
    return cls(**values)


def reopen(
    record: str | os.PathLike[str],
    *,
    data_root: str | os.PathLike[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> Outcome:
    """What the run behind a record file left: its networks are read, its data prepared again, its numbers the record's.

    Args:
        data_root: the folder of the real scans; phantoms are drawn again where they are gone.
        output_dir: the folder that holds ``stages``; default: the one that holds the record's folder.

    Raises:
        FileNotFoundError: no record there, or a stage whose checkpoint is gone; nothing is trained.
        ValueError: the record is of another version, or ``data_root`` is missing.
    """
    path = resolve(record)
    found, where = read_record(path), shorten(path)
    method = method_of(found, where)
    folder = resolve(output_dir) if output_dir is not None else path.parent.parent
    loaded = load(data.read_dataset(found.dataset, _root(found, data_root, where)), found.split, method, progress=False)
    fabric = make_fabric(device)
    with seeded_init(found.seed, "weights"):
        networks = method.networks(loaded.classes)
    channels_last(networks.to(fabric.device))
    stages = []
    for stage in method.stages(loaded):
        keys = [stage_key(stage, loaded, found.seed, networks, precision) for precision in (found.precision, "")]
        folders = [folder / "stages" / f"{method.name}-{stage.name}-{key}" for key in keys]
        finished = [(key, one) for key, one in zip(keys, folders, strict=True) if (one / CHECKPOINT).exists()]
        if not finished:
            raise FileNotFoundError(
                f"{where}: stage {stage.name!r} is not in {shorten(folder / 'stages')} (looked for "
                f"{' and '.join(one.name for one in folders)}): "
                "it was deleted, or trained on other scans or by another version"
            )
        key, one = finished[0]
        saved = torch.load(one / CHECKPOINT, map_location=fabric.device, weights_only=True)
        if saved["step"] < stage.steps:
            raise FileNotFoundError(f"{where}: {one.name} is unfinished, at step {saved['step']} of {stage.steps}")
        networks.load_state_dict(saved["networks"])
        stages.append(StageResult(stage.name, key, one, stage.steps, saved["seconds"], reused=True))
    networks.requires_grad_(True).eval()
    if found.val is None:
        raise ValueError(f"{where}: it has no validation numbers: {found.missing['val']}")
    return Outcome(
        method=method,
        data=loaded,
        seed=found.seed,
        trained=Trained(networks, stages),
        val=found.val,
        test=found.test,
        predict=predictor(method, networks, fabric),
        device=found.device,
        seconds=sum(found.seconds.values()),
    )


def _root(record: RunRecord, data_root: str | os.PathLike[str] | None, where: str) -> Path:
    if data_root is not None:
        return resolve(data_root)
    if record.data["kind"] != "phantom":
        raise ValueError(f"{where} is of real scans ({record.data.get('root')}): give their folder as data_root")
    split = record.split
    patients = len({*split.labelled, *split.unlabelled, *split.val, *split.test})
    return data.write_phantoms(record.dataset, DATA / "phantoms" / f"{record.dataset}-{patients}", patients, seed=0)


def embeds_slices(method: Method) -> bool:
    """Whether `embed_slices` works with ``method``: a 2D one that has an embedding."""
    return hasattr(method, "embed") and method.patch is None


def kept_steps(stage: StageResult) -> list[int]:
    """The steps of ``stage`` whose weights were kept."""
    found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in stage.folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def embeddings_over_training(outcome: Outcome, volumes: Sequence[Prepared]) -> dict[int, SliceEmbeddings]:
    """Every slice of ``volumes`` as the network embeds it after each kept step of its first stage, and at its end.

    The first stage is the pre-training, where there is one. Step 0 is there in any case: initial weights follow from
    the seed.
    """
    stage = outcome.trained.stages[0]
    with seeded_init(outcome.seed, "weights"):
        initial = outcome.method.networks(outcome.data.classes)
    states: dict[int, Mapping[str, torch.Tensor]] = {0: initial.state_dict()}
    states |= {step: outcome.trained.state(stage.name, step) for step in kept_steps(stage) if 0 < step < stage.steps}
    states[stage.steps] = outcome.trained.state(stage.name)
    return {step: embed_slices(_with(outcome, state), volumes) for step, state in states.items()}


def _with(outcome: Outcome, state: Mapping[str, torch.Tensor]) -> Outcome:
    """``outcome`` with its networks as they were in ``state``."""
    networks: nn.ModuleDict = copy.deepcopy(outcome.trained.networks)
    networks.load_state_dict(state)
    return dataclasses.replace(outcome, trained=Trained(networks.eval(), outcome.trained.stages))


def measured_volumes(loaded: TrainingData) -> list[Prepared]:
    """The scans to explore: validation patients, else training patients."""
    return loaded.val or loaded.train
