"""A notebook open in JupyterLab, driven from outside: run it, ask its kernel, find and touch its figures."""

import ast
from collections.abc import Callable
from typing import Any

PATIENCE = 60_000  # ms, for an answer that takes a fraction of a second on a machine with nothing else to do
_IDLE = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
_CELLS = "[...jupyterapp.shell.currentWidget.content.model.cells].filter((cell) => cell.type === 'code')"
_ASK = """async (expression) => {
    const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const request = { code: "", store_history: false, user_expressions: { answer: expression } };
    const reply = await kernel.requestExecute(request).done;
    const answer = reply.content.user_expressions.answer;
    return answer.data ? answer.data["text/plain"] : "'" + answer.ename + ": " + answer.evalue + "'";
}"""
FIGURE = """((title) => [...document.querySelectorAll(".js-plotly-plot")].find((one) =>
    one._fullLayout && (one._fullLayout.title.text || "").includes(title)))"""
_PLACES = """async ([title, points]) => {
    const figure = FIGURE(title), layout = figure._fullLayout, trace = figure._fullData[0];
    figure.scrollIntoView({ block: "center" });
    await new Promise((done) => setTimeout(done, 300));
    const box = figure.getBoundingClientRect();
    return points.map((point) => [
        box.left + layout.xaxis._offset + layout.xaxis.d2p(trace.x[point]),
        box.top + layout.yaxis._offset + layout.yaxis.d2p(trace.y[point])]);
}""".replace("FIGURE", FIGURE)


class OpenNotebook:
    """The notebook in the page's foreground."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(_IDLE)

    def run(self) -> None:
        """Run all cells, from cleared outputs, until the last is done; no cell may fail."""
        self.page.evaluate("() => jupyterapp.commands.execute('editmenu:clear-all')")
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells'); }")
        ran = f"{_CELLS}.every((cell) => cell.executionCount !== null && cell.executionState !== 'running')"
        self.page.wait_for_function(f"() => {ran} && {_IDLE}", polling=500)
        outputs = f"{_CELLS}.flatMap((cell) => cell.outputs.toJSON())"
        assert self.page.evaluate(f"() => {outputs}.filter((output) => output.output_type === 'error')") == []

    def ask(self, expression: str) -> Any:
        """What ``expression`` is in the kernel: a literal (number, text, list, ...)."""
        return ast.literal_eval(self.page.evaluate(_ASK, expression))

    def until(self, expression: str, holds: Callable[[Any], bool]) -> Any:
        """Asks the kernel until the answer is as wanted; returns it."""
        answer = self.ask(expression)
        for _ in range(PATIENCE // 100):
            if holds(answer):
                return answer
            self.page.wait_for_timeout(100)
            answer = self.ask(expression)
        raise AssertionError(f"{expression} stayed {answer!r}")

    def figure(self, title: str) -> Any:
        """The output that holds the figure with this title, its controls with it; waits until it is drawn."""
        self.page.wait_for_function(f"(title) => {FIGURE}(title) !== undefined", arg=title)
        plot = self.page.locator(".js-plotly-plot", has=self.page.locator(".gtitle", has_text=title))
        return self.page.locator(".jp-OutputArea-output").filter(has=plot)

    def places(self, title: str, points: list[int]) -> list[list[float]]:
        """Scrolls to a figure; where points of its first trace are in the window, (x, y) in pixels each."""
        return self.page.evaluate(_PLACES, [title, points])

    def click(self, title: str, point: int) -> None:
        """Click a point as a hand does: the pointer arrives, plotly sees it, the button goes down."""
        x, y = self.places(title, [point])[0]
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(150)
        self.page.mouse.click(x, y)

    def lasso(self, title: str, points: list[int], around: float = 12) -> None:
        """Draw a lasso that holds ``points``, a rectangle ``around`` pixels larger, at the pace of a hand.

        What the mouse hovered over must have reached Python: of messages that wait, plotly's figure keeps the last.
        """
        xs, ys = zip(*self.places(title, points), strict=True)
        left, right, top, bottom = min(xs) - around, max(xs) + around, min(ys) - around, max(ys) + around
        mouse = self.page.mouse
        mouse.move(left, top)
        self.page.wait_for_timeout(200)
        mouse.down()
        for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
            mouse.move(x, y, steps=4)
        self.page.wait_for_timeout(300)
        self.page.wait_for_function(_IDLE)
        mouse.up()
