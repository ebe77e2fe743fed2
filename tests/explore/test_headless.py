"""All widgets in one notebook, run by papermill as a reader's continuous integration would."""

import nbformat
import papermill

SETUP = """
import numpy as np, torch
from medlib.explore import *
rng = np.random.default_rng(0)
image = rng.random((6, 48, 48), np.float32)
label = np.zeros((6, 48, 48), np.uint8); label[:, 20:30, 20:30] = 1
look = {"classes": ("background", "LV"), "colours": ("#000000", "#D55E00")}
positions, patients = np.tile(np.arange(1, 7) / 6, 4), np.repeat(list("abcd"), 6)
"""
CELLS = [
    "viewer = volume_viewer(image, label, label, **look); viewer.show(); viewer.controls['slice'].value = 2",
    "explorer = embedding_explorer({'a': rng.normal(size=(24, 8)), 'b': rng.normal(size=(24, 8))}, positions, patients,"
    " (255 * rng.random((24, 16, 16))).astype(np.uint8)); explorer.show(); explorer.controls['point'].value = 3",
    "loss_explorer(lambda f, p: (f.square().sum(1) * p).sum(), np.eye(2), [0.2, 0.8])",
    "loss_slider(lambda a: {'line': ([0, 1], [0, a])}, {'a': (0, 1, 0.5)}, title='t', x_title='x', y_title='y')",
    "curves = live_curves(['loss'], interval=0.0)\n"
    "for step in range(20):\n    curves.update('fit', step, {'loss': 1 / (step + 1)})\n"
    "curves.finish()",
    "film = history_explorer({'a': {s: rng.normal(size=(24, 8)) for s in (0, 5)}}, positions, patients); film.show();"
    " film.controls['play'].value = 0; explorer.controls['dimensions'].value = '3D'",
    "show(slice_grid(image, label, label, **look), alt='Six slices.')",
]


def test_papermill_runs_every_widget(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDLIB_PNG", "0")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in [SETUP, *CELLS]])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "widgets.ipynb")
    done = papermill.execute_notebook(
        tmp_path / "widgets.ipynb", tmp_path / "done.ipynb", progress_bar=False, execution_timeout=120
    )
    shown = [[output for output in cell.outputs if output.output_type == "display_data"] for cell in done.cells[1:]]
    assert [len(outputs) for outputs in shown] == [1, 1, 1, 1, 2, 1, 1]
    assert all(output.data["text/plain"].strip() for outputs in shown for output in outputs)
    assert not [output for cell in done.cells for output in cell.outputs if output.output_type in ("stream", "error")]
