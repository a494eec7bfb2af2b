"""A Hugging Face Hub on loopback that serves one folder as one repository, to try accept.py where there is no network.

    python benches/hub_server.py DIR stabilityai/sd-x2-latent-upscaler 8765 &
    HF_ENDPOINT=http://127.0.0.1:8765 HF_HOME=FRESH python benches/accept.py

It has the addresses and headers that huggingface_hub and sd-upscale ask for; whatever revision is asked for is there.
"""

import argparse
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 20


def digest(path):
    """SHA-256 as the Hub names large files; it does for the small ones too."""
    sum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sum.update(block)
    return sum.hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files, repo = {}, ""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(rf"/api/models/{re.escape(self.repo)}(?:/revision/([^/]+))?", path):
            self.answer_json(self.about(commit(found[1])))
        elif found := re.fullmatch(rf"/api/models/{re.escape(self.repo)}/tree/([^/]+)", path):
            self.answer_json([entry(name, *of) for name, of in self.files.items()])
        elif (found := re.fullmatch(rf"/{re.escape(self.repo)}/resolve/([^/]+)/(.+)", path)) and found[2] in self.files:
            self.answer_file(commit(found[1]), *self.files[found[2]])
        else:
            self.answer_json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def about(self, revision):
        siblings = [{"rfilename": name} | entry(name, *of) for name, of in self.files.items()]
        return {"id": self.repo, "modelId": self.repo, "sha": revision, "private": False, "gated": False, "tags": [], "siblings": siblings}

    def answer_json(self, value, status=200, headers={}):
        body = json.dumps(value).encode()
        self.begin(status, {"Content-Type": "application/json", "Content-Length": len(body)} | headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_file(self, revision, path, size, sha256):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]), size - 1) if asked and asked[2] else size - 1
        headers = {"X-Repo-Commit": revision, "ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size}
        headers |= {"Accept-Ranges": "bytes", "Content-Length": last + 1 - first}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.begin(206 if asked else 200, headers)
        if self.command != "HEAD":
            with path.open("rb") as file:
                file.seek(first)
                left = last + 1 - first
                while left and (block := file.read(min(left, BLOCK))):
                    self.wfile.write(block)
                    left -= len(block)

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


def entry(name, _, size, sha256):
    """A file as the Hub lists it, with both clients' names of what it is."""
    about = {"type": "file", "path": name, "size": size, "oid": sha256[:40], "blobId": sha256[:40]}
    return about | {"lfs": {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 134}}


def commit(revision):
    """What a revision stands for: itself where it is a commit."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision or "") else "0" * 40


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo")
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    paths = sorted(path for path in args.folder.rglob("*") if path.is_file())
    Handler.files = {str(path.relative_to(args.folder)): (path, path.stat().st_size, digest(path)) for path in paths}
    Handler.repo = args.repo
    print(f"{len(paths)} files at http://127.0.0.1:{args.port}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
