"""TensorFlow Serving's REST API over a small HTTP/1.1 server."""

import collections
import contextlib
import json
import logging
import math
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler

from google.protobuf import json_format

from ..placing import MAX_VERSION
from . import predict_json, tensors
from .status import HTTP_STATUS, Code, ServingError, invalid

LOG = logging.getLogger("kzoo.serving")

_MODEL = r"/([^/:]+)"
_VERSION = r"(?:/(?i:versions)/([0-9]+)|/(?i:labels)/([^/:]+))?"
POST_PATH = re.compile(rf"(?i:/v1/models){_MODEL}{_VERSION}:(classify|regress|predict)")
GET_PATH = re.compile(rf"(?i:/v1/models)(?:{_MODEL})?{_VERSION}(?:/(?i:(metadata)))?")
API_PATH = re.compile(r"(?i:/v1/).*", re.DOTALL)

IDLE_SECONDS = 60  # between two requests
TRANSFER_SECONDS = 120  # for a request to come, and for its answer to go
LINGER_SECONDS = 2
MAX_CONNECTIONS = 256
SMALL_BODY_BYTES = 1 << 20
METHODS = {
    "classify": "tensorflow/serving/classify",
    "regress": "tensorflow/serving/regress",
}


class _TooLarge(ServingError):
    """TensorFlow Serving has no limit; HTTP's own status for this is 413."""

    def __init__(self, limit):
        message = f"Expected a request of at most {limit} bytes"
        super().__init__(Code.RESOURCE_EXHAUSTED, message)


class RestServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers REST requests, one thread a connection.

    When there are as many connections as may be, the one that was idle longest makes
    room for a new one. Connections that are too slow are cut.

    Args:
        core: The Server whose models it serves.
        host: The address to listen on.
        port: The port; 0 for a free one, then found in `port`.
        threads: How many requests are worked on at once.

    Raises:
        OSError: The address cannot be listened on.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, core, host, port, threads):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.core = core
        self.workers = threading.BoundedSemaphore(threads)
        # Of the bodies in memory, so many may be large.
        self.large_bodies = threading.BoundedSemaphore(threads)
        self.stopping = False
        self._connections = {}  # to (whether it is idle, when it will be cut)
        self._refused = collections.deque()  # (when to close it, connection)
        self._changed = threading.Condition()
        super().__init__((host, port), _Handler)
        self.port = self.server_address[1]
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.05,), name="kzoo-rest", daemon=True
        )

    def start(self):
        """Starts to accept connections."""
        self._thread.start()

    def stop(self, grace):
        """Stops: no new connection, and `grace` seconds for requests under way.

        Args:
            grace: Seconds; connections still busy then are cut.
        """
        self.stopping = True
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._close_refused(math.inf)
        # Ends idle ones; a busy one may still answer.
        self._hang_up(socket.SHUT_RD, self._which())
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, timeout=grace)
        self._hang_up(socket.SHUT_RDWR, self._which())

    def note(self, connection, seconds=math.inf, idle=False):
        """Notes what a connection does, and how long it may.

        Args:
            connection: Its socket.
            seconds: After so many it is cut.
            idle: Whether it may be closed to make room for another.
        """
        with self._changed:
            self._connections[connection] = idle, time.monotonic() + seconds

    def process_request(self, request, client_address):
        """Starts a connection's thread, or refuses it when there are too many."""
        if len(self._connections) >= MAX_CONNECTIONS:
            # The thread still answers a request that has just come, then it ends.
            for connection in self._which(lambda idle, _: idle)[:1]:
                self._hang_up(socket.SHUT_RD, [connection])
                self._forget(connection)
        if len(self._connections) >= MAX_CONNECTIONS:
            _refuse(request)
            self._refused.append((time.monotonic() + LINGER_SECONDS, request))
        else:
            self.note(request, IDLE_SECONDS, idle=True)
            super().process_request(request, client_address)

    def service_actions(self):
        """Cuts the connections whose time is over; the accepting loop calls it."""
        now = time.monotonic()
        self._hang_up(socket.SHUT_RDWR, self._which(lambda _, end: end < now))
        self._close_refused(now)

    def shutdown_request(self, request):
        """Closes a connection."""
        super().shutdown_request(request)
        self._forget(request)

    def handle_error(self, request, client_address):
        """Logs what a connection's thread raised; the server goes on."""
        if isinstance(sys.exception(), OSError):  # the client went away
            LOG.debug("connection from %s ended", client_address, exc_info=True)
        else:
            LOG.exception("connection from %s failed", client_address)

    def server_close(self):
        """Closes the listening socket; threads are waited for in `stop`."""
        self.socket.close()

    def _which(self, condition=lambda idle, end: True):
        """The connections of which (idle, end) fulfil a condition, by their end."""
        with self._changed:
            found = [
                (end, connection)
                for connection, (idle, end) in self._connections.items()
                if condition(idle, end)
            ]
        return [connection for _, connection in sorted(found, key=lambda pair: pair[0])]

    def _forget(self, connection):
        with self._changed:
            self._connections.pop(connection, None)
            self._changed.notify_all()

    def _close_refused(self, now):
        # Closed only now, for unread bytes of the client would cut off its answer.
        while self._refused and (
            self._refused[0][0] < now or len(self._refused) > MAX_CONNECTIONS
        ):
            super().shutdown_request(self._refused.popleft()[1])

    def _hang_up(self, how, connections):
        for connection in connections:
            try:
                connection.shutdown(how)
            except OSError:  # the client was first
                LOG.debug("a connection was already closed")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "kzoo"
    sys_version = ""
    # An answer is one write; waiting to fill a packet costs 40 ms.
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle_one_request(self):
        """Waits for a request and answers it."""
        self.server.note(self.connection, IDLE_SECONDS, idle=True)
        super().handle_one_request()

    def parse_request(self):
        """Reads a request's head; called when its first line is there."""
        self.server.note(self.connection, TRANSFER_SECONDS)
        return super().parse_request()

    def _serve(self):
        try:
            with self._room():
                body = self._body()
                self.server.note(self.connection)
                status, answer = self._computed(body)
        except ServingError as error:
            self._answer(*_error(error), close=True)
        else:
            self._answer(status, answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = _serve

    def _room(self):
        """What to hold as long as the body is in memory."""
        if self.headers.get("Transfer-Encoding") or self._length() > SMALL_BODY_BYTES:
            return self.server.large_bodies
        return contextlib.nullcontext()

    def _computed(self, body):
        """(status, answer) of a request, computed when it is its turn."""
        try:
            with self.server.workers:
                if self.headers.get("Content-Encoding", "").strip().lower() == "gzip":
                    body = _unzipped(body, self.server.core.max_request_bytes)
                return 200, self._route(body)
        except ServingError as error:
            return _error(error)
        except Exception as error:
            # A defect of this server must not end it.
            LOG.exception("%s %s failed", self.command, self.path)
            return _error(ServingError(Code.INTERNAL, type(error).__name__))

    def _route(self, body):
        """The answer to a request, as something for `json.dumps`."""
        core, path = self.server.core, self.path
        if re.match("https?://", path):
            path = urllib.parse.urlsplit(path).path
        path = path.partition("?")[0]
        if not API_PATH.fullmatch(path):
            raise ServingError(Code.NOT_FOUND, f"Not found: {path}")
        pattern = {"POST": POST_PATH, "GET": GET_PATH}.get(self.command)
        match = pattern and pattern.fullmatch(path)
        if not match:
            raise invalid(f"Malformed request: {self.command} {path}")
        name, version, label, what = match.groups()
        if name is None:
            raise invalid("Missing model name in request.")
        name, label = _unquoted(name), label and _unquoted(label)
        if version is not None:
            # Longer than any int64, and int() of it might take long.
            if len(version) > 19 or int(version) > MAX_VERSION:
                raise invalid(f"Failed to convert version: {version[:40]} to numeric.")
            version = int(version)
        if self.command == "GET":
            if what:
                return _metadata(core, name, version, label)
            return _status(core, name, version, label)
        if what == "predict":
            return _predict(core, name, version, label, body)
        return _classify(core, name, version, label, body, METHODS[what])

    def _body(self):
        """Reads the request's body, never more than the limit."""
        limit = self.server.core.max_request_bytes
        chunked = self.headers.get_all("Transfer-Encoding", [])
        length = self._length()
        if chunked:
            if self.headers.get("Content-Length") is not None:
                raise invalid("Expected one of Content-Length and Transfer-Encoding")
            if [value.strip().lower() for value in chunked] != ["chunked"]:
                raise ServingError(
                    Code.UNIMPLEMENTED, f"Transfer-Encoding: {chunked[0][:40]}"
                )
            body = self._chunks(limit)
        else:
            if length > limit:
                raise _TooLarge(limit)
            body = self.rfile.read(length)
            if len(body) < length:
                raise invalid(f"Expected {length} bytes. Received: {len(body)}")
        return body

    def _length(self):
        lengths = set(self.headers.get_all("Content-Length", ["0"]))
        text = lengths.pop()
        if lengths or not re.fullmatch("[0-9]{1,18}", text.strip(" \t")):
            raise invalid(f"Expected one Content-Length. Received: {text[:40]!r}")
        return int(text)

    def _chunks(self, limit):
        body = bytearray()
        while True:
            line = self.rfile.readline(1024)
            size = re.fullmatch(rb"([0-9a-fA-F]{1,15})[ \t]*(;[^\n]*)?\r?\n", line)
            if not size:
                raise invalid("Expected a chunk's size")
            size = int(size[1], 16)
            if len(body) + size > limit:
                raise _TooLarge(limit)
            if size == 0:
                break
            chunk = self.rfile.read(size)
            if len(chunk) < size or self.rfile.readline(3) not in (b"\r\n", b"\n"):
                raise invalid("Expected a whole chunk")
            body += chunk
        for _ in range(100):  # trailers mean nothing here
            if self.rfile.readline(65537) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise invalid("Expected fewer trailers")

    def handle_expect_100(self):
        """Asks for the body only when it will be read."""
        try:
            if self._length() > self.server.core.max_request_bytes:
                raise _TooLarge(self.server.core.max_request_bytes)
        except ServingError as error:
            self._answer(*_error(error), close=True)
            return False
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.wfile.flush()
        return True

    def _answer(self, status, answer, close=False):
        self.server.note(self.connection, TRANSFER_SECONDS)
        body = json.dumps(answer).encode()
        close = close or self.close_connection or self.server.stopping
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if close:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()
        if close:
            self.close_connection = True
        if close and not self.server.stopping:
            self._linger()

    def _linger(self):
        """Reads on for a moment: closing with unread bytes would cut off the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        end = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < end and self.connection.recv(1 << 16):
            pass

    def send_error(self, code, message=None, explain=None):
        """Answers what is not HTTP; called by the base class."""
        self.close_connection = True
        if not hasattr(self, "command"):
            self.command = None
        if self.request_version == "HTTP/0.9":  # or send_response writes no header
            self.request_version = "HTTP/1.0"
        self._answer(code, {"error": message or "Malformed request"}, close=True)

    def log_message(self, format, *args):
        """Logs a request."""
        LOG.debug("%s %s", self.client_address[0], format % args)


def _error(error):
    """(status, answer) of a ServingError."""
    status = 413 if isinstance(error, _TooLarge) else HTTP_STATUS[error.code]
    return status, {"error": error.message}


def _predict(core, name, version, label, body):
    document, infinities = tensors.parse(body)
    with core.lend(name, version, label) as (_, servable):
        inputs, signature_name, in_rows = predict_json.read(
            document, infinities, servable
        )
        outputs = servable.predict(inputs, signature_name, timeout=core.timeout)
    return predict_json.write(outputs, in_rows)


def _classify(core, name, version, label, body, method):
    document, _ = tensors.parse(body)
    with core.lend(name, version, label) as (_, servable):
        core.refuse_method(predict_json.signature(document, servable)[1], method)


def _status(core, name, version, label):
    return {
        "model_version_status": [
            {
                "version": str(number),
                "state": state.name,
                "status": {"error_code": code.name, "error_message": message},
            }
            for number, state, code, message in core.status(name, version, label)
        ]
    }


def _metadata(core, name, version, label):
    with core.lend(name, version, label) as (number, servable):
        signatures = {
            key: json_format.MessageToDict(
                signature,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for key, signature in sorted(servable.meta_graph.signature_def.items())
        }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": str(number)},
        "metadata": {"signature_def": {"signature_def": signatures}},
    }


def _unzipped(body, limit):
    inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        text = inflate.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(f"Expected gzip: {error}") from None
    if len(text) > limit:
        raise _TooLarge(limit)
    if not inflate.eof or inflate.unused_data:
        raise invalid("Expected one whole gzip member")
    return text


def _unquoted(text):
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise invalid(f"Failed to decode: {text[:100]}") from None


def _refuse(connection):
    """Answers a connection that is one too many, without waiting for it."""
    answer = b'{"error": "too many connections"}'
    connection.setblocking(False)
    try:
        connection.send(
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(answer), answer)
        )
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        LOG.debug("a refused connection was already closed")
