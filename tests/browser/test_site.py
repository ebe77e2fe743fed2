"""The static site in a browser: opened from a folder, as a reader would who unpacked it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medlib.book import publish


@pytest.fixture(scope="module")
def site(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the real notebooks."""
    folder = tmp_path_factory.mktemp("site")
    publish(folder)
    return folder


def test_every_figure_of_a_lesson_is_drawn(site: Path, open_page: Callable) -> None:
    page, watch = open_page((site / "04_coral.html").as_uri(), site.as_uri())
    figures = page.locator("figure.interactive")
    assert figures.count() > 5
    for i in range(figures.count()):
        figure = figures.nth(i)
        figure.scroll_into_view_if_needed()
        figure.locator(".js-plotly-plot .main-svg").first.wait_for()
        page.wait_for_function("figure => figure.dataset.drawn === 'yes'", arg=figure.element_handle())
        assert not figure.locator("img").is_visible() if figure.locator("img").count() else True
    assert watch.errors == [] and watch.outside == []


def test_a_reader_finds_the_way_and_chooses_a_theme(site: Path, open_page: Callable) -> None:
    page, watch = open_page((site / "index.html").as_uri(), site.as_uri(), color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("link", name="04 · CORAL").click()
    page.wait_for_url("**/04_coral.html")
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(background) == "rgb(255, 255, 255)" != dark
    page.get_by_role("link", name="Solutions").first.click()
    page.wait_for_url("**/solutions/04_coral.html")
    assert page.evaluate(background) == "rgb(255, 255, 255)", "the choice holds on the next page"
    assert page.locator("h1").inner_text().startswith("04")
    assert watch.errors == [] and watch.outside == []


def test_a_phone_needs_no_sideways_scrolling(site: Path, open_page: Callable) -> None:
    page, watch = open_page((site / "04_coral.html").as_uri(), site.as_uri(), viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert page.locator("math mfrac").first.bounding_box()["height"] > 20, "formulas are set"
    assert watch.errors == [] and watch.outside == []
