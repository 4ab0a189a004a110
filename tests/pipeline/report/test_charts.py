"""Laws of the charts: valid for any numbers, inside their frame."""

import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.charts import Series, flow, histogram, line_chart, ticks
from pipeline.report.read import spread
from pipeline.report.training import smooth

NUMBERS = st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=30)


@given(NUMBERS, NUMBERS)
def test_line_charts_are_valid_for_any_numbers(one: list[tuple[float, float]], two: list[tuple[float, float]]):
    series = [Series("a", [x for x, _ in p], [y for _, y in p], "raw") for p in (one, two)]
    chart = line_chart(series, x_label="<x>", y_label='"y"', title="t & <t>")
    if chart:
        ElementTree.fromstring(str(chart))
        assert "nan" not in str(chart) and "inf" not in str(chart)
    assert bool(chart) == any(math.isfinite(x) and math.isfinite(y) for x, y in one + two)


@given(st.lists(st.floats(width=32), max_size=50))
def test_histograms_are_valid_for_any_numbers(values: list[float]):
    chart = histogram([Series("a", values, [], "one")], x_label="x", title="t")
    if chart:
        ElementTree.fromstring(str(chart))
        assert "nan" not in str(chart)


@given(st.lists(st.integers(0, 10**9), max_size=9))
def test_ribbons_fill_the_height_and_never_more(counts: list[int]):
    chart = ElementTree.fromstring(str(flow(sum(counts), [("kept", c) for c in counts], title="t")))
    bars = [rect for rect in chart if rect.tag == "rect"]
    heights = [float(rect.get("height", "0")) for rect in bars[1:]]
    assert len(heights) == sum(c > 0 for c in counts)
    assert sum(heights) <= 120.5
    assert all(float(r.get("y", "0")) + float(r.get("height", "0")) <= 120.5 for r in bars)


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_ticks_are_few_and_inside(low: float, width: float):
    high = low + width
    marks = ticks(low, high)
    assert len(marks) <= 7
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= mark <= high + slack for mark in marks)


@given(st.integers(0, 1000), st.integers(0, 50))
def test_a_spread_is_increasing_and_within(total: int, count: int):
    rows = spread(total, count)
    assert len(rows) == min(total, count) == len(set(rows))
    assert rows == sorted(rows) and all(0 <= row < total for row in rows)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_smoothing_stays_between_the_extremes(values: list[float]):
    assert all(min(values) <= v <= max(values) for v in smooth(values))
