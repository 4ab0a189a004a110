"""Laws of the charts: valid for any numbers, the same each time, nothing from elsewhere."""

import math
import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.charts import Series, histogram, line_chart
from pipeline.report.read import spread
from pipeline.report.statistics import smooth

NUMBERS = st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=30)


@settings(max_examples=10)
@given(NUMBERS, NUMBERS)
def test_line_charts_are_valid_for_any_numbers(one: list[tuple[float, float]], two: list[tuple[float, float]]):
    series = [Series("a", [x for x, _ in p], [y for _, y in p], "raw") for p in (one, two)]
    chart = line_chart(series, x_label="<x>", y_label='"y"', title="t & <t>")
    if chart:
        ElementTree.fromstring(str(chart))
        assert "nan" not in str(chart) and "inf" not in str(chart)
    assert bool(chart) == any(math.isfinite(x) and math.isfinite(y) for x, y in one + two)


@settings(max_examples=10)
@given(st.lists(st.floats(width=32), max_size=50))
def test_histograms_are_valid_for_any_numbers(values: list[float]):
    chart = histogram([Series("a", values, [], "one")], x_label="x", title="t")
    if chart:
        ElementTree.fromstring(str(chart))
        assert "nan" not in str(chart)


def test_same_numbers_make_the_same_chart_and_words_stay_words():
    series = [Series("a", [1, 2, 3], [0.01, 2, 100], "raw"), Series("b", [2], [5], "v0")]
    one, again = (line_chart(series, x_label="$x_1$ <x>", y_label="loss", title="t") for _ in range(2))
    assert one == again
    assert "$x_1$ &lt;x&gt;" in one and ">loss</text>" in one and ">100</text>" in one
    assert "var(--kept)" in one and not re.search(r"#0000\d\d|url\(|<style|DejaVu", one)


@given(st.integers(0, 1000), st.integers(0, 50))
def test_a_spread_is_increasing_and_within(total: int, count: int):
    rows = spread(total, count)
    assert len(rows) == min(total, count) == len(set(rows))
    assert rows == sorted(rows) and all(0 <= row < total for row in rows)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_smoothing_stays_between_the_extremes(values: list[float]):
    assert all(min(values) <= v <= max(values) for v in smooth(values))
