"""A server for the page on 127.0.0.1, with the headers that let it ask nobody and use threads."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from edgelab.export import ExportError

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
}

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    # 'webrtc' and 'frame-ancestors' are not for a <meta>; a notebook on this machine may show the page in a frame
    "content-security-policy": f"{POLICY}; webrtc 'block'; frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
}


class _Handler(SimpleHTTPRequestHandler):
    """Files below one folder with their types and the headers that isolate the page; GET and HEAD, no listings."""

    extensions_map: Mapping[str, str] = TYPES | {"": "application/octet-stream"}
    protocol_version = "HTTP/1.1"
    headers_on = True

    def send_head(self):
        host = self.headers.get("host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # another name that leads here is someone else's page asking
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        if self.path.split("?")[0].endswith("/") and self.path.split("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def list_directory(self, path):
        self.send_error(HTTPStatus.NOT_FOUND)

    def end_headers(self):
        self.send_header("cache-control", "no-cache")
        for name, value in HEADERS.items() if self.headers_on else ():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args):
        pass


def server(folder: str | Path, port: int = 0, *, headers: bool = True) -> ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1 that does not run yet: `serve_forever()`, `shutdown()`, `server_close()` are its own.

    `port=0` takes a free one, found in `.server_port`. `headers=False` is a plain host that knows none of the page's headers.
    Raises ExportError when `folder` holds no page, or when the port is taken.
    """
    folder = Path(folder).resolve()
    if not (folder / "web.json").is_file():
        raise ExportError(f"{folder} holds no page of edgelab (there is no web.json); write one with export first")
    handler = type("Handler", (_Handler,), {"headers_on": headers})
    try:
        made = ThreadingHTTPServer(("127.0.0.1", port), lambda *a, **k: handler(*a, directory=str(folder), **k))
    except OSError as e:
        raise ExportError(f"port {port} of 127.0.0.1 cannot be had ({e.strerror}); choose another, or 0 for a free one") from e
    made.daemon_threads = True
    return made


@contextmanager
def serving(folder: str | Path, port: int = 0, *, headers: bool = True) -> Iterator[str]:
    """The address of the page, served from a thread for as long as the block lasts."""
    made = server(folder, port, headers=headers)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/"
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def serve(folder: str | Path, port: int = 8765) -> None:
    """Serves the page on 127.0.0.1 until it is interrupted (Ctrl-C)."""
    with serving(folder, port) as address:
        print(f"{address} (this machine only; Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
