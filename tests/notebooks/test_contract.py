"""Every committed notebook keeps the contract, and a notebook that breaks a rule is caught by that rule."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import papermill
import papermill.iorw
import papermill.parameterize
import pytest

from medlib.paths import NOTEBOOKS
from tests.notebooks.contract import PLOTLY, WIDGET, problems

COMMITTED = sorted(NOTEBOOKS.glob("*.ipynb"))
PARAMETERS = """dataset = "acdc"  # which data set
data_root = "phantom"  # its folder, or "phantom"
ratio = 0.1  # labelled share of the training patients
scale = "laptop"  # ci, laptop or paper
seed = 0  # of every random stream
device = "auto"  # auto, cpu, cuda or mps
output_dir = "runs"  # for records and checkpoints"""


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_notebook_keeps_the_contract(path: Path) -> None:
    assert problems(path) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_notebook_refuses_an_unknown_parameter(path: Path, tmp_path: Path) -> None:
    refuses(path, tmp_path)


def refuses(path: Path, folder: Path) -> None:
    """Run as papermill would with a parameter that nobody knows (papermill only warns), the notebook ends early."""
    notebook = papermill.parameterize.parameterize_notebook(
        papermill.iorw.load_notebook_node(str(path)),
        {"rato": 0.2, "output_dir": str(folder)},
        kernel_name="python3",
        language="python",
    )
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    end = next(i for i, source in enumerate(cells) if "start(globals()" in source)
    with pytest.raises(KeyError, match="unknown parameter 'rato'"):
        exec("\n".join(cells[: end + 1]), {"__name__": "__main__"})


def code(text: str, *outputs: dict, tags: tuple[str, ...] = ()) -> dict:
    """A code cell that was run."""
    return {
        "cell_type": "code", "source": text.splitlines(keepends=True), "execution_count": 0, "outputs": list(outputs),
        "metadata": {"tags": list(tags)} if tags else {},
    }  # fmt: skip


def prose(text: str) -> dict:
    """A cell of text."""
    return {"cell_type": "markdown", "source": [text], "metadata": {}}


def shown(**data: object) -> dict:
    """An output of several kinds, by MIME type with `/` as given."""
    return {"output_type": "display_data", "metadata": {}, "data": data}


def write(folder: Path, cells: list[dict], **metadata: object) -> Path:
    """A project with this one notebook in it, its cells counted as a fresh kernel would."""
    for count, cell in enumerate((cell for cell in cells if cell.get("execution_count") == 0), start=1):
        cell["execution_count"] = count
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path = folder / "notebooks" / "09_example.ipynb"
    path.parent.mkdir(exist_ok=True)
    (folder / "README.md").write_text("- notebooks/09_example.ipynb", encoding="utf-8")
    notebook = {"cells": cells, "metadata": kernel | metadata, "nbformat": 4, "nbformat_minor": 4}
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def good() -> list[dict]:
    """The cells of a notebook that keeps the contract."""
    return [
        prose("# An example"),
        code(PARAMETERS, tags=("parameters",)),
        code("from medlib.notebook import check, start\n\nsession = start(globals())"),
        prose("A figure. **Predict** it.\n\n<details><summary>Answer</summary>\n\n**0.567**.\n\n</details>"),
        code(
            "figure.show()",
            shown(**{PLOTLY: {"data": []}, "image/png": "iVBOR/tmp/w0KGgo=", "text/plain": ["Figure"]}),
            tags=("nbval-ignore-output",),
        ),
        prose("The table."),
        code("table", shown(**{"text/plain": "Dice 0.7"}), tags=("summary",)),
    ]


def changed(change: Callable[[list[dict]], object]) -> list[dict]:
    """The cells of the good notebook after ``change``."""
    cells = good()
    change(cells)
    return json.loads(json.dumps(cells))  # each a cell of its own, also where a change repeats one


def retext(index: int, old: str, new: str) -> Callable[[list[dict]], object]:
    """A change of the text of one cell."""
    return lambda cells: cells[index].update(source=["".join(cells[index]["source"]).replace(old, new)])


def test_a_good_notebook_has_no_problems(tmp_path: Path) -> None:
    assert problems(write(tmp_path, good())) == []


STREAM = {"output_type": "stream", "name": "stdout", "text": ["read ", "/tmp/someone/ACDC\n"]}
ERROR = {"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[1]["metadata"].clear(), "0 cells tagged 'parameters'"),
        (lambda cells: cells[2]["metadata"].update(tags=["parameters"]), "2 cells tagged"),
        (retext(1, "ratio = 0.1", "ratio = 1 / 10"), "ratio is not a literal"),
        (retext(1, "seed = 0", "import os"), "not `name = literal`"),
        (retext(1, "seed = 0", "sed = 0"), "lacks seed"),
        (retext(1, PARAMETERS, "own = 1  # own\n" + PARAMETERS), "must begin with dataset"),
        (retext(1, '"phantom"', '"/data/ACDC"'), "a fresh clone has only 'phantom'"),
        (retext(1, "ratio = 0.1", "ratio = 10"), "ratio must be"),
        (retext(1, "  # of every random stream", ""), "without a comment: seed"),
        (retext(2, "start(globals())", "1"), "does not call start"),
        (lambda cells: cells[4].update(execution_count=None), r"never run: \[4\]"),
        (lambda cells: cells[4].update(execution_count=7), "not run from top to bottom"),
        (lambda cells: cells[4]["outputs"].append(ERROR), r"ended in an error: \[4\]"),
        (lambda cells: cells[4]["outputs"].append(STREAM), "cell 4 names a path of one machine"),
        (lambda cells: cells[4]["outputs"].append(shown(**{"text/html": ["<a href='/tmp/x'>"]})), "4 names a path"),
        (lambda cells: cells[4]["outputs"][0]["data"][PLOTLY].update(title=r"C:\data"), "cell 4 names a path"),
        (lambda cells: cells.extend([prose("x")] * 70), "77 cells, at most 70"),
        (lambda cells: cells.append(code("a = 1\n" * 31)), "cell 7 has 31 lines"),
        (lambda cells: cells.extend([prose("x"), code("a = 1\n" * 9)] * 5), "the median code cell has 9 lines"),
        (lambda cells: cells.extend([prose("x"), code("a = 1\n" * 21)] * 2), "one code cell in ten is longer than 20"),
        (lambda cells: cells.extend(code("a = 1") for _ in range(3)), "cell 9: more than 3 code cells"),
        (lambda cells: cells[4]["outputs"][0]["data"].pop("image/png"), "cell 4: a figure or widget without image/png"),
        (lambda cells: cells[4]["outputs"].append(shown(**{WIDGET: {}})), "cell 4: a figure or widget without"),
        (lambda cells: cells[4]["outputs"].append(shown(**{"image/svg+xml": "<svg>"})), "cell 4: an SVG"),
        (lambda cells: cells[4]["metadata"].clear(), "cell 4: plotly JSON without the tag"),
        (lambda cells: cells[6]["metadata"].clear(), "0 cells tagged 'summary'"),
        (lambda cells: cells[6]["outputs"].clear(), "1 cells tagged 'summary', expected one, with the table"),
        (retext(3, "</details>", "</details> Minus **−0.567**."), r"tells \*\*−0.567"),
        (lambda cells: cells.append(code("interact(draw, x=3)")), r"cell 7: interact\(\) hangs"),
        (lambda cells: cells.append(code("out = widgets.Output()")), r"cell 7: Output\(\) hangs"),
        (lambda cells: cells.append(code("draw(x);  # quiet")), "cell 7: a trailing ';'"),
        (lambda cells: cells.append(code("print('" + "x" * 3_000_000 + "')")), "3.0 MB, at most"),
        (lambda cells: cells.append(code("check(answer, 1, name='half')")), "exercises without solutions/09_example"),
    ],
)  # fmt: skip
def test_a_bad_notebook_is_caught(change: Callable[[list[dict]], object], message: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, changed(change)))
    assert len(found) == 1 and re.search(message, found[0]), found


@pytest.mark.parametrize("root", ["home", "root", "Users", "work", "mnt"])
def test_a_path_of_a_machine_is_caught_and_a_path_of_the_reader_is_not(root: str, tmp_path: Path) -> None:
    cells = changed(retext(3, "A figure.", f"See `/{root}/me/x`."))
    assert "cell 3 names a path" in problems(write(tmp_path, cells))[0]
    harmless = changed(retext(3, "A figure.", f"See /data/{root}/x, runs/{root}, https://example.org/{root}/x."))
    assert problems(write(tmp_path, harmless)) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"widgets": {}}, "widget state"),
        ({"papermill": {}}, "papermill metadata"),
        ({"kernelspec": {"name": "my-env"}}, "must be called python3"),
    ],
)
def test_bad_metadata_is_caught(metadata: dict, message: str, tmp_path: Path) -> None:
    assert any(message in problem for problem in problems(write(tmp_path, good(), **metadata)))


def test_a_notebook_that_the_readme_forgets_is_caught(tmp_path: Path) -> None:
    path = write(tmp_path, good())
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    assert problems(path) == ["09_example.ipynb is not listed in README.md"]


def test_every_exercise_needs_its_solution(tmp_path: Path) -> None:
    asked = [*good(), prose("Exercise"), code("half = None\ncheck(half, 0.5, name='half')\ncheck(None, 1, (), 'one')")]
    solved = [*good(), prose("Solution"), code("verdict = check(0.5, 0.5, name='half')")]
    path = write(tmp_path, asked)
    solutions = tmp_path / "notebooks" / "solutions"
    solutions.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(elsewhere, solved).rename(solutions / path.name)
    assert problems(path) == ["exercises without a solution: one"]


def test_an_unknown_parameter_is_refused_by_a_good_notebook_and_not_by_one_that_never_starts(tmp_path: Path) -> None:
    path = write(tmp_path, good())
    refuses(path, tmp_path)
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'rato'"):
        papermill.execute_notebook(
            str(path), str(tmp_path / "out.ipynb"), kernel_name="python3", progress_bar=False,
            parameters={"rato": 0.2, "output_dir": str(tmp_path)}, execution_timeout=60,
        )  # fmt: skip
    careless = write(tmp_path, changed(retext(2, "start(globals())", "1 or 'start(globals())'")))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refuses(careless, tmp_path)
