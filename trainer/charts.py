"""Line charts by matplotlib, as inline SVG for the page or as SVG and PNG files.

An inline chart is drawn in stand-in colours that become currentColor and the page's CSS variables, so that it follows
the reader's light or dark mode. Series differ by dash and marker too. Texts are untrusted: they stay text in the SVG
and are never mathtext. Figures are made without pyplot, so nothing global is left behind.
"""

import io
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from launch.files import new_file, write_text

_SIZE = (5.5, 3.5)  # inches of 72 points: 396 wide is a phone's width, so that letters stay readable there
# Ink, grid, then Okabe and Ito's colours, told apart in every common colour blindness, dark enough for white paper.
_PAPER = ("#57606a", "#d8dee4", "#c24e00", "#0072b2", "#007a59", "#a0528a", "#1b1f24")
_STAND_INS = tuple(f"#01020{i}" for i in range(len(_PAPER)))
_PAGE = ("currentColor", "var(--line)", *(f"var(--c{i})" for i in range(len(_PAPER) - 2)))
_DASHES = ((0, (6, 2)), "-", (0, (2, 1.5)), (0, (7, 2, 2, 2)))  # 5 colours and 4 dashes: 20 series differ
_MARKERS = ("s", "o", "^", "D")
_OFF = ("text.parse_math", "axes.spines.left", "axes.spines.top", "axes.spines.right", "legend.frameon")
_STYLE: dict[Any, Any] = dict.fromkeys(_OFF, False) | {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True}
_STYLE |= {"svg.fonttype": "none", "font.size": 11, "axes.titlesize": 11, "xtick.major.size": 0, "ytick.major.size": 0}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Series:
    """One line: points by x, and an interval (low, high) of y per point where there is one."""

    name: str
    points: list[tuple[float, float]]
    intervals: list[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Chart:
    """A line chart. `key` names its files and its ids; `ticks` makes the x axis categories 0, 1, 2 ... with names."""

    key: str
    title: str
    series: list[Series]
    x_label: str
    spoken: str
    ticks: Sequence[str] | None = None
    from_zero: bool = False


def inline(chart: Chart) -> Markup:
    """The chart as a figure of an HTML page, whose style sheet defines --line and --c0 to --c4."""
    root = _tree(chart, _STAND_INS)
    del root.attrib["width"], root.attrib["height"]
    drawn = Markup(ElementTree.tostring(root, encoding="unicode"))  # escaped by ElementTree
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(chart.title, drawn)


def save(charts: Sequence[Chart], folder: Path) -> None:
    """Write KEY.svg and KEY.png of each chart, in the colours of light mode; `folder` is made. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        root = _tree(chart, _PAPER)
        root.set("xmlns", "http://www.w3.org/2000/svg")
        write_text(folder / f"{chart.key}.svg", ElementTree.tostring(root, encoding="unicode") + "\n")
        with new_file(folder / f"{chart.key}.png") as partial:
            partial.write_bytes(_drawn(chart, _PAPER, "png"))


def number(value: float, _: Any = None) -> str:
    """A number as an axis shows it: 2.5G, 12k, 0.25, 2e-05."""
    for size, name, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= least:
            return f"{value / size:.4g}{name}"
    return f"{value:.4g}"


def _tree(chart: Chart, colours: Sequence[str]) -> ElementTree.Element:
    """The SVG without namespaces, metadata and style sheet, which would hold for the whole page."""
    root = ElementTree.fromstring(_drawn(chart, colours, "svg"))
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text if element.tag == "text" else None
        element.attrib = {name.rpartition("}")[2]: _plain(chart, name, value) for name, value in element.items()}
    root.attrib |= {"role": "img", "aria-label": _clean(chart.spoken), "stroke-linejoin": "round"}
    return root


def _plain(chart: Chart, name: str, value: str) -> str:
    """An attribute's value: ids of this chart, the page's colours and font, and tenths, which are enough."""
    if name == "id":
        return f"{chart.key}-{value}"
    if name in ("d", "x", "y", "transform"):
        return re.sub(r"(\.\d)\d+", r"\1", " ".join(value.split()))
    value = re.sub(r"^#|(?<=url\()#", f"#{chart.key}-", value)
    value = re.sub(r"#01020(\d)", lambda found: _PAGE[int(found[1])], value)
    return re.sub("font-family: [^;]*;", "font-family: system-ui, sans-serif;", value)


def _drawn(chart: Chart, colours: Sequence[str], kind: str) -> bytes:
    """The file that matplotlib writes."""
    # It warns of a home that it cannot write to, and of letters that its own font lacks.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    ink, grid, *series = colours
    parts: dict[Any, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    parts |= {"axes.edgecolor": grid, "grid.color": grid, "svg.hashsalt": chart.key}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()  # whatever matplotlibrc lies where the user stands
        matplotlib.rcParams.update(_STYLE | parts)
        figure = _figure(chart, series)
        if colours is _PAPER:  # the page has the title in its own text
            figure.axes[0].set_title(_clean(chart.title), loc="left")
        file = io.BytesIO()
        undated = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, dpi=160, transparent=colours is not _PAPER, metadata=undated)
    return file.getvalue()


def _figure(chart: Chart, colours: Sequence[str]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    lines = []
    for i, one in enumerate(chart.series, start=len(chart.series) == 1):  # a line that is alone is whole
        # Models stand beside each other at a dim, so that their intervals do not hide one another.
        shift = 0.1 * (i - (len(chart.series) - 1) / 2) if chart.ticks and len(chart.series) > 1 else 0.0
        xs, ys = [x + shift for x, _ in one.points], [y for _, y in one.points]
        every = max(1, len(xs) // 8)  # enough to tell curves apart
        style = {"color": colours[i % len(colours)], "linestyle": _DASHES[i % 4], "marker": _MARKERS[i % 4]}
        style |= {"markersize": 4.5, "markevery": (i * every // 4, every), "linewidth": 1.6}
        lines += axes.plot(xs, ys, **style)
        # Around its middle, because the value itself need not lie inside a bootstrap's interval.
        middle, half = ([(high + sign * low) / 2 for low, high in one.intervals or []] for sign in (1, -1))
        axes.errorbar(xs[: len(half)], middle, yerr=half, fmt="none", ecolor=style["color"], capsize=3)
    if chart.ticks:
        axes.set_xticks(range(len(chart.ticks)), [_clean(name) for name in chart.ticks])
        axes.set_xlim(-0.4, len(chart.ticks) - 0.6)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(number)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(number)
    if chart.from_zero:
        axes.set_ylim(min(0.0, *(y for one in chart.series for _, y in one.points)), axes.get_ylim()[1] * 1.05)
    axes.set_xlabel(_clean(chart.x_label))
    if len(lines) > 1:
        names = [_clean(one.name)[:45] for one in chart.series]
        columns = 396 // (62 + 7 * max(map(len, names))) or 1  # points: a sample and its spaces, a letter
        figure.legend(lines, names, loc="outside lower left", ncols=columns, handlelength=3)
    return figure


def _clean(text: str) -> str:
    """What XML allows, on one line."""
    return " ".join(_NOT_XML.sub("?", text).split())
