"""Many runs of one comparison: methods x labelled patients x seeds, one record each, resumable at any point."""

import argparse
import itertools
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from papermill.cli import _resolve_type

from medlib import experiment
from medlib.data import read_dataset
from medlib.data.splits import split_cases
from medlib.methods import SCALES, build
from medlib.paths import resolve
from medlib.results.records import SUFFIX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m medlib sweep``."""
    parser.add_argument("dataset", help="data set, such as acdc")
    parser.add_argument("root", type=Path, help="its folder")
    parser.add_argument("--methods", nargs="+", required=True, help="names as in medlib.methods")
    parser.add_argument("--labelled", nargs="+", type=int, required=True, metavar="N", help="labelled patients")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-s", "--setting", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--name", default="", help="told apart by this name where settings differ")
    parser.add_argument("--phantom", action="store_true", help="the folder holds phantoms; say so in the records")
    parser.add_argument("--open-test", action="store_true", help="also measure on the test patients")
    parser.add_argument(
        "--records", type=Path, required=True, help="folder of the records; runs recorded there are skipped"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="folder of the checkpoints")
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> int:
    """Run what has no record yet."""
    settings = {name: _resolve_type(value) for name, value in options.setting}
    sweep(options, settings)
    return 0


def record_name(method: str, name: str, labelled: int, seed: int) -> str:
    """The file name of one run's record."""
    return "-".join(part for part in (method, name, f"{labelled}p", f"s{seed}") if part) + SUFFIX


def sweep(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """See `add_arguments`. Every method is built and every split made before the first run starts."""
    cases = read_dataset(options.dataset, resolve(options.root))
    methods = {name: build(name, scale=options.scale, **settings) for name in options.methods}
    splits = {count: split_cases(options.dataset, cases, labelled=count) for count in options.labelled}
    grid = list(itertools.product(options.seeds, options.labelled, options.methods))
    for number, (seed, labelled, name) in enumerate(grid, start=1):
        path = resolve(options.records) / record_name(name, options.name, labelled, seed)
        if path.exists():
            print(f"[{number}/{len(grid)}] {path.name}: there already", flush=True)
            continue
        started = time.monotonic()
        data = experiment.load(cases, splits[labelled], methods[name], progress=False)
        outcome = experiment.run(
            methods[name],
            data,
            seed=seed,
            output_dir=resolve(options.output_dir),
            device=options.device,
            open_test=options.open_test,
            progress=False,
        )
        root = None if options.phantom else options.root
        outcome.record(scale=options.scale, root=root, command=repeat(options, name, labelled, seed)).save(path)
        dice = outcome.val.summary["mean"]["dice"]
        took = time.monotonic() - started
        print(f"[{number}/{len(grid)}] {path.name}: validation Dice {dice:.3f}, {took:.0f} s", flush=True)


def repeat(options: argparse.Namespace, method: str, labelled: int, seed: int) -> str:
    """The command that makes one record again."""
    words: Sequence[object] = [
        "python", "-m", "medlib", "sweep", options.dataset, "ROOT", "--methods", method, "--labelled", labelled,
        "--seeds", seed, "--scale", options.scale, "--records", "RECORDS",
    ]  # fmt: skip
    extra = [word for pair in options.setting for word in ("-s", *pair)]
    extra += ["--name", options.name] if options.name else []
    extra += ["--phantom"] if options.phantom else []
    extra += ["--open-test"] if options.open_test else []
    return shlex.join(str(word) for word in (*words, *extra))
