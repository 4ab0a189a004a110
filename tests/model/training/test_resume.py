"""Laws of resume: interrupted equals unbroken, to the last bit, however and wherever it was interrupted."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.certificate import read_certificate
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.storage import read_json
from model.training import driver
from model.training.checkpoint import read_facts
from model.training.config import Stage1Config
from model.training.driver import fit, run, train
from model.training.loop import Training
from model.training.report import restart_line
from tests.model.runs import (
    Driver,
    advance,
    die_at_each_step,
    fingerprint,
    open_training,
    stumble,
    trained_positions,
    unbroken,
    whole_weights_sha256,
)

Values = Callable[..., dict[str, Any]]
EVERY = 3
"""Steps between two checkpoints of the sweep, so that most cuts fall between them."""


def live_until(config: Stage1Config, cut: int, *, mid_step: Callable[[], None]) -> None:
    """Go on from the run's folder to step `cut`, saving as the loop does; then die within the next step."""
    training = open_training(config)
    try:
        for step in range(training.position // config.batch_size, cut):
            training.step()
            if (step + 1) % EVERY == 0:
                training.save({})
        begin_step(training)
        mid_step()
    finally:
        training.close()  # as the loop does, where it can


def begin_step(training: Training) -> None:
    """The first micro-batch of the next step: its gradients are there, the optimizer has not moved."""
    batch = next(training.batches)
    condition = training.condition(batch.prompts, batch.fps, batch.original_size_px, batch.encoded)
    training.accumulate(batch, condition)


def by_exception(config: Stage1Config, cut: int) -> None:
    def fail() -> None:
        raise ValueError("a mistake in user code")

    with pytest.raises(ValueError, match="a mistake"):
        live_until(config, cut, mid_step=fail)


def by_sigkill(config: Stage1Config, cut: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.model.training.test_resume"])
    child = context.Process(target=_die, args=(config.model_dump(mode="json"), cut))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def _die(values: dict[str, Any], cut: int) -> None:
    config = Stage1Config.model_validate(values)
    live_until(config, cut, mid_step=lambda: os.kill(os.getpid(), signal.SIGKILL))


def by_leave(config: Stage1Config, cut: int) -> None:
    """A notice: save at once, in whatever moment between two steps, and leave."""
    training = open_training(config)
    advance(training, cut - training.position // config.batch_size)
    training.save({})
    training.close()


FORMS = {"exception": by_exception, "sigkill": by_sigkill, "leave": by_leave}


def interrupted(config: Stage1Config, form: str, cuts: list[int], steps: int) -> dict[str, Any]:
    for cut in cuts:
        FORMS[form](config, cut)
    training = open_training(config)
    advance(training, steps - training.position // config.batch_size)
    found = fingerprint(training)
    training.close()
    return found


@pytest.mark.parametrize(
    ("form", "cuts"),
    [("leave", [1]), ("exception", [5]), ("sigkill", [5]), ("leave", [2, 3, 7])],  # epoch: 5.5 steps
    ids=lambda value: str(value),
)
def test_interrupted_training_equals_unbroken_training(
    stage_values: Values, tmp_path: Path, form: str, cuts: list[int]
) -> None:
    values = stage_values(accumulation=2, optim={"name": "lamb", "lr": 1e-2})
    whole = Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")})
    parts = Stage1Config.model_validate(values | {"out": str(tmp_path / "parts")})
    assert interrupted(parts, form, cuts, 8) == unbroken(whole, 8)


def test_interrupted_muon_equals_unbroken_muon(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values(optim={"name": "muon", "lr": 1e-3})
    whole = Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")})
    parts = Stage1Config.model_validate(values | {"out": str(tmp_path / "parts")})
    assert interrupted(parts, "leave", [2, 3], 5) == unbroken(whole, 5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", list(FORMS))
def test_any_cut_of_forty_steps_equals_unbroken_training(
    stage_values: Values, tmp_path: Path, form: str
) -> None:
    values = stage_values(accumulation=2, samples=160)
    expected = unbroken(Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")}), 40)
    for cut in range(1, 40):
        parts = Stage1Config.model_validate(values | {"out": str(tmp_path / f"cut-{cut}")})
        assert interrupted(parts, form, [cut], 40) == expected, cut


@pytest.mark.ray
@pytest.mark.slow
def test_exception_in_user_code_restarts_the_run_to_the_same_end(
    ray_cluster: None, stage_values: Values, tmp_path: Path
) -> None:
    values = stage_values(samples=48, checkpoint={"every_samples": 12})
    config, marker = Stage1Config.model_validate(values), str(tmp_path / "stumbled")
    open_training(config).close()

    def stumbling(words: dict[str, Any]) -> None:
        train(words, after_step=stumble(words, 32, marker))

    fit(config, stumbling, num_groups=6)
    assert Path(marker).exists()
    told = [restart_line(read_json(file)) for file in RunFolder(config.out).restarts()]
    assert len(told) == 1 and "ValueError: a mistake in user code" in told[0] and "from 24 samples" in told[0]
    assert trained_positions(config.out) == list(range(4, 49, 4))  # as if nothing had happened
    last = RunFolder(config.out).latest_checkpoint() or ""
    assert read_facts(last)["position"] == 48
    ended = open_training(config)
    assert ended.weights_sha256() == whole_weights_sha256(config, tmp_path / "whole")
    ended.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("steps", [5, 40])
def test_worker_killed_at_every_step_ends_like_an_unbroken_run(
    ray_cluster: None, stage_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """One life of the worker more than there are steps, each one step longer than the last."""
    monkeypatch.setattr(driver, "MAX_FAILURES", -1)
    changes = {
        "accumulation": 2,
        "samples": 4 * steps,
        "checkpoint": {"every_samples": 12},
    }
    config = Stage1Config.model_validate(stage_values(**changes))
    died = tmp_path / "died"
    died.mkdir()
    open_training(config).close()

    def dying(words: dict[str, Any]) -> None:
        train(words, after_step=die_at_each_step(died))

    fit(config, dying, num_groups=6)
    assert {int(marker.name) for marker in died.iterdir()} == set(range(4, 4 * steps + 1, 4))
    ended = open_training(config)
    assert fingerprint(ended) == unbroken(config.model_copy(update={"out": str(tmp_path / "whole")}), steps)
    ended.close()


@pytest.mark.ray
@pytest.mark.slow
def test_driver_killed_again_and_again_ends_like_an_unbroken_run(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values(samples=800, ray={"num_cpus": 1}, checkpoint={"every_samples": 60})
    config = Stage1Config.model_validate(values)
    for samples in (44, 160, 310, 470, 600):
        driver = Driver(tmp_path, values)
        driver.wait_for_samples(samples)
        driver.kill()
    assert Driver(tmp_path, values).finish() == 0
    certificate = read_certificate(config.out, job="stage1")
    assert certificate is not None
    assert trained_positions(config.out) == list(range(4, 801, 4))
    assert certificate.facts["weights_sha256"] == whole_weights_sha256(config, tmp_path / "whole")


def interrupt(driver: Driver, how: str) -> Driver:
    """Interrupt a run in the middle; the driver that goes on with it."""
    if how == "worker killed":
        os.kill(driver.worker(), signal.SIGKILL)
        return driver
    if how == "worker told to leave":
        os.kill(driver.worker(), signal.SIGTERM)
        return driver
    if how == "driver killed":
        driver.kill()
    else:
        driver.process.send_signal(signal.SIGINT)
        driver.process.send_signal(signal.SIGINT)  # as by `make` or `timeout`, which pass on what we have heard
        assert driver.finish() == 130, driver.log[-2000:]
        assert "the same command continues" in driver.log
    assert read_certificate(str(driver.run)) is None
    return Driver(driver.folder, Stage1Config.load(driver.folder / "config.yaml").model_dump(mode="json"))


@pytest.mark.ray
@pytest.mark.parametrize(
    "how",
    [
        "driver killed",
        pytest.param("ctrl-c", marks=pytest.mark.slow),
        pytest.param("worker killed", marks=pytest.mark.slow),
        pytest.param("worker told to leave", marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_equals_unbroken_run_and_claims_its_folder(
    stage_values: Values, tmp_path: Path, how: str
) -> None:
    samples = 120 if how == "driver killed" else 400  # a kill needs no time to be heard
    changes = {"ray": {"num_cpus": 1}, "checkpoint": {"every_samples": samples // 8}}
    values = stage_values(samples=samples, trackers=["tensorboard"], **changes)
    config = Stage1Config.model_validate(values)
    started = Driver(tmp_path, values)
    started.wait_for_samples(samples // 4)
    last = interrupt(started, how)
    assert last.finish() == 0, last.log[-2000:]
    certificate = read_certificate(config.out, job="stage1")
    assert certificate is not None and certificate.num_out == samples
    assert trained_positions(config.out) == list(range(4, samples + 1, 4))  # as if nothing had happened
    assert certificate.facts["weights_sha256"] == whole_weights_sha256(config, tmp_path / "whole")
    said = {
        "ctrl-c": "stopping after a last checkpoint",
        "worker killed": "worker 0 died: ",
        "worker told to leave": "saved before it did",
    }
    assert said.get(how, "") in last.log
    for name in ("curves.png", "config.yaml", "certificate.json", "tensorboard"):
        assert (Path(config.out) / name).exists()
    assert run(config) == certificate  # already complete
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        run(config.model_copy(update={"seed": 1}))
