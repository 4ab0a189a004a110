"""The law of every job: killed anywhere and started again, it ends as if it had never been killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import ray

from infra.certificate import Certificate, read_certificate
from infra.cluster import RayConfig, ray_session
from infra.errors import ConfigError, DataError, TooManyFailuresError
from pipeline.job import JobConfig, count_fates, refuse_failures, run_job, run_units
from pipeline.journal import JournalWriter, Receipts, Unit

SCRIPT = """
import sys
from infra.cluster import RayConfig, ray_session
from pipeline.job import run_units
from pipeline.journal import Unit
from functools import partial

class Square:
    def __init__(self, log):
        self.log = log
    def __call__(self, payload):
        import time
        with open(self.log, "a") as file:
            file.write(f"{payload['x']}\\n")
        time.sleep(0.02)
        return {"square": payload["x"] ** 2, "notes": {"ok": 1}}

out, log = sys.argv[1:]
units = [Unit(f"unit-{x}", {"x": x}) for x in range(60)]
with ray_session(RayConfig(num_cpus=2)):
    receipts = run_units(out, units, partial(Square, log), what="squares", units_per_task=5)
    print([receipt["square"] for _, receipt in receipts.in_order(units)])
"""


def start(tmp_path: Path, out: Path, log: Path, address: str = "local") -> "subprocess.Popen[str]":
    """A driver of its own process group, with a Ray session of its own or on a running cluster."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    checkout = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, str(script), str(out), str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": checkout},
    )


def kill_after_receipts(process: "subprocess.Popen[str]", out: Path, count: int) -> None:
    deadline_s = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline_s:
        if len(Receipts(str(out))) >= count:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.communicate()


@pytest.mark.ray
def test_job_killed_and_started_again_loses_and_repeats_nothing(tmp_path: Path, ray_cluster: None) -> None:
    survive_a_kill(tmp_path, seed=0, address=ray.get_runtime_context().gcs_address)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("seed", [1, 2])
def test_job_killed_with_its_whole_session_loses_and_repeats_nothing(tmp_path: Path, seed: int) -> None:
    survive_a_kill(tmp_path, seed=seed, address="local")


def survive_a_kill(tmp_path: Path, seed: int, address: str) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    kill_after_receipts(start(tmp_path, out, log, address), out, random.Random(seed).randrange(5, 45))
    done_before = len(Receipts(str(out)))
    assert 0 < done_before < 60, "the kill must come in the middle for this test to mean something"
    printed, errors = start(tmp_path, out, log, address).communicate(timeout=180)
    assert printed.strip() == str([x**2 for x in range(60)]), errors[-2000:]
    tries = Counter(log.read_text().split())
    assert set(tries) == {str(x) for x in range(60)}
    assert sum(tries.values()) - 60 <= 2, "at most the unit that each of 2 workers had in hand"


@pytest.mark.ray
def test_receipts_do_not_depend_on_the_number_of_workers(tmp_path: Path, ray_cluster: None) -> None:
    units = [Unit(str(i), {"x": i}) for i in range(17)]

    def receipts_with(workers: int) -> list[dict]:
        out = str(tmp_path / str(workers))
        with ray_session(RayConfig()):
            found = run_units(
                out, units, lambda: echo, what="echo", num_workers=workers, units_per_task=workers
            )
        return [receipt for _, receipt in found.in_order(units)]

    assert receipts_with(1) == receipts_with(2) == [{"got": {"x": i}} for i in range(17)]


def echo(payload: dict) -> dict:
    return {"got": payload}


class EchoConfig(JobConfig):
    size: int = 3


def run_echo(out: Path, num_dead: int = 0, **more: int) -> Certificate:
    """A job as every command of the data side is one."""
    config = EchoConfig.model_validate({"out": str(out), **more})
    units = [Unit(str(i), {"x": i}) for i in range(config.size)]

    def finish(receipts: Receipts) -> Certificate:
        assert [receipt["got"]["x"] for _, receipt in receipts.in_order(units)] == list(range(config.size))
        counts = {"ok": len(units) - num_dead, "timeout": num_dead}
        refuse_failures(counts, 0.5, what="rows could not be echoed")
        return Certificate(job="echo", config_hash=config.hash(), **count_fates(counts))

    work = partial(run_units, config.out, units, lambda: echo, what="echo", num_workers=config.num_workers)
    return run_job("echo", config, {"input": "x"}, work=work, finish=finish)


@pytest.mark.ray
def test_a_job_is_certified_last_and_recognised_when_done(tmp_path: Path, ray_cluster: None) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyFailuresError, match=r"2 of 3 rows could not be echoed \(timeout 2\)"):
        run_echo(out, num_dead=2)
    assert read_certificate(out) is None and len(Receipts(str(out))) == 3
    done = run_echo(out, num_dead=1)
    assert (done.num_in, done.num_out, done.dead) == (3, 2, {"timeout": 1}) and done.created_at_s > 0
    assert not (out / "journal").exists()
    assert run_echo(out, num_workers=2) == done, "how many work at once doesn't make another job"
    with pytest.raises(ConfigError, match="size: 3 there, 4 now"):
        run_echo(out, size=4)


def test_a_certificate_that_loses_a_row_is_refused() -> None:
    with pytest.raises(DataError, match="3 rows in"):
        Certificate(job="j", config_hash="x", num_in=3, num_out=2).check()


def test_a_torn_last_line_counts_as_never_written(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path / "journal"), "block")
    writer.append("a", {"n": 1})
    writer.append("b", {"n": 2})
    writer.close()
    file = tmp_path / "journal" / "block.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    assert "b" not in Receipts(str(tmp_path))
    again = JournalWriter(str(tmp_path / "journal"), "block")
    again.append("b", {"n": 3})
    again.close()
    receipts = Receipts(str(tmp_path))
    assert receipts.get("a") == {"n": 1}
    assert receipts.get("b") == {"n": 3}
    assert len(receipts) == 2


def test_journal_works_on_an_object_store(s3_server: str) -> None:
    writer = JournalWriter("s3://bucket/job/journal", "block")
    writer.append("a", {"n": 1})
    writer.append("b", {"n": 2})
    writer.close()
    again = JournalWriter("s3://bucket/job/journal", "block")  # the block is tried again: its worker died
    assert again.finished() == {"a", "b"}
    again.append("c", {"n": 3})
    receipts = Receipts("s3://bucket/job")
    assert [receipts.get(unit)["n"] for unit in "abc"] == [1, 2, 3]
