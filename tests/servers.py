"""Servers on the loopback interface that misbehave on demand: files over HTTP, S3 behind a faulty line, a small Hub."""

import contextlib
import datetime
import http.client
import http.server
import json
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

__all__ = ["Answer", "Fault", "FaultyServer", "Request", "fake_hub", "faulty_s3"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without its query
    target: str  # as it was sent
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def start(self) -> int:
        """First byte that is asked for."""
        found = re.match(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(found[1]) if found else 0


@dataclass
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the answers to `times` requests for a file (None: to all of them)."""

    times: int | None = None
    status: int | None = None  # answer with this status
    reset: bool = False  # tear the connection down without an answer
    cut: int | None = None  # tear it down after this many bytes of the body
    stall: float = 0.0  # seconds without a byte, in the middle of the body
    drip: tuple[int, float] | None = None  # (bytes, seconds): that many bytes, that long a pause, and so on
    wrong: bool = False  # flip a bit
    short: int = 0  # leave out this many bytes at the end, as if the file had never had them
    endless: bool = False  # go on after the end of the file, which is announced as 1 TB long
    no_ranges: bool = False  # send the whole file whatever was asked for
    redirect: str | None = None  # send to this URL instead
    chunked: bool = False  # do not say how long the body is


class FaultyServer:
    """HTTP/1.1 with ranges over what `content` answers (the files of a folder), with a deque of `faults` per path."""

    def __init__(self, content: Path | Callable[[Request], Answer], *, tls: Path | None = None) -> None:
        """`tls` is a folder for the certificate of `localhost`, and for that of its `authority.pem`."""
        self._tls = tls
        self.content = content if callable(content) else lambda request: _file(content, request)
        self.faults: dict[str, Fault] = {}
        self.requests: deque[Request] = deque()
        self.sent: dict[str, int] = {}  # bytes of bodies, by path
        self.most_at_once = 0
        self.gate: threading.Barrier | None = None  # where GET requests wait for each other
        self._served: dict[str, int] = {}
        self.at_once = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.faulty = self  # type: ignore[attr-defined]
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(_certificate(self._tls))
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https://localhost' if self._tls else 'http://127.0.0.1'}:{self._server.server_address[1]}"

    def forget(self) -> None:
        """Begin to count, and to fail, anew."""
        with self._lock:
            self.faults, self.sent, self._served, self.most_at_once = {}, {}, {}, 0
            self.requests.clear()

    def asked(self, suffix: str = "", method: str = "GET") -> list[Request]:
        return [request for request in list(self.requests) if request.path.endswith(suffix) and request.method == method]

    def fault(self, path: str) -> Fault:
        """What goes wrong with this request; the longest key that ends the path decides, and "" is for all."""
        with self._lock:
            for key in sorted(self.faults, key=len, reverse=True):
                if path.endswith(key):
                    count = self._served[key] = self._served.get(key, 0) + 1
                    found = self.faults[key]
                    return found if found.times is None or count <= found.times else Fault()
        return Fault()

    @contextlib.contextmanager
    def counted(self, request: Request) -> Iterator[None]:
        with self._lock:
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._lock:
                self.at_once -= 1

    def note(self, path: str, count: int) -> None:
        with self._lock:
            self.sent[path] = self.sent.get(path, 0) + count


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        return

    def _handle(self) -> None:
        server: FaultyServer = self.server.faulty  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, path, self.path, headers, body)
        with server.counted(request), contextlib.suppress(ConnectionError):
            if server.gate and self.command == "GET":
                server.gate.wait()
            self._answer(server, request, server.fault(path))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815  # names that http.server looks for

    def _answer(self, server: FaultyServer, request: Request, fault: Fault) -> None:
        if fault.reset:
            self._tear_down()
            return
        if fault.redirect or fault.status:
            status = fault.status or 302
            answer = Answer(status, {"location": fault.redirect} if fault.redirect else {}, b"no\n")
        else:
            if fault.no_ranges:
                headers = {name: value for name, value in request.headers.items() if name != "range"}
                request = Request(request.method, request.path, request.target, headers, request.body)
            answer = server.content(request)
        body, length = answer.body, len(answer.body)
        if fault.wrong and body:
            body = body[:-1] + bytes([body[-1] ^ 4])
        if fault.short:
            body = body[: -fault.short]
            length = len(body)
        if fault.endless:
            length = 10**12
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if not (fault.endless and name.lower() == "content-length"):
                self.send_header(name, value)
        if fault.chunked:
            self.send_header("transfer-encoding", "chunked")
        elif "content-length" not in {name.lower() for name in answer.headers} or fault.endless:
            self.send_header("content-length", str(length))
        self.end_headers()
        if request.method == "HEAD":
            return
        if fault.chunked:
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        for piece in self._pieces(body, fault):
            self.wfile.write(piece)
            server.note(request.path, len(piece))
        if fault.cut is not None and fault.cut < length:
            self._tear_down()

    def _pieces(self, body: bytes, fault: Fault) -> Iterator[bytes]:
        if fault.cut is not None:
            body = body[: fault.cut]
        if fault.stall:
            yield body[: len(body) // 2]
            time.sleep(fault.stall)
            body = body[len(body) // 2 :]
        step, pause = fault.drip or (1 << 16, 0.0)
        for start in range(0, len(body), step):
            yield body[start : start + step]
            time.sleep(pause)
        while fault.endless:
            yield bytes(1 << 16)

    def _tear_down(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        # What was sent arrives, and then the line is dead.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


def _file(root: Path, request: Request) -> Answer:
    file = root / request.path.lstrip("/")
    if not file.is_file():
        return Answer(404)
    return ranged(file.read_bytes(), request)


def ranged(data: bytes, request: Request) -> Answer:
    """`data`, or the part of it that is asked for."""
    if "range" not in request.headers:
        return _measured(Answer(200, {"accept-ranges": "bytes"}, data), request)
    if request.start >= len(data):
        return Answer(416, {"content-range": f"bytes */{len(data)}"})
    found = re.match(r"bytes=\d+-(\d+)", request.headers["range"])
    stop = min(int(found[1]) + 1 if found else len(data), len(data))
    headers = {"content-range": f"bytes {request.start}-{stop - 1}/{len(data)}"}
    return _measured(Answer(206, headers, data[request.start : stop]), request)


def _measured(answer: Answer, request: Request) -> Answer:
    if request.method == "HEAD":
        answer.headers["content-length"] = str(len(answer.body))
        answer.body = b""
    return answer


@contextlib.contextmanager
def faulty_s3() -> Iterator[FaultyServer]:
    """moto's S3 behind a server that can be told to fail."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()

    def forward(request: Request) -> Answer:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        try:
            headers = {name: value for name, value in request.headers.items() if name not in {"connection", "content-length"}}
            connection.request(request.method, request.target, request.body or None, headers)
            reply = connection.getresponse()
            body = reply.read()
            kept = {n: v for n, v in reply.getheaders() if n.lower() not in {"connection", "transfer-encoding", "date", "server"}}
            if request.method != "HEAD":
                kept = {n: v for n, v in kept.items() if n.lower() != "content-length"}
            return Answer(reply.status, kept, body)
        finally:
            connection.close()

    try:
        with FaultyServer(forward) as server:
            yield server
    finally:
        moto.stop()


def fake_hub(files: Mapping[str, Mapping[str, bytes]], branches: Mapping[str, str], token: str | None = None) -> Any:
    """What a Hub answers for the dataset `team/logits`: `files` by commit and name, `branches` by name.

    Files come from another host than the one that is asked, as on the real one.
    """

    def content(request: Request) -> Answer:
        if found := re.fullmatch(r"/api/datasets/team/logits/revision/(.+)", request.path):
            if token and request.headers.get("authorization") != f"Bearer {token}":
                return Answer(401, {"x-error-code": "RepoNotFound"})
            commit = branches.get(found[1], found[1])
            if commit not in files:
                return Answer(404, {"x-error-code": "RevisionNotFound"})
            return _json({"id": "team/logits", "sha": commit, "siblings": []})
        if found := re.fullmatch(r"/api/datasets/team/logits/tree/([0-9a-f]{40})(?:/(.+))?", request.path):
            below = found[2] or ""
            names = [name for name in files[found[1]] if name.startswith(below)]
            return _json([{"type": "file", "path": n, "size": len(files[found[1]][n]), "oid": "0" * 40} for n in names])
        if found := re.fullmatch(r"/datasets/team/logits/resolve/([0-9a-f]{40})/(.+)", request.path):
            if token and request.headers.get("authorization") != f"Bearer {token}":
                return Answer(401)
            port = request.headers["host"].partition(":")[2]
            return Answer(302, {"location": f"http://localhost:{port}/cdn/{found[1]}/{found[2]}"})
        if found := re.fullmatch(r"/cdn/([0-9a-f]{40})/(.+)", request.path):
            data = files.get(found[1], {}).get(found[2])
            return Answer(404) if data is None else ranged(data, request)
        return Answer(404, {"x-error-code": "RepoNotFound"})

    return content


def _certificate(folder: Path) -> Path:
    """Key and certificate of `localhost`, issued by `authority.pem` beside it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    now, issuer = datetime.datetime.now(datetime.UTC), generate_private_key(SECP256R1())

    def certificate(name: str, key: Any, authority: bool) -> bytes:
        built = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        )
        return bytes(built.sign(issuer, hashes.SHA256()).public_bytes(Encoding.PEM))

    own = generate_private_key(SECP256R1())
    secret = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "authority.pem").write_bytes(certificate("authority", issuer, True))
    (folder / "server.pem").write_bytes(secret + certificate("localhost", own, False))
    return folder / "server.pem"


def _json(value: object) -> Answer:
    return Answer(200, {"content-type": "application/json"}, json.dumps(value).encode())
