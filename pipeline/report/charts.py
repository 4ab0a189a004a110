"""Line charts and histograms as inline SVG, drawn by matplotlib. Numbers in, markup out, colours by CSS.

Each is drawn for a width of about 420 px, so that its words can be read on a phone; a page sets them side by
side. Colours are those of the page's stylesheet by name, so a chart follows the page from light to dark; words
stay words, in the page's own font. The same numbers give the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES, DPI = (4.2, 2.2), 100
BINS = 28
LOG_SPAN = 30
"""The y axis of a line chart turns logarithmic when its values span more than this factor."""
STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": "kept", "linewidth": 0.9, "alpha": 0.3},
    "smooth": {"color": "kept", "linewidth": 1.6},
    "v0": {"color": "blue", "linestyle": (0, (4, 3)), "marker": "o"},
    "v1": {"color": "filtered", "linestyle": (0, (4, 3)), "marker": "o"},
    "v2": {"color": "dead", "linestyle": (0, (4, 3)), "marker": "o"},
    "v3": {"color": "violet", "linestyle": (0, (4, 3)), "marker": "o"},
    "v4": {"color": "green", "linestyle": (0, (4, 3)), "marker": "o"},
    "v5": {"color": "soft", "linestyle": (0, (4, 3)), "marker": "o"},
    "none": {"color": "filtered", "linewidth": 1.4, "marker": "o"},
    "shuffled": {"color": "dead", "linewidth": 1.4, "marker": "o"},
    "one": {"color": "kept", "alpha": 0.65},
    "two": {"color": "filtered", "alpha": 0.55},
}
"""Name of a series' style -> how it is drawn; the colours are variables of style.css, as are the legend's."""
NAMES = ("kept", "dead", "filtered", "violet", "green", "blue", "line", "soft")
HEX = {f"#0000{number:02x}": name for number, name in enumerate(NAMES, start=1)}
"""Stand-ins of the stylesheet's colours while matplotlib draws."""
COLOURS = {name: code for code, name in HEX.items()}
UNWANTED = (
    r"<defs>\s*<style.*?</style>\s*</defs>\s*",  # it would style the whole page
    r'<defs>\s*<clipPath.*?</clipPath>\s*</defs>\s*| clip-path="[^"]*"',  # nothing is drawn outside
    r'(?<=<g) id="[^"]*"',  # the same in every chart
    r'font-(?:size|family): [^;"]*;? ?',
)
"""What matplotlib writes into an SVG that has no place in a page."""


@dataclass(frozen=True)
class Series:
    """One line or one histogram."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """A key of `STYLES`."""
    error: Sequence[float] = ()
    """Standard errors of the values; () = unknown."""


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> Markup:
    """Lines over one x axis; points that aren't finite are left out."""
    shown = [(one.style, *_finite(one)) for one in series]
    ys = np.concatenate([y for _, _, y in shown]) if shown else np.empty(0)
    if not len(ys):
        return Markup()
    figure, axes = _figure(x_label, y_label, logarithmic=bool(ys.min() > 0 and ys.max() / ys.min() > LOG_SPAN))
    for style, x, y in shown:
        single = {"marker": "o"} if len(x) == 1 else {}
        axes.plot(x, y, markersize=3.5, **{"linewidth": 0.9, **_style(style), **single})
    return _svg(figure, title)


def difference_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> Markup:
    """Differences with a bar of one standard error each way, about a line at zero."""
    shown = [one for one in series if len(one.x)]
    if not shown:
        return Markup()
    figure, axes = _figure(x_label, y_label)
    axes.axhline(0, color=COLOURS["soft"], linewidth=0.9)
    for one in shown:
        axes.errorbar(one.x, one.y, one.error or None, capsize=2.5, markersize=3.5, **_style(one.style))
    return _svg(figure, title)


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    good = np.isfinite(x) & np.isfinite(y)
    return x[good], y[good]


def histogram(series: Sequence[Series], *, x_label: str, title: str) -> Markup:
    """Shares of each series' values (`x`; `y` is not used) in common bins."""
    values = [np.asarray([v for v in one.x if math.isfinite(v)], float) for one in series]
    together = np.concatenate(values) if values else np.empty(0)
    if not len(together):
        return Markup()
    low, high = float(together.min()), float(together.max())
    if np.all(together == np.round(together)) and high - low < BINS and abs(low) < 1e9:
        edges = np.arange(low, high + 2) - 0.5  # whole numbers stand in the middle of their bars
    else:
        pad = max(0.5, 1e-3 * abs(low)) if low == high else 0.0
        edges = np.linspace(low - pad, high + pad, BINS + 1)
    counts = [np.histogram(found, edges)[0] for found in values]
    return _stairs(counts, edges, [one.style for one in series], x_label=x_label, title=title)


def counted_histogram(counts: Sequence[int], *, x_label: str, title: str) -> Markup:
    """The same of values that were counted in equal bins of [0, 1]."""
    if not sum(counts):
        return Markup()
    edges = np.linspace(0, 1, len(counts) + 1)
    return _stairs([np.asarray(counts)], edges, ["one"], x_label=x_label, title=title)


def _stairs(
    counts: Sequence[np.ndarray], edges: np.ndarray, styles: Sequence[str], *, x_label: str, title: str
) -> Markup:
    figure, axes = _figure(x_label, "share")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    for found, style in zip(counts, styles, strict=True):
        axes.stairs(found / max(found.sum(), 1), edges, fill=True, linewidth=0, **_style(style))
    axes.set_ylim(bottom=0)
    return _svg(figure, title)


def short(value: float) -> str:
    """1,500 -> 1.5k; 0.25 -> 0.25."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def _style(name: str) -> dict[str, Any]:
    return {**STYLES[name], "color": COLOURS[STYLES[name]["color"]]}


def _figure(x_label: str, y_label: str, *, logarithmic: bool = False) -> "tuple[Figure, Axes]":
    """Empty axes with a quiet grid; no words but the two labels and the ticks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.locator_params(nbins=5)
    if logarithmic:
        axes.set_yscale("log")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=COLOURS["soft"])
    for axis, label in ((axes.xaxis, x_label), (axes.yaxis, y_label)):
        axis.set_label_text(label, fontsize=8, color=COLOURS["soft"], parse_math=False)
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: short(value))
    return figure, axes


def _svg(figure: "Figure", title: str) -> Markup:
    """The figure as markup for the body of a page: colours and font by CSS, and a name."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg ") + len("<svg ") :]
    text = re.sub("|".join(UNWANTED), "", text, flags=re.DOTALL)
    text = re.sub("|".join(HEX), lambda found: f"var(--{HEX[found[0]]})", text)
    attributes, _, drawing = text.partition(">")
    head = Markup('<svg role="img" aria-label="{}" {}><title>{}</title>')
    return head.format(title, Markup(attributes), title) + Markup(drawing)
