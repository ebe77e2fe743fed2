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
    "planes = linked_planes(image, label, label, {'entropy': image}, (5.0, 1.0, 1.0), windows=CT_WINDOWS, **look);"
    " planes.show(); planes.controls['overlay'].value = 'entropy'",
    "from medlib.losses.contrastive import positional_contrastive_loss\n"
    "from medlib.losses.coral import relational_loss\n"
    "both = loss_explorer({'RAL': relational_loss, 'PCL': positional_contrastive_loss}, rng.normal(size=(4, 2)),"
    " [0, 0.3, 0.6, 1], {'threshold': (0.05, 0.95, 0.4)}); both.show(); both.controls['angle'].value = 90",
    "def run(callback):\n    for step in range(1, 21):\n        callback('fit', step, {'lr': 0.1, 'loss': 1 / step})\n"
    "monitor = training_monitor(run, interval=0.05); monitor.show(); monitor.start()",
    "monitor.wait(60)",
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
    assert [len(outputs) for outputs in shown] == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 0]
    assert all(output.data["text/plain"].strip() for outputs in shown for output in outputs)
    assert "over the steps of fit" in shown[-2][0].data["text/plain"], "the picture is that of the whole run"
    assert not [output for cell in done.cells for output in cell.outputs if output.output_type in ("stream", "error")]
