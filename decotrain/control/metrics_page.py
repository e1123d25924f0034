"""One page over HTTP: the coordinator's figures for Prometheus.

Plain HTTP without authentication, on an address of the operator's choice; it takes no input. The
coordinator's thread writes the text; each request has a thread of its own, and both their number
and their time are bounded, so that nobody who is slow keeps Prometheus waiting.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress
from typing import Any

from decotrain.control.transport import split_address
from decotrain.errors import ConfigError

REQUEST_S = 5.0  # a request from its first byte to its last
REQUESTS_MAX = 16  # at once; then the oldest goes


class MetricsPage:
    """Bound when constructed."""

    def __init__(self, listen: str) -> None:
        from http.server import BaseHTTPRequestHandler  # seldom needed, slow to load

        self.text = ""
        page = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_S

            def do_GET(self) -> None:
                body = page.text.encode()
                known = self.path in ("/", "/metrics")
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body) if known else 0))
                self.end_headers()
                if known:
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        host, port = split_address(listen)
        try:
            self.server = _server(host, port, Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics at {listen}: {error.strerror}; choose another address"
            ) from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, name="metrics", daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _server(host: str, port: int, handler: Any) -> Any:
    """Listens at the address, of either kind."""
    from http.server import ThreadingHTTPServer

    family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]

    class Server(ThreadingHTTPServer):
        address_family = family
        daemon_threads = True

        def __init__(self) -> None:
            self.under_way: deque[socket.socket] = deque()
            super().__init__(place, handler)  # type: ignore[arg-type]

        def process_request(self, request: Any, client_address: Any) -> None:
            self.under_way.append(request)
            if len(self.under_way) > REQUESTS_MAX:
                _cut(self.under_way[0])
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            # The handler's own limit is one of each read: a byte now and then would go on for ever.
            timer = threading.Timer(REQUEST_S, _cut, [request])
            timer.daemon = True
            timer.start()
            try:
                super().process_request_thread(request, client_address)
            finally:
                timer.cancel()
                with suppress(ValueError):
                    self.under_way.remove(request)

        def handle_error(self, *_: object) -> None:
            pass  # whoever asked is gone, or was too slow

    return Server()


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)
