"""What an evaluation makes of its videos' receipts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.evaluate.extract import FeatureCache
from model.evaluate.metric import SMALL_N
from model.evaluate.networks import NetworkConfig
from model.evaluate.results import make_results
from model.evaluate.scores import chosen


def row(side: str, number: int, *, status: str = "ok", **changes: Any) -> dict[str, Any]:
    fate = {"status": status, "error": None if status == "ok" else "damaged"}
    features = {"features": {"clip": f"c{number % 7}"}, "prompt": {"clip_references": "p"}}
    return {
        "side": side,
        "name": f"{number}",
        "text": "A dog.",
        "id": f"{number}",
        **fate,
        **features,
        **changes,
    }


@pytest.fixture
def how(tmp_path: Path, tiny_encoder: dict[str, Any]) -> dict[str, Any]:
    cache, draw = FeatureCache(str(tmp_path)), np.random.default_rng(0)
    for key in ("p", *(f"c{n}" for n in range(7))):
        cache.put(key, draw.normal(size=(4, 16)))
    networks = NetworkConfig.model_validate({"clip": tiny_encoder["clip"]})
    return {"cache": cache, "networks": networks, "frames": {}, "system": {}}


def test_files_that_cannot_be_read_do_not_bring_a_score_of_few_videos(how: dict[str, Any]) -> None:
    rows = [row("real", n) for n in range(SMALL_N)]
    rows += [row("sampled", n, status="ok" if n else "undecodable") for n in range(SMALL_N)]
    metrics = chosen(["clip_fid", "clip_i"])
    values, _ = make_results(rows, metrics, {}, **how)
    assert set(values["scores"]) == {"clip_i"}
    assert values["not_computed"]["clip_fid"].startswith(
        "255 sampled and 256 real videos, and its value depends"
    )
    marked, _ = make_results(rows, metrics, {}, **how, allow_small_n=True)
    assert marked["scores"]["clip_fid"]["small_n"] and not marked["not_computed"]


def test_any_text_leaves_a_line_for_each_video(how: dict[str, Any]) -> None:
    texts = ["one\u2028two", "one\x85two", "zwölf"]
    rows = [row("sampled", n, text=text) for n, text in enumerate(texts)]
    _, table = make_results(rows, chosen(["clip_i"]), {}, **how)
    assert [json.loads(line)["text"] for line in table.decode().splitlines()] == texts


def test_other_reference_pictures_are_another_protocol(how: dict[str, Any]) -> None:
    def protocol(*shown: list[str]) -> str:
        rows = [row("sampled", n, references=pictures) for n, pictures in enumerate(shown)]
        return make_results(rows, chosen(["clip_i"]), {}, **how)[0]["scores"]["clip_i"]["protocol"]

    single, multi = protocol(["a"], ["b"]), protocol(["a", "c"], ["b"])
    assert single != multi and single == protocol(["b"], ["a"])
