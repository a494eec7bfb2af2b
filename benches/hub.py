"""A folder as a model repository of a Hugging Face Hub on loopback, as far as huggingface_hub and sd-upscale ask.

    python benches/hub.py DIR                                    prints its address, and serves until interrupted
    HF_ENDPOINT=http://127.0.0.1:PORT HF_HOME=$(mktemp -d) python benches/accept.py

The folder stands for the published repository at the commit that sd-upscale pins, so that what accept.py does with a network is tried
without one: diffusers fetches, and both programs read the cache. --repo and --commit make it another.
"""

import argparse
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from repository import COMMIT, REPO

CHUNK = 1 << 20


def digest(path, algorithm, prefix=b""):
    state = hashlib.new(algorithm, prefix)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            state.update(block)
    return state.hexdigest()


class Repository:
    """The files under a folder, with the hashes that the Hub gives: SHA-256 of weights, git's of all else."""

    def __init__(self, folder, name, commit):
        self.name, self.commit, self.files = name, commit, {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size, is_large = path.stat().st_size, path.suffix in (".safetensors", ".bin", ".pth")
            blob = digest(path, "sha256") if is_large else digest(path, "sha1", b"blob %d\0" % size)
            self.files[path.relative_to(folder).as_posix()] = (path, size, blob, is_large)

    def info(self):
        """What /api/models/REPO/revision/REVISION?blobs=true answers."""
        siblings = []
        for name, (_, size, blob, is_large) in self.files.items():
            sibling = {"rfilename": name, "size": size, "blobId": blob[:40]}
            siblings.append(sibling | ({"lfs": {"sha256": blob, "size": size, "pointerSize": 134}} if is_large else {}))
        facts = {"id": self.name, "modelId": self.name, "sha": self.commit, "private": False, "gated": False, "disabled": False}
        return facts | {"tags": [], "siblings": siblings}

    def tree(self):
        """What /api/models/REPO/tree/REVISION?recursive=true answers."""
        entries = []
        for name, (_, size, blob, is_large) in self.files.items():
            entry = {"type": "file", "path": name, "size": size, "oid": blob[:40]}
            entries.append(entry | ({"lfs": {"oid": blob, "size": size, "pointerSize": 134}} if is_large else {}))
        return entries


def handler(repository):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = unquote(urlsplit(self.path).path)
            about, files = f"/api/models/{repository.name}", f"/{repository.name}/resolve/"
            if path == about:
                return self.as_json("main", repository.info(), with_body)
            for kind, value in (("revision", repository.info), ("tree", repository.tree)):
                if path.startswith(f"{about}/{kind}/"):
                    return self.as_json(path.removeprefix(f"{about}/{kind}/"), value(), with_body)
            if not path.startswith(files):
                return self.missing("RepoNotFound")
            revision, _, name = path.removeprefix(files).partition("/")
            if revision not in ("main", repository.commit):
                return self.missing("RevisionNotFound")
            if name not in repository.files:
                return self.missing("EntryNotFound")
            self.file(*repository.files[name], with_body)

        def head(self, status, length, **fields):
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.send_header("X-Repo-Commit", repository.commit)
            for name, value in fields.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def missing(self, code):
            self.head(404, 0, X_Error_Code=code)

        def as_json(self, revision, value, with_body):
            if revision not in ("main", repository.commit):
                return self.missing("RevisionNotFound")
            body = json.dumps(value).encode()
            self.head(200, len(body), Content_Type="application/json; charset=utf-8")
            if with_body:
                self.wfile.write(body)

        def file(self, path, size, blob, is_large, with_body):
            start, end, status = 0, size - 1, 200
            fields = {"ETag": f'"{blob}"', "Accept_Ranges": "bytes"}
            if is_large:
                fields |= {"X_Linked_ETag": f'"{blob}"', "X_Linked_Size": str(size)}
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end, status = int(first), min(int(last or end), end), 206
                if start >= size:
                    return self.head(416, 0, Content_Range=f"bytes */{size}")
                fields["Content_Range"] = f"bytes {start}-{end}/{size}"
            self.head(status, end + 1 - start, **fields)
            if with_body:
                self.send(path, start, end + 1 - start)

        def send(self, path, start, left):
            with path.open("rb") as file:
                file.seek(start)
                while left and (block := file.read(min(CHUNK, left))):
                    self.wfile.write(block)
                    left -= len(block)

    return Handler


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo", default=REPO)
    parser.add_argument("--commit", default=COMMIT)
    parser.add_argument("--port", type=int, default=0, help="any that is free")
    args = parser.parse_args()
    repository = Repository(args.folder, args.repo, args.commit)
    server = ThreadingHTTPServer(("127.0.0.1", args.port), handler(repository))
    print(f"http://127.0.0.1:{server.server_port} serves {args.folder} as {args.repo} at {repository.commit}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
