"""Server of the search page. It accepts local requests only, and serves no files by path."""

import errno
import json
import os
import re
from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pml_tacl.serve._searcher import RunSearcher
from pml_tacl.utils.errors import InputError

MAX_UPLOAD = 32 * 2**20  # bytes
_MOST = 200  # images in one response
_SECONDS = 30.0  # timeout of an idle connection
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class SearchServer(ThreadingHTTPServer):
    """HTTP server of a run's search page on 127.0.0.1.

    Clients request images by row number in the index, never by path. Requests with a Host header
    other than this machine, and requests from pages of other sites, get status 403.

    Args:
        searcher: searcher of the run.
        port: port from 0 to 65535; 0 for any free port.

    Attributes:
        url: URL of the page.

    Raises:
        InputError: if the port is in use, or not allowed.

    Example:
        >>> server = SearchServer(searcher, port=0)  # doctest: +SKIP
        >>> server.serve_forever()  # doctest: +SKIP
    """

    daemon_threads = True
    # On Windows this option would let two servers share a port.
    allow_reuse_address = os.name != "nt"

    def __init__(self, searcher: RunSearcher, port: int = 8765) -> None:
        self.searcher = searcher
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is in use" if error.errno == errno.EADDRINUSE else "is not allowed"
            raise InputError(
                f"port={port} {why}: give another port, or 0 for any free port"
            ) from error
        self.port = int(self.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        names = ("127.0.0.1", "localhost", "[::1]")
        self.hosts = {f"{name}:{self.port}" for name in names} | (
            set(names) if self.port == 80 else set()
        )


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "pml-tacl", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *_: Any) -> None:
        """Do not log requests, for privacy."""

    def _answer(self, make: Callable[[str, dict[str, str]], tuple[str, bytes]]) -> None:
        try:
            self._check_origin()
            asked = urlsplit(self.path)
            fields = {name: values[-1] for name, values in parse_qs(asked.query).items()}
            kind, content = make(asked.path, fields)
        except _Refused as refused:
            self._refuse(refused.status, str(refused))
        except LookupError as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error.args[0]))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as error:
            self._refuse(HTTPStatus.NOT_FOUND, f"the image cannot be read: {error}")
        else:
            self._send(HTTPStatus.OK, kind, content)

    def _check_origin(self) -> None:
        """Refuse requests from other sites, even if their host name resolves to this machine."""
        hosts = self.server.hosts
        if self.headers.get("Host", "").lower() not in hosts:
            raise _Refused(HTTPStatus.FORBIDDEN, f"open {self.server.url}")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() not in {f"http://{host}" for host in hosts}:
            raise _Refused(HTTPStatus.FORBIDDEN, "request from another site")
        if self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            top = self.headers.get("Sec-Fetch-Mode") == "navigate"  # the user followed a link
            if not (top and self.path == "/"):
                raise _Refused(HTTPStatus.FORBIDDEN, "request from another site")

    def _get(self, path: str, fields: dict[str, str]) -> tuple[str, bytes]:
        searcher = self.server.searcher
        if path == "/":
            return _TYPES["html"], _page(searcher)
        if path in ("/style.css", "/script.js"):
            return _TYPES[path.rpartition(".")[2]], _file(path[1:])
        if found := re.fullmatch(r"/(thumbnail|image|attention)/(\d{1,12})", path, re.ASCII):
            return "image/webp", searcher.drawn(found[1], int(found[2]))
        if path == "/api/images":
            count = _number(fields, "count", 48)
            return _json(searcher.sample(count, _seed(fields), fields.get("text", "")))
        if path == "/api/search":
            return _json(searcher.neighbours(_seed(fields, "row"), _number(fields, "k", 24)))
        raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self, path: str, fields: dict[str, str]) -> tuple[str, bytes]:
        if path != "/api/search":
            raise _Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        k = _number(fields, "k", 24)
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the size of the image is missing")
        if int(length) > MAX_UPLOAD:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the image has {int(length) / 2**20:.0f} MB, but at most {MAX_UPLOAD >> 20} MB "
                "are allowed",
            )
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise ConnectionError("the upload was interrupted")
        try:
            return _json(self.server.searcher.neighbours_of(content, k))
        except OSError as error:
            raise _Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"this file cannot be read: {error}"
            ) from error

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._send(status, "application/json", json.dumps({"error": text}).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        text = "" if kind.startswith("image/") else "; charset=utf-8"
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind + text)
        self.send_header("Content-Length", str(len(content)))
        kept = status is HTTPStatus.OK and not text
        self.send_header("Cache-Control", "private, max-age=600" if kept else "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        try:
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except (ConnectionError, TimeoutError):  # the browser closed the connection
            self.close_connection = True


def _number(fields: dict[str, str], name: str, usual: int) -> int:
    text = fields.get(name, str(usual))
    if not (text.isascii() and text.isdecimal() and 1 <= len(text) <= 6 and int(text) > 0):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{name} must be a number of at least 1")
    return min(int(text), _MOST)


def _seed(fields: dict[str, str], name: str = "seed") -> int:
    text = fields.get(name, "" if name == "row" else "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        raise _Refused(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number")
    return int(text)


def _json(content: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(content).encode()


def _page(searcher: RunSearcher) -> bytes:
    parts = {
        "NAME": escape(searcher.name),
        "COUNT": f"{len(searcher.index):,}".replace(",", "\u202f"),
        "LIMIT": str(MAX_UPLOAD),
    }
    text = _file("page.html").decode()
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], text).encode()


def _file(name: str) -> bytes:
    return files("pml_tacl.serve").joinpath(name).read_bytes()
