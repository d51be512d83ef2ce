"""trainer/charts.py: points lie where their values say, colours are the page's, and texts stay texts."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_report import ATTACK, Page
from trainer.charts import Chart, Series, inline, save


def lines_of(svg: str, colour: str) -> list[np.ndarray]:
    """Points [n, 2] of every path in this colour that is clipped to the frame, which markers and caps are not."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*clip-path[^>]*stroke: {re.escape(colour)}[;"]', svg)
    return [np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path), dtype=float) for path in paths]


def test_chart_places_points_by_their_values() -> None:
    data = [(1.0, 10.0), (2.0, 40.0), (5.0, 20.0)]
    ends = [(5.0, 12.0), (42.0, 45.0), (20.0, 20.0)]  # of a bootstrap: the value need not lie inside
    svg = str(inline(Chart("t", "t", [Series("a", data, ends), Series("b", [(1.0, 0.0)])], "step", "d")))
    xy, *bars = lines_of(svg, "var(--c0)")
    assert len(xy) == 3 and len(bars) == 3
    scale_x = np.polyfit([x for x, _ in data], xy[:, 0], 1)
    scale_y = np.polyfit([y for _, y in data], xy[:, 1], 1)
    assert scale_x[0] > 0 > scale_y[0]
    np.testing.assert_allclose(np.polyval(scale_x, [x for x, _ in data]), xy[:, 0], atol=0.2)
    np.testing.assert_allclose(np.polyval(scale_y, [y for _, y in data]), xy[:, 1], atol=0.2)
    for bar, pair in zip(bars, ends, strict=True):
        np.testing.assert_allclose(np.polyval(scale_y, pair), bar[:, 1], atol=0.2)
    # The tick that reads 20 stands beside the value 20.
    tick = re.search(r'text-anchor: end[^>]* y="([\d.]+)"[^>]*>20<', svg)
    assert tick and float(tick[1]) == pytest.approx(xy[2, 1], abs=6)


def test_chart_has_the_page_s_colours_and_is_the_same_each_time() -> None:
    series = [Series(name, [(float(x), x + i) for x in range(30)]) for i, name in enumerate("abcdef")]
    one = Chart("key", "t", series, "step", "d")
    svg = str(inline(one))
    assert svg == str(inline(one))
    colours = {"none", "currentColor", "var(--line)", *(f"var(--c{i})" for i in range(5))}
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) == colours
    dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)", svg))
    assert len(dashes) == 3, "beside the solid line"


def test_texts_of_charts_stay_texts(tmp_path: Path) -> None:
    texts = ("$x^2$", "_hidden", ATTACK, "\ud800\x00 odd", "\u6771\u4eac")
    one = Chart("key", "$x^2$ " + ATTACK, [Series(t, [(0.0, 1.0)]) for t in texts], "$y$", ATTACK, ["$z$"])
    save([one], tmp_path)
    for svg in (str(inline(one)), (tmp_path / "key.svg").read_text()):
        page = Page(svg)
        assert not {"script", "img"} & set(page.tags)
        for text in ("$x^2$", "_hidden", ATTACK[:45], "?? odd", "\u6771\u4eac", "$y$", "$z$"):
            assert text in page.words
        assert ("aria-label", ATTACK) in page.attributes
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 1e7]])
def test_chart_of_odd_values(values: list[float]) -> None:
    points = [(float(x), y) for x, y in enumerate(values, 1)]
    svg = str(inline(Chart("t", "t", [Series("a", points)], "step", "d", from_zero=True)))
    assert "nan" not in svg and "inf" not in svg and len(lines_of(svg, "var(--line)")) >= 2
