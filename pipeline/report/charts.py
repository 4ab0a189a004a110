"""Charts as inline SVG: lines, histograms, and the flow of rows. Numbers in, markup out, colours by CSS.

Each is drawn for a width of about 420 px, so that its words can be read on a phone; a page sets them
side by side. Labels are escaped here: what these functions return is safe markup.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34


@dataclass(frozen=True)
class Series:
    """One line or one histogram."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS class: raw, smooth, v0-v3 (validation), one, two."""


@dataclass(frozen=True)
class Scale:
    """Data -> pixels, linear or logarithmic."""

    low: float
    high: float
    start_px: float
    end_px: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        frac = (at - low) / (high - low) if high > low else 0.5
        return self.start_px + frac * (self.end_px - self.start_px)


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> Markup:
    """Lines over one x axis; the y axis turns logarithmic when values span more than a factor of 30."""
    series = [_finite(s) for s in series]
    ys = [y for s in series for y in s.y]
    xs = [x for s in series for x in s.x]
    if not ys:
        return Markup()
    positive = min(ys) > 0 and max(ys) / min(ys) > 30
    pad = 0.0 if positive else 0.06 * (max(ys) - min(ys) or abs(max(ys)) or 1)
    x_scale = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = Scale(min(ys) - pad, max(ys) + pad, HEIGHT - BOTTOM, TOP, positive)
    body = [_axes(x_scale, y_scale, x_label, y_label)]
    for one in series:
        points = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in zip(one.x, one.y, strict=True))
        body.append(Markup('<polyline class="line {}" points="{}"/>').format(one.style, points))
        if one.style.startswith("v") or len(one.x) == 1:
            dots = zip(one.x, one.y, strict=True)
            body += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
                    one.style, x_scale(x), y_scale(y)
                )
                for x, y in dots
            ]
    return _svg(body, title)


def _finite(series: Series) -> Series:
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Series(series.name, [x for x, _ in pairs], [y for _, y in pairs], series.style)


def histogram(series: Sequence[Series], *, x_label: str, title: str, bins: int = 28) -> Markup:
    """Shares of each series' values (`x`; `y` is not used) in common bins."""
    values = [np.asarray([v for v in s.x if math.isfinite(v)], float) for s in series]
    together = np.concatenate([v for v in values if len(v)]) if any(map(len, values)) else np.empty(0)
    if not len(together):
        return Markup()
    low, high = float(together.min()), float(together.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    whole = np.all(together == np.round(together))
    if whole and high - low < bins:
        edges = np.arange(math.floor(low), math.floor(high) + 2) - 0.5
    else:
        edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(v, edges)[0] / max(len(v), 1) for v in values]
    top = max(float(s.max()) for s in shares)
    x_scale = Scale(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT)
    y_scale = Scale(0, top * 1.06, HEIGHT - BOTTOM, TOP)
    body = [_axes(x_scale, y_scale, x_label, "share", percent=True)]
    floor = y_scale(0)
    for one, share in zip(series, shares, strict=True):
        for left, right, part in zip(edges[:-1], edges[1:], share, strict=True):
            if part > 0:
                x, y = x_scale(left), y_scale(part)
                width = max(x_scale(right) - x - 1, 0.8)
                body.append(
                    Markup(
                        '<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                    ).format(one.style, x, y, width, floor - y)
                )
    return _svg(body, title)


def flow(num_in: int, fates: Sequence[tuple[str, int]], *, title: str) -> Markup:
    """Rows on the left, what became of them on the right: ribbons as wide as their share.

    Args:
        num_in: rows that came in.
        fates: (CSS class, rows) from top to bottom; together they are `num_in`.
        title: for those who can't see it.
    """
    total, gap, height, width = max(num_in, 1), 7, 120, 360
    shown = [(style, count) for style, count in fates if count]
    space = height - gap * max(len(shown) - 1, 0)
    thick = [max(2.0, space * count / total) for _, count in shown]
    shrink = space / max(sum(thick), 1e-9)
    thick = [t * min(shrink, 1.0) for t in thick]
    body = [Markup('<rect class="flow in" x="0" y="{:.1f}" width="10" height="{:.1f}" rx="2"/>')]
    body[0] = body[0].format((height - sum(thick)) / 2, sum(thick))
    left, right = (height - sum(thick)) / 2, 0.0
    middle = width / 2
    for (style, _), t in zip(shown, thick, strict=True):
        curve = f"M10,{left:.1f} C{middle},{left:.1f} {middle},{right:.1f} {width - 10},{right:.1f} "
        curve += f"L{width - 10},{right + t:.1f} "
        curve += f"C{middle},{right + t:.1f} {middle},{left + t:.1f} 10,{left + t:.1f} Z"
        body.append(Markup('<path class="flow ribbon {}" d="{}"/>').format(style, curve))
        end = '<rect class="flow {}" x="{}" y="{:.1f}" width="10" height="{:.1f}" rx="2"/>'
        body.append(Markup(end).format(style, width - 10, right, t))
        left, right = left + t, right + t + gap
    return _svg(body, title, size=(width, height))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between `low` and `high`, at most about `count` + 2."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    factor = min((f for f in (1, 2, 2.5, 5, 10) if (high - low) / (f * step) <= count + 1), default=10)
    step *= factor
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """1,500 -> 1.5k; 0.25 -> 0.25."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def _axes(x_scale: Scale, y_scale: Scale, x_label: str, y_label: str, *, percent: bool = False) -> Markup:
    body = []
    if y_scale.logarithmic:
        marks = [10.0**e for e in range(math.ceil(math.log10(y_scale.low)), 20) if 10.0**e <= y_scale.high]
        marks = marks or [y_scale.low, y_scale.high]
    else:
        marks = ticks(y_scale.low, y_scale.high)
    for mark in marks:
        y = y_scale(mark)
        text = f"{100 * mark:.3g}%" if percent else short(mark)
        body.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, text)
        )
    for mark in ticks(x_scale.low, x_scale.high):
        x = x_scale(mark)
        anchor = "middle" if x < WIDTH - 26 else "end"
        body.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
                x, HEIGHT - BOTTOM + 15, anchor, short(mark)
            )
        )
    labels = '<text class="label" x="{}" y="{}" text-anchor="end">{}</text>'
    body.append(Markup(labels).format(WIDTH - RIGHT, HEIGHT - 4, x_label))
    body.append(Markup('<text class="label" x="{}" y="{}">{}</text>').format(2, HEIGHT - 4, y_label))
    return Markup().join(body)


def _svg(body: Sequence[Markup], title: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>')
    return head.format(*size, title, escape(title)) + Markup().join(body) + Markup("</svg>")
