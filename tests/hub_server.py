"""A Hub on loopback: as much of its HTTP protocol as ``huggingface_hub`` uses for models, with faults on demand.

Repositories with branches, pull requests, commits, private and gated ones; preupload, LFS batch with basic and
multipart transfer, ndjson commits; resolve with ranges, large files behind a redirect to another origin. Not Xet.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

PART = 3_000_000  # bytes of one part of a multipart upload
LARGE = re.compile(r".*\.(safetensors|onnx|bin|pth|gguf|model)")


@dataclass
class Repo:
    """``branches`` and ``commits``: name to commit, and commit to files (name to bytes)."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(repr((content, len(self.commits))).encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.branches[branch] = files, message, oid
        return oid


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose "METHOD /path" matches."""

    match: str
    times: int = 1
    status: int | None = None  # answer this, with ``headers`` and ``body``
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": "a fault"})
    cut: int | None = None  # close the connection after so many bytes of the answer
    stall: int | None = None  # stop after so many bytes of the answer, or of the upload, until ``go`` is set
    go: threading.Event = field(default_factory=threading.Event)


@dataclass
class Seen:
    """A request that was answered, or is being answered. ``sent`` and ``received`` count body bytes."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None
    sent: int = 0
    received: int = 0
    done: bool = False


class HubServer:
    """``with HubServer() as hub``: ``hub.url`` is the endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {"hf_writerWRITERwriter": "user", "hf_readerREADERreader": "reader"}
        self.members: set[str] = set()  # who may read gated repositories
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Seen] = []

    def add(self, repo_id: str, files: dict[str, bytes], **fields: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(**fields)
        repo.commit("main", dict(files))
        return repo

    def count(self, match: str) -> int:
        return sum(bool(re.fullmatch(match, f"{seen.method} {seen.path}")) for seen in self.log)

    def __enter__(self) -> HubServer:
        model = "/api/models/{owner}/{name}"
        app = Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(model, self.info),
                Route(f"{model}/revision/{{rev:path}}", self.info),
                Route(f"{model}/tree/{{rev:path}}", self.tree),
                Route(f"{model}/branch/{{branch:path}}", self.branch, methods=["POST"]),
                Route(f"{model}/preupload/{{rev:path}}", self.preupload, methods=["POST"]),
                Route(f"{model}/commit/{{rev:path}}", self.commit, methods=["POST"]),
                Route("/{owner}/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
                Route("/{owner}/{name}/resolve/{rest:path}", self.resolve, methods=["GET", "HEAD"]),
                Route("/lfs/{oid}", self.put, methods=["PUT"]),
                Route("/lfs/{oid}/complete", self.complete, methods=["POST"]),
                Route("/lfs/{oid}/verify", self.verify, methods=["POST"]),
                Route("/lfs/{oid}/{part:int}", self.put, methods=["PUT"]),
                Route("/cdn/{oid}", self.cdn),
            ]
        )
        config = uvicorn.Config(self._with_faults(app), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url, self.other = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(5)

    def _with_faults(self, app: Callable[..., Any]) -> Callable[..., Any]:
        async def outer(scope: dict[str, Any], receive: Any, send: Any) -> None:
            headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
            seen = Seen(
                scope["method"], scope["path"], headers["host"], headers.get("authorization"), headers.get("range")
            )
            self.log.append(seen)
            what = f"{seen.method} {seen.path}"
            fault = next((f for f in self.faults if f.times > 0 and re.fullmatch(f.match, what)), None)
            if fault is not None:
                fault.times -= 1

            async def stalled(bytes_so_far: int) -> None:
                while fault is not None and fault.stall is not None and bytes_so_far >= fault.stall:
                    if fault.go.is_set():
                        return
                    await asyncio.sleep(0.02)

            async def count_in() -> Any:
                message = await receive()
                seen.received += len(message.get("body", b""))
                await stalled(seen.received if seen.received else -1)
                return message

            async def count_out(message: Any) -> None:
                body = message.get("body", b"")
                if fault is not None and fault.cut is not None and message["type"] == "http.response.body":
                    await send(message | {"body": body[: fault.cut], "more_body": True})
                    seen.sent += fault.cut
                    raise ConnectionResetError("cut on purpose")
                if fault is not None and fault.stall is not None and len(body) > fault.stall:
                    await send(message | {"body": body[: fault.stall], "more_body": True})
                    await stalled(fault.stall)
                    message, body = message | {"body": body[fault.stall :]}, body[fault.stall :]
                await send(message)
                seen.sent += len(body)

            if fault is not None and fault.status is not None:
                while (await count_in()).get("more_body"):
                    pass
                await JSONResponse(fault.body, fault.status, fault.headers)(scope, count_in, count_out)
            else:
                await app(scope, count_in, count_out)
            seen.done = True

        return outer

    # -- who and what ----------------------------------------------------------------------------------------------

    def user(self, request: Request) -> str | None:
        return self.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))

    def find(self, request: Request, *, content: bool = False, write: bool = False) -> Repo | Response:
        repo_id, user = "{owner}/{name}".format(**request.path_params), self.user(request)
        if request.headers.get("authorization") and user is None:
            told = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return JSONResponse({"error": f"Invalid token {request.headers['authorization']}"}, 401, told)
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            code = 401 if user is None else 404
            return JSONResponse({"error": "Repository not found"}, code, {"X-Error-Code": "RepoNotFound"})
        if content and repo.gated and user not in self.members:
            told = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {repo_id} is restricted."}
            return JSONResponse({"error": told["X-Error-Message"]}, 401 if user is None else 403, told)
        if write and user != repo_id.split("/")[0]:
            return JSONResponse({"error": "You don't have the rights to write"}, 401 if user is None else 403)
        return repo

    def at(self, repo: Repo, rev: str) -> str | Response:
        oid = repo.branches.get(rev, rev)
        if oid in repo.commits:
            return oid
        return JSONResponse({"error": f"Invalid rev id: {rev}"}, 404, {"X-Error-Code": "RevisionNotFound"})

    async def whoami(self, request: Request) -> Response:
        user = self.user(request)
        return JSONResponse({"name": user, "type": "user"}) if user else JSONResponse({"error": "Invalid"}, 401)

    async def create(self, request: Request) -> Response:
        body, user = await request.json(), self.user(request)
        owner = body.get("organization") or user
        repo_id = f"{owner}/{body['name']}"
        url = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if user is None or owner != user:
            return JSONResponse({"error": "Invalid username or password."}, 401 if user is None else 403)
        if repo_id in self.repos:
            return JSONResponse(url | {"error": "You already created this model repo"}, 409)
        self.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs"}, private=body.get("visibility") == "private")
        return JSONResponse(url)

    async def validate(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def info(self, request: Request) -> Response:
        repo = self.find(request)
        if isinstance(repo, Response):
            return repo
        oid = self.at(repo, request.path_params.get("rev", "main"))
        if isinstance(oid, Response):
            return oid
        repo_id = "{owner}/{name}".format(**request.path_params)
        return JSONResponse({"id": repo_id, "modelId": repo_id, "sha": oid, "private": repo.private, "siblings": []})

    async def tree(self, request: Request) -> Response:
        repo = self.find(request)
        if isinstance(repo, Response):
            return repo
        oid = self.at(repo, request.path_params["rev"])
        if isinstance(oid, Response):
            return oid
        folders = {name.rpartition("/")[0] for name in repo.commits[oid] if "/" in name}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": f, "oid": "0" * 40} for f in sorted(folders)]
        for name, data in repo.commits[oid].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if LARGE.fullmatch(name):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return JSONResponse(entries)

    async def branch(self, request: Request) -> Response:
        repo = self.find(request, write=True)
        if isinstance(repo, Response):
            return repo
        name = request.path_params["branch"]
        if name in repo.branches:
            return JSONResponse({"error": "Reference already exists"}, 409)
        repo.branches[name] = repo.branches["main"]
        return JSONResponse({}, 201)

    # -- down ------------------------------------------------------------------------------------------------------

    async def resolve(self, request: Request) -> Response:
        repo = self.find(request, content=True)
        if isinstance(repo, Response):
            return repo
        rest = request.path_params["rest"]
        rev = next((b for b in repo.branches if rest.startswith(f"{b}/")), rest.split("/")[0])
        oid = self.at(repo, rev)
        if isinstance(oid, Response):
            return oid
        headers, name = {"X-Repo-Commit": oid}, rest[len(rev) + 1 :]
        data = repo.commits[oid].get(name)
        if data is None:
            return JSONResponse({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
        if not LARGE.fullmatch(name):
            return ranged(request, data, headers | {"ETag": f'"{git_oid(data)}"'})
        self.objects[sha256(data)] = data
        headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        return RedirectResponse(f"{self.other}/cdn/{sha256(data)}", 302, headers)

    async def cdn(self, request: Request) -> Response:
        if "authorization" in request.headers:
            return JSONResponse({"error": "a signed address wants no token"}, 400)
        return ranged(request, self.objects[request.path_params["oid"]], {})

    # -- up --------------------------------------------------------------------------------------------------------

    async def preupload(self, request: Request) -> Response:
        pull = request.query_params.get("create_pr")
        repo = self.find(request, write=not pull)
        if isinstance(repo, Response):
            return repo
        oid = self.at(repo, request.path_params["rev"])
        if isinstance(oid, Response):
            return oid
        files = []
        for file in (await request.json())["files"]:
            large = bool(LARGE.fullmatch(file["path"]))
            there = repo.commits[oid].get(file["path"])
            known = None if there is None else (sha256(there) if large else git_oid(there))
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return JSONResponse({"files": files})

    async def batch(self, request: Request) -> Response:
        objects = []
        for item in (await request.json())["objects"]:
            oid, size = item["oid"], item["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                here = f"{self.url}/lfs/{oid}"
                upload: dict[str, Any] = {"href": here}
                if size > PART:
                    urls = {f"{i + 1:05d}": f"{here}/{i + 1}" for i in range(-(-size // PART))}
                    upload = {"href": f"{here}/complete", "header": {"chunk_size": str(PART), **urls}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{here}/verify"}}
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def put(self, request: Request) -> Response:
        data, oid, part = await request.body(), request.path_params["oid"], request.path_params.get("part")
        if part is not None:
            self.parts[oid, part] = data
        elif sha256(data) != oid:
            return JSONResponse({"error": "wrong content"}, 400)
        else:
            self.objects[oid] = data
        return Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def complete(self, request: Request) -> Response:
        oid, body = request.path_params["oid"], await request.json()
        data = b"".join(self.parts[oid, part["partNumber"]] for part in body["parts"])
        if sha256(data) != oid:
            return JSONResponse({"error": "wrong content"}, 400)
        self.objects[oid] = data
        return JSONResponse({})

    async def verify(self, request: Request) -> Response:
        there = self.objects.get(request.path_params["oid"])
        return JSONResponse({}, 200 if there is not None and len(there) == (await request.json())["size"] else 404)

    async def commit(self, request: Request) -> Response:
        pull, rev = request.query_params.get("create_pr"), request.path_params["rev"]
        repo = self.find(request, write=not pull)
        if isinstance(repo, Response):
            return repo
        oid = self.at(repo, rev)
        if isinstance(oid, Response):
            return oid
        files, message = dict(repo.commits[oid]), ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if len(self.objects.get(value["oid"], b"")) != value["size"]:
                        return JSONResponse({"error": "LFS pointer pointed to a file that does not exist"}, 400)
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return JSONResponse({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        repo_id = "{owner}/{name}".format(**request.path_params)
        answer: dict[str, Any] = {"success": True}
        if pull:
            repo.pulls += 1
            rev = f"refs/pr/{repo.pulls}"
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{repo.pulls}"
        new = repo.commit(rev, files, message)
        return JSONResponse(answer | {"commitOid": new, "commitUrl": f"{self.url}/{repo_id}/commit/{new}"})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def ranged(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Response(data, headers=headers | {"Accept-Ranges": "bytes"})
    start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1) + 1
    if start >= len(data):
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Response(data[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})
