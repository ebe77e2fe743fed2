"""All executed notebooks as a static site.

Figures stay interactive, formulas are MathML, and a page asks no other host for anything, so the site also opens from a
folder. Figures are drawn by one copy of plotly.js, the one inside the installed plotly.
"""

import base64
import json
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import nbformat
import plotly
from bs4 import BeautifulSoup
from jinja2 import Environment, PackageLoader, StrictUndefined
from jupyterlab_pygments import JupyterStyle
from markupsafe import Markup
from nbconvert.filters import Highlight2HTML, ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from medlib.book.formulas import formula
from medlib.paths import NOTEBOOKS, shorten

PLOTLY, VIEW = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
SOLUTIONS = "solutions"
_SCRIPT = "plotly.min.js"


@dataclass(frozen=True)
class Lesson:
    """One executed notebook. ``name`` is its path below the folder of notebooks, without the suffix."""

    name: str
    notebook: nbformat.NotebookNode

    @property
    def page(self) -> str:
        """Its page, relative to the site's root."""
        return f"{self.name}.html"

    @property
    def up(self) -> str:
        """From its page back to the site's root."""
        return "../" * self.name.count("/")

    @property
    def number(self) -> str:
        """The two digits by which texts refer to it; empty for solutions."""
        return "" if self.name.startswith(f"{SOLUTIONS}/") else self.name[:2]


def publish(output: Path, notebooks: Path = NOTEBOOKS) -> list[Path]:
    """Write the site of all notebooks in ``notebooks`` and its folder "solutions" into ``output``; returns its pages.

    A site that this wrote before is replaced. Raises ValueError for a folder that holds anything else, a notebook that
    was not run, a picture without a text for those who do not see it, a link that leads nowhere, and a formula that
    cannot be set.
    """
    lessons = read_lessons(notebooks)
    if output.exists() and any(output.iterdir()) and not (output / _SCRIPT).is_file():
        raise ValueError(f"{shorten(output)} holds files that are not a site; name a new or an empty folder")
    pages = [_Page(lesson, lessons) for lesson in lessons]
    bodies = [page.body() for page in pages]  # every fault is found before the old site is gone
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    folder = Path(__file__).parent
    for asset in (folder / "page.js", Path(plotly.__file__).parent / "package_data" / _SCRIPT):
        shutil.copyfile(asset, output / asset.name)
    code = HtmlFormatter(style=JupyterStyle).get_style_defs(".highlight")
    (output / "style.css").write_text((folder / "style.css").read_text(encoding="utf-8") + code, encoding="utf-8")
    templates = Environment(
        loader=PackageLoader("medlib.book", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    written = []
    for page, body in zip(pages, bodies, strict=True):
        path = output / page.lesson.page
        path.parent.mkdir(exist_ok=True)
        path.write_text(templates.get_template("lesson.html").render(page.context(body)), encoding="utf-8")
        for name, png in page.pictures.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(png)
        written.append(path)
    index = output / "index.html"
    index.write_text(templates.get_template("index.html").render(_contents(pages)), encoding="utf-8")
    return [index, *written]


def read_lessons(notebooks: Path) -> list[Lesson]:
    """The notebooks of a folder in order, then their solutions. ValueError where there are none or one was not run."""
    paths = [*sorted(notebooks.glob("*.ipynb")), *sorted((notebooks / SOLUTIONS).glob("*.ipynb"))]
    if not paths:
        raise ValueError(f"no notebooks in {shorten(notebooks)}")
    lessons = []
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        if any(cell.execution_count is None for cell in code):
            raise ValueError(f"{shorten(path)} has cells that were not run: make notebooks NB={shorten(path)}")
        lessons.append(Lesson(path.relative_to(notebooks).with_suffix("").as_posix(), notebook))
    return lessons


class _Prose(IPythonRenderer):
    """Markdown of one page: formulas become MathML, and what names another notebook becomes a link to its page."""

    def __init__(self, lesson: Lesson, lessons: Sequence[Lesson]) -> None:
        super().__init__(escape=False, anchor_link_text="#")
        self.lesson = lesson
        self.pages = {f"{other.name}.ipynb": other.page for other in lessons}
        self.numbers = {other.number: other.page for other in lessons if other.number not in ("", lesson.number)}

    def block_math(self, body: str) -> str:
        return f'<span class="formula" tabindex="0">{formula(body, block=True)}</span>'

    def inline_math(self, body: str) -> str:
        return formula(body)

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")

    def text(self, text: str) -> str:
        def linked(found: re.Match[str]) -> str:
            page = self.numbers.get(found[2])
            return f'<a href="{self.lesson.up}{page}">{found[0]}</a>' if page else found[0]

        return re.sub(r"\b([Nn]otebook\s)(\d\d)\b", linked, super().text(text))

    def codespan(self, text: str) -> str:
        page = self.pages.get(unescape(text))
        shown = super().codespan(text)
        return f'<a href="{self.lesson.up}{page}">{shown}</a>' if page not in (None, self.lesson.page) else shown

    def link(self, text: str, url: str, title: str | None = None) -> str:
        place, _, anchor = url.partition("#")
        if place and not re.match(r"[a-z]+:", place):
            page = self.pages.get(_below(Path(self.lesson.name).parent, place))
            if page is None:
                raise ValueError(
                    f"links to {url}, which is no notebook of the site: name it in words or by its web address"
                )
            url = f"{self.lesson.up}{page}" + (f"#{anchor}" if anchor else "")
        return super().link(re.sub(r"</?a\b[^>]*>", "", text), url, title)


def _below(folder: Path, place: str) -> str:
    """``place`` as seen from ``folder``, without its "..": a name below the folder of notebooks."""
    parts: list[str] = []
    for part in (folder / place).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


class _Page:
    """The page of one lesson: its HTML, the pictures it shows (the first as ``thumbnail``), and its text alone."""

    def __init__(self, lesson: Lesson, lessons: Sequence[Lesson]) -> None:
        self.lesson, self.lessons = lesson, lessons
        self.pictures: dict[str, bytes] = {}
        self.prose, self.thumbnail = "", ""
        self.highlight = Highlight2HTML(pygments_lexer="python")

    def body(self) -> str:
        """All cells as HTML; fills the attributes. ValueError names the notebook and the cell."""
        parts = []
        for number, cell in enumerate(self.lesson.notebook.cells):
            try:
                parts.append(self._cell(cell))
            except ValueError as error:
                raise ValueError(f"cell {number} of {self.lesson.name}.ipynb: {error}") from error
        return "\n".join(part for part in parts if part)

    def context(self, body: str) -> dict[str, Any]:
        """What the template needs."""
        soup = BeautifulSoup(self.prose, "html.parser")
        sections = [(tag["id"], _heading(tag)) for tag in soup.select("h2[id]")]
        chain = [lesson for lesson in self.lessons if bool(lesson.number) == bool(self.lesson.number)]
        at = chain.index(self.lesson)
        names = {lesson.name: lesson for lesson in self.lessons}
        twin = names.get(f"{SOLUTIONS}/{self.lesson.name}" if self.lesson.number else self.lesson.name.split("/")[-1])
        return {
            "lesson": self.lesson,
            "title": _title(soup),
            "body": Markup(body),
            "sections": sections,
            "before": chain[at - 1] if at else None,
            "after": chain[at + 1] if at + 1 < len(chain) else None,
            "twin": twin,
            "root": self.lesson.up,
        }

    def _markdown(self, source: str) -> str:
        return MarkdownWithMath(renderer=_Prose(self.lesson, self.lessons)).render(source)

    def _cell(self, cell: nbformat.NotebookNode) -> str:
        if cell.cell_type == "markdown":
            text = f'<div class="prose">{self._markdown(cell.source)}</div>'
            self.prose += text
            return text
        if cell.cell_type != "code" or not cell.source.strip():
            return ""
        outputs = "\n".join(filter(None, map(self._output, cell.outputs)))
        shown = f'<div class="output">{outputs}</div>' if outputs else ""
        return f'<div class="code">{self.highlight(cell.source)}{shown}</div>'

    def _output(self, output: nbformat.NotebookNode) -> str:
        if output.output_type == "stream":
            return f"<pre>{ansi2html(output.text)}</pre>"
        if output.output_type == "error":
            return f'<pre class="error">{ansi2html(chr(10).join(output.traceback))}</pre>'
        data = output.data
        if PLOTLY in data or VIEW in data or "image/png" in data:
            return self._figure(data, output.metadata.get("image/png", {}))
        if "text/html" in data:
            return f'<div class="table" tabindex="0">{data["text/html"]}</div>'
        if "text/markdown" in data:
            return f'<div class="prose">{self._markdown(data["text/markdown"])}</div>'
        return f"<pre>{ansi2html(data['text/plain'])}</pre>"

    def _figure(self, data: Mapping[str, Any], picture: Mapping[str, Any]) -> str:
        """An interactive figure with its picture until it is drawn; of a widget, whose kernel is gone, the picture."""
        alt = picture.get("alt") or data.get("text/plain", "")
        if not alt.strip() or alt.startswith("<"):
            raise ValueError(
                "a picture without a sentence that says what it shows: use medlib.explore.show(figure, alt=...)"
            )
        image = (
            self._image(base64.b64decode(data["image/png"]), alt, picture.get("width")) if "image/png" in data else ""
        )
        if PLOTLY in data:
            figure = {key: data[PLOTLY][key] for key in ("data", "layout", "frames") if key in data[PLOTLY]}
            size = "width:{width}px;height:{height}px".format_map({"width": 720, "height": 400} | figure["layout"])
            text = json.dumps(figure, separators=(",", ":")).replace("<", "\\u003c")  # no "</script>" inside
            return (
                f'<figure class="interactive"><div class="still">{image}</div>'
                f'<div class="live" role="img" aria-label="{escape(alt)}" style="{size}" hidden></div>'
                f'<script type="application/json">{text}</script>'
                f"<noscript>{'' if image else escape(alt)}</noscript></figure>"
            )
        if VIEW not in data:
            return f"<figure>{image}</figure>"
        if "image/png" in data and not image:
            return ""  # a picture of one pixel: what was live is shown in full by the next output
        shown = image or f"<p>{escape(alt)}</p>"
        return (
            f"<figure>{shown}<figcaption>A still picture: run the notebook to move the sliders.</figcaption></figure>"
        )

    def _image(self, png: bytes, alt: str, width: int | None) -> str:
        """The tag of a picture that is stored beside the page; empty for a picture of one pixel."""
        wide, high = struct.unpack(">II", png[16:24])
        if (wide, high) == (1, 1):
            return ""
        name = f"{self.lesson.name}/{len(self.pictures) + 1:02d}.png"
        self.pictures[name] = png
        shown = width or wide
        size = f'width="{shown}" height="{round(high * shown / wide)}"'
        tag = f'<img src="{self.lesson.up}{name}" alt="{escape(alt)}" {size} loading="lazy">'
        self.thumbnail = self.thumbnail or tag
        return tag


def _heading(tag: Any) -> str:
    """The text of a heading without the mark that links to it."""
    return "".join(part if isinstance(part, str) else part.get_text() for part in tag.contents if not _is_anchor(part))


def _is_anchor(part: Any) -> bool:
    return not isinstance(part, str) and "anchor-link" in (part.get("class") or [])


def _title(soup: BeautifulSoup) -> str:
    heading = soup.find("h1")
    if heading is None:
        raise ValueError("a notebook without a title: begin its first cell with '# '")
    return _heading(heading)


def _contents(pages: Sequence[_Page]) -> dict[str, Any]:
    """What the index says: of each lesson its title, its gist (what its first paragraph emphasises), its
    first list (what a reader can do afterwards) and its first picture."""
    entries = []
    names = {page.lesson.name for page in pages}
    for page in pages:
        if not page.lesson.number:
            continue
        soup = BeautifulSoup(page.prose, "html.parser")
        lead, skills = soup.find("p"), soup.find("ul")
        gist = (lead.find(["em", "strong"], recursive=False) or lead) if lead else None
        solutions = f"{SOLUTIONS}/{page.lesson.name}"
        entries.append(
            {
                "lesson": page.lesson,
                "title": _title(soup),
                "lead": Markup(gist.decode_contents()) if gist else "",
                "skills": [Markup(item.decode_contents()) for item in skills.find_all("li")] if skills else [],
                "picture": Markup(page.thumbnail),
                "solutions": f"{solutions}.html" if solutions in names else None,
            }
        )
    return {"entries": entries, "summary": metadata("medlib")["Summary"], "root": ""}
