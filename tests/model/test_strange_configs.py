"""A checkpoint's config comes from anybody: what it names is not imported unless the user says so."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.certificate import file_entries, read_sealed, require_certificate, write_certificate, write_sealed
from infra.config import ALLOW_IMPORTS
from infra.errors import ConfigError
from infra.run_folder import COMMITTED
from infra.storage import read_json, write_json
from model.sampling import export, plan
from model.training.build import make_generator
from model.training.checkpoint import find_checkpoint
from model.training.config import Stage1Config, Stage2Config
from model.training.preflight import check_same_model
from model.training.state import restore_generator, start_from_base, trained_by

NAME = "strange_code:CONFIG"
CODE = """
from model.backbones.base import BackboneConfig
from model.backbones.presets import PRESETS
CONFIG = PRESETS["fit-tiny"]
"""


@pytest.fixture(params=["preset", "optim"])
def strange(
    request: pytest.FixtureRequest, trained_run: Stage1Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of a run whose checkpoint names code that could be imported."""
    run = tmp_path / "strange"
    shutil.copytree(trained_run.out, run)
    place = Path(find_checkpoint(str(run))) / COMMITTED
    facts = read_sealed(str(place))
    facts["config"][request.param] = NAME if request.param == "preset" else {"name": NAME}
    write_sealed(str(place), facts)  # whoever makes a checkpoint seals what it says
    (tmp_path / "strange_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield run
    sys.modules.pop("strange_code", None)


def _sampling(run: Path) -> plan.SampleConfig:
    return plan.SampleConfig(run=str(run), out=str(run / "out"), prompts=("A dog.",))


def test_nothing_that_a_checkpoint_names_is_imported(
    strange: Path, trained_run: Stage1Config, stage_values: Callable[..., dict[str, Any]]
) -> None:
    large = Stage1Config.model_validate(
        stage_values(
            height_px=24, width_px=32, upsampler={"small_size_px": [12, 16], "start_from": str(strange)}
        )
    )
    second = Stage2Config.model_validate(stage_values(start_from=str(strange), tasks=None))
    cpu = torch.device("cpu")
    uses: dict[str, Callable[[], object]] = {
        "sample": lambda: plan.check(_sampling(strange)),
        "export": lambda: export.check(export.ExportConfig(run=str(strange), out=str(strange / "out"))),
        "restore": lambda: restore_generator(str(strange), device=cpu),
        "stage 2": lambda: check_same_model(second, find_checkpoint(str(strange))),
        "upsampler": lambda: trained_by(str(strange), own=large),
        "base": lambda: start_from_base(make_generator(large, 8), large, str(strange)),
    }
    for what, use in uses.items():
        with pytest.raises(ConfigError, match=rf"asks for {NAME}.*cure: .*{ALLOW_IMPORTS}={NAME}$"):
            use()
        assert "strange_code" not in sys.modules, what


def test_an_exported_config_imports_nothing_either(
    trained_run: Stage1Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "export"
    export.run(export.ExportConfig(run=trained_run.out, out=str(out)))
    facts = read_json(str(out / "config.json"))
    facts["config"]["preset"] = NAME
    write_json(str(out / "config.json"), facts)
    certificate = require_certificate(str(out), job="export", made_by="export")
    places = [str(out / file.path) for file in certificate.files]
    write_certificate(str(out), certificate.model_copy(update={"files": file_entries(str(out), places)}))
    (tmp_path / "strange_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=ALLOW_IMPORTS):
        export.load_exported(str(out))
    assert "strange_code" not in sys.modules
    monkeypatch.setenv(ALLOW_IMPORTS, f"other:NAME,{NAME}")
    assert export.load_exported(str(out)) is not None
    del sys.modules["strange_code"]


def test_what_the_user_names_is_imported(
    strange: Path, stage_values: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_IMPORTS, NAME)
    assert "videos of 4 frames" in plan.check(_sampling(strange))
    monkeypatch.delenv(ALLOW_IMPORTS)
    preset = read_json(str(Path(find_checkpoint(str(strange))) / COMMITTED))["config"]["preset"]
    own = stage_values(preset=preset, start_from=str(strange), tasks=None, optim={"name": NAME})
    check_same_model(Stage2Config.model_validate(own), find_checkpoint(str(strange)))
