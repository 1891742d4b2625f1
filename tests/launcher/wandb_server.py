"""As much of a Weights & Biases server as its client needs, on this machine; it can drop every connection."""

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VIEWER = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the library's
        """Says nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.drops or self.server.drops_next:
            self.server.drops_next = max(0, self.server.drops_next - 1)
            self.close_connection = True
            self.connection.close()
            return
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        answer: dict[str, Any] = {}
        if "graphql" in self.path:
            answer = self._graphql(json.loads(body))
        elif "file_stream" in self.path:
            self.server.streams.append(json.loads(body))
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = _answer

    def _known(self, name: str | None) -> dict[str, Any] | None:
        """What it knows of a run that resumes."""
        lines = [json.dumps(row) for row in self.server.history]
        if not lines:
            return None
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return {"id": "b", "name": name, "displayName": "x", "tags": [], "wandbConfig": '{"t": 1}', **counts, **tails}

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, given = request["query"], request.get("variables") or {}
        project = {"name": given.get("project"), "entity": {"name": "me"}}
        if "upsertBucket" in query:
            self.server.ids.append(given["name"])
            bucket = {"id": "b", "name": given["name"], "displayName": "x", "historyLineCount": 0, "config": "{}"}
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": {"id": "p", **project, "bucket": self._known(given.get("name"))}}}
        if "NotifyScriptableRunAlert" in query:
            self.server.alerts.append(f"{given['severity']} {given['title']}: {given['text']}")
        if "viewer" in query:
            return {"data": {"viewer": _VIEWER, "serverInfo": {"cliVersionInfo": {}}}}
        return {"data": {}, "errors": [{"message": "this server does not know that"}]}


class Server(http.server.ThreadingHTTPServer):
    """What it was told: run ids, alerts, and the files that were streamed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.drops = False
        self.drops_next = 0
        """Connections that are dropped before it works again."""
        self.ids: list[str] = []
        self.alerts: list[str] = []
        self.streams: list[dict[str, Any]] = []

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row of every history that came."""
        return [
            json.loads(line)
            for stream in self.streams
            for line in stream.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        ]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A dropped connection is what was asked for."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server while the block runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
