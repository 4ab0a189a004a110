"""Redrive: what a retry may cure is tried again, everything else is carried over."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.certificate import Certificate, read_certificate, write_certificate
from infra.claim import open_job
from infra.config import ALLOW_IMPORTS
from infra.errors import ConfigError
from pipeline.clips import crawl, redrive
from pipeline.clips.crawl import CrawlConfig
from pipeline.clips.filters import FilterConfig
from pipeline.clips.redrive import RedriveConfig
from pipeline.clips.sources import SourceConfig, source_from_path

pytestmark = pytest.mark.ray


class Site(ThreadingHTTPServer):
    """Serves a folder; names in `down` answer 503."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.down, self.asked = root, set[str](), list[str]()


class Handler(BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.asked.append(name)
        path = self.server.root / name
        code = 503 if name in self.server.down else 200 if path.is_file() else 404
        body = path.read_bytes() if code == 200 else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def site(tmp_path, write_video, write_picture):
    for number in range(3):
        write_video(tmp_path / "www" / f"{number}.mp4", seed=number)
        write_picture(tmp_path / "www" / f"{number}.jpg", seed=number)
    server = Site(tmp_path / "www")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def table_of(out: Path) -> pa.Table:
    certificate = read_certificate(str(out), job="crawl")
    assert certificate is not None
    return pa.concat_tables([pq.read_table(out / file.path) for file in certificate.files])


def crawl_site(site: Site, tmp_path: Path, out: str = "clips", **settings: Any) -> pa.Table:
    names = ["0.mp4", "1.mp4", "2.mp4", "0.jpg", "1.jpg", "2.jpg", "absent.mp4"]
    lines = [f"http://127.0.0.1:{site.server_port}/{name}\tcaption of {name}" for name in names]
    (tmp_path / "urls.txt").write_text("\n".join(lines))
    fetch = {"allow_hosts": ["127.0.0.1"], "max_tries": 1, "per_host_per_s": 500}
    config = {"sources": [source_from_path(str(tmp_path / "urls.txt"))], "fetch": fetch, **settings}
    crawl.run(CrawlConfig.model_validate({**config, "out": str(tmp_path / out)}))
    return table_of(tmp_path / out)


def fates(table: pa.Table) -> list[str]:
    return table["status"].to_pylist()


def test_addresses_are_crawled_to_rows_with_bytes_on_disk(ray_cluster, tmp_path, site):
    table = crawl_site(site, tmp_path)
    assert fates(table) == ["ok"] * 6 + ["not_found"]
    assert table["media"].to_pylist()[:6] == ["video"] * 3 + ["image"] * 3
    for row in table.to_pylist()[:6]:
        name = row["source_uri"].rpartition("/")[2]
        assert Path(row["local_uri"]).read_bytes() == (site.root / name).read_bytes()
        assert row["caption"] == f"caption of {name}"


def test_redrive_retries_the_retriable_and_carries_the_rest_over(ray_cluster, tmp_path, site):
    site.down = {"1.mp4", "2.jpg"}
    before = crawl_site(site, tmp_path)
    assert fates(before) == ["ok", "unreachable", "ok", "ok", "ok", "unreachable", "not_found"]
    site.down, site.asked = set(), []
    redrive.run(RedriveConfig(clips=str(tmp_path / "clips"), out=str(tmp_path / "again")))
    after = table_of(tmp_path / "again")
    assert fates(after) == ["ok"] * 6 + ["not_found"]
    assert after["attempt"].to_pylist() == [1, 2, 1, 1, 1, 2, 1]
    assert sorted(set(site.asked)) == ["1.mp4", "2.jpg", "robots.txt"]
    kept = [0, 2, 3, 4, 6]
    assert after.take(kept).equals(before.take(kept))


def test_redriven_clips_have_the_ids_of_a_crawl_that_never_failed(ray_cluster, tmp_path, site):
    site.down = {"1.mp4"}
    crawl_site(site, tmp_path)
    site.down = set()
    redrive.run(RedriveConfig(clips=str(tmp_path / "clips"), out=str(tmp_path / "again")))
    unbroken = crawl_site(site, tmp_path, "unbroken")
    assert table_of(tmp_path / "again")["clip_id"].to_pylist() == unbroken["clip_id"].to_pylist()


def test_a_redrive_can_be_redriven(ray_cluster, tmp_path, site):
    site.down = {"0.mp4", "1.mp4"}
    crawl_site(site, tmp_path)
    site.down = {"1.mp4"}
    redrive.run(RedriveConfig(clips=str(tmp_path / "clips"), out=str(tmp_path / "second")))
    site.down = set()
    redrive.run(RedriveConfig(clips=str(tmp_path / "second"), out=str(tmp_path / "third")))
    table = table_of(tmp_path / "third")
    assert fates(table)[:3] == ["ok"] * 3
    assert table["attempt"].to_pylist()[:3] == [2, 3, 1]


def test_a_shared_media_folder_makes_a_second_crawl_conditional(ray_cluster, tmp_path, site):
    first = crawl_site(site, tmp_path, "one", media=str(tmp_path / "media"))
    second = crawl_site(site, tmp_path, "two", media=str(tmp_path / "media"))
    assert first.equals(second)
    assert {Path(uri).parents[1] for uri in first["local_uri"].to_pylist()[:6]} == {tmp_path / "media"}


def test_what_is_no_crawl_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no certified crawl output"):
        redrive.check(RedriveConfig(clips=str(tmp_path / "nothing"), out=str(tmp_path / "out")))


def test_filters_that_a_crawl_of_somebody_else_names_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "strange_filter.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = SourceConfig(kind="folder", path=str(tmp_path))
    theirs = CrawlConfig(
        sources=(source,), out=str(tmp_path / "clips"), filters=FilterConfig(plugins=("strange_filter:judge",))
    )
    open_job(theirs.out, job=crawl.JOB, config=theirs, inputs={})
    write_certificate(theirs.out, Certificate(job=crawl.JOB, config_hash="", num_in=0, num_out=0))
    mine = RedriveConfig(clips=theirs.out, out=str(tmp_path / "again"))
    with pytest.raises(ConfigError, match=r"config.yaml asks for strange_filter:judge.*cure: [^\n]*$"):
        redrive.check(mine)
    monkeypatch.setenv(ALLOW_IMPORTS, "strange_filter:judge")
    redrive.check(mine)


def test_a_page_becomes_clips(ray_cluster, tmp_path, site):
    html = "<title>t</title><video src='0.mp4' title='a film'></video><img src='1.jpg' alt='a picture'>"
    (site.root / "index.html").write_text(html)
    source = SourceConfig(kind="page", path=f"http://127.0.0.1:{site.server_port}/index.html")
    fetch = {"allow_hosts": ["127.0.0.1"]}
    crawl.run(CrawlConfig.model_validate({"sources": [source], "fetch": fetch, "out": str(tmp_path / "clips")}))
    table = table_of(tmp_path / "clips")
    rows = zip(*(table[name].to_pylist() for name in ("media", "caption", "status")), strict=True)
    assert list(rows) == [("video", "a film", "ok"), ("image", "a picture", "ok")]
