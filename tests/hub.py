"""A stand-in for the Hugging Face Hub's API on the loopback: enough of it to upload a folder to."""

import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_secret_of_the_tests"


class Hub(ThreadingHTTPServer):
    """The Hub of user ada, who may write to ada/...

    files: {repository: {name: content}} of what was committed; private: {repository: whether}; broken: whether large
    files are refused.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files, self.private, self.large, self.seen, self.broken = {}, {}, {}, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Requests(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.seen.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/large/"):
            hub.large[path.rpartition("/")[2]] = body
            return self._send({}, 403 if hub.broken else 200)
        if path == "/api/validate-yaml":
            found = re.search(r'^base_model: "(.*)"$', json.loads(body)["content"], re.MULTILINE)
            wrong = found and not re.fullmatch(r"[\w.-]+/[\w.-]+", found[1])
            errors = [{"message": f'"base_model" with value "{found[1]}" is not valid'}] if wrong else []
            return self._send({"errors": errors, "warnings": []}, 400 if wrong else 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self._send({"name": "ada", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ada'}/{wanted['name']}"
            if not name.startswith("ada/"):
                return self._send({"error": "You don't have the rights to create a model there"}, 403)
            if name in hub.files:
                return self._send({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.files[name] = {}
            hub.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            return self._send({"url": f"{hub.url}/{name}"})
        name = "/".join(path.removeprefix("/api/models").removesuffix("/info/lfs/objects/batch").removesuffix(
            ".git").strip("/").split("/")[:2])
        if name not in hub.files:
            return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/main/" in path:
            content = hub.files[name][path.partition("/resolve/main/")[2]]
            return self._send(content, 200, {"X-Repo-Commit": "1" * 40, "ETag": f'"{len(content)}"'})
        if "/preupload/" in path:
            return self._send({"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if file[
                "path"].endswith(".safetensors") else "regular"} for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self._send({"transfer": "basic", "objects": [
                {**file, "actions": {"upload": {"href": f"{hub.url}/large/{file['oid']}"}}}
                for file in json.loads(body)["objects"]]})
        if "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.large[value["oid"]]
            return self._send({"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})
        return self._send({"id": name, "modelId": name, "siblings": [], "sha": "1" * 40})

    def _send(self, answer, code=200, headers=()):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving():
    """While a Hub answers."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
