"""A figure that reaches the page whole, keeps a selection without its outline, and controls that have a name."""

from typing import Any

import ipywidgets
import numpy as np
import pytest

from medlib.explore import embedding_explorer, history_explorer
from medlib.explore.live import ControlNames, LiveFigure, PlotlyLibrary
from medlib.rng import numpy_generator


def figure() -> LiveFigure:
    live = LiveFigure()
    live.add_scatter(x=[1, 2, 3], y=[4, 5, 6], mode="markers")
    return live


def test_the_page_first_hears_of_the_whole_figure() -> None:
    live = figure()
    live.layout.height = 321
    live.data[0].x = np.array([7, 8, 9])
    assert live.comm is None
    ipywidgets.VBox([live])  # a box tells the page of what it holds
    assert live.comm is not None
    state = live.get_state()
    assert state["_widget_layout"]["height"] == 321 and len(state["_widget_data"]) == 1
    assert list(state["_widget_data"][0]["x"]) == [7, 8, 9]


def test_a_page_that_is_loaded_again_hears_of_the_figure_as_it_is() -> None:
    live = figure()
    assert live.model_id
    live.add_scatter(x=[1], y=[1])
    live.data[0].y, live.layout.title.text = [9, 9, 9], "later"
    state = live.get_state()
    assert [trace["y"] for trace in state["_widget_data"]] == [[9, 9, 9], [1]]
    assert state["_widget_layout"]["title"]["text"] == "later"
    assert "_widget_data" not in live.get_state("_config"), "a change of one part sends that part"


def test_a_figure_opens_where_a_cell_ends_in_it() -> None:
    live = figure()
    shown = live._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    assert live.comm is not None and shown["model_id"] == live.model_id


def test_plotly_js_travels_once() -> None:
    first, second = figure(), figure()
    assert first.model_id != second.model_id and first._library == second._library
    assert len(PlotlyLibrary.shared().source) > 1_000_000 > 100 * len(first.get_state()["_esm"])
    PlotlyLibrary.shared().close()
    third = figure()
    assert third.model_id and third._library not in ("", first._library), "a closed library is of no use to a page"


def test_a_lassos_outline_goes_and_what_it_held_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    live, sent = figure(), []
    live.data[0].selectedpoints = [0, 2]
    assert live.model_id
    for name in ("_send_relayout_msg", "_send_restyle_msg"):
        monkeypatch.setattr(live, name, lambda *given, **named: sent.append((*given, *named.values())))

    def page(**changed: Any) -> None:
        live._js2py_relayout = {"relayout_data": changed, "source_view_id": "a view"}

    unreadable = {"xref": "x", "yref": "y", "type": "path", "opacity": object(), "path": "M351,11L375,11L375,-12Z"}
    page(selections=[unreadable])
    assert sent == [({"selections": []},), ({"selectedpoints": [[0, 2]]}, 0)]
    assert live._js2py_relayout is None and live.layout.selections == ()
    sent.clear()
    page(dragmode="pan")
    assert live.layout.dragmode == "pan"
    assert not any("selections" in message or "selectedpoints" in message for message, *_ in sent)


def test_explorers_name_their_controls_and_say_what_they_show() -> None:
    rng = numpy_generator(0, "live")
    features, positions = {step: rng.normal(size=(40, 8)) for step in (0, 5)}, np.tile(np.arange(1, 9) / 8, 5)
    patients = np.repeat([f"patient{i}" for i in range(5)], 8).tolist()
    thumbnails = rng.integers(0, 255, (40, 8, 8), np.uint8)
    slices = embedding_explorer({"net": features[5]}, positions, patients, thumbnails, projection="PCA", title="Slices")
    film = history_explorer({"net": features}, positions, patients, title="Film")
    for explorer in (slices, film):
        assert sum(isinstance(part, ControlNames) for part in explorer.widget.children) == 1
        assert explorer.controls["spoken"] in explorer.widget.children
    said = slices.controls["spoken"]
    assert "Slices (PCA), coloured by position. net: rank correlation" in said.value
    slices.controls["colour"].value = "patient"
    slices.controls["only patient"].value = "patient2"
    assert "8 of 40 shown), coloured by patient." in said.value and "trustworthiness" in said.value
    before = film.controls["spoken"].value
    film.controls["step"].value = 0
    assert "Film (PCA), step 0. net, mean cosine" in film.controls["spoken"].value != before
