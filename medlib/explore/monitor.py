"""A training to watch while it runs: in the background of this kernel, or in another process."""

import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from IPython.display import DisplayHandle
from plotly.subplots import make_subplots

from medlib.data.prepare import Prepared
from medlib.evaluate import predict_volume
from medlib.explore import pixels
from medlib.explore.curves import spread, term_names, thin
from medlib.explore.live import LiveFigure
from medlib.explore.panels import block
from medlib.explore.show import Explorer, hint, redraw, show_widget, stack
from medlib.explore.slices import class_legend
from medlib.explore.style import INK, MUTED, SERIES, TEMPLATE, WIDTH, bare_axis
from medlib.methods import Method
from medlib.nets import seeded_init
from medlib.paths import resolve, shorten
from medlib.train import CHECKPOINT, METRICS, Predict, StageResult, StopTraining, make_fabric, predictor

_SAMPLES = 3  # slices that are shown
_TILE = 104  # px of a sample, at most
_CURVES = 250  # px of the part with the curves
_HEAD, _FOOT, _LEFT, _RIGHT, _APART, _TITLES = 112, 52, 60, 56, 6, 66  # px
_MEAN, _CLASS = "mean Dice", "Dice of "
_SILENT = 60.0  # s without a line after which a watched stage gives way to a newer one
_SECONDS = 5.0  # s to wait for a run that was asked to stop when the waiting itself was interrupted


def training_monitor(
    run: Callable[..., Any] | str | os.PathLike[str],
    *,
    samples: Sequence[Prepared] = (),
    method: Method | None = None,
    title: str = "Training",
    interval: float = 1.0,
) -> "TrainingMonitor":
    """Loss terms, learning rate, validation Dice and sample predictions of a training, live, with a stop button.

    run: what trains, called in a thread of its own as ``run(callback=...)``, such as
    ``functools.partial(session.run, method, loaded)``; or the folder of a run that another process makes: its output
    folder, of which the stage written last is shown, or one stage's folder · samples: prepared scans with a label, of
    three patients of which the slice with the largest structures is shown · method: of a watched folder, to predict the
    samples with its checkpoints · interval: seconds between drawings.

    A run is begun by its button or by ``start()``, which returns at once: other cells can be run meanwhile. (Those that
    draw from PyTorch's global generator also draw from its dropout's.) Stopped, it leaves a checkpoint at the next line
    of its log, and starting again goes on from there, here or in a new kernel. A restart of the kernel ends the run;
    its last periodic checkpoint stays. Raises FileNotFoundError for a folder that does not exist.
    """
    return TrainingMonitor(run, samples=samples, method=method, title=title, interval=interval)


class TrainingMonitor(Explorer):
    """See `training_monitor`.

    ``history`` holds the lines so far, as in ``metrics.jsonl``; ``state`` is "ready", "running", "stopping", "stopped",
    "finished" or "failed", for a folder "watching" or "stopped".
    """

    def __init__(
        self,
        run: Callable[..., Any] | str | os.PathLike[str],
        *,
        samples: Sequence[Prepared],
        method: Method | None,
        title: str,
        interval: float,
    ) -> None:
        if not callable(run) and (not isinstance(run, str | os.PathLike) or not os.fspath(run)):
            raise TypeError(f"run must be a function that takes callback=, or a folder, got {run!r}")
        if not isinstance(interval, int | float) or not interval > 0:
            raise ValueError(f"interval must be a positive number of seconds, got {interval!r}")
        if not isinstance(samples, Sequence) or not all(isinstance(one, Prepared) for one in samples):
            raise TypeError(
                f"samples must be a sequence of prepared scans, such as data.val, got {type(samples).__name__}"
            )
        if method is not None and not isinstance(method, Method):
            raise TypeError(f"method must be a built method, medlib.methods.build(...), got {method!r}")
        self._run = run if callable(run) else None
        self._folder = None if callable(run) else _Folder(run, method, samples)
        of_each = {one.case.patient: one for one in reversed(samples)}  # the first scan of a patient
        shown = [one for one in samples if of_each[one.case.patient] is one][:_SAMPLES]
        self._pictures = [_Sample(one) for one in shown]
        self._title, self._interval = title, interval
        self._handle = DisplayHandle()
        self._lock, self._ask, self._over = threading.RLock(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self.history: list[dict[str, Any]] = []
        self.state = "ready"
        self._heard: set[str] = set()
        self._note, self._trouble, self._outcome = "", "", None
        self._error: BaseException | None = None

        wide = ipywidgets.Layout(width="150px")
        verb = "watch" if self._folder else "start"
        controls = {
            "start": ipywidgets.Button(description=verb, icon="play", button_style="primary", layout=wide),
            "stop": ipywidgets.Button(description="stop", icon="stop", layout=wide),
            "status": ipywidgets.HTML(),
        }
        if self._folder:
            tip = "start a training in a terminal; its curves appear here. Its own Ctrl-C stops it, with a checkpoint."
            controls["start"].tooltip, controls["stop"].tooltip = "Follow the folder", "Leave the run alone"
        else:
            tip = "press start and run other cells meanwhile; stop, and start again: it goes on where it was."
            controls["start"].tooltip = "Train in the background; goes on from a checkpoint where there is one"
            controls["stop"].tooltip = "Write a checkpoint and end"
        self._curves = _Curves(title, self._pictures)
        boxes = ipywidgets.HBox([controls["start"], controls["stop"]])
        widget = stack(hint(tip), boxes, controls["status"], self._curves.figure)
        super().__init__(widget, go.Figure(), "", controls, {"training": self._curves.figure})
        controls["start"].on_click(lambda button: self.start())
        controls["stop"].on_click(lambda button: self.stop())
        if self._folder:
            self.start()
        else:
            self.refresh()

    def start(self) -> None:
        """Begin the run, or go on with it, and return at once. RuntimeError where it is going on."""
        with self._lock:
            if self.state in ("running", "stopping", "watching"):
                raise RuntimeError(f"{self._title}: this is going on ({self.state}); stop it first")
            self._ask.clear()
            self._over.clear()
            self._heard, self._note, self._outcome, self._error = set(), "", None, None
            self.state = "watching" if self._folder else "running"
            self.refresh()
            self._threads = [threading.Thread(target=self._paint, daemon=True)]
            if self._run is not None:
                self._threads.insert(0, threading.Thread(target=self._work, daemon=True))
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        """Ask the run to end with a checkpoint, at its next line; end the watching. Nothing where nothing goes on."""
        with self._lock:
            if self.state == "running":
                self.state = "stopping"
                self._ask.set()
            elif self.state == "watching":
                self.state = "stopped"
                self._over.set()
            self.refresh()

    def wait(self, timeout: float | None = None) -> Any:
        """What ``run`` returned, once it has ended; the picture of the static page is then that of the whole run.

        While a cell waits, no button is heard: interrupting the kernel stops the run, with a checkpoint, as it does
        without a monitor. Raises what the run raised, KeyboardInterrupt where it was stopped, TimeoutError after
        ``timeout`` seconds, RuntimeError where there is no run.
        """
        if self._run is None or not self._threads:
            raise RuntimeError(f"{self._title}: no run of this kernel to wait for; call start() first")
        end = None if timeout is None else time.monotonic() + timeout
        try:
            for thread in self._threads:
                thread.join(None if end is None else max(0.0, end - time.monotonic()))
                if thread.is_alive():
                    raise TimeoutError(f"{self._title}: still {self.state} after {timeout:g} s")
        except KeyboardInterrupt:
            self.stop()
            self._threads[0].join(_SECONDS)
            raise
        self._show(self._handle.update)
        if self._error is not None:
            raise self._error
        return self._outcome

    def show(self) -> None:
        """Display the widget with a picture of what is known by now."""
        self._show(self._handle.display)

    def refresh(self) -> None:
        """Draw what has been heard so far."""
        with self._lock:
            try:
                if self._folder:
                    self.history = self._folder.read()
                    if saved := self._folder.checkpoint():
                        self._predict(*saved)
                self._curves.draw(self.history)
                facts = self._facts()
                self._trouble = ""
            except Exception as error:  # what cannot be drawn must be seen, and must not end the run or the watching
                facts = []
                self._trouble = f"cannot be drawn: {type(error).__name__}: {error}"
            self.controls["start"].disabled = self.state in ("running", "stopping", "watching")
            self.controls["stop"].disabled = self.state not in ("running", "watching")
            self.controls["status"].value = self._status(facts)

    # ---- threads

    def _work(self) -> None:
        assert self._run is not None
        try:
            self._outcome = self._run(callback=self._hear)
            if predict := getattr(self._outcome, "predict", None):  # a reused stage shows no predictions
                self._predict(predict, self.history[-1]["step"] if self.history else 0)
            state = "finished"
        except KeyboardInterrupt as stopped:
            self._error, state = stopped, "stopped"
        except BaseException as error:
            self._error, state = error, "failed"
        with self._lock:
            self.state = state
        self._over.set()

    def _paint(self) -> None:
        while not self._over.wait(self._interval):
            self.refresh()
        self.refresh()

    def _hear(self, stage: str, step: int, terms: Mapping[str, Any]) -> None:
        """The callback of the run, in its thread: only notes what it is told, and predicts the samples."""
        history = self.history
        if stage not in self._heard:  # a stage that goes on from a checkpoint, or is shown again from its start
            self._heard.add(stage)
            history = [line for line in history if line["stage"] != stage or line["step"] < step]
        line = {name: value for name, value in terms.items() if name != "predict"}
        self.history = [*history, {"stage": stage, "step": step, **line}]
        if "predict" in terms:
            self._predict(terms["predict"], step)
        if self._ask.is_set():
            raise StopTraining

    def _predict(self, predict: Predict, step: int) -> None:
        try:
            for one in self._pictures:
                one.predict(predict, step)
        except Exception as error:
            self._note = f"the samples cannot be predicted: {type(error).__name__}: {error}"

    # ---- words

    def _facts(self) -> list[str]:
        if self._folder:
            return self._folder.facts()
        return [f"{escape(str(line['stage']))}, step {line['step']:,}" for line in self.history[-1:]]

    def _status(self, facts: Sequence[str]) -> str:
        parts = [f"<b>{self.state}</b>", *facts]
        if self.state == "stopping":
            parts.append("a checkpoint follows at the next line of the log")
        if self.state == "stopped" and self._error is not None:
            parts.append(escape(str(self._error)))
        text = f'<div role="status" aria-live="polite">{" · ".join(parts)}</div>'
        for trouble in filter(None, (self._note, self._trouble)):
            text += f'<div role="alert">{escape(trouble)}</div>'
        if self.state == "failed" and self._error is not None:
            error = f"{type(self._error).__name__}: {self._error}"
            where = "".join(traceback.format_exception(self._error))
            text += f'<div role="alert"><b>{escape(error)}</b></div>'
            text += f"<details><summary>where it happened</summary><pre>{escape(where)}</pre></details>"
        return block(text)

    def _show(self, send: Callable[..., object]) -> None:
        with self._lock:
            self.twin = go.Figure(self._curves.figure)
            stages = list(dict.fromkeys(line["stage"] for line in self.history))
            seen = f"over the steps of {', '.join(stages)}" if stages else "not begun yet"
            parts = "loss terms, learning rate and validation Dice"
            shown = f", {len(self._pictures)} slices with label and prediction" if self._pictures else ""
            self.alt = f"{self._title}: {parts}, {seen}{shown}."
        show_widget(self.widget, self.twin, self.alt, send)


class _Folder:
    """The stages that another process writes below a folder."""

    def __init__(self, path: str | os.PathLike[str], method: Method | None, samples: Sequence[Prepared]) -> None:
        self.path = resolve(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{shorten(self.path)} is not a folder: give a run's output folder or a stage's")
        if samples and method is None:
            raise ValueError("samples of a watched folder need the method that predicts them: give method=...")
        self._shown: list[Path] = []
        self._lines: dict[Path, tuple[float, list[dict[str, Any]]]] = {}
        self._method, self._loaded = (method if samples else None), (self.path, 0.0)
        if self._method is not None:
            with seeded_init(0):  # weights come from the checkpoints
                self._networks = self._method.networks(len(samples[0].case.about.classes)).eval()
            self._predict = predictor(self._method, self._networks, make_fabric("cpu"))

    def read(self) -> list[dict[str, Any]]:
        """The lines of the stage that was written last; before them those of the stages that it was seen to follow."""
        newest = self._newest()
        if newest is not None and newest not in self._shown and self._gives_way():
            run = ("method", "seed")
            if self._shown and any(self._settings(self._shown[-1])[n] != self._settings(newest)[n] for n in run):
                self._shown = []
            self._shown.append(newest)
        return [line for folder in self._shown for line in self._history(folder)]

    def facts(self) -> list[str]:
        """What is shown, how far it is, and since when it has been silent."""
        if not self._shown:
            return [f"nothing is trained below {escape(shorten(self.path))} yet"]
        folder = self._shown[-1]
        step, steps = self._step(folder), self._settings(folder)["steps"]
        end = "finished" if step == steps else f"last line {self._silent(folder):.0f} s ago"
        return [escape(folder.name), f"step {step:,} of {steps:,}", end]

    def checkpoint(self) -> tuple[Predict, int] | None:
        """The networks and the step of a checkpoint that is new, where their output means something."""
        file = self._shown[-1] / CHECKPOINT if self._shown else None
        if self._method is None or file is None or not file.exists() or self._loaded == (file, file.stat().st_mtime):
            return None
        self._loaded = (file, file.stat().st_mtime)
        settings = self._settings(file.parent)
        if settings["method"] != self._method.name or not settings["uses_labels"]:
            return None
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            self._networks.load_state_dict(saved["networks"])
        except Exception as error:
            raise RuntimeError(f"{shorten(file)} cannot be read: {type(error).__name__}: {error}") from error
        return self._predict, saved["step"]

    def _newest(self) -> Path | None:
        files = [self.path / METRICS] if (self.path / METRICS).exists() else (self.path / "stages").glob(f"*/{METRICS}")
        return min((file.parent for file in files), key=self._silent, default=None)

    def _gives_way(self) -> bool:
        """Whether the last shown stage is finished or has fallen silent, or there is none."""
        if not self._shown:
            return True
        folder = self._shown[-1]
        return self._silent(folder) > _SILENT or self._step(folder) == self._settings(folder)["steps"]

    def _settings(self, folder: Path) -> dict[str, Any]:
        file = folder / "stage.json"
        try:
            found = json.loads(file.read_text())
            return {name: found[name] for name in ("method", "seed", "steps", "uses_labels")}
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{shorten(file)} is no description of a stage: {type(error).__name__}: {error}"
            ) from error

    def _silent(self, folder: Path) -> float:
        """Seconds since its last line."""
        return max(0.0, time.time() - (folder / METRICS).stat().st_mtime)

    def _history(self, folder: Path) -> list[dict[str, Any]]:
        written = (folder / METRICS).stat().st_mtime
        if folder not in self._lines or self._lines[folder][0] != written:
            try:
                self._lines[folder] = (written, StageResult("", "", folder, 0, 0.0, True).history())
            except ValueError as error:
                raise ValueError(f"{shorten(folder / METRICS)} has a line that cannot be read: {error}") from error
        return self._lines[folder][1]

    def _step(self, folder: Path) -> int:
        lines = self._history(folder)
        return lines[-1]["step"] if lines else 0


class _Sample:
    """One slice of a prepared scan, with its label and what a network makes of it."""

    def __init__(self, scan: Prepared) -> None:
        if scan.label is None:
            raise ValueError(f"{scan.case.case} has no label: samples are prepared scans with a label")
        self.z = int(np.argmax((scan.label > 0).sum(axis=(1, 2))))
        self.name = f"{scan.case.patient}, slice {self.z + 1}"
        self.classes, self.colours = scan.case.about.classes, scan.case.about.colours
        self._inputs = scan.inputs()  # slices (Z, 1, H, W), or one volume (1, 1, Z, H, W)
        self._label = np.array(scan.label[self.z])
        self._box = pixels.focus(self._label)
        self._gray = pixels.to_gray(np.array(scan.image[self.z], np.float32)[self._box])
        self.step: int | None = None
        self._guess: np.ndarray | None = None

    def predict(self, predict: Predict, step: int) -> None:
        volume = self._inputs.ndim == 5
        inputs = self._inputs if volume else self._inputs[self.z : self.z + 1]
        classes = predict_volume(predict, inputs).argmax(dim=0)  # (Z, H, W), or this slice alone
        self._guess, self.step = classes[self.z if volume else 0].cpu().numpy(), step

    def tiles(self) -> tuple[np.ndarray, np.ndarray]:
        """The slice (h,w,3) with its label, and with the prediction; where that errs it is magenta."""
        truth = self._label[self._box]
        drawn = pixels.blend(self._gray, pixels.label_overlay(truth, self.colours))
        if self._guess is None:
            return drawn, pixels.blend(self._gray)
        layer = pixels.disagreement_overlay(truth, self._guess[self._box], self.colours)
        return drawn, pixels.blend(self._gray, layer)

    def caption(self) -> str:
        """What is to be said of the prediction."""
        if self._guess is None:
            return "not predicted yet"
        return f"{100 * np.mean(self._guess != self._label):.1f} % wrong"


def _terms(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss terms; without their total where it only repeats one of them."""
    others = [name for name in term_names(history) if name != "total"]
    totals = [line for line in history if "total" in line]
    repeats = all(any(line.get(name) == line["total"] for name in others) for line in totals)
    return others if repeats else term_names(history)


class _Curves:
    """The figure of a monitor: loss terms on the left, Dice and learning rate on the right, samples below."""

    def __init__(self, title: str, samples: Sequence[_Sample]) -> None:
        self.title, self.samples = title, samples
        wide = WIDTH - _LEFT - _RIGHT
        self._tile = min(_TILE, (wide + _APART) // (2 * max(1, len(samples))) - _APART)
        strip = _TITLES + self._tile + 28 if samples else 0  # of axes and samples, pictures, words
        inner = _CURVES + strip
        frame = make_subplots(2, 2, specs=[[{"rowspan": 2}, {}], [None, {}]])
        foot, middle = strip / inner, (inner + strip) / 2 / inner
        frame.update_layout(
            template=TEMPLATE,
            title={"text": title, "y": 1 - 30 / (inner + _HEAD + _FOOT), "yanchor": "top"},
            height=inner + _HEAD + _FOOT,
            margin={"l": _LEFT, "r": _RIGHT, "t": _HEAD, "b": _FOOT, "autoexpand": False},
            legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            xaxis={"domain": [0, 0.54], "title": "step", "rangemode": "tozero"},
            yaxis={"domain": [foot, 1], "title": "loss term"},
            xaxis2={"domain": [0.66, 1], "showticklabels": False, "matches": "x3"},
            yaxis2={"domain": [middle + 0.03, 1], "title": "Dice (thick: mean)", "range": [0, 1.03]},
            xaxis3={"domain": [0.66, 1], "title": "step", "rangemode": "tozero"},
            yaxis3={"domain": [foot, middle - 0.03], "title": "learning rate", "rangemode": "tozero", "nticks": 4,
                    "exponentformat": "e"},
        )  # fmt: skip
        if samples:
            # in pixels, downwards from below the titles of the axes
            frame.update_layout(
                xaxis4=bare_axis(domain=[0, 1], range=[0, wide], anchor="y4", fixedrange=True),
                yaxis4=bare_axis(domain=[0, foot], range=[strip, 0], anchor="x4", fixedrange=True),
                legend2={"orientation": "h", "x": 0, "y": 0, "yanchor": "top"},
            )
            class_legend(frame, samples[0].classes, samples[0].colours, disagreement=True)
            frame.for_each_trace(lambda trace: trace.update(legend="legend2", xaxis="x4", yaxis="y4"))
        self.figure = LiveFigure(frame)
        self._traces: dict[str, int] = {}
        self._written: list[str] = []

    def draw(self, history: Sequence[Mapping[str, Any]]) -> None:
        """All of ``history``, and the samples; each trace in one message."""
        starts: dict[str, int] = {}
        last = 0
        for line in history:
            starts.setdefault(line["stage"], last)
            last = max(last, starts[line["stage"]] + line["step"])
        terms = _terms(history)
        checks = [(line, line["val_dice"]) for line in history if "val_dice" in line]
        structures = dict.fromkeys(name for _, dice in checks for name in dice)
        curves = {name: (1, 1, [(line, line[name]) for line in history if name in line]) for name in terms}
        curves |= {f"{_CLASS}{name}": (1, 2, [(line, dice[name]) for line, dice in checks]) for name in structures}
        curves[_MEAN] = (1, 2, [(line, float(np.nanmean(list(dice.values())))) for line, dice in checks])
        curves["learning rate"] = (2, 2, [(line, line["lr"]) for line in history if "lr" in line])
        for name, (row, column, points) in curves.items():
            if points:
                x, y = thin([starts[line["stage"]] + line["step"] for line, _ in points], [v for _, v in points])
                redraw(self._trace(name, row, column, terms.index(name) if name in terms else None), x=x, y=y)
        latest = {name: line[name] for line in history for name in (*terms, "lr") if name in line}
        words = [f"{'learning rate' if name == 'lr' else name} {value:.3g}" for name, value in latest.items()]
        now = " · ".join(words) or "nothing logged yet"
        self.figure.layout.title.text = f"{self.title}<br><span style='font-size:13px'>{now}</span>"
        last_line, last_dice = checks[-1] if checks else ({}, {})
        self._annotate(starts, last_dice, starts[last_line["stage"]] + last_line["step"] if checks else 0)

    def _trace(self, name: str, row: int, column: int, term: int | None) -> Any:
        """The curve ``name``, added where it is new."""
        if name not in self._traces:
            if term is not None:
                line = {"color": SERIES[term % len(SERIES)], "width": 2.0}
            elif name.startswith(_CLASS):
                line = {"color": MUTED, "width": 1.2}
            else:
                line = {"color": INK, "width": 2.4}
            self._traces[name] = len(self.figure.data)
            mode = "lines+markers" if row == 1 and column == 2 else "lines"
            trace = go.Scatter(name=name, x=[], y=[], mode=mode, line=line, showlegend=term is not None)
            self.figure.add_trace(trace, row=row, col=column)
        return self.figure.data[self._traces[name]]

    def _annotate(self, starts: Mapping[str, int], dice: Mapping[str, float], at: int) -> None:
        """Stages where they begin, classes where the curves of their ``dice`` end, the samples with their words.

        Only what has changed goes to the page.
        """
        words = [
            {"text": stage, "x": x, "y": 1, "xref": "x", "yref": "y domain", "xanchor": "left", "yanchor": "top"}
            for stage, x in starts.items()
        ]
        ends = {"xref": "x2", "yref": "y2", "xanchor": "left", "xshift": 5, "font": {"size": 10}}
        heights = spread({name: value for name, value in dice.items() if math.isfinite(value)}, gap=0.11)
        words += [{"text": name, "x": at, "y": round(height, 4), **ends} for name, height in heights.items()]
        here, places = {"xref": "x4", "yref": "y4"}, []
        for i, one in enumerate(self.samples):
            left = 2 * i * (self._tile + _APART)
            right = left + self._tile + _APART
            places.append((left, right))
            below = {**here, "y": _TITLES + self._tile + 12, "xanchor": "left", "font": {"size": 11}}
            words += [
                {
                    "text": f"<b>{one.name}</b>",
                    "x": left,
                    "y": _TITLES - 11,
                    "xanchor": "left",
                    "font": {"color": INK},
                    **here,
                },
                {"text": "label", "x": left, **below},
                {"text": one.caption(), "x": right, **below},
            ]
        steps = {one.step for one in self.samples if one.step is not None}
        if steps:
            corner = {"x": 1, "xref": "paper", "xanchor": "right", "y": 0, "yref": "paper", "yshift": -18}
            words.append({**corner, "text": f"predicted at step {max(steps):,}"})
        written = [f"{word['text']} {word['x']} {word['y']}" for word in words]
        if written != self._written:
            lines = [{"type": "line", "xref": "x", "yref": "y domain", "x0": x, "x1": x, "y0": 0, "y1": 1,
                      "line": {"color": MUTED, "width": 1, "dash": "dot"}} for x in starts.values() if x]  # fmt: skip
            where = {"y": _TITLES, "sizex": self._tile, "sizey": self._tile, "sizing": "contain", **here}
            images = [
                {"source": pixels.data_uri(tile), "x": x, **where}
                for one, pair in zip(self.samples, places, strict=True)
                for x, tile in zip(pair, one.tiles(), strict=True)
            ]
            with self.figure.batch_update():
                self.figure.layout.annotations, self.figure.layout.shapes = words, lines
                self.figure.layout.images = images
            self._written = written
