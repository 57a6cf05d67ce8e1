"""A server of the part of Google Cloud Storage's JSON API that gcsfs, TensorStore and google-cloud-storage use.

The emulators on PyPI have no generations in the answers to reads, which TensorStore needs, and ignore preconditions,
which locks need. Objects are kept in memory.

    server = Server("bucket"); os.environ |= server.environment(); ...; server.stop()
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Object(NamedTuple):
    data: bytes
    generation: int
    written: float


class Server(ThreadingHTTPServer):
    """Buckets on a free port of this machine.

    fault: called with (method, path) before each request; returns None, or how the request fails: "503", "403",
    "truncated" (half the content) or "slow" (content after a second).
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.lock, self.count = threading.RLock(), 0
        self.requests: list[str] = []
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "crab",
            "NO_GCE_CHECK": "true",
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and content in one packet
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, status: int, body: Any = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def fail(self, status: int, message: str) -> None:
        self.reply(status, {"error": {"code": status, "message": message}}, {"Content-Type": "application/json"})

    def resource(self, bucket: str, key: str, found: Object) -> dict[str, Any]:
        when = datetime.datetime.fromtimestamp(found.written, datetime.UTC).isoformat().replace("+00:00", "Z")
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": key,
            "generation": str(found.generation),
            "metageneration": "1",
            "size": str(len(found.data)),
            "updated": when,
            "timeCreated": when,
            "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
            "etag": str(found.generation),
            "contentType": "application/octet-stream",
        }

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append(f"{self.command} {url.path}")
        fault = self.server.fault(self.command, unquote(url.path))
        if fault == "slow":
            time.sleep(1)
        elif fault in ("503", "403", "401"):
            self.fail(int(fault), f"fault {fault}")
            return
        with self.server.lock:
            self.answer(url.path, query, body, cut=fault == "truncated")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815

    def answer(self, path: str, query: dict[str, str], body: bytes, cut: bool) -> None:
        if path.startswith("/batch/"):
            self.batch(body)
            return
        match = re.fullmatch(r"(?P<kind>/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)(/o(/(?P<key>.+))?)?", path)
        if match is None or self.command == "POST" and path.endswith("/b"):
            self.fail(404, f"no such address {path}")
            return
        bucket, key = match["bucket"], unquote(match["key"] or "")
        if bucket not in self.server.buckets:
            self.fail(404, "The specified bucket does not exist.")
        elif match["kind"] == "/upload":
            self.upload(bucket, key, query, body)
        elif "/rewriteTo/" in path:
            source, _, target = match["key"].partition("/rewriteTo/")
            _, other, _, name = target.split("/", 3)
            found = self.server.buckets[bucket].get(unquote(source))
            if found is None:
                self.fail(404, "No such object")
                return
            made = self.store(other, unquote(name), found.data)
            self.reply(200, {"done": True, "resource": self.resource(other, unquote(name), made)})
        elif key:
            self.one(bucket, key, query, cut)
        elif path.endswith("/o"):
            self.listing(bucket, query)
        else:
            self.reply(200, {"kind": "storage#bucket", "name": bucket, "location": "US", "storageClass": "STANDARD"})

    def allowed(self, bucket: str, key: str, query: dict[str, str]) -> bool:
        found = self.server.buckets[bucket].get(key)
        generation = found.generation if found else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            self.fail(412, "At least one of the pre-conditions you specified did not hold.")
            return False
        if found and int(query.get("ifGenerationNotMatch", -1)) == generation:
            self.reply(304)
            return False
        return True

    def store(self, bucket: str, key: str, data: bytes) -> Object:
        self.server.count += 1
        made = Object(bytes(data), 1_000_000 + self.server.count, time.time())
        self.server.buckets[bucket][key] = made
        return made

    def one(self, bucket: str, key: str, query: dict[str, str], cut: bool) -> None:
        objects = self.server.buckets[bucket]
        if not self.allowed(bucket, key, query):
            return
        if key not in objects:
            self.fail(404, f"No such object: {bucket}/{key}")
            return
        found = objects[key]
        if self.command == "DELETE":
            del objects[key]
            self.reply(204)
        elif query.get("alt") == "media":
            headers = {
                "x-goog-generation": str(found.generation),
                "x-goog-stored-content-length": str(len(found.data)),
                "Content-Type": "application/octet-stream",
                "Accept-Ranges": "bytes",
            }
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                self.reply(200, found.data, headers, cut)
                return
            size = len(found.data)
            first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            last = min(size - 1, int(asked[2])) if asked[1] and asked[2] else size - 1
            if first > last:
                self.fail(416, "Requested range not satisfiable")
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            self.reply(206, found.data[first : last + 1], headers, cut)
        else:
            self.reply(200, self.resource(bucket, key, found), {"Content-Type": "application/json"})

    def listing(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        for key, found in sorted(self.server.buckets[bucket].items()):
            if not key.startswith(prefix) or key < start or (end and key >= end):
                continue
            inner = key[len(prefix) :]
            if delimiter and delimiter in inner:
                prefixes.add(prefix + inner.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.resource(bucket, key, found))
        content = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        self.reply(200, {name: value for name, value in content.items() if value}, {"Content-Type": "application/json"})

    def upload(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> None:
        kind = query.get("uploadType")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            parts = [
                part for part in re.split(rb"\r?\n?--" + re.escape(boundary[1]).encode(), body) if part.strip(b"-\r\n")
            ]
            meta, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[:2])
            key = json.loads(meta)["name"]
        elif kind == "resumable" and "upload_id" not in query:
            key = query.get("name") or json.loads(body)["name"]
            if self.allowed(bucket, key, query):
                self.server.count += 1
                number = str(self.server.count)
                self.server.uploads[number] = (bucket, key, query, bytearray())
                place = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
                self.reply(200, b"", {"Location": place})
            return
        elif kind == "resumable":
            bucket, key, query, kept = self.server.uploads[query["upload_id"]]
            kept += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                self.reply(308, b"", {"Range": f"bytes=0-{len(kept) - 1}"} if kept else {})
                return
            data = bytes(kept)
        else:
            key, data = query.get("name", key), body
        if self.allowed(bucket, key, query):
            made = self.store(bucket, key, data)
            headers = {"Content-Type": "application/json", "x-goog-generation": str(made.generation)}
            self.reply(200, self.resource(bucket, key, made), headers)

    def batch(self, body: bytes) -> None:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        answers = []
        for part in body.split(b"--" + boundary[1].encode()):
            asked = re.search(rb"DELETE \S*/b/([^/]+)/o/(\S+?)(\?\S*)? HTTP", part)
            number = re.search(rb"Content-ID: <?([^>\r\n]+)>?", part)
            if asked:
                gone = self.server.buckets[asked[1].decode()].pop(unquote(asked[2].decode()), None)
                status = "204 No Content" if gone else "404 Not Found"
                name = f"Content-ID: <response-{number[1].decode()}>\r\n" if number else ""
                answers.append(f"Content-Type: application/http\r\n{name}\r\nHTTP/1.1 {status}\r\n\r\n")
        text = "".join(f"--answers\r\n{answer}\r\n" for answer in answers) + "--answers--"
        self.reply(200, text.encode(), {"Content-Type": 'multipart/mixed; boundary="answers"'})
