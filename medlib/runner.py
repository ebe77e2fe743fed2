"""The one door to papermill: run a notebook with parameters, into a file of its own.

papermill alone passes a misspelt parameter with a warning, and can be talked into overwriting the notebook it was
given. Here an unknown parameter or a value of the wrong type is an error before anything runs, the output path is
chosen, and the source is only ever read.
"""

import ast
import builtins
import difflib
import hashlib
import io
import json
import os
import re
import time
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medlib.paths import NOTEBOOKS, resolve, shorten

TIMEOUTS = {"ci": 600, "laptop": 3600, "paper": 3 * 24 * 3600}
"""Seconds one cell may take, by scale: far above its need: a kernel that hangs ends, one that is slow goes on."""


SETUP_CELLS = 4
"""Parameters, overrides, `start`, and methods with their data: so far a notebook only takes or refuses its input."""


def read_literal(text: str) -> object:
    """The Python literal that ``text`` is, or ``text`` itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


@dataclass(frozen=True)
class Parameter:
    """One assignment of a notebook's parameters cell: its name, its value there, and the comment behind it."""

    name: str
    default: object
    help: str

    def parse(self, text: str) -> object:
        """The value that ``text`` on a command line stands for; ValueError where the default's type cannot hold it.

        True, False, None and numbers are read as papermill reads them; a parameter whose default is a text takes the
        text as it is, one whose default is None takes anything.
        """
        if isinstance(self.default, str):
            return text
        value = read_literal(text)
        if isinstance(self.default, float) and type(value) is int:
            value = float(value)
        if self.default is not None and type(value) is not type(self.default):
            wanted = type(self.default).__name__
            raise ValueError(f"{self.name} must be a {wanted} like its default {self.default!r}, got {text!r}")
        return value


@dataclass(frozen=True)
class Run:
    """What a run left behind: the executed notebook, the run records written meanwhile, the seconds it took."""

    notebook: Path
    records: tuple[Path, ...]
    seconds: float


def find_notebook(name: str) -> Path:
    """The notebook called ``name``: a path, or the name of one in ``notebooks/`` with or without ``.ipynb``.

    FileNotFoundError lists the notebooks there are.
    """
    for path in (Path(name).expanduser(), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if path.suffix == ".ipynb" and path.is_file():
            return path.resolve()
    known = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    raise FileNotFoundError(f"no notebook {name!r}{closest(name, known)}; there are: {', '.join(known) or 'none'}")


def tagged_cells(notebook: Path, tag: str) -> list[dict]:
    """The cells of a notebook file that carry ``tag``, as JSON. ValueError where the file is not a notebook."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [cell for cell in cells if tag in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{shorten(notebook)} is not a notebook ({error})") from error


def notebook_summary(executed: Path) -> str:
    """What the cells tagged ``summary`` of an executed notebook show, as text: the table a run ends with."""
    outputs = [output for cell in tagged_cells(executed, "summary") for output in cell.get("outputs", [])]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(text).rstrip() for text in texts)


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of ``notebook`` by name, read from its parameters cell without running it.

    ValueError where it has no cell tagged ``parameters``, or that cell holds anything but ``name = literal``.
    """
    cells = tagged_cells(notebook, "parameters")
    if not cells:
        raise ValueError(f"{shorten(notebook)} has no cell tagged 'parameters', so nothing in it can be overridden")
    source = "".join(cells[0]["source"])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    parameters = {}
    for statement in ast.parse(source).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                pass
            case _:
                raise ValueError(f"{shorten(notebook)}: not `name = literal` in parameters: {ast.unparse(statement)}")
        try:
            default = ast.literal_eval(value)
        except ValueError as error:
            raise ValueError(f"{shorten(notebook)}: parameter {name} is not a literal: {ast.unparse(value)}") from error
        parameters[name] = Parameter(name, default, comments.get(statement.end_lineno or 0, ""))
    return parameters


def parse_overrides(notebook: Path, overrides: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Command line pairs (name, text) as values for ``notebook``. KeyError: unknown name; ValueError: bad value."""
    known = notebook_parameters(notebook)
    values = {}
    for name, text in overrides:
        if name not in known:
            raise KeyError(unknown_parameters([name], known, shorten(notebook)))
        values[name] = known[name].parse(text)
    return values


def default_output(notebook: Path, values: Mapping[str, object]) -> Path:
    """Where the executed notebook goes: the output folder, and a name that tells the overrides apart."""
    own = notebook_parameters(notebook).get("output_dir")
    folder = values.get("output_dir", own.default if own else "runs")
    named = [f"{name}={value}" for name, value in values.items() if name != "output_dir"]
    stem = re.sub(r"[^\w.=-]+", "_", "-".join([notebook.stem, *named]))
    if len(stem.encode()) > 120:  # file systems end at 255 bytes
        stem = f"{stem.encode()[:120].decode(errors='ignore')}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    return resolve(str(folder)) / f"{stem}.ipynb"


def run_notebook(
    notebook: Path,
    values: Mapping[str, object],
    output: Path | None = None,
    timeout: int | None = None,
    progress: bool = True,
) -> Run:
    """Execute ``notebook`` with ``values`` in place of its parameters and write the result to ``output``.

    ``timeout`` is in seconds per cell (default: ``TIMEOUTS`` of the scale). ValueError where ``output`` is the source
    or lies among the sources, and where the notebook's set-up refuses a value or the data: its message, and no
    ``output``. Where a later cell fails, ``papermill.PapermillExecutionError`` (or nbclient's timeout error) is raised
    and ``output`` still holds everything up to it.
    """
    import papermill  # this and the next take a second, and only a run needs them

    from medlib.results.records import SUFFIX

    known = notebook_parameters(notebook)
    if unknown := sorted(set(values) - set(known)):
        raise KeyError(unknown_parameters(unknown, known, shorten(notebook)))
    output = default_output(notebook, values) if output is None else resolve(output)
    if output.resolve() == notebook.resolve() or NOTEBOOKS in output.resolve().parents:
        raise ValueError(f"{shorten(output)} is a source, which a run never touches; give another output path")
    settings = {name: values.get(name, parameter.default) for name, parameter in known.items()}
    if timeout is None:
        scale = os.environ.get("MEDLIB_SCALE") or str(settings.get("scale", "laptop"))
        timeout = TIMEOUTS.get(scale, TIMEOUTS["laptop"])
    if timeout < 1:
        raise ValueError(f"timeout must be at least 1 second, got {timeout}")
    if output.is_dir():
        raise ValueError(f"the output {shorten(output)} is a folder: name a file in it, such as {notebook.name}")
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters=dict(values),
            kernel_name="python3",
            progress_bar=progress,
            execution_timeout=timeout,
        )
    except papermill.PapermillExecutionError as error:
        if error.exec_count > SETUP_CELLS or not _is_refusal(error.ename):
            raise
        output.unlink(missing_ok=True)
        raise ValueError(error.evalue) from error
    folder = resolve(str(settings.get("output_dir", output.parent)))
    records = [path for path in sorted(folder.rglob(f"*{SUFFIX}")) if path.stat().st_mtime >= started]
    return Run(output, tuple(records), time.time() - started)


def _is_refusal(name: str) -> bool:
    """Whether an error of this name says that a value, a file or a folder cannot be used."""
    kind = getattr(builtins, name, None)
    return name in ("ValueError", "DataError") or (isinstance(kind, type) and issubclass(kind, OSError))


def closest(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'ratio'?)"`` for ``rato``, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def unknown_parameters(unknown: Iterable[str], known: Iterable[str], where: str) -> str:
    """The message about parameters that do not exist: each with the closest that does, then all that do."""
    known = list(known)
    wrong = ", ".join(f"{name!r}{closest(name, known)}" for name in unknown)
    return f"{where}: unknown parameter {wrong}; known: {', '.join(known)}"
