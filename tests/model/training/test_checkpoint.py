"""Laws of checkpoints: whole or absent, safe to read, any filesystem."""

import pickle
from pathlib import Path

import pytest
import torch

from infra.certificate import read_sealed, write_sealed
from infra.errors import ConfigError, TrainingError
from infra.run_folder import RunFolder
from infra.storage import sha256_file
from model.training.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    load_state,
    read_facts,
    tensors_in,
)
from model.training.driver import say_where_it_goes_on


def a_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.w": torch.randn(30, 20),
        "model.b": torch.randn(7).bfloat16(),
        "optim.step": torch.tensor(3.0),
        "rng": torch.get_rng_state(),
    }


def empty_like(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def save_one(run: Path | str, position: int, state: dict[str, torch.Tensor], **options) -> None:
    writer = CheckpointWriter(RunFolder(str(run)), **options)
    writer.save(state, {"position": position})
    writer.close()


def test_loaded_state_equals_saved_state(tmp_path: Path) -> None:
    state = a_state()
    save_one(tmp_path, 8, state)
    found = empty_like(state)
    load_state(find_checkpoint(str(tmp_path)), found)
    for name, value in state.items():
        assert value.equal(found[name]), name


def test_background_save_holds_the_moment_of_the_call_once_it_is_settled(tmp_path: Path) -> None:
    state = a_state()
    before = {name: value.clone() for name, value in state.items()}
    writer = CheckpointWriter(RunFolder(str(tmp_path)))
    writer.save(state, {"position": 8})
    writer.settle()
    for value in state.values():
        value.zero_()  # the next step moves the weights while the file is being written
    writer.close()
    found = empty_like(state)
    load_state(RunFolder(str(tmp_path)).latest_checkpoint() or "", found)
    assert all(before[name].equal(found[name]) for name in before)


def test_newest_checkpoints_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(RunFolder(str(tmp_path)), num_to_keep=2)
    for position in (8, 16, 24):
        writer.save(a_state(), {"position": position})
    writer.close()
    assert RunFolder(str(tmp_path)).positions() == [16, 24]
    assert not Path(RunFolder(str(tmp_path)).checkpoint(8)).exists()


def test_half_written_checkpoint_is_none_is_named_and_is_cleaned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(str(tmp_path))
    for position in (4, 8, 16):
        save_one(tmp_path, position, a_state())
    for position in (4, 16):  # 4: a kill while it was pruned, which loses nothing
        (Path(run.checkpoint(position)) / "committed.json").unlink()
    assert run.latest_checkpoint() == run.checkpoint(8)
    assert say_where_it_goes_on(run, 40) == 8
    told = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert len(told) == 1 and "checkpoint 16 has no committed.json" in told[0] and "goes on from 8" in told[0]
    CheckpointWriter(run).clean()
    assert not Path(run.checkpoint(16)).exists() and not Path(run.checkpoint(4)).exists()
    assert run.positions() == [8] and run.half_written() == []


def test_other_shapes_and_names_are_said(tmp_path: Path) -> None:
    save_one(tmp_path, 8, a_state())
    uri = RunFolder(str(tmp_path)).checkpoint(8)
    with pytest.raises(TrainingError, match=r"model.w is \(30, 20\) there, \(2, 2\) here"):
        load_state(uri, {"model.w": torch.zeros(2, 2)})
    with pytest.raises(TrainingError, match=r"model.new is not there"):
        load_state(uri, {"model.new": torch.zeros(2, 2)})
    assert tensors_in(uri)["model.w"] == (30, 20)


def test_unknown_format_says_why(tmp_path: Path) -> None:
    save_one(tmp_path, 8, a_state())
    uri = RunFolder(str(tmp_path)).checkpoint(8)
    facts = read_sealed(uri + "/committed.json")
    write_sealed(uri + "/committed.json", facts | {"format": 99, "version": "9.9"})
    with pytest.raises(ConfigError, match=r"format 99 .vimi 9.9"):
        read_facts(uri)


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "committed.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damaged_checkpoint_is_refused_and_the_one_before_it_named(tmp_path: Path, name: str, how: str) -> None:
    for position in (8, 16):
        save_one(tmp_path, position, a_state())
    run = RunFolder(str(tmp_path))
    uri, before = run.checkpoint(16), run.checkpoint(8)
    place = Path(uri) / name
    data = bytearray(place.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(b ^ 1 for b in data[middle : middle + 64])
    if how == "missing":
        place.unlink()
        if name == "committed.json":  # then it is none
            assert run.latest_checkpoint() == before
            return
    else:
        place.write_bytes(data if how == "flipped" else data[:middle])
    with pytest.raises(TrainingError, match=f"{name}.*cure: use {before}") as caught:
        load_state(uri, empty_like(a_state()))
    assert "\n" not in str(caught.value)
    load_state(before, empty_like(a_state()))


def test_hashes_made_while_writing_are_those_of_the_files(tmp_path: Path) -> None:
    save_one(tmp_path, 8, a_state())
    uri = RunFolder(str(tmp_path)).checkpoint(8)
    hashes = {entry["path"]: entry["sha256"] for entry in read_facts(uri)["files"]}
    assert set(hashes) == {"__0_0.distcp", ".metadata"}
    for name, digest in hashes.items():
        assert digest == sha256_file(f"{uri}/{name}")


class Bomb:
    """Runs code where it is unpickled: it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_index_that_names_code_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, 8, a_state())
    uri, mark = RunFolder(str(tmp_path)).checkpoint(8), tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    (Path(uri) / ".metadata").write_bytes(bomb)
    with pytest.raises(TrainingError, match=r"builtins\.exec"):
        tensors_in(uri)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # the bomb is live


def test_object_store_holds_checkpoints(s3_server: str) -> None:
    state = a_state()
    for position in (8, 16):
        save_one("s3://runs/one", position, state, num_to_keep=1)
    assert RunFolder("s3://runs/one").positions() == [16]
    found = empty_like(state)
    load_state(find_checkpoint("s3://runs/one"), found)
    assert all(state[name].equal(found[name]) for name in state)
