"""A real web server on loopback with every fault that a crawler meets."""

import socket
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = bytes(range(256)) * 400  # 102,400 bytes that are no text


ETAG = '"v1"'


class Site(ThreadingHTTPServer):
    """What was asked for, and how often."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: Counter[str] = Counter()
        self.sent_bytes = 0
        self.ranges: list[str | None] = []
        self.active = self.most_active = 0
        self.times: list[float] = []
        self.robots = "User-agent: *\nDisallow: /private\n"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, path = self.server, self.path.split("?")[0]
        site.hits[path] += 1
        site.times.append(time.monotonic())
        site.active += 1
        site.most_active = max(site.most_active, site.active)
        try:
            getattr(self, "on_" + path.strip("/").split("/")[0].replace(".", "_"), self.on_missing)()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            site.active -= 1

    def reply(self, code: int = 200, body: bytes = BODY, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent_bytes += len(body)

    def on_robots_txt(self) -> None:
        self.reply(body=self.server.robots.encode())

    def on_missing(self) -> None:
        self.reply(404, b"")

    def on_good(self) -> None:
        self.reply()

    on_private = on_good

    def on_tagged(self) -> None:
        if self.headers["If-None-Match"] == ETAG:
            self.reply(304, b"", ETag=ETAG)
        else:
            self.reply(ETag=ETAG, Last_Modified="Mon, 05 Jan 2026 10:00:00 GMT")

    def on_slow(self) -> None:
        time.sleep(2)
        self.reply()

    def on_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b"\0" * 10)
            self.wfile.flush()
            time.sleep(0.1)

    def on_cut(self) -> None:
        """The first answer breaks off half-way; a range request gets the rest."""
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if asked and self.headers["If-Range"] == ETAG:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.reply(206, BODY[start:], ETag=ETAG, Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        else:
            self.reply(body=BODY[:50000], length=len(BODY), ETag=ETAG)
            self.close_connection = True

    def on_cutalways(self) -> None:
        self.reply(body=BODY[:50000], length=len(BODY))
        self.close_connection = True

    def on_circle(self) -> None:
        self.reply(302, b"", Location="/circle")

    def on_hop(self) -> None:
        self.reply(302, b"", Location="/good")

    def on_inward(self) -> None:
        self.reply(302, b"", Location=f"http://localhost:{self.server.server_port}/good")

    def on_file(self) -> None:
        self.reply(302, b"", Location="file:///etc/passwd")

    def on_announced(self) -> None:
        self.reply(body=b"", length=10_000_000_000)

    def on_endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + b"\0" * 65536 + b"\r\n")

    def on_reset(self) -> None:
        linger = b"\1\0\0\0\0\0\0\0"
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def on_flaky(self) -> None:
        self.reply(503, b"") if self.server.hits["/flaky"] < 3 else self.reply()

    def on_busy(self) -> None:
        self.reply(429, b"", Retry_After="1") if self.server.hits["/busy"] < 2 else self.reply()

    def on_always429(self) -> None:
        self.reply(429, b"", Retry_After="0")

    def on_badredirect(self) -> None:
        self.reply(302, b"", Location="http://host:99999/")

    def on_superscript(self) -> None:
        self.reply(429, b"", Retry_After="\u00b2")

    def on_badrange(self) -> None:
        self.reply(206, BODY[2:], Content_Range="bytes \u00b2-5/10")

    def on_html(self) -> None:
        self.reply(body=b"<!DOCTYPE html><html>not a film</html>" + b" " * 600, Content_Type="video/mp4")

    def on_empty(self) -> None:
        self.reply(body=b"")

    def on_noai(self) -> None:
        self.reply(X_Robots_Tag="noindex, noai")

    def on_forbidden(self) -> None:
        self.reply(403, b"")

    def on_pages(self) -> None:
        links = "".join(f'<a href="/pages/{self.path}/{n}">x</a>' for n in range(2))
        body = f"<title>T {self.path}</title><video src='/good/{self.path}.mp4'></video>{links}"
        self.reply(body=body.encode(), Content_Type="text/html")
