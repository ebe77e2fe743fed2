"""What a run leaves behind: one JSON file that says what was run, on what, how long it took and what came out.

A record holds no path of the machine it was made on, so that it can be published as it is.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from medlib.data.splits import Split
from medlib.evaluate import METRICS, Evaluation
from medlib.methods import SCALES, Method, available, build
from medlib.paths import PROJECT, written_whole
from medlib.results.statistics import mean_std

SCHEMA = 1
SUFFIX = ".record.json"
Part = Literal["test", "val"]

# An absolute path starts a word, unlike a/b and https://x, with / or ~/ or C:\ or \\
_PATH = re.compile(r"(?<![\w.\-:/\\~])(?:file://)?(?:~?/|[A-Za-z]:[/\\]|\\\\)[^\s'\",;:)\]]+")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run of one method with one seed.

    - ``method``, ``variant``, ``settings``: the name given to `medlib.methods.build`, "paper" or "released", and all
      hyper-parameters as run; ``scale`` "ci", "laptop" or "paper"; ``seed``
    - ``dataset``, ``data``: the data set's name and what stood in for it: ``{"kind": "real" or "phantom", "root": its
      folder's name, ...}``; ``split`` the patients of each part
    - ``versions``, ``device``, ``command``: see `versions`; "cpu" or the GPU's name, and ", bf16-mixed" where not all
      was float32; the command that repeats the run
    - ``seconds`` per stage, ``parameters`` their number in all networks, heads and frozen ones included
    - ``val``, ``test``: the metrics of each case and class, or None, and then ``missing[part]`` says why
    - ``history``: the file of losses per step, relative to this record's folder, or None
    """

    method: str
    variant: str
    settings: Mapping[str, Any]
    scale: str
    seed: int
    dataset: str
    data: Mapping[str, Any]
    split: Split
    versions: Mapping[str, str]
    device: str
    command: str
    seconds: Mapping[str, float]
    parameters: int
    val: Evaluation | None
    test: Evaluation | None
    missing: Mapping[str, str] = field(default_factory=dict)
    history: str | None = None

    def __post_init__(self) -> None:
        for part in ("val", "test"):
            if getattr(self, part) is None and not self.missing.get(part):
                raise ValueError(f"missing[{part!r}] must say why there is no {part} evaluation")
        if self.data.get("kind") not in ("real", "phantom"):
            raise ValueError(f"data['kind'] must be 'real' or 'phantom', got {self.data.get('kind')!r}")
        if self.history is not None and without_paths(self.history) != self.history:
            raise ValueError(f"history must be relative to the record's folder, got {self.history!r}")

    @property
    def precision(self) -> str:
        """What it was computed in: "32-true", or "bf16-mixed"."""
        return self.device.partition(", ")[2] or "32-true"

    def evaluation(self, part: Part) -> Evaluation:
        """The evaluation of ``part``. Raises ValueError with the reason where there is none."""
        found: Evaluation | None = getattr(self, part)
        if found is None:
            raise ValueError(f"{self.method} seed {self.seed} has no {part} evaluation: {self.missing[part]}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: undefined numbers are None, absolute paths are cut down to their last name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["split"] = asdict(self.split)
        for part in ("val", "test"):
            values[part] = values[part] and values[part].to_dict()
        return {"schema": SCHEMA} | _plain(values)

    @classmethod
    def from_dict(cls, values: Any, source: str = "record") -> "RunRecord":
        """What `to_dict` wrote. Raises ValueError that names ``source`` and the key that is wrong."""
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{source}: 'schema' must be {SCHEMA}, got {found!r}: not a run record of this version")
        values = {key: value for key, value in values.items() if key != "schema"}
        for key in sorted(_KINDS.keys() | values.keys()):
            if key not in _KINDS or key not in values:
                raise ValueError(f"{source}: {'unknown key' if key in values else 'missing key'} {key!r}")
            kinds, value = _KINDS[key], values[key]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{source}: {key!r} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        values["split"] = _split(values["split"], source)
        for part in ("val", "test"):
            try:
                values[part] = None if values[part] is None else Evaluation.from_dict(values[part])
            except ValueError as error:
                raise ValueError(f"{source}: {part!r}: {error}") from None
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the record to ``path``, which must end in ".record.json", in one step: never a torn file."""
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            raise ValueError(
                f"a record's file name must end in {SUFFIX!r} for `load_records` to find it, got {path.name!r}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with written_whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        return path


_KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "variant": (str,),
    "settings": (dict,),
    "scale": (str,),
    "seed": (int,),
    "dataset": (str,),
    "data": (dict,),
    "split": (dict,),
    "versions": (dict,),
    "device": (str,),
    "command": (str,),
    "seconds": (dict,),
    "parameters": (int,),
    "val": (dict, type(None)),
    "test": (dict, type(None)),
    "missing": (dict,),
    "history": (str, type(None)),
}


def _split(values: Mapping[str, Any], source: str) -> Split:
    """The split of a record in a file."""
    parts = {}
    for part in ("labelled", "unlabelled", "val", "test"):
        patients = values.get(part)
        if not isinstance(patients, list) or not all(isinstance(patient, str) for patient in patients):
            raise ValueError(f"{source}: 'split.{part}' must be a list of patients, got {patients!r}")
        parts[part] = tuple(patients)
    if not isinstance(values.get("name"), str):
        raise ValueError(f"{source}: 'split.name' must be str, got {values.get('name')!r}")
    return Split(name=values["name"], **parts)


def without_paths(text: str) -> str:
    """``text`` with each absolute path cut down to ".../" and its last name: "-p data_root .../ACDC"."""
    return _PATH.sub(lambda hit: ".../" + re.split(r"[/\\]", hit.group().rstrip("/\\"))[-1], text)


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return without_paths(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions that decide a result: python, torch, monai, numpy, medlib, and medlib's commit where git knows it."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "monai", "numpy", "medlib")}
    if not (PROJECT / ".git").exists():
        return found  # an installed copy: a repository further up is somebody else's
    try:
        command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return found  # no git
    return found | {"commit": commit}


def load_records(folder: str | os.PathLike[str]) -> list[RunRecord]:
    """All records (``*.record.json``) in ``folder`` and below, by file name.

    Raises FileNotFoundError when there is no such folder, ValueError that names the file and the key of a wrong record.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}, so no run records (*{SUFFIX}) in it")
    return [read_record(path) for path in sorted(Path(folder).rglob("*" + SUFFIX))]


def read_record(path: str | os.PathLike[str]) -> RunRecord:
    """The record in one file. Raises ValueError that names the file and what is wrong with it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return RunRecord.from_dict(values, str(path))


def full_settings(record: RunRecord) -> dict[str, Any]:
    """The settings of a run; one that is younger than its record had its default then, that of the record's scale."""
    if record.method not in available() or record.scale not in SCALES:
        return dict(record.settings)
    return build(record.method, scale=record.scale).plain() | dict(record.settings)


def departures(record: RunRecord, method: Method) -> dict[str, Any]:
    """The settings of a run that are not those of ``method``, by name. None: the run is one of ``method``."""
    usual = method.plain()
    return {name: value for name, value in full_settings(record).items() if name not in usual or usual[name] != value}


def _decided(names: Sequence[str], record: RunRecord) -> tuple[Any, ...]:
    """What was run: the method, its variant, and those of its settings."""
    settings = full_settings(record)
    return record.method, record.variant, {name: settings.get(name) for name in names}


def _method(record: RunRecord) -> str:
    return record.method


def table(
    records: Sequence[RunRecord],
    *,
    part: Part = "test",
    metric: str = "dice",
    label: Callable[[RunRecord], str] = _method,
    mix: Collection[str] = (),
) -> pd.DataFrame:
    """Seeds side by side: one row per (method, labelled patients), in the order they first occur.

    part: "test" or "val". metric: one of `medlib.evaluate.METRICS`, or "pooled_dice". label: the name of a record's
    row; runs of one method under different settings need names of their own. Columns: ``n`` seeds, ``mean`` and ``std``
    (sample, over seeds) of the mean over foreground classes, the mean of each class, and ``missed``, the class-volumes
    per seed that were not predicted at all.

    Raises ValueError when records that belong to different tables are given: another data set, data (real or phantom,
    root), scale, or evaluated patients, and within a row other settings or other labelled patients. ``mix`` names those
    that are meant: "dataset", "data", "scale", "split", "settings". Also for a seed that occurs twice in a row, and for
    a record without the ``part``. A number that one seed lacks (a distance where a class was always missed) is NaN.
    """
    if metric not in (*METRICS, "pooled_dice"):
        raise ValueError(f"there is no metric {metric!r}; choose from {(*METRICS, 'pooled_dice')}")
    facts = {
        "dataset": lambda r: r.dataset,
        "data": lambda r: (r.data["kind"], r.data.get("root")),
        "scale": lambda r: r.scale,
        "split": lambda r: (r.split.name, sorted(getattr(r.split, part))),
    }
    _refuse(records, facts, mix, "records")
    rows: dict[tuple[str, int], list[RunRecord]] = defaultdict(list)
    for record in records:
        rows[label(record), len(record.split.labelled)].append(record)
    summary = {}
    for key, group in rows.items():
        named = sorted({name for record in group for name in record.settings})
        within: dict[str, Callable[[RunRecord], Any]] = {
            "split": lambda r: sorted(r.split.labelled),
            "settings": partial(_decided, named),
        }
        _refuse(group, within, mix, f"the runs of {key[0]!r} with {key[1]} labelled patients")
        seeds = [record.seed for record in group]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{key[0]!r} with {key[1]} labelled patients has a seed twice: {sorted(seeds)}")
        found = [record.evaluation(part) for record in group]
        if metric == "pooled_dice":
            classes = [dict(evaluation.pooled) for evaluation in found]
            means = [sum(values.values()) / len(values) for values in classes]
        else:
            classes = [{name: c[metric] for name, c in e.summary["classes"].items()} for e in found]
            means = [evaluation.summary["mean"][metric] for evaluation in found]
        mean, std = (math.nan, math.nan) if any(math.isnan(m) for m in means) else mean_std(means)[:2]
        summary[key] = {"n": len(group), "mean": mean, "std": std}
        summary[key] |= pd.DataFrame(classes).mean(skipna=False).to_dict()
        summary[key] |= {"missed": sum(evaluation.summary["missed"] for evaluation in found) / len(group)}
    index = pd.MultiIndex.from_tuples(list(summary), names=["method", "labelled"])
    return pd.DataFrame(list(summary.values()), index=index)


def seeds_table(
    records: Sequence[RunRecord], *, part: Part = "val", label: Callable[[RunRecord], str] = _method
) -> pd.DataFrame:
    """`table` for reading: the mean Dice of a row as "mean ± std", a column for each number of labelled patients.

    The standard deviation is over seeds; their number follows in brackets where it is not three.
    """
    found = table(records, part=part, label=label)
    text = [
        f"{mean:.3f}" + (f" ± {std:.3f}" if n > 1 else "") + (f" ({n})" if n != 3 else "")
        for n, mean, std in zip(found["n"], found["mean"], found["std"], strict=True)
    ]
    shown = pd.Series(text, found.index).unstack()
    shown = shown.reindex(dict.fromkeys(found.index.get_level_values("method")))
    return shown[sorted(shown)].rename(columns="{} labelled".format).rename_axis(index=None, columns=None)


def _refuse(
    records: Sequence[RunRecord], facts: Mapping[str, Callable[[RunRecord], Any]], mix: Collection[str], what: str
) -> None:
    for name, fact in facts.items():
        seen: list[Any] = []
        for record in records:
            if fact(record) not in seen:
                seen.append(fact(record))
        if len(seen) > 1 and name not in mix:
            raise ValueError(f"{what} differ in {name}: {seen}; choose one, or say mix=[{name!r}]")
