"""The static site: what a page holds, and that it asks no other host for anything."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup

from medlib import paths
from medlib.__main__ import main
from medlib.book import PLOTLY, VIEW, publish
from medlib.book.formulas import formula
from medlib.explore.pixels import encode_png

FIGURE = {"data": [{"type": "scatter", "y": [1, 2], "name": "</script><b>"}], "layout": {"width": 720, "height": 300}}
TEXT = """# 07 · A lesson

*In an hour you learn $p < q$.* More.

- see $\\mathcal L_c$ fall

## 1 · First

As in notebook 08, `08_other.ipynb` and [its middle](08_other.ipynb#Middle); solutions: `solutions/07_lesson.ipynb`.

$$\\frac{a}{b}$$
"""


def png(height: int, width: int) -> str:
    """A grey picture as a notebook stores it."""
    return base64.b64encode(encode_png(np.full((height, width, 4), 128, np.uint8))).decode()


def shown(alt: str = "", **data: object) -> nbformat.NotebookNode:
    """An output that `medlib.explore.show` would leave."""
    metadata = {"image/png": {"width": 100, "alt": alt}} if alt else {}
    return nbformat.v4.new_output("display_data", {"text/plain": alt or "<Figure>", **data}, metadata=metadata)


def code(source: str, *outputs: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A cell that was run."""
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=1)


def prose(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_markdown_cell(text)


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """A lesson with every kind of output, its solutions, and another lesson."""
    folder = tmp_path / "notebooks"
    picture = {"image/png": png(40, 200)}
    cells = [
        prose(TEXT),
        code("draw()", shown("A line that <rises>.", **{PLOTLY: FIGURE}, **picture)),
        code("move()", shown("A slider.", **{VIEW: {"model_id": "x"}}, **picture)),
        code("train()", shown("Curves that follow.", **{VIEW: {"model_id": "y"}, "image/png": png(1, 1)})),
        code("bare()", shown("No browser drew this.", **{VIEW: {"model_id": "z"}})),
        code("table", nbformat.v4.new_output("execute_result", {"text/html": "<table></table>", "text/plain": "0"})),
        code("print('<b>')", nbformat.v4.new_output("stream", name="stdout", text="<b>")),
    ]
    write(folder, "07_lesson", *cells)
    write(folder, "08_other", prose("# 08 · Other\n\nThe other one.\n\n## Middle"))
    write(
        folder,
        "solutions/07_lesson",
        prose("# 07 · Solutions\n\nTry `07_lesson.ipynb` first, [here](../07_lesson.ipynb)."),
    )
    return folder


def write(folder: Path, name: str, *cells: nbformat.NotebookNode) -> None:
    path = folder / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


def page(site: Path, name: str) -> BeautifulSoup:
    """A page without its figures' numbers, which take long to parse."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    return BeautifulSoup(re.sub(r'(<script type="application/json">).*?</script>', r"\1</script>", text), "html.parser")


def faults(site: Path) -> list[str]:
    """What is wrong with a site: requests to other hosts, links that lead nowhere, pictures without words."""
    found = []
    documents = {path: page(site, path.relative_to(site).with_suffix("").as_posix()) for path in site.rglob("*.html")}
    anchors = {path: {tag["id"] for tag in soup.select("[id]")} for path, soup in documents.items()}
    for path, soup in documents.items():
        here = path.relative_to(site)
        wanted = [tag.get("src") or tag.get("href") for tag in soup.select("script[src], link[href], img[src], iframe")]
        links = [tag["href"] for tag in soup.select("a[href]")]
        for url in [*wanted, *links]:
            parts = urlsplit(url)
            if parts.scheme == "data" or (parts.scheme in ("http", "https") and url not in wanted):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.scheme or parts.netloc or not target.is_file():
                found.append(f"{here}: {url} is not there")
            elif parts.fragment and not {parts.fragment, unquote(parts.fragment)} & anchors[target]:
                found.append(f"{here}: {url} has no such place")
        found += [
            f"{here}: a picture without words" for tag in soup.select("img") if not (tag.get("alt") or "").strip()
        ]
        found += [f"{here}: a figure without words" for tag in soup.select(".live") if not tag.get("aria-label")]
        styles = " ".join(tag.get_text() for tag in soup.select("style")) + " ".join(
            tag["style"] for tag in soup.select("[style]")
        )
        found += [f"{here}: a style from elsewhere" for _ in re.findall(r"url\(|@import", styles)]
    for sheet in site.rglob("*.css"):
        found += [f"{sheet.name}: a style from elsewhere" for _ in re.findall(r"url\(|@import", sheet.read_text())]
    return found


def test_a_page_shows_each_output(notebooks: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pages = publish(site, notebooks)
    names = ["index", "07_lesson", "08_other", "solutions/07_lesson"]
    assert [path.relative_to(site).with_suffix("").as_posix() for path in pages] == names
    assert faults(site) == []
    soup = page(site, "07_lesson")
    live, slider, bare = soup.select("main figure")
    numbers = re.search(r'json">(.*?)</script>', (site / "07_lesson.html").read_text(encoding="utf-8"))
    assert numbers and json.loads(numbers[1]) == FIGURE  # nothing in it ended the script
    assert live.select_one(".live")["aria-label"] == live.img["alt"] == "A line that <rises>."
    assert live.img["width"] == "100" and live.img["height"] == "20"
    assert (site / live.img["src"]).read_bytes() == base64.b64decode(png(40, 200))
    assert slider.img["alt"] == "A slider." and "run the notebook to move the sliders" in slider.figcaption.text
    assert bare.img is None and "No browser drew this." in bare.text and "run the notebook" in bare.text
    assert "Curves that follow." not in soup.text  # a picture of one pixel says that the next output has it all
    assert soup.select_one(".table table") and soup.select(".output > pre")[0].text == "<b>"


def test_formulas_and_links_of_a_page(notebooks: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    publish(site, notebooks)
    soup = page(site, "07_lesson")
    assert "$" not in soup.select_one(".prose").text and soup.select_one("math mfrac")
    assert "ℒ" in soup.text and soup.select_one('.formula math[display="block"]')
    links = [link["href"] for link in soup.select(".prose p a")]
    assert links == ["08_other.html", "08_other.html", "08_other.html#Middle", "solutions/07_lesson.html"]
    back = [link["href"] for link in page(site, "solutions/07_lesson").select(".prose p a")]
    assert back == ["../07_lesson.html", "../07_lesson.html"]
    index = page(site, "index")
    assert [tag.text for tag in index.select("h2")] == ["07 · A lesson", "08 · Other"]
    first = index.select_one("li")
    assert "In an hour you learn" in first.text and "More" not in first.text and "see" in first.select_one("li").text
    assert first.img["alt"] == "A line that <rises>." and first.select("a")[-1]["href"] == "solutions/07_lesson.html"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (prose("[x](../medlib/nets.py)"), r"cell 1 of 09_bad\.ipynb: links to \.\./medlib/nets\.py"),
        (prose("[x](10_gone.ipynb)"), "links to 10_gone.ipynb"),
        (prose(r"So $\foo x$."), r"cell 1 of 09_bad\.ipynb: the formula .* cannot be set: \\foo"),
        (prose(r"So $\left( x$."), "the formula .* cannot be set"),
        (code("plot()", shown(**{"image/png": png(2, 2)})), r"cell 1 of 09_bad\.ipynb: a picture without a sentence"),
        (nbformat.v4.new_code_cell("x = 1"), "09_bad.ipynb has cells that were not run"),
    ],
)
def test_a_bad_notebook_stops_the_site_before_the_old_one_is_gone(
    cell: nbformat.NotebookNode, message: str, notebooks: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    publish(site, notebooks)
    write(notebooks, "09_bad", prose("# 09 · Bad"), cell)
    with pytest.raises(ValueError, match=message):
        publish(site, notebooks)
    assert faults(site) == [] and (site / "07_lesson.html").is_file()


def test_only_a_site_is_replaced(notebooks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site"
    publish(site, notebooks)
    (notebooks / "08_other.ipynb").unlink()
    lesson = notebooks / "07_lesson.ipynb"
    lesson.write_text(lesson.read_text().replace("[its middle](08_other.ipynb#Middle)", "its middle"))
    publish(site, notebooks)
    assert not (site / "08_other.html").exists() and faults(site) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert main(["book", "-o", str(mine)]) == 2
    assert "holds files that are not a site" in capsys.readouterr().err and (mine / "thesis.txt").is_file()
    with pytest.raises(ValueError, match="no notebooks in"):
        publish(site, tmp_path / "nowhere")


def test_the_real_notebooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site"
    assert main(["book", "--output", str(site)]) == 0
    sources = [*paths.NOTEBOOKS.glob("*.ipynb"), *paths.NOTEBOOKS.glob("solutions/*.ipynb")]
    assert f"{len(sources) + 1} pages" in capsys.readouterr().out
    assert faults(site) == []
    for source in sources:
        name = source.relative_to(paths.NOTEBOOKS).with_suffix("").as_posix()
        soup = page(site, name)
        outputs = [output for cell in nbformat.read(source, 4).cells for output in cell.get("outputs", [])]
        figures = [output for output in outputs if PLOTLY in output.get("data", {})]
        assert len(soup.select("figure.interactive")) == len(figures)
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert str(paths.PROJECT) not in text and str(Path.home()) + "/" not in text
        for code_in_it in soup.select("main :is(code, pre)"):
            code_in_it.decompose()
        left = re.findall(r".{0,30}\$.{0,30}", " ".join(tag.text for tag in soup.select("main .prose")))
        assert left == [], "formulas that were not set"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.replace("<head>", '<head><script src="https://cdn.example.org/x.js">'), "cdn.example.org"),
        (lambda s: s.replace('href="08_other.html#Middle"', 'href="08_other.html#gone"'), "#gone has no such place"),
        (lambda s: s.replace('href="08_other.html"', 'href="09_gone.html"'), "09_gone.html is not there"),
        (lambda s: re.sub(r'alt="A slider\."', "", s), "a picture without words"),
        (lambda s: s.replace('style="width', 'style="background:url(//e.org/x.png);width'), "a style from elsewhere"),
    ],
)
def test_faults_of_a_site_are_found(change: Callable[[str], str], fault: str, notebooks: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    publish(site, notebooks)
    lesson = site / "07_lesson.html"
    lesson.write_text(change(lesson.read_text(encoding="utf-8")), encoding="utf-8")
    assert any(fault in found for found in faults(site))


def test_letters_of_a_formula_stand_in_their_own_characters() -> None:
    text = formula(r"\mathcal L \mathcal N \mathbb E \mathbf 1 \mathbf T \arg\max_i a \Big\| b \lVert h\rVert")
    for letter in ("ℒ", "𝒩", "𝔼", "𝟏", "𝐓"):
        assert f">{letter}<" in text
    assert "mathvariant" not in text.replace('mathvariant="normal"', "") and "\\" not in text
    assert text.count('<mo stretchy="false">&#x02016;</mo>') == 2
    assert 'display="block"' in formula("x", block=True) and 'display="inline"' in formula("x")
