"""One page over HTTP: the coordinator's figures for Prometheus.

Plain HTTP without authentication, on an address of the operator's choice; it takes no input. The
coordinator's thread writes the text, the page's thread hands it out.
"""

from __future__ import annotations

import threading

from decotrain.control.transport import split_address
from decotrain.errors import ConfigError

REQUEST_S = 5.0


class MetricsPage:
    """Bound when constructed."""

    def __init__(self, listen: str) -> None:
        from http.server import BaseHTTPRequestHandler, HTTPServer  # seldom needed, slow to load

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

        try:
            self.server = HTTPServer(split_address(listen), Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics at {listen}: {error.strerror}; choose another address"
            ) from None
        self.address = f"{listen.rpartition(':')[0]}:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, name="metrics", daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
