"""A Hub of about a hundred lines on the loopback, for HF_ENDPOINT: files, 404, gated, cut connections.

python hub_server.py FOLDER   prints its port; models are FOLDER/USER/NAME; what was sent of weight
files is written to FOLDER.log, a JSON list [user, where it began, how many bytes] a line.
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CUTS = [200, 503]  # what the user "cut" gets for weights: half of them, then nothing, then all


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for a model."""

    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlparse(self.path)
        parts = url.path.strip("/").split("/")
        if url.path == "/api/models":
            query = parse_qs(url.query)
            word, author = query.get("search", [""])[0], query.get("author", [""])[0]
            near = [
                p
                for p in sorted(self.root.glob("*/*"))
                if word in p.name and author in ("", p.parent.name)
            ]
            body = [{"id": f"{p.parent.name}/{p.name}", "modelId": p.name} for p in near]
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        if parts[:2] == ["api", "models"] and "tree" in parts:
            return self.tree(self.root / parts[2] / parts[3])
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self.info(parts[2], parts[3])
        if len(parts) < 5:
            return self.reply(404, b"{}")
        user, name, _, _, *file = parts
        return self.file(self.root / user / name, "/".join(file))

    def refused(self, user: str) -> bool:
        if user == "gated":
            self.reply(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        elif user == "private":
            self.reply(401, b"{}")
        else:
            return False
        return True

    def info(self, user: str, name: str) -> None:
        if self.refused(user):
            return
        folder = self.root / user / name
        if not folder.is_dir():
            self.reply(404, b"{}", X_Error_Code="RepoNotFound")
            return
        huge = 10**16 if user == "huge" else 0
        siblings = [
            {"rfilename": p.name, "size": p.stat().st_size + huge,
             **({"lfs": lfs(p)} if p.suffix == ".safetensors" else {})}
            for p in sorted(folder.iterdir())
        ]  # fmt: skip
        body = {"id": f"{user}/{name}", "modelId": name, "sha": COMMIT, "siblings": siblings,
                "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
        self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def tree(self, folder: Path) -> None:
        entries = [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
            for p in sorted(folder.iterdir())
        ]
        self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")

    def file(self, folder: Path, name: str) -> None:
        path = folder / name
        if not path.is_file():
            self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        body = path.read_bytes()
        tag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        weights = self.command == "GET" and name.endswith("safetensors")
        cut = CUTS.pop(0) if weights and CUTS and folder.parent.name == "cut" else None
        if cut == 503:
            return self.reply(503, b"{}")
        send = body[start : len(body) // 2] if cut else body[start:]
        if weights:
            with open(f"{self.root}.log", "a") as log:
                log.write(json.dumps([folder.parent.name, start, len(send)]) + "\n")
        self.send_response(206 if wanted else 200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(send)
            self.wfile.flush()
        self.close_connection = bool(cut)


def lfs(path: Path) -> dict[str, object]:
    """What the Hub says of a large file."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"size": path.stat().st_size, "sha256": digest, "pointerSize": 134}


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
