"""A Hub of our own on 127.0.0.1: repositories from memory, every request remembered."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c0ffee" * 6 + "cafe"


class Hub:
    """Repositories as {"models/OWNER/NAME" or "datasets/OWNER/NAME": {path: bytes}}; `sizes` lies about some."""

    def __init__(self, repositories, sizes=None):
        self.repositories, self.sizes = repositories, sizes or {}
        self.requests: list[str] = []
        self.gated: set[str] = set()

    def files_sent(self):
        return {
            url.split(f"/resolve/{COMMIT}/")[1] for url in self.requests if url.startswith("GET") and "resolve" in url
        }

    @contextmanager
    def serving(self):
        """Its endpoint, for HF_ENDPOINT."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def log_message(self, *_):
        pass

    def _answer(self, body):
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        api = path.startswith("/api/")
        place = path.removeprefix("/api").lstrip("/")
        place = place if place.startswith(("models/", "datasets/")) else f"models/{place}"
        name, what = "/".join(place.split("/")[:3]), place.split("/")[3:]
        files = self.hub.repositories.get(name)
        if files is None:
            return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated:
            return self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if api and what[:1] == ["tree"]:
            return self._send(200, json.dumps([self._entry(p, data) for p, data in files.items()]).encode(), body)
        if api:
            if what[1:] not in ([], ["main"], [COMMIT]):
                return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
            return self._send(200, json.dumps({"id": name.split("/", 1)[1], "sha": COMMIT}).encode(), body)
        data = files["/".join(what[2:])]
        tag = hashlib.sha256(data).hexdigest()
        size = {"Content-Length": str(self.hub.sizes[what[-1]])} if what[-1] in self.hub.sizes and not body else {}
        return self._send(200, data, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, **size})

    def _entry(self, path, data):
        size = self.hub.sizes.get(path, len(data))
        return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(data).hexdigest()}

    def _send(self, status, data, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
