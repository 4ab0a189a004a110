"""Laws of the progress line: the last state is printed, and once."""

import pytest

from infra.progress import ProgressPrinter


@pytest.mark.parametrize("total", [None, 3])
@pytest.mark.parametrize("every_s", [0.0, 60.0])
def test_the_end_is_printed_once(capsys: pytest.CaptureFixture[str], total: int | None, every_s: float) -> None:
    progress = ProgressPrinter("crawl", total, every_s=every_s)
    for _ in range(3):
        progress.add(1, {"ok": 1})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert sum("ok 3" in line for line in lines) == 1 and "ok 3" in lines[-1]


def test_nothing_done_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressPrinter("crawl", None).close()
    assert "crawl: 0" in capsys.readouterr().err


def test_a_slow_job_is_told_by_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("infra.progress.time.monotonic", lambda: now_s[0])
    progress = ProgressPrinter("embed", 100, unit="units")
    progress.done, now_s[0] = 2, 60.0
    assert "2.0 units/min" in progress.line() and "0.0 units/s" not in progress.line()
