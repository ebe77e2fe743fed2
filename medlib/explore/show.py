"""Figures and widgets on the page, each with a picture and a sentence for where it cannot be drawn."""

import base64
import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from IPython.display import display

from medlib.explore.live import ControlNames
from medlib.explore.pixels import decode_canvas, encode_png, fewer_colours

PNG_LIMIT = 150_000  # bytes of one picture in a committed notebook
# Pixels per unit of the figure and colours merged, from the best to the smallest: the first within the limit is taken.
_LADDER = ((2, 1), (2, 8), (1.5, 8), (1, 1), (1, 8), (1, 14))
_SECONDS = 120.0  # a browser that has not drawn by then, on a busy machine, will not
_browser: list[bool] = []  # empty: not looked for yet; one entry: whether pictures can be drawn


def _start_browser() -> bool:
    from choreographer.browsers.chromium import Chromium

    if not Chromium.find_browser(skip_local=False):
        return False
    import kaleido  # type: ignore[import-untyped]

    kaleido.start_sync_server(n=1, silence_warnings=True, mathjax=False)
    return True


def browser_found() -> bool:
    """Whether figures can be turned into pictures here. Looked up once; ``MEDLIB_PNG=0`` in the environment says no."""
    if os.environ.get("MEDLIB_PNG", "1") == "0":
        return False
    if not _browser:
        try:
            _browser.append(_start_browser())
        except Exception:  # a half-installed browser or kaleido only costs the picture
            _browser.append(False)
    return _browser[0]


def _draw(figure: go.Figure, scale: float) -> bytes:
    import kaleido

    answer: queue.Queue[bytes | BaseException] = queue.Queue()

    def work() -> None:
        options = {"format": "png", "width": figure.layout.width, "height": figure.layout.height, "scale": scale}
        try:
            answer.put(kaleido.calc_fig_sync(json.loads(figure.to_json()), opts=options))
        except BaseException as error:
            answer.put(error)

    threading.Thread(target=work, daemon=True).start()
    result = answer.get(timeout=_SECONDS)
    if isinstance(result, BaseException):
        raise result
    return result


def _sized(figure: go.Figure) -> go.Figure:
    """A plain copy of ``figure`` that states its width and height, its template's where it has none of its own."""
    plain = go.Figure(figure)
    theme = figure.layout.template.layout
    plain.update_layout(width=figure.layout.width or theme.width, height=figure.layout.height or theme.height)
    return plain


def picture(figure: go.Figure, scale: float = 2.0) -> bytes | None:
    """``figure`` as PNG at ``scale`` times its size (less, where that exceeds ``PNG_LIMIT`` bytes).

    None without a browser.
    """
    if not browser_found():
        return None
    sized = _sized(figure)
    try:
        png, canvas, drawn = b"", np.empty(0), 0.0
        for times, step in [rung for rung in _LADDER if rung[0] <= scale]:
            if len(png) * (times / max(drawn, 1)) ** 2 > 1.3 * PNG_LIMIT and 1 < times != drawn:
                continue  # the last try tells that this one will not do either
            if times != drawn:
                canvas, drawn = decode_canvas(_draw(sized, times)), times
            png = encode_png(fewer_colours(canvas, step))
            if len(png) <= PNG_LIMIT:
                break
        return png
    except Exception:  # the browser is there but cannot run (no sandbox, no memory): do without, and do not wait again
        _browser[:] = [False]
        return None


def _bundle(
    content: dict[str, Any], figure: go.Figure, alt: str, scale: float, send: Callable[..., object] | None = None
) -> None:
    if not alt.strip():
        raise ValueError("alt must be a sentence that says what the figure shows, got an empty text")
    metadata: dict[str, Any] = {}
    png = picture(figure, scale)
    if png is not None:
        content["image/png"] = base64.b64encode(png).decode()
        metadata["image/png"] = {"width": _sized(figure).layout.width, "alt": alt}
    (send or display)({**content, "text/plain": alt}, metadata=metadata, raw=True)


def show(figure: go.Figure, alt: str) -> None:
    """Display ``figure``: interactive where plotly runs, a PNG where a browser drew one, else ``alt``.

    ``alt`` is one sentence for a reader who does not see the picture; it names no machine, path or measured time.
    """
    sized = _sized(figure)
    # plotly's extension of JupyterLab shows the PNG, pixel by pixel, until the mouse enters: hence once its size.
    _bundle({"application/vnd.plotly.v1+json": json.loads(sized.to_json())}, sized, alt, scale=1)


def show_widget(
    widget: ipywidgets.Widget, twin: go.Figure, alt: str, send: Callable[..., object] | None = None
) -> None:
    """Display ``widget`` where a kernel runs; elsewhere its static ``twin`` as PNG, else ``alt``.

    ``send``: what displays it instead of IPython's ``display``, such as the ``update`` of a ``DisplayHandle``.
    """
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    _bundle({"application/vnd.jupyter.widget-view+json": view}, twin, alt, 2, send)


@dataclass
class Explorer:
    """A widget, what stands in its place on a static page, and handles to its parts.

    As the last expression of a cell it displays itself. ``controls`` holds the sliders, buttons and menus by name (set
    their ``value`` from Python to move them) and ``figures`` the live figures.
    """

    widget: ipywidgets.Widget
    twin: go.Figure
    alt: str
    controls: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, go.FigureWidget] = field(default_factory=dict)

    def show(self) -> None:
        """Display the widget with its twin."""
        show_widget(self.widget, self.twin, self.alt)

    def _ipython_display_(self) -> None:
        self.show()


def redraw(trace: Any, **values: Any) -> None:
    """Set properties of one trace of a live figure, in one message.

    Never several traces in one ``batch_update``: plotly leaves out values that did not change, and the page then
    deletes a property in those traces where it did not.
    """
    with trace.figure.batch_update():
        for name, value in values.items():
            trace[name] = value


def hint(text: str) -> ipywidgets.HTML:
    """One line above a widget that says what to try, in the colours of the reader's theme."""
    style = "color:var(--jp-ui-font-color1,#1f2933);font-size:13px;line-height:1.45;max-width:720px"
    return ipywidgets.HTML(f'<div style="{style}"><b>Try:</b> {text}</div>')


def stack(*parts: ipywidgets.Widget) -> ipywidgets.VBox:
    """``parts`` under each other, as wide as a figure, with names that a screen reader can say."""
    return ipywidgets.VBox([*parts, ControlNames()], layout=ipywidgets.Layout(width="740px"))
