"""Live parts of a page: a figure that reaches it as a whole, and names for its controls."""

from copy import deepcopy
from typing import Any

import anywidget
import plotly.graph_objects as go
from traitlets import observe


class LiveFigure(go.FigureWidget):
    """A ``FigureWidget`` the page hears of when it is first shown or put into a box, with all that was done before.

    plotly's own tells the page at once, of an empty figure, and sends its traces afterwards. A page that still loads
    plotly.js keeps those messages waiting, may draw the empty figure first, and then leaves it empty.
    """

    def open(self) -> None:
        """Nothing yet: the first look at `model_id` opens the connection."""

    @property
    def model_id(self) -> Any:
        """The name under which the page knows the figure."""
        if self.comm is None:
            self._widget_data, self._widget_layout = deepcopy(self._data), deepcopy(self._layout_obj._props)
            super().open()
        return super().model_id

    @observe("_js2py_relayout")
    def _handler_js2py_relayout(self, change: Any) -> None:
        """A selection stays, the outline around it goes.

        plotly on the page selects by its outlines again at every redraw, but has those of a lasso in pixels and then
        finds nothing; plotly in Python cannot read them.
        """
        message = change["new"]
        if message and message["relayout_data"].pop("selections", None):
            self._send_relayout_msg({"selections": []})
            for i, trace in enumerate(self.data):
                chosen = trace.selectedpoints if "selectedpoints" in trace else None
                if chosen is not None:
                    self._send_restyle_msg({"selectedpoints": [[int(point) for point in chosen]]}, trace_indexes=i)
        super()._handler_js2py_relayout(change)


class ControlNames(anywidget.AnyWidget):
    """Tells a screen reader how sliders and players in the same box are called; it takes no room.

    ipywidgets writes a label beside a slider, but does not connect it with the handle that the keyboard reaches, and
    draws the buttons of a player as symbols without a name.
    """

    _esm = """
    const PLAYER = ["play or pause", "back to the start", "repeat"];
    function give(element, name) {
      element.setAttribute("aria-label", name);
      element.title = name;
    }
    function name(box) {
      for (const handle of box.querySelectorAll(".widget-slider .noUi-handle:not([aria-label])")) {
        const label = handle.closest(".widget-slider").querySelector("label");
        if (label?.textContent) give(handle, label.textContent);
      }
      for (const player of box.querySelectorAll(".widget-play"))
        player.querySelectorAll("button").forEach((one, i) => one.hasAttribute("aria-label") || give(one, PLAYER[i]));
    }
    function render({ el }) {
      el.style.display = "none";
      let watch;
      const start = requestAnimationFrame(() => {  // by then the box is on the page
        const box = el.closest(".widget-vbox");
        if (!box) return;
        name(box);
        watch = new MutationObserver(() => name(box));
        watch.observe(box, { childList: true, subtree: true });
      });
      return () => { cancelAnimationFrame(start); watch?.disconnect(); };
    }
    export default { render };
    """
