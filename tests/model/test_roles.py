"""Roles of prompts: one declared from outside serves at once, and checkpoints made before it go on."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.run_folder import RunFolder
from model.condition import Segment
from model.data.batch import ROLES, role_number
from model.prompt.encoder import PromptEncoderConfig
from model.prompt.load import load_prompt_encoder
from model.prompt.pictures import ReferenceSize, reference_tensors
from model.prompt.select import select
from model.sampling.requests import parse_prompt
from model.training.checkpoint import CheckpointWriter, load_state
from model.training.config import Stage1Config
from model.training.loop import Training
from model.training.preflight import read_index
from pipeline.schema import RoleFacts
from tests.model.prompt_tables import jpeg, moving_square

PICTURE = jpeg(moving_square(0, num_frames=1, height=40, width=60)[0])


@pytest.fixture
def style(monkeypatch: pytest.MonkeyPatch) -> str:
    """A role that the product doesn't know: a picture whose style the video shall have."""
    monkeypatch.setitem(ROLES, "style", RoleFacts("subject"))
    return "style"


def test_a_new_role_is_asked_for_encoded_dropped_and_shown(
    style: str, tiny_encoder: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "style.jpg").write_bytes(PICTURE)
    prompt = parse_prompt("A dog runs, like <image>", [f"style:{tmp_path / 'style.jpg'}"])
    assert prompt[1] == Segment("image", style, None, PICTURE)
    encoder = load_prompt_encoder(PromptEncoderConfig.model_validate(tiny_encoder))
    encoded = encoder.encode_each([prompt])[0]
    assert (encoded.role[encoded.segment == 1] == role_number(style)).all()
    assert role_number(style) == len(ROLES) - 1
    assert select(prompt, dropped=frozenset({"subject"})) == prompt[:1]
    assert reference_tensors([prompt], ReferenceSize(16, 16)).role.tolist() == [[role_number(style)]]


def test_a_run_from_before_a_role_goes_on_and_learns_it(
    trained_run: Stage1Config, style: str, tmp_path: Path
) -> None:
    shutil.copytree(trained_run.out, tmp_path / "run")
    config = trained_run.model_copy(update={"out": str(tmp_path / "run")})
    training = Training(config, read_index(config.out))
    assert training.position == 8
    tables = [training.model.get_parameter(f"embedder.{name}role.weight") for name in ("", "references.")]
    before = [table.detach().clone() for table in tables]
    training.step()
    for table, drawn in zip(tables, before, strict=True):
        assert len(table) == len(ROLES)
        assert drawn[-1].abs().sum() > 0  # as drawn
        assert not torch.equal(table[:-1], drawn[:-1])
    training.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(there=st.integers(1, 9), more=st.integers(0, 5), width=st.integers(1, 4))
def test_shorter_tables_fill_the_first_rows_and_leave_the_new_ones(
    tmp_path_factory: pytest.TempPathFactory, there: int, more: int, width: int
) -> None:
    run = str(tmp_path_factory.mktemp("run"))
    names = ["model.embedder.role.weight", "optim.embedder.references.role.weight.exp_avg"]
    saved = {name: torch.randn(there, width) for name in names}
    writer = CheckpointWriter(RunFolder(run))
    writer.save(saved, {"position": 4})
    writer.close()
    state = {name: torch.randn(there + more, width) for name in names}
    fresh = {name: table.clone() for name, table in state.items()}
    load_state(f"{run}/checkpoints/samples-{4:012d}", state)
    for name, table in state.items():
        assert torch.equal(table[:there], saved[name]) and torch.equal(table[there:], fresh[name][there:])
