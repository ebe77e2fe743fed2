"""``python -m medlib``: run a notebook into a file of its own, check a data folder, draw phantoms, list notebooks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from medlib.paths import NOTEBOOKS, resolve, shorten


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: the notebook failed or the data set has faults; 2: a wrong call; 130: Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, KeyError, OSError) as error:
        print(f"medlib: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a loss that is not finite, a checkpoint that cannot be read: the message says it
        if type(error) is RuntimeError or type(error).__module__.startswith("medlib"):
            print(f"medlib: {error}", file=sys.stderr)
            return 1
        raise
    except KeyboardInterrupt as stop:
        print(f"medlib: {stop or 'interrupted'}", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m medlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a notebook with parameters; the source is never touched")
    run.add_argument("notebook", help="its name (04_coral) or path")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("-o", "--output", type=Path, help="default: a name made of the overrides, in output_dir (runs/)")
    run.add_argument("--timeout", type=int, metavar="SECONDS", help="limit per cell; default: ample for the scale")
    run.set_defaults(command=command_run)

    summary = commands.add_parser("summary", help="the table of a notebook that was run")
    summary.add_argument("notebook", type=Path, help="path of the executed notebook")
    summary.set_defaults(command=command_summary)

    check = commands.add_parser("check", help="look through a data set's folder before anything trains on it")
    check.add_argument("name", help="data set, such as acdc")
    check.add_argument("root", type=Path, help="its folder")
    check.add_argument(
        "--figure", type=Path, metavar="PAGE", help="also one page of pictures: .html, .png, .pdf or .svg"
    )
    check.set_defaults(command=command_check)

    phantoms = commands.add_parser("phantoms", help="draw phantom patients in a data set's own layout")
    phantoms.add_argument("name", help="data set, such as acdc")
    phantoms.add_argument("root", type=Path, help="folder to write to")
    phantoms.add_argument("--patients", type=int, default=60)
    phantoms.add_argument("--seed", type=int, default=0)
    phantoms.add_argument("--size", choices=("small", "full"), default="small", help="full: as large as real scans")
    phantoms.set_defaults(command=command_phantoms)

    sweep = commands.add_parser("sweep", help="methods x settings x patients x seeds, one record a run, resumable")
    sweep.add_argument("dataset", help="data set, such as acdc")
    sweep.add_argument("root", type=Path, help="its folder")
    sweep.add_argument("--methods", nargs="+", required=True, metavar="NAME", help="names as in medlib.methods")
    sweep.add_argument("--labelled", nargs="+", type=int, required=True, metavar="N", help="labelled patients")
    sweep.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    sweep.add_argument(
        "--records", type=Path, required=True, help="folder of the records; runs that have one are skipped"
    )
    sweep.add_argument("--scale", default="laptop", help="ci, laptop (default) or paper")
    sweep.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    sweep.add_argument("--precision", help="32-true or bf16-mixed; default: what the device prefers")
    sweep.add_argument(
        "--recompute", type=int, default=0, metavar="N",
        help="compute the N finest levels again in the backward pass: less memory, more time, the same result",
    )  # fmt: skip
    sweep.add_argument("-s", "--setting", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    sweep.add_argument(
        "--ablation", nargs="+", action="append", default=[], metavar=("NAME", "SETTING=VALUE"),
        help="a row of an ablation table: its name in the records' names, and what is set in it; may be repeated",
    )  # fmt: skip
    sweep.add_argument(
        "--vary", nargs="+", action="append", default=[], metavar=("SETTING", "VALUE"),
        help="a setting and its values, each with every ablation and every other varied setting; may be repeated",
    )  # fmt: skip
    sweep.add_argument("--protocol", default="common", help="patient lists: common, or published ones")
    sweep.add_argument("--name", default="", help="tells runs with other settings apart")
    sweep.add_argument("--phantom", action="store_true", help="the folder holds phantoms; the records will say so")
    sweep.add_argument("--open-test", action="store_true", help="also measure on the test patients")
    sweep.add_argument("--output-dir", type=Path, default=Path("runs"), help="folder of the checkpoints")
    sweep.set_defaults(command=command_sweep)

    record = commands.add_parser("record", help="train on phantoms and write the small file that explorers open")
    record.add_argument("--output", type=Path, help="a .npz file; default: the one in data/recorded/")
    record.add_argument("--methods", nargs="+", default=["coral", "pcl"], metavar="NAME", help="that embed slices")
    record.add_argument("--scale", default="laptop", help="ci, laptop (default) or paper")
    record.add_argument("--ratio", type=float, default=0.1, help="labelled share of the training patients")
    record.add_argument("--seed", type=int, default=0)
    record.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")
    record.add_argument("--output-dir", type=Path, default=Path("runs/recorded"), help="folder of the checkpoints")
    record.set_defaults(command=command_record)

    commands.add_parser("methods", help="the methods by name").set_defaults(command=command_methods)
    commands.add_parser("datasets", help="the data sets and their protocols").set_defaults(command=command_datasets)
    notebooks = commands.add_parser("notebooks", help="the notebooks and their parameters")
    notebooks.set_defaults(command=command_notebooks)

    book = commands.add_parser("book", help="all executed notebooks as a static site that needs no other host")
    book.add_argument("-o", "--output", type=Path, default=Path("site"), help="folder; default: site")
    book.set_defaults(command=command_book)
    return parser


def command_run(options: argparse.Namespace) -> int:
    """Run a notebook; print its table and where the result is, also where a cell failed."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError

    from medlib import runner

    notebook = runner.find_notebook(options.notebook)
    values = runner.parse_overrides(notebook, options.parameter)
    output = runner.default_output(notebook, values) if options.output is None else resolve(options.output)
    try:
        run = runner.run_notebook(notebook, values, output, options.timeout)
    except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"{error}\nmedlib: the run failed; as far as it came: {shorten(output)}", file=sys.stderr)
        return 1
    print_summary(run.notebook, f" ({run.seconds:.0f} s)")
    for record in run.records:
        print(f"Record: {shorten(record)}")
    return 0


def command_summary(options: argparse.Namespace) -> int:
    """Print the table of an executed notebook."""
    print_summary(resolve(options.notebook))
    return 0


def print_summary(executed: Path, note: str = "") -> None:
    """The table of an executed notebook, where it has one, and its path."""
    from medlib.runner import notebook_summary

    if table := notebook_summary(executed):
        print(table)
    print(f"Executed notebook: {shorten(executed)}{note}")


def command_check(options: argparse.Namespace) -> int:
    """Print what a data set's folder holds, and what would stop a training."""
    from medlib.data.check import check_dataset

    if options.figure is not None:
        from medlib.explore.report import check_page, check_target, write_page

        check_target(resolve(options.figure))
    report = check_dataset(options.name, options.root, progress=sys.stderr.isatty())
    print(report)
    if options.figure is not None:
        write_page(check_page(report), resolve(options.figure))
        print(f"Figure: {shorten(resolve(options.figure))}")
    return 0 if report.ok else 1


def command_phantoms(options: argparse.Namespace) -> int:
    """Draw phantom patients."""
    from medlib.data import write_phantoms

    root = write_phantoms(options.name, resolve(options.root), options.patients, options.seed, size=options.size)
    print(f"{options.patients} phantom patients: {shorten(root)}")
    return 0


def command_sweep(options: argparse.Namespace) -> int:
    """Run what has no record yet."""
    from medlib.sweep import Sweep

    grid = {name: value for name, value in vars(options).items() if name not in ("command", "setting", "ablation")}
    grid |= {"settings": {name: read_value(text) for name, text in options.setting}}
    grid |= {"ablations": read_ablations(options.ablation), "vary": read_varied(options.vary)}
    Sweep(**grid).run()
    return 0


def read_ablations(rows: Sequence[Sequence[str]]) -> dict[str, dict[str, object]]:
    """The settings of each ablation by its name, from rows NAME SETTING=VALUE ..."""
    ablations: dict[str, dict[str, object]] = {}
    for name, *pairs in rows:
        if name in ablations or "=" in name:
            raise ValueError(f"each --ablation begins with a name of its own, got {name!r}")
        if wrong := [pair for pair in pairs if "=" not in pair]:
            raise ValueError(f"--ablation {name}: write each setting as SETTING=VALUE, got {wrong[0]!r}")
        ablations[name] = {setting: read_value(text) for setting, _, text in (pair.partition("=") for pair in pairs)}
    return ablations


def read_varied(rows: Sequence[Sequence[str]]) -> dict[str, list[object]]:
    """The values of each varied setting, from rows SETTING VALUE ..."""
    names = [name for name, *_ in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--vary {twice[0]}: give all its values at once")
    return {name: [read_value(text) for text in values] for name, *values in rows}


def command_record(options: argparse.Namespace) -> int:
    """Record a phantom run for the explorers."""
    from medlib.explore import recorded

    given = {name: value for name, value in vars(options).items() if name not in ("command", "output")}
    output = recorded.RECORDED if options.output is None else resolve(options.output)
    run = recorded.record_phantoms(output, **given)
    steps = max(len(snapshots) for snapshots in run.features.values())
    print(f"{len(run.positions)} slices, {steps} steps of {', '.join(run.features)}: {shorten(output)}")
    return 0


def read_value(text: str) -> object:
    """A number, True, False or None as Python reads it (true and false, too); anything else is a text, also "none"."""
    from medlib.runner import read_literal

    return read_literal({"true": "True", "false": "False"}.get(text, text))


def command_notebooks(options: argparse.Namespace) -> int:
    """List the notebooks, each with its parameters, their defaults and what they mean."""
    from medlib.runner import notebook_parameters

    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(notebook.stem)
        for parameter in notebook_parameters(notebook).values():
            print(f"    {parameter.name} = {parameter.default!r}".ljust(32) + f"  {parameter.help}".rstrip())
    return 0


def command_book(options: argparse.Namespace) -> int:
    """Publish the notebooks as they were run."""
    from medlib.book import publish

    output = resolve(options.output)
    pages = publish(output)
    print(f"{len(pages)} pages: open {shorten(output / 'index.html')}")
    return 0


def command_methods(options: argparse.Namespace) -> int:
    """List the methods by name."""
    from medlib.methods import available

    for name, method in sorted(available().items()):
        print(f"{name:<24}{method.title}")
    return 0


def command_datasets(options: argparse.Namespace) -> int:
    """List the data sets by name, with the protocols that have published patient lists."""
    from medlib.data.descriptions import DESCRIPTIONS
    from medlib.data.splits import protocols

    for name, info in DESCRIPTIONS.items():
        print(f"{name:<12}{info.title}\n{'':<12}protocols: {', '.join(['common', *protocols(name)])}")
        print(f"{'':<12}patients are told apart by {info.patient_rule}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
