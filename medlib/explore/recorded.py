"""A run to explore at once: recorded in one small file, or read from a finished run's folder, without training."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
import numpy as np

from medlib.explore.embedding import embedding_explorer
from medlib.explore.history import history_explorer
from medlib.explore.pixels import to_gray
from medlib.explore.show import Explorer
from medlib.paths import DATA, make_folder, resolve, shorten, written_whole

if TYPE_CHECKING:  # opening a recorded file needs neither torch nor MONAI
    from medlib.experiment import Outcome

RECORDED = DATA / "recorded" / "acdc_phantom.npz"
LIMIT = 2_000_000  # bytes of a recording in the repository
FORMAT = 1
SHARES = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the first stage: most happens early
THIRDS = ("1st third", "2nd third", "3rd third")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """Validation slices of one run, as methods embed them over training, with what is known of each slice.

    ``features``: method -> step -> (N,D) · ``positions`` (N,) in (0, 1] · ``patients`` N names · ``thumbnails`` (N,h,w)
    uint8 · ``labels`` (N,h,w) uint8 or None · ``predictions``: method -> (N,h,w) uint8, after the last stage ·
    ``columns``: name -> N numbers or texts · ``groups`` N names or None · ``classes``, ``colours`` of the labels ·
    ``title``, and ``command``, which repeats the run.
    """

    title: str
    command: str
    features: Mapping[str, Mapping[int, np.ndarray]]
    positions: np.ndarray
    patients: Sequence[str]
    thumbnails: np.ndarray
    labels: np.ndarray | None = None
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: Sequence[str] | None = None
    classes: Sequence[str] = ()
    colours: Sequence[str] = ()

    def embedding(self, **settings: Any) -> Explorer:
        """The slices at the end of the first stage; ``settings`` as in `embedding_explorer`."""
        last = {name: snapshots[max(snapshots)] for name, snapshots in self.features.items()}
        given = {"columns": self.columns, "labels": self.labels, "predictions": self.predictions or None}
        look = {"classes": self.classes, "colours": self.colours, "title": self.title}
        places = self.positions, self.patients, self.thumbnails, self.groups
        return embedding_explorer(last, *places, **{**given, **look, **settings})

    def training(self, **settings: Any) -> Explorer:
        """How the slices came to lie so, for the first three methods; clusters are the thirds of the position.

        ``settings`` as in `history_explorer`.
        """
        film = {name: snapshots for name, snapshots in self.features.items() if len(snapshots) > 1}
        if not film:
            raise ValueError("only one step of each method is there: train with keep=... to see more")
        first = dict(list(film.items())[:3])
        places = self.positions, self.patients, thirds(self.positions), self.thumbnails
        return history_explorer(first, *places, **{"title": f"{self.title}, over training", **settings})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one .npz: features as float16 about their mean, pictures as uint8."""
        path = resolve(path)
        if path.suffix != ".npz":
            raise ValueError(f"a recording is written to a .npz file, got {path.name!r}")
        if used := sorted({"position", "patient", "group"} & set(self.columns)):
            raise ValueError(f"columns {used} are there already: give them another name")
        methods = list(self.features)
        about = {
            "format": FORMAT, "title": self.title, "command": self.command, "methods": methods,
            "columns": list(self.columns), "classes": list(self.classes), "colours": list(self.colours),
        }  # fmt: skip
        arrays: dict[str, np.ndarray] = {
            "about": np.array(json.dumps(about)),
            "positions": np.asarray(self.positions, np.float32),
            "patients": np.array([str(p) for p in self.patients]),
            "thumbnails": np.asarray(self.thumbnails, np.uint8),
        }
        if self.labels is not None:
            arrays["labels"] = np.asarray(self.labels, np.uint8)
        if self.groups is not None:
            arrays["groups"] = np.array([str(group) for group in self.groups])
        for i, name in enumerate(methods):
            if name in self.predictions:
                arrays[f"prediction/{i}"] = np.asarray(self.predictions[name], np.uint8)
            for step, features in self.features[name].items():
                arrays[f"features/{i}/{step}"], arrays[f"about them/{i}/{step}"] = _packed(features)
        for i, values in enumerate(self.columns.values()):
            column = np.asarray(values)
            arrays[f"column/{i}"] = column.astype(np.float16) if column.dtype.kind == "f" else column
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            np.savez_compressed(unfinished, allow_pickle=False, **arrays)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RecordedRun":
        """What `save` wrote. ValueError that names the file where it is anything else."""
        where = shorten(resolve(path))
        try:
            with np.load(resolve(path), allow_pickle=False) as file:
                arrays = dict(file.items())
            about = json.loads(str(arrays["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']}, this version reads {FORMAT}")
            features: dict[str, dict[int, np.ndarray]] = {name: {} for name in about["methods"]}
            for key in arrays:
                kind, *rest = key.split("/")
                if kind == "features":
                    one = _unpacked(arrays[key], arrays["/".join(["about them", *rest])])
                    features[about["methods"][int(rest[0])]][int(rest[1])] = one
            named = {name: arrays.get(f"prediction/{i}") for i, name in enumerate(about["methods"])}
            columns = {name: arrays[f"column/{i}"] for i, name in enumerate(about["columns"])}
            return cls(
                title=about["title"],
                command=about["command"],
                features={name: dict(sorted(one.items())) for name, one in features.items()},
                positions=arrays["positions"],
                patients=arrays["patients"].tolist(),
                thumbnails=arrays["thumbnails"],
                labels=arrays.get("labels"),
                predictions={name: maps for name, maps in named.items() if maps is not None},
                columns={n: c.astype(np.float32) if c.dtype.kind == "f" else c for n, c in columns.items()},
                groups=arrays["groups"].tolist() if "groups" in arrays else None,
                classes=about["classes"],
                colours=about["colours"],
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{where} is not a recorded run ({error or type(error).__name__})") from error


def _packed(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,D) as float16 about their mean, in parts of the largest; and (D+1,) float32, that mean and that largest.

    Embeddings that have collapsed differ in their fourth digit, which float16 alone would round away.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        raise ValueError("features to record must be finite")
    middle = features.mean(axis=0)
    largest = max(float(np.abs(features - middle).max()), 1e-30)
    return ((features - middle) / largest).astype(np.float16), np.append(middle, largest).astype(np.float32)


def _unpacked(parts: np.ndarray, about: np.ndarray) -> np.ndarray:
    return (parts.astype(np.float32) * about[-1] + about[:-1]).astype(np.float32)


def thirds(positions: np.ndarray) -> list[str]:
    """The third of its scan that each slice, (N,) in (0, 1], lies in."""
    return [THIRDS[min(int(3 * p - 1e-6), 2)] for p in positions]


def record_outcomes(outcomes: Mapping[str, "Outcome"], *, title: str, command: str) -> RecordedRun:
    """The validation slices of finished runs on the same data, as a `RecordedRun`.

    ``outcomes``: names -> runs of methods that embed slices. Per method two columns are added: ``entropy``, the mean
    over the slice of the entropy of the predicted classes in parts of its maximum, and ``error``, the share of the
    structures' pixels (of label or prediction) where the two differ, not a number where there are none.
    """
    from medlib import finished
    from medlib.evaluate import predict_volume

    if not outcomes:
        raise ValueError("outcomes is empty: give at least one finished run")
    features, predictions, columns = {}, {}, {}
    scans: dict[str, tuple] = {}
    for name, outcome in outcomes.items():
        volumes = finished.measured_volumes(outcome.data)
        over = finished.embeddings_over_training(outcome, volumes)
        features[name] = {step: one.features for step, one in over.items()}
        slices = over[max(over)]
        scans[name] = slices.cases, slices.images.shape
        found = [predict_volume(outcome.predict, volume.inputs()).cpu().numpy() for volume in volumes]
        chances = np.concatenate([one.transpose(1, 0, 2, 3) for one in found])  # (N, C, S, S)
        predictions[name] = chances.argmax(axis=1).astype(np.uint8)
        entropy = -(chances * np.log(np.maximum(chances, 1e-12))).sum(axis=1).mean(axis=(1, 2))
        columns[f"entropy ({name})"] = (entropy / np.log(chances.shape[1])).astype(np.float32)
    if len(set(scans.values())) > 1:
        raise ValueError(f"the runs were prepared differently, so their slices are not the same: {list(scans)}")
    labels = None
    if all(volume.label is not None for volume in volumes):
        labels = np.concatenate([np.asarray(volume.label) for volume in volumes]).astype(np.uint8)
        for name, maps in predictions.items():
            wrong = (maps != labels).sum(axis=(1, 2))
            either = ((maps > 0) | (labels > 0)).sum(axis=(1, 2))
            error = np.where(either > 0, wrong / np.maximum(either, 1), np.nan)
            if np.isfinite(error).any():
                columns[f"error ({name})"] = error.astype(np.float32)
    groups = [str(volume.case.info.get("group", "")) for volume in volumes for _ in volume.image]
    columns["height"] = np.array(thirds(slices.positions))
    info = outcome.data.info
    return RecordedRun(
        title=title,
        command=command,
        features=features,
        positions=slices.positions,
        patients=slices.patients,
        thumbnails=to_gray(slices.images),
        labels=labels,
        predictions=predictions,
        columns=columns,
        groups=groups if any(groups) else None,
        classes=info.classes,
        colours=info.colours,
    )


def record_phantoms(
    output: str | os.PathLike[str] = RECORDED,
    *,
    methods: Sequence[str] = ("coral", "pcl"),
    scale: str = "laptop",
    ratio: float = 0.1,
    seed: int = 0,
    output_dir: str | os.PathLike[str] = "runs/recorded",
    device: str = "auto",
) -> RecordedRun:
    """Train ``methods`` on heart phantoms, keep their weights on the way, and write the recording to ``output``.

    What was trained before with the same inputs is taken from ``output_dir``. ValueError where the file exceeds 2 MB,
    what the repository takes; it is written all the same.
    """
    from medlib import data, experiment, finished
    from medlib.data.splits import split_cases
    from medlib.methods import build
    from medlib.notebook import PHANTOM_PATIENTS
    from medlib.results.records import SUFFIX
    from medlib.train import make_fabric

    chosen = [build(name, scale=scale) for name in methods]
    if unfit := [method.title for method in chosen if not finished.embeds_slices(method)]:
        raise ValueError(f"{', '.join(unfit)} does not embed slices")
    if resolve(output).suffix != ".npz" or resolve(output).is_dir():
        raise ValueError(f"output must be a .npz file, for a recording is one, got {resolve(output).name!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    make_folder(resolve(output).parent, "output")
    make_folder(resolve(output_dir), "output_dir")
    make_fabric(device)
    patients = PHANTOM_PATIENTS[scale]
    root = data.write_phantoms("acdc", DATA / "phantoms" / f"acdc-{patients}", patients, seed=0)
    cases = data.read_dataset("acdc", root)
    split = split_cases("acdc", cases, ratio, seed=0)
    command = f"python -m medlib record --methods {' '.join(methods)} --scale {scale} --ratio {ratio:g} --seed {seed}"
    outcomes = {}
    for method in chosen:
        loaded = experiment.load(cases, split, method)
        steps = method.stages(loaded)[0].steps
        keep = sorted({round(share * steps) for share in SHARES})
        where = resolve(output_dir)
        outcome = experiment.run(method, loaded, seed=seed, output_dir=where, device=device, keep=keep)
        name = f"{method.name}-{scale}-{len(split.labelled)}p-s{seed}{SUFFIX}"
        outcome.record(scale=scale, root=None, command=command).save(where / "records" / name)
        outcomes[method.title] = outcome
    run = record_outcomes(outcomes, title=f"Phantom hearts, scale {scale}", command=command)
    size = run.save(output).stat().st_size
    if size > LIMIT:
        raise ValueError(f"{shorten(resolve(output))} has {size:,} bytes; the repository takes {LIMIT:,}")
    return run


def open_run(
    path: str | os.PathLike[str] | None = None, *, data_root: str | os.PathLike[str] | None = None
) -> RecordedRun:
    """A run to explore, without training: ``open_run().training()``, ``open_run("runs").embedding()``.

    path: None for the recorded phantom run of this repository; a recording (.npz); a record (.record.json) of a run
    whose checkpoints are still there; or a folder of runs: the newest whose method embeds slices, with those of other
    methods on the same data, split, scale and seed · data_root: the folder of the scans, where they are real.
    """
    if path is None and not RECORDED.exists():
        raise FileNotFoundError(f"{shorten(RECORDED)} is missing; `python -m medlib record` trains and writes it")
    place = RECORDED if path is None else resolve(path)
    if place.suffix == ".npz":
        return RecordedRun.load(place)
    from medlib import finished
    from medlib.results.records import read_record

    records = _newest_together(place) if place.is_dir() else [place]
    outcomes = {}
    for one in records:
        outcome = finished.reopen(one, data_root=data_root)
        if not finished.embeds_slices(outcome.method):
            raise ValueError(f"{shorten(one)}: {outcome.method.title} does not embed slices")
        name = outcome.method.title
        outcomes[name if name not in outcomes else f"{name}, {one.name.removesuffix('.record.json')}"] = outcome
    first = read_record(records[0])
    source = "phantom" if first.data["kind"] == "phantom" else first.dataset.upper()
    return record_outcomes(outcomes, title=f"Validation slices, {source}", command=first.command)


def _newest_together(folder: Path) -> list[Path]:
    """The record files below ``folder`` of runs that can be compared with the newest, oldest first."""
    from medlib.methods.base import available
    from medlib.results.records import SUFFIX, read_record

    methods = available()
    found = sorted(folder.rglob("*" + SUFFIX), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{shorten(folder)} holds no run record (*{SUFFIX}); a run writes one")
    records = {path: read_record(path) for path in found}

    def facts(path: Path) -> tuple:
        record = records[path]
        prepared = [record.settings.get(name) for name in ("image_size", "spacing")]
        return record.dataset, json.dumps([record.data, prepared]), record.split, record.scale, record.seed

    kept = [path for path in found if hasattr(methods.get(records[path].method), "embed")]
    if not kept:
        raise ValueError(f"{shorten(folder)}: none of its {len(found)} runs is of a method that embeds slices")
    newest: dict[str, Path] = {}
    for path in kept:
        if facts(path) == facts(kept[-1]):
            newest[records[path].method] = path  # of one method, the last run
    return list(newest.values())


def explore(path: str | os.PathLike[str] | None = None, *, data_root: str | os.PathLike[str] | None = None) -> Explorer:
    """Both explorers of `open_run`, one behind the other: how the embedding formed, and where it ended."""
    run = open_run(path, data_root=data_root)
    last = run.embedding()
    if all(len(snapshots) < 2 for snapshots in run.features.values()):
        return last
    film = run.training()
    tabs = ipywidgets.Tab([film.widget, last.widget], titles=["through training", "at its end"])
    controls = {f"training {name}": control for name, control in film.controls.items()} | dict(last.controls)
    return Explorer(tabs, film.twin, film.alt, controls, {**film.figures, **last.figures})
