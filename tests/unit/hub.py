"""A stand-in for the Hugging Face hub: the few calls of its HTTP interface that an upload makes.

It keeps what arrives, answers with a status of the test's choosing, and never asks who the caller
is beyond writing down the Authorization header.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """``with Hub() as hub``: listens at ``hub.url``. ``files``: what the commits brought.

    ``fails``: path fragment -> (status, message) to answer there. ``large``: names that go by LFS.
    """

    def __init__(self, fails=None):
        self.fails = fails or {}
        self.calls, self.tokens, self.created, self.commits = [], set(), [], []
        self.blobs, self.files = {}, {}

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, path, body):
        """(status, object) for a POST."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            sent = json.loads(body)["files"]
            kinds = [
                (f["path"], "lfs" if f["path"].endswith("tensors") else "regular") for f in sent
            ]
            told = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in kinds]
            return 200, {"files": told}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": self._places(json.loads(body)["objects"])}
        if "/commit/" in path:
            return 200, self._commit(path, body)
        if "/branch/" in path:
            return 201, {}
        return 404, {"error": f"the stand-in knows no {path}"}

    def _places(self, objects):
        place = {"upload": {"href": ""}}
        return [
            {**o, "actions": {**place, "upload": {"href": f"{self.url}/blob/{o['oid']}"}}}
            for o in objects
        ]

    def _commit(self, path, body):
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append({"path": path, **lines[0]["value"]})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
            else:
                self.files[value["path"]] = base64.b64decode(value["content"])
        repo, oid = path.removeprefix("/api/models/").partition("/commit/")[0], "1" * 40
        address = f"{self.url}/{repo}/commit/{oid}"
        return {"commitUrl": address, "commitOid": oid, "pullRequestUrl": None}


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            return

        def _body(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _send(self, status, content):
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self):
            body, path = self._body(), self.path.partition("?")[0]
            hub.calls.append(path)
            hub.tokens.add(self.headers.get("Authorization"))
            for fragment, (status, message) in hub.fails.items():
                if fragment in path:
                    return self._send(status, {"error": message})
            return self._send(*hub.answer(path, body))

        def do_PUT(self):
            body = self._body()
            digest = hashlib.sha256(body).hexdigest()
            assert self.path == f"/blob/{digest}"
            assert self.headers.get("Authorization") is None  # the blob's own address is the right
            hub.blobs[digest] = body
            self._send(200, {})

    return Handler
