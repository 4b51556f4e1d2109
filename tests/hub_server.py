"""A small server of the Hub's API, for the client that users have: repositories in memory, LFS, commits, files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_good"


class HubServer(ThreadingHTTPServer):
    """
    The server; a context manager that serves while it is open.

    Args:
        refuse (`str`, *optional*): what fails with status 500: `"lfs"` (large files), `"commit"` or `"create"`.
        slow (`float`): seconds that every upload of a large file takes longer.
        large (`int`): bytes from which a file is large.

    Attributes:
        repos (`dict`): contents by path, of each repository.
        commits (`list`): `(repository, summary)` of each commit.
    """

    daemon_threads = True

    def __init__(self, refuse=None, slow=0.0, large=1000):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.slow, self.large = refuse, slow, large
        self.repos, self.commits, self.objects = {}, [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def sha(self, repo):
        told = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo].items())
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, status, body=b"", kind="application/json", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, text, code=""):
        self.answer(status, {"error": text}, X_Error_Message=text, **({"X_Error_Code": code} if code else {}))

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def allowed(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            if not self.allowed:
                return self.error(401, "Invalid credentials in Authorization header")
            return self.answer(200, {"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {}})
        if path.startswith("/api/models/"):
            return self.model(path.removeprefix("/api/models/"))
        repo, found, file = path.removeprefix("/").partition("/resolve/")
        return self.file(repo, file.partition("/")[2]) if found else self.error(404, "no such page")

    do_HEAD = do_GET

    def model(self, path):
        repo, _, rest = "/".join(path.split("/")[:2]), "", path.split("/")[2:]
        files = self.server.repos.get(repo)
        if files is None:
            return self.error(404, "Repository not found", "RepoNotFound")
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
                if name.startswith(under)
            ]
            return self.answer(200, tree)
        siblings = [{"rfilename": name} for name in files]
        return self.answer(200, {"id": repo, "modelId": repo, "sha": self.server.sha(repo), "siblings": siblings})

    def file(self, repo, name):
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            known = repo in self.server.repos
            return self.error(404, "Entry not found", "EntryNotFound" if known else "RepoNotFound")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": self.server.sha(repo)}
        headers |= {"Accept_Ranges": "bytes"}
        asked = self.headers.get("Range")
        if self.command == "HEAD" or asked is None:
            return self.answer(200, data, "application/octet-stream", **headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(data) - 1)
        part = data[start : end + 1]
        return self.answer(
            206, part, "application/octet-stream", Content_Range=f"bytes {start}-{end}/{len(data)}", **headers
        )

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if not self.allowed:
            return self.error(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        parts = path.removeprefix("/api/models/").split("/")
        repo, action = "/".join(parts[:2]), parts[2]
        if action == "preupload":
            files = json.loads(body)["files"]
            large = [file["size"] >= self.server.large for file in files]
            return self.answer(
                200,
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "lfs" if big else "regular", "shouldIgnore": False}
                        for file, big in zip(files, large, strict=True)
                    ]
                },
            )
        return self.commit(repo, body) if action == "commit" else self.error(404, "no such page")

    def create(self, asked):
        if self.server.refuse == "create":
            return self.error(500, "the Hub is having a bad day")
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}
        if repo in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", **answer})
        self.server.repos[repo] = {}
        return self.answer(200, answer)

    def batch(self, asked):
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                **(
                    {}
                    if one["oid"] in self.server.objects
                    else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}", "header": {}}}}
                ),
            }
            for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def do_PUT(self):
        oid, data = self.path.rpartition("/")[2], self.body()
        time.sleep(self.server.slow)
        if self.server.refuse == "lfs":
            return self.error(403, "no room for large files")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.error(400, "not the content that was announced")
        self.server.objects[oid] = data
        return self.answer(200)

    def commit(self, repo, body):
        if self.server.refuse == "commit":
            return self.error(403, "this repository is read-only")
        files, summary = self.server.repos[repo], ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.server.commits.append((repo, summary))
        sha = self.server.sha(repo)
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})
