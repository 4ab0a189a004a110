"""What ffmpeg may be led to by a stranger's file: its own bytes, in a container of a short list."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import pytest
from av.error import ArgumentError
from av.format import ContainerFormat

from infra.videos import FORMATS, SAFE
from pipeline.clips.filters import FilterConfig
from pipeline.clips.parent import inspect_parent
from pipeline.clips.sources import Item
from pipeline.media.frames import probe
from pipeline.schema import RowError

FILM = "@film@"
"""Stands for the path of a film that would play."""
ODD = "\u00e9"
"""Not ASCII, so that the text is not told from media by its letters alone."""
SCRIPTS = {
    "ffconcat": f"ffconcat version 1.0\n# {ODD}\nfile '{FILM}'\n",
    "m3u8": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#{ODD}\n#EXTINF:3,\n{FILM}\n#EXT-X-ENDLIST\n",
    "sdp": f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns={ODD}\r\nc=IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n",
    "mpd": f'<!--{ODD}--><MPD type="static"><Period><AdaptationSet><Representation><BaseURL>{FILM}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>",
    "xml": f'<!--{ODD}--><AssetMap xmlns="http://www.smpte-ra.org/schemas/429-9/2007/AM"><Path>{FILM}</Path></AssetMap>',
    "idx": f"# VobSub index file, v7\n# {ODD}\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n",
    "pls": f"[playlist]\n# {ODD}\nFile1={FILM}\n",
    "asx": f'<asx version="3.0"><!--{ODD}--><entry><ref href="{FILM}"/></entry></asx>',
    "rtsp": f"RTSPtext rtsp://127.0.0.1:9/{ODD}\n",
    "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><!--{ODD}--><image href="{FILM}"/></svg>',
    "sub": f"{{0}}{{25}}{ODD} {FILM}\n",
}


@contextmanager
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server that notes each request."""
    hits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/film.mp4", hits
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def film(tmp_path_factory, write_video) -> Path:
    return write_video(tmp_path_factory.mktemp("canary") / "film.mp4", num_frames=20)


def test_no_other_demuxer_can_be_reached_by_any_name(film):
    """Whatever ffmpeg thinks that the bytes are: refused before its demuxer reads a byte."""
    listed = {*FORMATS, "mp4", "m4a", "3gp", "3g2", "mj2", "webm"}  # ffmpeg's other names for two of them
    reached = set()
    for name in sorted(av.formats_available):
        try:
            names = set(ContainerFormat(name, "r").name.split(","))  # several that one demuxer has
        except ValueError:
            continue  # writes only
        try:
            av.open(io.BytesIO(film.read_bytes()), format=name, options=SAFE).close()
        except ArgumentError:
            if names & listed:
                reached.add(name)
            continue
        except (OSError, ValueError, EOFError):  # the demuxer's own opinion of an mp4
            pass
        assert names & listed, name
        reached.add(name)
    assert {"mp4", "matroska", "avi", "mpegts"} <= reached


@pytest.mark.parametrize("kind", SCRIPTS)
@pytest.mark.parametrize("scheme", ["", "file:", "file://", "relative"])
def test_what_names_other_files_is_refused_and_they_stay_closed(tmp_path, film, kind, scheme):
    target = film.name if scheme == "relative" else f"{scheme}{film}"
    text = SCRIPTS[kind].replace(FILM, target).encode("latin-1")
    for name in (f"a.{kind}", "a.mp4"):
        path = film.parent / f"{kind}-{name}"
        path.write_bytes(text)
        for source in (str(path), text):
            with pytest.raises(RowError):
                probe(source)
        (row,) = inspect_parent(Item(str(path)).to_json(), {"local_uri": str(path)}, "whole", FilterConfig())
        assert row["status"] in ("undecodable", "wrong_type")


@pytest.mark.parametrize("kind", [kind for kind, text in SCRIPTS.items() if FILM in text])
def test_what_names_addresses_asks_for_none(tmp_path, kind):
    with canary() as (url, hits):
        text = SCRIPTS[kind].replace(FILM, url).encode("latin-1")
        (tmp_path / f"a.{kind}").write_bytes(text)
        for source in (str(tmp_path / f"a.{kind}"), text):
            with pytest.raises(RowError):
                probe(source)
        assert not hits


def test_a_name_with_a_number_in_it_is_not_a_sequence_of_pictures(tmp_path, write_picture):
    for number in range(3):
        write_picture(tmp_path / f"a{number:03d}.jpg")
    (tmp_path / "a%03d.jpg").write_bytes(bytes(range(256)))
    with pytest.raises(RowError):
        probe(str(tmp_path / "a%03d.jpg"))


def test_only_files_and_pipes_are_opened(film):
    with canary() as (url, hits):
        for address in (url, f"concat:{film}", f"subfile,,start,0,end,0,,:{film}", f"crypto:{film}"):
            with pytest.raises((OSError, ValueError)):
                av.open(address, options=SAFE)
        assert not hits
