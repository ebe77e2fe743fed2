"""Live parts of a page: a figure that reaches it as a whole, and names for its controls."""

from copy import deepcopy
from typing import Any

import anywidget
import plotly
import plotly.graph_objects as go
from traitlets import Bytes, Unicode, observe

_LOADED = f"medlib: plotly.js of plotly {plotly.__version__}"  # the page's name for it


class PlotlyLibrary(anywidget.AnyWidget):
    """plotly.js with plotly's own widget (5 MB), for all figures of a kernel: it travels to a page once."""

    _esm = "export default {};"  # it has nothing to show
    _shared: "PlotlyLibrary | None" = None
    source = Bytes().tag(sync=True)

    @classmethod
    def shared(cls) -> "PlotlyLibrary":
        """The kernel's only one; a new one where it was closed."""
        if cls._shared is None or cls._shared.comm is None:
            cls._shared = cls(source=str(go.FigureWidget._esm).encode())
        return cls._shared


class LiveFigure(go.FigureWidget):
    """A ``FigureWidget`` the page hears of when it is first shown or put into a box, with all that was done before.

    plotly's own tells the page at once, of an empty figure, and sends its traces afterwards. A page that still loads
    plotly.js keeps those messages waiting, may draw the empty figure first, and then leaves it empty. It also brings a
    plotly.js with each figure, and a page that needs more than two seconds for one is never told anything again:
    anywidget gives up on the figure, without a word to the kernel. Here a page loads plotly.js once, in its own time,
    and each figure keeps what it is told meanwhile.
    """

    _esm = """
    const TOLD = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
      "removeLayoutProps", "removeTraceProps"].map((name) => `_py2js_${name}`);
    const LOADED = Symbol.for("LOADED");
    async function load(model) {
      const library = await model.widget_manager.get_model(model.get("_library"));
      const address = URL.createObjectURL(new Blob([library.get("source")], { type: "text/javascript" }));
      try { return (await import(address)).default; } finally { URL.revokeObjectURL(address); }
    }
    function plotly(model) {  // the same for all figures of the page; one that did not load is asked for again
      globalThis[LOADED] ??= load(model).catch((error) => { delete globalThis[LOADED]; throw error; });
      return globalThis[LOADED];
    }
    export default () => {
      let figure, started;
      return {
        initialize({ model }) {
          const waiting = [];
          const keepers = TOLD.map((name) => [`change:${name}`, () => waiting.push([name, model.get(name)])]);
          for (const [event, keep] of keepers) model.on(event, keep);
          started = plotly(model).then((make) => {
            for (const [event, keep] of keepers) model.off(event, keep);
            figure = make();
            figure.initialize({ model });
            for (const [name, message] of waiting) model.set(name, message);
          });
          started.catch(() => {});  // whoever draws the figure says so
        },
        async render(view) {
          await started;
          if (!view.signal?.aborted) return figure.render(view);
        },
      };
    };
    """.replace('LOADED"', f'{_LOADED}"')
    _library = Unicode().tag(sync=True)

    def open(self) -> None:
        """Nothing yet: the first look at `model_id` opens the connection."""

    @property
    def model_id(self) -> Any:
        """The name under which the page knows the figure."""
        if self.comm is None:
            self._library = PlotlyLibrary.shared().model_id
            super().open()
        return super().model_id

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
        """What a page is told that asks for all: the figure as it is now, also after a reload of the page."""
        state: dict[str, Any] = super().get_state(key, drop_defaults)
        if key is None:  # plotly's own are those of the figure when it was made
            for name, now in (("_widget_data", self._data), ("_widget_layout", self._layout_obj._props)):
                state[name] = self.trait_metadata(name, "to_json")(deepcopy(now), self)
        return state

    def _repr_mimebundle_(self, *given: Any, **named: Any) -> Any:
        """What a cell shows that ends in the figure itself."""
        _ = self.model_id  # plotly's asks for a name without opening
        return super()._repr_mimebundle_(*given, **named)

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
