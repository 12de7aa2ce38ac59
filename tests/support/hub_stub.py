"""A Hub of one process: the HTTP calls that huggingface_hub makes to create, upload, commit and download.

    with HubStub() as hub: ...    # clients need hub.environment

It keeps every commit whole. `tamper` may change or drop (`None`) a file of a commit, as a control.
"""

import hashlib
import json
import socket
import threading
from base64 import b64decode
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".png")


@cache
def port() -> int:
    """Return the port of all stubs of this process: libraries read the address of the Hub when they are imported."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class HubStub:
    """Repositories of models in memory, behind a local address."""

    def __init__(self, tamper=lambda path, content: content):
        self.tamper = tamper
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large_files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", port()), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": "hf_stub", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; a new repository has one without any."""
        commits = self.repositories.get(name) or [("0" * 40, {})]
        return next((commit for commit in reversed(commits) if revision in ("main", commit[0])), None)

    def commit(self, name: str, lines: list[dict]) -> str:
        """Apply the operations of a commit and return its hash."""
        files = dict(self.files(name)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        changed = {path: self.tamper(path, content) for path, content in files.items()}
        files = {path: content for path, content in changed.items() if content is not None}
        sha = hashlib.sha1(f"{name} {len(self.repositories[name])}".encode()).hexdigest()
        self.repositories[name].append((sha, files))
        return sha


def _handler(hub: HubStub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status: int, content: bytes | dict, **headers):
            if isinstance(content, dict):
                content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
            self.send_response(status)
            # the next stub has the same address: a connection that stays open would go on to ask this one
            for name, value in {"Content-Length": str(len(content)), "Connection": "close", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, code: str):
            self.reply(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def route(self):
            self.path = unquote(urlsplit(self.path).path)
            hub.calls.append(f"{self.command} {self.path}")
            return self.path.strip("/").split("/")

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            parts = self.route()
            if parts[:2] == ["api", "whoami-v2"]:
                return self.reply(200, {"name": "tester", "type": "user", "orgs": []})
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if name not in hub.repositories:
                return self.refuse("RepoNotFound")
            revision = parts[5 if parts[0] == "api" else 3] if len(parts) > (5 if parts[0] == "api" else 3) else "main"
            found = hub.files(name, revision)
            if found is None:
                return self.refuse("RevisionNotFound")
            sha, files = found
            if parts[0] == "api":
                return self.about(name, sha, files, parts[4:])
            path = "/".join(parts[4:])
            if path not in files:
                return self.refuse("EntryNotFound")
            etag = hashlib.sha256(files[path]).hexdigest()
            self.reply(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges="none")

        def about(self, name: str, sha: str, files: dict[str, bytes], rest: list[str]):
            if rest[:1] == ["tree"]:
                return self.refuse("EntryNotFound")
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.reply(
                200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
            )

        def do_PUT(self):
            oid = self.route()[-1]
            content = self.body()
            if hashlib.sha256(content).hexdigest() != oid:
                return self.reply(400, {"error": "the content is not that of its name"})
            hub.large_files[oid] = content
            self.reply(200, b"")

        def do_POST(self):
            parts, content = self.route(), self.body()
            if parts[-1] == "create":
                asked = json.loads(content)
                name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
                status = 409 if name in hub.repositories else 200
                hub.repositories.setdefault(name, [])
                return self.reply(status, {"url": f"{hub.url}/{name}", "name": name, "id": name})
            if parts[-1] == "validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if parts[-1] == "batch":
                return self.reply(
                    200, {"transfer": "basic", "objects": [self.upload(o) for o in json.loads(content)["objects"]]}
                )
            if parts[-1] == "verify":
                return self.reply(200, {})
            name = "/".join(parts[2:4])
            if name not in hub.repositories:
                return self.refuse("RepoNotFound")
            if parts[4] == "preupload":
                return self.reply(200, {"files": [self.mode(file) for file in json.loads(content)["files"]]})
            sha = hub.commit(name, [json.loads(line) for line in content.splitlines()])
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})

        def mode(self, file: dict) -> dict:
            large = file["path"].endswith(LFS_SUFFIXES)
            return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        def upload(self, entry: dict) -> dict:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{entry['oid']}"},
                "verify": {"href": f"{hub.url}/lfs/verify"},
            }
            return {**entry, "actions": actions}

    return Handler
