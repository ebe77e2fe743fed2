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
