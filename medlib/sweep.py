"""Many runs of one comparison: methods x settings x labelled patients x seeds, one record each, resumable."""

import itertools
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medlib import experiment
from medlib.data import read_dataset
from medlib.data.phantoms import is_phantom
from medlib.data.splits import Split, split_cases
from medlib.methods import Method, build
from medlib.nets import recompute_levels, seeded_init
from medlib.paths import make_folder, resolve
from medlib.results.records import SUFFIX, RunRecord, departures, read_record
from medlib.train import PRECISIONS, make_fabric


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid of runs.

    Attributes:
        dataset, root: the data set's name and its folder; ``phantom`` says that the folder holds phantoms.
        methods, labelled, seeds: the axes of the grid: names, numbers of labelled patients, seeds of the training.
        settings: what all its methods are built with, on top of ``scale``; ``name`` tells such runs apart.
        ablations: another axis: by name, settings on top of those. A run is the one that its name (behind ``name`` and
            a +) and its settings would make without this axis; they share records.
        vary: further axes: values by the name of a setting. The name of a run then ends in +setting=value.
        records: folder of the records; a run that has one is not run again.
        output_dir: folder of the checkpoints, which runs share where their inputs agree.
        protocol: which patient lists, see `medlib.data.split_cases`.
        device, precision: see `medlib.train.make_fabric`.
        recompute: levels of the networks that take less memory and more time, see `medlib.train.train`.
        open_test: also measure on the test patients.
    """

    dataset: str
    root: Path
    methods: Sequence[str]
    labelled: Sequence[int]
    seeds: Sequence[int]
    records: Path
    scale: str = "laptop"
    device: str = "auto"
    precision: str | None = None
    recompute: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    ablations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    name: str = ""
    protocol: str = "common"
    phantom: bool = False
    open_test: bool = False
    output_dir: Path = Path("runs")

    def run(self) -> None:
        """Run what has no record yet.

        Before the first run starts every method and its networks are built, every split is made, and every record that
        is there is read: what cannot be run is refused then.
        """
        cases = read_dataset(self.dataset, resolve(self.root))
        rows = self._rows()
        methods = {
            (method, row): build(method, scale=self.scale, **settings)
            for method, (row, settings) in itertools.product(self.methods, rows.items())
        }
        splits = {
            count: split_cases(self.dataset, cases, protocol=self.protocol, labelled=count) for count in self.labelled
        }
        make_folder(resolve(self.records), "records")
        make_folder(resolve(self.output_dir), "output_dir")
        grid = {
            resolve(self.records) / record_name(name, row, labelled, seed): (seed, labelled, name, row)
            for seed, labelled, (name, row) in itertools.product(self.seeds, self.labelled, methods)
        }
        make_fabric(self.device, precision=self.precision)
        for method in methods.values():
            method.protocol(cases[0].about)
            with seeded_init(0):
                recompute_levels(method.networks(len(cases[0].about.classes)), self.recompute)
        for path, (seed, labelled, name, row) in grid.items():
            if path.exists():
                self._check_same(read_record(path), methods[name, row], seed, splits[labelled], path)
        for number, (path, (seed, labelled, name, row)) in enumerate(grid.items(), start=1):
            method = methods[name, row]
            if path.exists():  # from the start, or made meanwhile by another sweep
                self._check_same(read_record(path), method, seed, splits[labelled], path)
                print(f"[{number}/{len(grid)}] {path.name}: there already", flush=True)
                continue
            started = time.monotonic()
            outcome = experiment.run(
                method,
                experiment.load(cases, splits[labelled], method),
                seed=seed,
                output_dir=resolve(self.output_dir),
                device=self.device,
                precision=self.precision,
                recompute=self.recompute,
                open_test=self.open_test,
            )
            root = None if self._drawn else self.root
            command = self.command(name, row, labelled, seed)
            outcome.record(scale=self.scale, root=root, command=command).save(path)
            dice, took = outcome.val.summary["mean"]["dice"], time.monotonic() - started
            print(f"[{number}/{len(grid)}] {path.name}: validation Dice {dice:.3f}, {took:.0f} s", flush=True)

    def __post_init__(self) -> None:
        for name in (self.name, *self.ablations):
            if not re.fullmatch(r"[\w.=+]*", name):
                raise ValueError(f"name becomes part of file names: letters, digits and ._=+ only, got {name!r}")
        for setting, values in self.vary.items():
            if isinstance(values, str) or not values:
                raise ValueError(f"{setting} is varied without values: name at least one")
            for value in values:
                if not re.fullmatch(r"[\w.-]+", str(value)):
                    raise ValueError(
                        f"{setting} cannot be varied to {value!r}, which does not fit into a file name: "
                        f"write --ablation NAME {setting}=VALUE"
                    )
            if len(set(values)) < len(values):  # of what fits into a name, so that all can be compared
                raise ValueError(f"{setting} takes a value twice: {list(values)}")
        for row in (self.settings, *self.ablations.values(), self.vary):
            if odd := sorted({"name", "scale", "seed", "labelled"} & row.keys()):
                raise ValueError(f"{', '.join(odd)} is no setting of a method: use the sweep's own option")
            if row is not self.vary and (twice := sorted(self.vary.keys() & row.keys())):
                raise ValueError(f"{', '.join(twice)} is both varied and set")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        for each in itertools.product(self.methods, self._rows(), self.labelled, self.seeds):
            if len(file := record_name(*each)) > 200:  # file systems end at 255, and a file being written has some more
                raise ValueError(f"name makes a file name of {len(file)} letters, at most 200 fit: {file}")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be 0 or more, got {list(self.seeds)}")

    def _rows(self) -> dict[str, dict[str, Any]]:
        """The settings by name, one entry for each ablation with each combination of what varies."""
        rows = {}
        for row, own in (self.ablations or {"": {}}).items():
            for values in itertools.product(*self.vary.values()):
                varied = dict(zip(self.vary, values, strict=True))
                parts = (self.name, row, *(f"{setting}={value}" for setting, value in varied.items()))
                rows["+".join(part for part in parts if part)] = {**self.settings, **own, **varied}
        return rows

    @property
    def _drawn(self) -> bool:
        return self.phantom or is_phantom(resolve(self.root))

    def _check_same(self, record: RunRecord, method: Method, seed: int, split: Split, path: Path) -> None:
        """ValueError unless the record on disk is of the run that is asked for."""
        differing = sorted(departures(record, method)) if record.method == method.name else []
        facts = {
            "method": record.method != method.name,
            "seed": record.seed != seed,
            "scale": record.scale != self.scale,
            "data set": (record.dataset, record.data["kind"]) != (self.dataset, "phantom" if self._drawn else "real"),
            "precision": self.precision not in (None, record.precision),
            "patients": record.split != split,
            "test": self.open_test and record.test is None and bool(split.test),
        }
        differing += [name for name, other in facts.items() if other]
        if differing:
            raise ValueError(
                f"{path.name} is of a run with other settings ({', '.join(differing)}); "
                "tell the two apart with --name, or choose another --records folder"
            )

    def command(self, method: str, row: str, labelled: int, seed: int) -> str:
        """The command that makes one record again."""
        words: list[object] = ["python", "-m", "medlib", "sweep", self.dataset, "ROOT", "--methods", method]
        words += ["--labelled", labelled, "--seeds", seed, "--scale", self.scale, "--records", "RECORDS"]
        words += [word for pair in self._rows()[row].items() for word in ("-s", *pair)]
        words += ["--name", row] if row else []
        words += ["--protocol", self.protocol] if self.protocol != "common" else []
        words += ["--precision", self.precision] if self.precision else []
        words += ["--recompute", self.recompute] if self.recompute else []
        words += ["--phantom"] if self.phantom else []
        words += ["--open-test"] if self.open_test else []
        return shlex.join(str(word) for word in words)


def record_name(method: str, name: str, labelled: int, seed: int) -> str:
    """The file name of one run's record."""
    return "-".join(part for part in (method, name, f"{labelled}p", f"s{seed}") if part) + SUFFIX
