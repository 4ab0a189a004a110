"""Laws of `vimi-data encode`: exactly once, the same bytes, and training that doesn't know the difference."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cli.encode import EncodeConfig, check, options_of, run
from infra.certificate import Certificate, FileEntry, read_certificate, write_certificate
from infra.errors import ConfigError, TooManyFailuresError, TrainingError
from infra.storage import list_files
from infra.validation_cells import cells_of
from model.data.inputs import InputConfig
from model.data.shards import open_shards
from model.encodings.make import describe_inputs, make_row_encoder
from model.prompt.load import load_prompt_encoder
from model.training.config import Stage1Config
from model.training.driver import check as check_stage
from model.training.loop import Training
from model.training.preflight import prepare_index, read_index
from model.training.validation.loss import Validation
from model.training.validation.preview import Preview
from pipeline.prompts.encode import Worker, plan_units
from tests.model.conftest import shake
from tests.model.training.validation.test_loss import task_rows

Values = Callable[..., dict[str, Any]]


def encode(values: dict[str, Any], out: Path, **changes: Any) -> tuple[EncodeConfig, Certificate]:
    shared = {name: value for name, value in values.items() if name in EncodeConfig.model_fields}
    config = EncodeConfig.model_validate(shared | {"out": str(out), "num_workers": 2} | changes)
    return config, run(config)


def contents(out: Path) -> dict[str, str]:
    files = list_files(str(out), suffix=".parquet")
    return {Path(f).name: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}


def train(values: dict[str, Any], steps: int = 5) -> tuple[Training, list[float]]:
    config = Stage1Config.model_validate(values)
    check_stage(config)
    prepare_index(config, open_shards(config.prompts))
    training = Training(config, read_index(config.out))
    return training, [float(training.step().loss) for _ in range(steps)]


def encode_here(values: dict[str, Any], out: Path, **changes: Any) -> None:
    """The job's worker in this process: what it rounds, training rounds alike."""
    shared = {name: value for name, value in values.items() if name in EncodeConfig.model_fields}
    config = EncodeConfig.model_validate(shared | {"out": str(out)} | changes)
    inputs = config.model_dump(mode="json", include=set(InputConfig.model_fields))
    worker = Worker(partial(make_row_encoder, inputs, "cpu"), config.prompts, config.out)
    receipts = [worker(unit.payload) for unit in plan_units(worker.shards)]
    files = [FileEntry.model_validate(receipt["entry"]) for receipt in receipts]
    rows = sum(file.rows for file in files)
    certificate = Certificate(
        job="encode",
        config_hash=config.hash(),
        num_in=rows,
        num_out=rows,
        files=files,
        inputs={"prompts": worker.shards.certificate.content_hash()},
        facts={"inputs": describe_inputs(config), "encodings": receipts[0]["facts"]},
    )
    write_certificate(config.out, certificate)


def film(training: Training) -> list[str]:
    """Hashes of the frames of the videos that a run samples now (of equal ones x264 may make other bytes)."""
    Preview(training, read_index(training.config.out)).make()
    place = Path(training.run.samples(training.position), "samples.json")
    return [entry["frames_sha256"] for entry in json.loads(place.read_text())["samples"]]


DROPOUT = {"text": 0.3, "retrieved": 0.2, "all": 0.2}


@pytest.mark.parametrize("kind", ["pixels", "image", "video", "mllm"])
def test_training_from_encodings_is_the_same_to_the_bit(
    stage_values: Values,
    make_shards,
    autoencoders,
    tiny_mllm: dict[str, Any],
    short_previews: None,
    tmp_path: Path,
    kind: str,
) -> None:
    size = {"num_frames": 5, "height_px": 16, "width_px": 24}
    shards = str(make_shards(12, num_frames=5, height=16, width=24))
    values = stage_values(prompts=shards, dropout=DROPOUT, **size)
    values["backbone"] = {**values["backbone"], "patch_px": 1 if kind in autoencoders else 4}
    values |= {"autoencoder": autoencoders[kind]} if kind in autoencoders else {}
    values |= {"encoder": tiny_mllm} if kind == "mllm" else {}
    fresh, expected = train(values | {"out": str(tmp_path / "fresh")}, 4)
    encode_here(values, tmp_path / "encoded")
    stored, found = train(values | {"out": str(tmp_path / "stored"), "encodings": str(tmp_path / "encoded")}, 4)
    assert found == expected
    assert stored.weights_sha256() == fresh.weights_sha256()
    assert stored.targets.space == fresh.targets.space
    assert not {**vars(stored.encoder), **vars(stored.targets)}.get("latents")
    filmed = [film(training) for training in (fresh, stored)]
    assert filmed[0] == filmed[1]
    assert "encoder" not in vars(stored.encoder)  # neither training nor a preview ever loads it
    assert (next(stored.batches).video.numel() == 0) == (kind in autoencoders)  # nor anything decoded
    # Another row's documents are not among them: a CLIP is loaded for those, a language model is not.
    validated = cells_of(Validation(stored, read_index(stored.config.out)).run())
    assert ("shuffled" in {cell.given for cell in validated}) == (kind != "mllm")
    assert ("encoder" in vars(stored.encoder)) == (kind != "mllm")
    fresh.close()
    stored.close()


def test_all_that_tasks_show_is_stored_and_their_loss_without_it_asks_no_language_model(
    stage_values: Values, make_shards, make_row, autoencoders, tiny_mllm: dict[str, Any], tmp_path: Path
) -> None:
    """Subjects and first frames as latents of their own size; prompts with words in their pictures' place."""
    shards = str(make_shards(rows=task_rows(make_row), name="tasks"))
    values = stage_values(prompts=shards, dropout={"frame": 0.3}, encoder=tiny_mllm)
    values |= {"autoencoder": autoencoders["image"], "validation": {"num_samples": 6, "held_out_frac": 0}}
    values["backbone"] = {**values["backbone"], "patch_px": 1}
    fresh, expected = train(values | {"out": str(tmp_path / "fresh")}, 3)
    encode_here(values, tmp_path / "encoded")
    stored, found = train(values | {"out": str(tmp_path / "stored"), "encodings": str(tmp_path / "encoded")}, 3)
    assert found == expected
    shake(stored.model)
    record = Validation(stored, read_index(stored.config.out)).run()
    for task in ("subject_driven", "video_prediction"):
        own, none = (record[f"val/video {task} references {given}"] for given in ("own", "none"))
        assert own != none
    assert "encoder" not in vars(stored.encoder) and "latents" not in vars(stored.targets)
    fresh.close()
    stored.close()


@pytest.mark.ray
def test_output_is_the_same_for_any_number_of_workers(
    ray_cluster: None, stage_values: Values, tmp_path: Path
) -> None:
    values = stage_values(dropout=DROPOUT)
    config, certificate = encode(values, tmp_path / "two")
    assert (certificate.num_in, certificate.num_out, certificate.dead) == (22, 22, {})
    assert len(certificate.files) == 6 and certificate.facts["highlights"]["files"] == "6"
    assert all(contents(tmp_path / "two")[f.path] == f.sha256 for f in certificate.files)
    encode(values, tmp_path / "one", num_workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert run(config) == certificate  # found whole
    with pytest.raises(ConfigError, match=r"documents: \[0, 1, 2\] there, \[0\] now"):
        run(config.model_copy(update={"documents": (0,)}))


@pytest.mark.ray
def test_training_with_the_jobs_encodings_equals_training_without(
    ray_cluster: None, stage_values: Values, autoencoders, tmp_path: Path
) -> None:
    values = stage_values(dropout=DROPOUT, autoencoder=autoencoders["image"])
    values["backbone"] = {**values["backbone"], "patch_px": 1}
    fresh, expected = train(values | {"out": str(tmp_path / "fresh")})
    encode(values, tmp_path / "encoded")
    stored, found = train(values | {"out": str(tmp_path / "stored"), "encodings": str(tmp_path / "encoded")})
    assert found == pytest.approx(expected, rel=1e-4)  # another process may round otherwise
    assert stored.encoder.identity_hash == fresh.encoder.identity_hash
    assert "encoder" not in vars(stored.encoder)
    records = [Validation(t, read_index(t.config.out)).run() for t in (fresh, stored)]
    assert records[0] == pytest.approx(records[1], rel=1e-3, abs=1e-3)
    # A prompt that is not among them is encoded by the encoder itself, to the same tokens.
    other = fresh.loader.read(0).prompt[::-1]
    assert torch.equal(stored.encoder.encode([other]).tokens, fresh.encoder.encode([other]).tokens)
    # What was trained from encodings, goes on without them.
    stored.save({})
    stored.close()
    again, _ = train(values | {"out": str(tmp_path / "stored")}, 1)
    assert again.position == 6 * 4
    again.close()
    fresh.close()


@pytest.mark.ray
def test_rows_that_cannot_be_encoded_are_counted_and_replaced(
    ray_cluster: None, stage_values: Values, make_shards, make_row, tmp_path: Path
) -> None:
    rows = [make_row(n, num_frames=4, height=12, width=16) for n in range(12)]
    rows[5]["segments"][1]["image"] = b"not a picture"
    values = stage_values(prompts=str(make_shards(rows=rows, name="bad")), documents=[1], dropout={})
    with pytest.raises(TooManyFailuresError, match=r"1 of 12 rows could not be encoded.*bad_row"):
        encode(values, tmp_path / "strict", max_failed_frac=0.0)
    _, certificate = encode(values, tmp_path / "encoded")
    assert (certificate.num_out, certificate.dead) == (11, {"bad_row": 1})
    training, losses = train(values | {"encodings": str(tmp_path / "encoded")}, 3)  # 12 samples: an epoch
    assert training.loader.num_bad >= 1 and all(loss > 0 for loss in losses)
    training.close()


def test_encodings_that_do_not_serve_are_refused_by_the_preflight(
    stage_values: Values, make_shards, tmp_path: Path
) -> None:
    values = stage_values()
    encoded = tmp_path / "encoded"
    encode_here(values, encoded, documents=[0, 1])
    values |= {"encodings": str(encoded), "documents": [0, 1]}

    def refuse(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            check_stage(Stage1Config.model_validate(values | changes))
        assert "\n" not in str(caught.value)

    check_stage(Stage1Config.model_validate(values))
    check_stage(Stage1Config.model_validate(values | {"documents": [1], "dropout": {"all": 0.9}}))
    refuse(r"documents: \[0, 1\] there, also \[2\] now", documents=[0, 2])
    refuse("dropout: nothing | .* also text now", dropout={"text": 0.5})
    refuse("encoder.patch_grid: None there, 1 now", encoder=values["encoder"] | {"patch_grid": 1})
    refuse("encodes other shards", prompts=str(make_shards(8, num_frames=4, height=12, width=16, name="b")))
    refuse("no certified encodings", encodings=str(tmp_path))
    refuse("cure: --set augment_references=false", augment_references=True)
    refuse("was made by 'augment'", encodings=values["prompts"])
    # Other weights under the same path, and the same weights under another.
    files = values["encoder"]["clip"]
    moved = {**files, "pretrained": str(tmp_path / "moved.pt")}
    shutil.copy(files["pretrained"], moved["pretrained"])
    check_stage(Stage1Config.model_validate(values | {"encoder": values["encoder"] | {"clip": moved}}))
    weights = torch.load(moved["pretrained"])
    weights["state_dict"]["logit_scale"] += 1
    torch.save(weights, moved["pretrained"])
    refuse("encoder.clip", encoder=values["encoder"] | {"clip": moved})


def test_encodings_of_another_version_of_the_offline_tokens_are_refused(
    stage_values: Values, tmp_path: Path
) -> None:
    values = stage_values(encoder={"clip": {"name": "offline"}, "patch_grid": 1})
    encode_here(values, tmp_path / "encoded", documents=[1])
    values |= {"encodings": str(tmp_path / "encoded"), "documents": [1]}
    check_stage(Stage1Config.model_validate(values))
    made = read_certificate(tmp_path / "encoded")
    assert made is not None
    del made.facts["inputs"]["encoder"]["picture_tokens"]  # as before there were versions
    write_certificate(tmp_path / "encoded", made)
    with pytest.raises(ConfigError, match=r"encoder\.picture_tokens: None there, 2 now"):
        check_stage(Stage1Config.model_validate(values))


def test_an_encoder_swapped_after_the_preflight_stops_the_run(
    stage_values: Values, tiny_encoder: dict[str, Any], tmp_path: Path
) -> None:
    clip = {**tiny_encoder["clip"], "pretrained": str(tmp_path / "own.pt")}
    shutil.copy(tiny_encoder["clip"]["pretrained"], clip["pretrained"])
    values = stage_values(encoder=tiny_encoder | {"clip": clip})
    encode_here(values, tmp_path / "encoded")
    training, _ = train(values | {"encodings": str(tmp_path / "encoded")}, 1)
    weights = torch.load(clip["pretrained"])
    weights["state_dict"]["text_projection"] *= 2
    torch.save(weights, clip["pretrained"])
    with pytest.raises(TrainingError, match="was made by another prompt encoder"):
        training.encoder.encode([training.loader.read(0).prompt[::-1]])
    training.close()


def test_what_a_stage_config_shares_is_read_from_its_file(stage_values: Values, tmp_path: Path) -> None:
    values = stage_values(documents=[0, 1])
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(values))
    options = options_of(str(tmp_path / "stage1.yaml"))
    assert "samples" not in options and "out" not in options
    config = EncodeConfig.load(options={**options, "out": str(tmp_path / "out")})
    assert config.documents == (0, 1) and config.encoder == Stage1Config.model_validate(values).encoder
    assert "22 prompts in 6 row groups, each with [0, 1] documents" in check(config)


DRIVER = """
import sys
from cli.encode import EncodeConfig, run
run(EncodeConfig.load(sys.argv[1]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_bytes(
    ray_cluster: None, stage_values: Values, tmp_path: Path
) -> None:
    values = stage_values(dropout=DROPOUT)
    config, certificate = encode(values, tmp_path / "whole", num_workers=1)
    out = tmp_path / "killed"
    place = tmp_path / "encode.yaml"
    place.write_text(yaml.safe_dump(json.loads(config.model_dump_json()) | {"out": str(out)}))
    checkout = str(Path(__file__).parents[3])
    for wanted in (1, 3, 5):  # files that may stand before the kill
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(place)],
            env={**os.environ, "PYTHONPATH": checkout},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(1200):
            if len(contents(out)) >= wanted or process.poll() is not None:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    again = run(config.model_copy(update={"out": str(out)}))
    assert contents(out) == contents(tmp_path / "whole")
    assert again.content_hash() == certificate.content_hash()
    assert load_prompt_encoder(config.encoder).identity_hash == again.facts["encodings"]["encoder"]
