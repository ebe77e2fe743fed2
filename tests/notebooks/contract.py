"""The rules every committed notebook keeps, as functions from a notebook to what is wrong with it."""

import ast
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from medlib.notebook import FIXED, PHANTOM
from medlib.paths import PROJECT
from medlib.runner import notebook_parameters, notebook_summary

MAX_CELLS = 70
MAX_LINES = 30
MEDIAN_LINES = 8
LONG_LINES = 20  # nine cells in ten are no longer
MAX_CODE_IN_A_ROW = 3
MAX_BYTES = 3_000_000

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(home|root|work|Users|tmp|private|mnt|content)(?=/|$|\s|['\"])|\b[A-Z]:\\")
HANGS = re.compile(r"\b(interact|interact_manual|interactive|interactive_output|Output)\s*\(")

Notebook = dict
"""A notebook as JSON."""


def source(cell: dict) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


def code_cells(notebook: Notebook) -> list[tuple[int, dict]]:
    """The code cells that hold anything, with their place in the notebook."""
    cells = enumerate(notebook["cells"])
    return [(index, cell) for index, cell in cells if cell["cell_type"] == "code" and source(cell).strip()]


def strings(value: object) -> Iterator[str]:
    """Every text inside nested JSON, pictures left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        if value and all(isinstance(part, str) for part in value):
            yield "".join(value)
        else:
            for part in value:
                yield from strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if not key.startswith("image/"):
                yield from strings(part)


def has_parameters(path: Path, notebook: Notebook) -> Iterator[str]:
    """One cell tagged `parameters`: literals, the fixed names first, phantoms by default."""
    tagged = sum("parameters" in tags(cell) for cell in notebook["cells"])
    if tagged != 1:
        yield f"{tagged} cells tagged 'parameters', expected one"
        return
    try:
        parameters = notebook_parameters(path)
    except ValueError as error:
        yield str(error)
        return
    if missing := [name for name in FIXED if name not in parameters]:
        yield f"the parameters cell lacks {', '.join(missing)}"
        return
    if list(parameters)[: len(FIXED)] != list(FIXED):
        yield f"the parameters must begin with {', '.join(FIXED)}, in this order"
    if parameters["data_root"].default != PHANTOM:
        yield f"data_root is {parameters['data_root'].default!r}; a fresh clone has only {PHANTOM!r}"
    for name in FIXED:
        try:
            FIXED[name].validate(name, parameters[name].default)
        except ValueError as error:
            yield f"default: {error}"
    if bare := [parameter.name for parameter in parameters.values() if not parameter.help]:
        yield f"parameters without a comment: {', '.join(bare)}"


def starts(path: Path, notebook: Notebook) -> Iterator[str]:
    """The first code cell after the parameters calls `start(globals()`, which refuses unknown parameters."""
    code = [cell for _, cell in code_cells(notebook)]
    after = [code[place + 1] for place, cell in enumerate(code[:-1]) if "parameters" in tags(cell)]
    if after and not re.search(r"\bstart\(globals\(\)", source(after[0])):
        yield "the cell after the parameters does not call start(globals(), ...)"


def was_run(path: Path, notebook: Notebook) -> Iterator[str]:
    """Every code cell was run, from top to bottom in one go, without an error."""
    code = code_cells(notebook)
    if bare := [index for index, cell in code if cell.get("execution_count") is None]:
        yield f"cells never run: {bare}"
    elif [cell["execution_count"] for _, cell in code] != list(range(1, len(code) + 1)):
        yield "the cells were not run from top to bottom in a fresh kernel (execution counts)"
    if failed := [index for index, cell in code for output in cell["outputs"] if output["output_type"] == "error"]:
        yield f"cells that ended in an error: {failed}"


def names_no_machine(path: Path, notebook: Notebook) -> Iterator[str]:
    """Neither text nor output names a path of the machine it was run on."""
    for index, cell in enumerate(notebook["cells"]):
        for text in strings([cell["source"], *([cell["outputs"]] if cell["cell_type"] == "code" else [])]):
            place = text.find(str(PROJECT))
            if place < 0 and (match := MACHINE_PATH.search(text)):
                place = match.start()
            if place >= 0:
                yield f"cell {index} names a path of one machine: {text[max(place - 20, 0) : place + 40]!r}"
                break


def cells_are_short(path: Path, notebook: Notebook) -> Iterator[str]:
    """No long cell, few of middling length, prose between code."""
    if len(notebook["cells"]) > MAX_CELLS:
        yield f"{len(notebook['cells'])} cells, at most {MAX_CELLS}"
    code = code_cells(notebook)
    for index, cell in code:
        if (lines := len(source(cell).splitlines())) > MAX_LINES:
            yield f"cell {index} has {lines} lines, at most {MAX_LINES}"
    lengths = sorted(sum(bool(line.strip()) for line in source(cell).splitlines()) for _, cell in code)
    if lengths and statistics.median(lengths) > MEDIAN_LINES:
        yield f"the median code cell has {statistics.median(lengths):g} lines, at most {MEDIAN_LINES}"
    if lengths and lengths[int(0.9 * (len(lengths) - 1))] > LONG_LINES:
        yield f"one code cell in ten is longer than {LONG_LINES} lines: {lengths[-5:]}"
    row = 0
    for index, cell in enumerate(notebook["cells"]):
        row = row + 1 if cell["cell_type"] == "code" else 0
        if row == MAX_CODE_IN_A_ROW + 1:
            yield f"cell {index}: more than {MAX_CODE_IN_A_ROW} code cells without a sentence between them"


def figures_have_pictures(path: Path, notebook: Notebook) -> Iterator[str]:
    """A figure or widget keeps a PNG for a printed page, and nbval does not compare its JSON."""
    for index, cell in code_cells(notebook):
        for output in cell["outputs"]:
            kinds = output.get("data", {})
            if (PLOTLY in kinds or WIDGET in kinds) and "image/png" not in kinds:
                yield f"cell {index}: a figure or widget without image/png"
            if "image/svg+xml" in kinds:
                yield f"cell {index}: an SVG, which differs on every run; use PNG"
            if PLOTLY in kinds and "nbval-ignore-output" not in tags(cell):
                yield f"cell {index}: plotly JSON without the tag nbval-ignore-output"


def runs_headless(path: Path, notebook: Notebook) -> Iterator[str]:
    """Nothing that hangs or differs when no one is looking, no widget state, a size that a clone can bear."""
    for index, cell in code_cells(notebook):
        if match := HANGS.search(source(cell)):
            yield f"cell {index}: {match.group(1)}() hangs headless runs; use observe() and FigureWidget"
        lines = [line for line in source(cell).splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if lines and lines[-1].partition("#")[0].rstrip().endswith(";"):
            yield f"cell {index}: a trailing ';' hides nothing from nbval; write `_ = ...`"
    if "widgets" in notebook["metadata"]:
        yield "widget state in the metadata; `make notebooks` strips it"
    if "papermill" in notebook["metadata"]:
        yield "papermill metadata; `make notebooks` strips it"
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "the kernel must be called python3"
    if (size := path.stat().st_size) > MAX_BYTES:
        yield f"{size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.1f}"


def has_summary(path: Path, notebook: Notebook) -> Iterator[str]:
    """One cell tagged `summary` shows, as text, the table that a run prints at its end."""
    tagged = [cell for cell in notebook["cells"] if "summary" in tags(cell)]
    if len(tagged) != 1 or not notebook_summary(path).strip():
        yield f"{len(tagged)} cells tagged 'summary', expected one, with the table of the run as text"


def answers_are_folded(path: Path, notebook: Notebook) -> Iterator[str]:
    """After a "Predict" the number, in bold or with six digits, is behind a click: <details> ... </details>."""
    for index, cell in enumerate(notebook["cells"]):
        _, asked, rest = source(cell).partition("Predict")
        if cell["cell_type"] == "markdown" and asked:
            bare = re.sub(r"<details>.*?</details>", "", rest, flags=re.DOTALL)
            if told := re.search(r"\*\*[−-]?\d+\.\d{3,}\*\*|\d\.\d{6,}", bare):
                yield f"cell {index} asks for a prediction and tells {told[0]} at once: fold it into <details>"


def is_listed(path: Path, notebook: Notebook) -> Iterator[str]:
    """The README beside the folder of notebooks names it."""
    readme = path.parent.parent / "README.md"
    if not readme.is_file() or path.name not in readme.read_text(encoding="utf-8"):
        yield f"{path.name} is not listed in README.md"


def has_solutions(path: Path, notebook: Notebook) -> Iterator[str]:
    """Each exercise, known by the name its check is given, is solved in the notebook of the same name in solutions/."""
    asked = exercises(notebook)
    if not asked:
        return
    solutions = path.parent / "solutions" / path.name
    if not solutions.is_file():
        yield f"exercises without solutions/{path.name}"
        return
    solved = json.loads(solutions.read_text(encoding="utf-8"))
    if unsolved := sorted(asked - exercises(solved)):
        yield f"exercises without a solution: {', '.join(unsolved)}"
    yield from (f"solutions: {problem}" for problem in was_run(solutions, solved))


def exercises(notebook: Notebook) -> set[str]:
    """The names that a notebook gives to `check(answer, reference, cases, name)`."""
    text = "\n".join(source(cell) for _, cell in code_cells(notebook))
    calls = [node for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*", "", text))) if isinstance(node, ast.Call)]
    checks = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "check"]
    names = [[*call.args[3:4], *(word.value for word in call.keywords if word.arg == "name")] for call in checks]
    return {ast.literal_eval(name[0]) if name else "exercise" for name in names}


RULES: tuple[Callable[[Path, Notebook], Iterator[str]], ...] = (
    has_parameters, starts, was_run, names_no_machine, cells_are_short, figures_have_pictures, runs_headless,
    has_summary, answers_are_folded, is_listed, has_solutions,
)  # fmt: skip


def problems(path: Path) -> list[str]:
    """All that is wrong with the committed notebook at ``path``; empty for one that keeps the contract."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [problem for rule in RULES for problem in rule(path, notebook)]
