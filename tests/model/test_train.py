"""Laws of training: interrupted equals unbroken, ranks agree, the door refuses early."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml

from infra.errors import ConfigError, TrainingError
from infra.storage import read_certificate, write_json
from model.data.plan import ids_of
from model.data.shards import open_shards
from model.training.checkpoint import CheckpointWriter, latest_checkpoint, read_facts
from model.training.door import prepare_index, read_index
from model.training.loop import Training
from model.training.stages import Stage1Config, Stage2Config, StageConfig
from model.training.state import hash_tensors, state_of, weights_of
from model.training.telemetry import read_metrics
from model.training.train import check, run

Values = Callable[..., dict[str, Any]]


def open_training(config: StageConfig) -> Training:
    prepare_index(config, open_shards(config.prompts))
    return Training(config, read_index(config.out))


def fingerprint(training: Training) -> dict[str, Any]:
    """Weights, optimizer, averages and the next ten batches, as hashes."""
    state = state_of(training.model, training.optimizer, training.emas)
    plan, shards = training.loader.plan, training.loader.row_groups.shards
    return {
        "state": hash_tensors({k: v for k, v in state.items() if k != "rng"}),
        "ids": ids_of(plan, shards, training.position, 10 * training.config.batch_size),
        "position": training.position,
    }


def advance(training: Training, steps: int) -> None:
    for _ in range(steps):
        training.step()


def cut_and_resume(config: Stage1Config, cut: int, steps: int) -> dict[str, Any]:
    """Train `cut` steps, save, lose half a step of gradients, start again from the folder, go on."""
    first = open_training(config)
    advance(first, cut)
    first.save({})
    first.writer.wait()
    batch = next(first.batches)  # the interrupted step had begun: mid-accumulation
    condition = first.condition(batch.prompts, batch.fps, batch.original_size_px)
    first._accumulate(batch, condition)
    first.close()
    second = open_training(config)
    assert second.position == cut * config.batch_size
    advance(second, steps - cut)
    found = fingerprint(second)
    second.close()
    return found


def unbroken(config: Stage1Config, steps: int) -> dict[str, Any]:
    training = open_training(config)
    advance(training, steps)
    found = fingerprint(training)
    training.close()
    return found


@pytest.mark.parametrize("cut", [1, 5])  # 22 rows: step 5 lies across the first epoch's end
def test_resumed_training_equals_unbroken_training(stage_values: Values, tmp_path: Path, cut: int) -> None:
    values = stage_values(accumulation=2, optim={"name": "lamb", "lr": 1e-2})
    whole = Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")})
    parts = Stage1Config.model_validate(values | {"out": str(tmp_path / "parts")})
    assert cut_and_resume(parts, cut, 8) == unbroken(whole, 8)


@pytest.mark.slow
def test_any_cut_of_forty_steps_equals_unbroken_training(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values(accumulation=2, samples=160)
    whole = Stage1Config.model_validate(values | {"out": str(tmp_path / "whole")})
    expected = unbroken(whole, 40)
    for cut in range(1, 40):
        parts = Stage1Config.model_validate(values | {"out": str(tmp_path / f"cut-{cut}")})
        assert cut_and_resume(parts, cut, 40) == expected, cut


def test_accumulation_changes_rounding_only(stage_values: Values, tmp_path: Path) -> None:
    found = []
    for number in (1, 2):
        values = stage_values(accumulation=number, out=str(tmp_path / f"run-{number}"))
        training = open_training(Stage1Config.model_validate(values))
        advance(training, 3)
        found.append(weights_of(training.model))
        training.close()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def _rank(rank: int, world: int, values: dict[str, Any], folder: str, steps: int) -> None:
    """One process of a plain torch.distributed run; rank 0 writes what came out."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=values.pop("port"))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = Stage1Config.model_validate(values)
    if rank == 0:
        prepare_index(config, open_shards(config.prompts))
    dist.barrier()
    training = Training(config, read_index(config.out))
    ids = []
    for _ in range(steps):
        positions = range(training.position, training.position + config.batch_size)
        ids.append([training.loader.plan.source(p).rows[0] for p in positions])
        training.step()
    training.save({})
    training.writer.wait()
    digest = training.weights_sha256()
    if rank == 0:
        write_json(folder, {"ids": ids, "sha": digest})
    training.close()
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def on_ranks(world: int, values: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    values = values | {"port": free_port()}
    mp.spawn(_rank, args=(world, values, str(folder), steps), nprocs=world)  # pyright: ignore
    return json.loads(folder.read_text())


def weights_at(run: str) -> dict[str, torch.Tensor]:
    from model.training.checkpoint import load_state, tensors_in

    uri = latest_checkpoint(run) or ""
    state = {k: torch.zeros(s) for k, s in tensors_in(uri).items() if k.startswith("model.")}
    load_state(uri, state)
    return state


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_see_the_samples_of_one_and_end_alike(
    stage_values: Values, tmp_path: Path, mode: str
) -> None:
    values = stage_values(parallel={"mode": mode}, self_condition_rate=0.5)
    two = on_ranks(2, values | {"out": str(tmp_path / "two")}, tmp_path / "two.json", 4)
    single = open_training(Stage1Config.model_validate(values | {"out": str(tmp_path / "one")}))
    ids = []
    for _ in range(4):
        places = range(single.position, single.position + single.config.batch_size)
        ids.append([single.loader.plan.source(p).rows[0] for p in places])
        single.step()
    assert two["ids"] == ids
    expected = weights_of(single.model)
    single.close()
    for name, value in weights_at(str(tmp_path / "two")).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)
    # What two ranks wrote, one rank continues.
    again = open_training(Stage1Config.model_validate(values | {"out": str(tmp_path / "two")}))
    assert again.position == 16
    assert again.weights_sha256() == two["sha"]
    advance(again, 1)
    again.close()


def test_rehearsal_changes_nothing(stage_values: Values, tmp_path: Path) -> None:
    found = []
    for name in ("with", "without"):
        training = open_training(Stage1Config.model_validate(stage_values(out=str(tmp_path / name))))
        if name == "with":
            assert training.rehearse() == 0  # no device memory on a CPU
        advance(training, 2)
        found.append(fingerprint(training))
        training.close()
    assert found[0] == found[1]


def test_nonfinite_loss_names_its_samples(stage_values: Values) -> None:
    training = open_training(Stage1Config.model_validate(stage_values()))
    before = weights_of(training.model)
    with torch.no_grad():
        next(iter(training.model.parameters())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"gradient norm is nan; samples with a non-finite loss: [0-9a-f]"):
        training.step()
    assert training.position == 0 and before
    training.close()


def test_stage_two_starts_from_stage_one(stage_values: Values, make_shards, make_row, tmp_path: Path) -> None:
    first = open_training(Stage1Config.model_validate(stage_values()))
    advance(first, 2)
    first.save({})
    first.writer.wait()
    tasks = ["subject_driven", "video_prediction", "text_to_video"]
    rows = [make_row(n, task=tasks[n % 3], num_frames=4, height=12, width=16) for n in range(12)]
    shards = make_shards(rows=rows, job="instruct", name="instructions")
    values = stage_values(
        prompts=str(shards), out=str(tmp_path / "two"), start_from=first.config.out, batch_size=4
    )
    second = open_training(Stage2Config.model_validate(values))
    assert second.position == 0
    assert second.weights_sha256() == first.weights_sha256()
    advance(second, 1)
    averaged = Stage2Config.model_validate(values | {"start_ema": "power-0.05", "out": str(tmp_path / "three")})
    third = open_training(averaged)
    for name, value in first.emas["power-0.05"].weights.items():
        assert value.equal(weights_of(third.model)[f"model.{name}"])
    for training in (first, second, third):
        training.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "fit-enormous"}, "preset 'fit-enormous'; legal: .*fit-tiny"),
        ({"prompts": "/nowhere"}, "no certified prompts at /nowhere"),
        ({"batch_size": 6, "num_workers": 4}, "batch_size 6 is not divisible by 4 workers"),
        ({"batch_size": 64, "num_workers": 64}, "64 workers, but .* has 6 row groups"),
        ({"backbone": {"wings": 2}}, "backbone: .*wings"),
    ],
)
def test_door_refuses_in_one_line(stage_values: Values, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(Stage1Config.model_validate(stage_values(**changes)))
    assert "\n" not in str(caught.value)


def test_stage_two_door_refuses_missing_and_foreign_checkpoints(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values(start_from=str(tmp_path / "none"), out=str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        check(Stage2Config.model_validate(values))
    training = open_training(Stage1Config.model_validate(stage_values(prompts=values["prompts"])))
    training.save({})
    training.close()
    values |= {"start_from": training.config.out, "height_px": 16}
    with pytest.raises(ConfigError, match="height_px: 12 there, 16 now"):
        check(Stage2Config.model_validate(values))


@pytest.mark.ray
def test_run_is_certified_and_claims_its_folder(ray_cluster: None, stage_values: Values) -> None:
    config = Stage1Config.model_validate(stage_values(log={"every_samples": 4}))
    certificate = run(config)
    assert certificate.num_out == 40 and certificate.job == "stage1"
    records = read_metrics(config.out)
    assert [r["samples"] for r in records if "loss" in r] == list(range(4, 41, 4))
    assert any("val/loss video retrieval on" in r for r in records)
    for name in ("curves.png", "config.yaml", "certificate.json", "tensorboard"):
        assert (Path(config.out) / name).exists()
    assert run(config) == certificate  # already complete
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        run(config.model_copy(update={"seed": 1}))


def driver(config_file: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own, as a user starts it."""
    code = f"""
import sys
from model.training.train import Stage1Config, run
run(Stage1Config.load({str(config_file)!r}))
"""
    log = (folder / "driver.log").open("ab")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment)


def wait_for_samples(run_folder: Path, samples: int, process: subprocess.Popen[bytes]) -> None:
    place = run_folder / "metrics.jsonl"
    for _ in range(1200):
        assert process.poll() is None, (run_folder.parent / "driver.log").read_text()[-2000:]
        lines = place.read_text().split("\n")[:-1] if place.exists() else []
        if any(json.loads(line)["samples"] >= samples for line in lines):
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def training_worker(driver_pid: int) -> int:
    """Pid of the Ray Train worker that descends from this driver."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
    for pid, name in names.items():
        above = pid
        while above in parents and above != driver_pid:
            above = parents[above]
        if above == driver_pid and b"RayTrainWorker" in name:
            return pid
    raise AssertionError("no training worker")


@pytest.mark.ray
@pytest.mark.parametrize("victim", ["driver", pytest.param("worker", marks=pytest.mark.slow)])
def test_killed_run_equals_unbroken_run(stage_values: Values, tmp_path: Path, victim: str) -> None:
    values = stage_values(samples=240, ray={"num_cpus": 1}, checkpoint={"every_samples": 40})
    config = Stage1Config.model_validate(values)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    process = driver(tmp_path / "config.yaml", tmp_path)
    wait_for_samples(Path(config.out), 60, process)
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert read_certificate(config.out) is None
        process = driver(tmp_path / "config.yaml", tmp_path)
    else:
        os.kill(training_worker(process.pid), signal.SIGKILL)
    assert process.wait(timeout=120) == 0, (tmp_path / "driver.log").read_text()[-2000:]
    certificate = read_certificate(config.out, job="stage1")
    assert certificate is not None
    samples = [r["samples"] for r in read_metrics(config.out) if "loss" in r]
    assert samples == list(range(4, 241, 4))  # as if nothing had happened
    torch.set_num_threads(1)
    whole = open_training(config.model_copy(update={"out": str(tmp_path / "whole")}))
    advance(whole, 60)
    assert certificate.facts["weights_sha256"] == whole.weights_sha256()
    assert read_facts(latest_checkpoint(config.out) or "")["position"] == 240
    whole.close()


def test_checkpoint_writer_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(str(tmp_path))
    writer.save({"model.w": torch.zeros(2)}, {"position": 4})
    with pytest.raises(TrainingError, match="could not be written"):
        writer.wait()
