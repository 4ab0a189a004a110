"""The CLIP from a hub: a real HTTP server on loopback that speaks as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import open_clip
import pytest
import torch
from safetensors.torch import save

MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
LOAD = """
import sys
from infra.clip import ClipConfig, load_clip
from infra.errors import ConfigError
for name in sys.argv[1:]:
    try:
        clip = load_clip(ClipConfig(name=name))
        print(clip.model_hash, clip.preprocessing.mean, clip.encode_texts(["a dog"]).shape)
    except ConfigError as error:
        print("refused:", error)
"""


@pytest.fixture
def hub() -> Iterator[str]:
    """Serves one repository, `someone/tiny`; any other is a 404 as the hub's."""
    torch.manual_seed(0)
    weights = save(open_clip.CLIP(**MODEL).state_dict())  # type: ignore[arg-type]
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    files = {
        "/someone/tiny/resolve/main/open_clip_config.json": json.dumps(config).encode(),
        "/someone/tiny/resolve/main/open_clip_model.safetensors": weights,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(200 if body else 404)
            if body:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            else:
                missing = "EntryNotFound" if self.path.startswith("/someone/tiny/") else "RepoNotFound"
                self.send_header("X-Error-Code", missing)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def load(*names: str, endpoint: str, home: Path) -> list[str]:
    """`load_clip` of each name in its own process: the hub's client reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_hub_model_is_fetched_once_and_found_without_the_hub_and_an_unknown_one_is_refused(
    hub: str, tmp_path: Path
) -> None:
    first, refused = load("hf-hub:someone/tiny", "hf-hub:someone/else", endpoint=hub, home=tmp_path)
    assert "(0.1, 0.2, 0.3) (1, 24)" in first
    assert refused.startswith("refused: the hub has no repository 'someone/else'")
    assert load("hf-hub:someone/tiny", endpoint="http://127.0.0.1:9", home=tmp_path) == [first]
