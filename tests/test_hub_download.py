"""Fetching from a hub: a small hub on this machine, well-behaved or not, and what of it arrives."""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars, logging
from published import saved
from safetensors.torch import save

import formery
from formery.errors import FormeryError
from formery.models.hub.download import fetch, headers, is_hub_id
from formery.models.weights import INDEX, WEIGHTS, table_of

CONFIG = json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}).encode()
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(1)}
SMALL = {"config.json": CONFIG, "tokenizer.json": b"{}", WEIGHTS: save(TENSORS)}


class Hub:
    """A hub of repositories: {name: {commit: {file: content}}}, the last commit being the main branch."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[str, str] = {}
        self.log: list[tuple[str, str]] = []
        self.authorizations: list[str | None] = []
        self.sent = 0
        self.token: str | None = None
        # What goes wrong: given the handler and its path, True where the answer is given already.
        self.fault: Callable[[Any, str], bool] = lambda handler, path: False
        self.tree: Callable[[list[dict[str, Any]]], Any] = lambda entries: entries
        self.extra: dict[str, str] = {}
        self.ranges = True
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, {})
        commit = hashlib.sha1(f"{name}{len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def answer(self, handler: Any) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.log.append((handler.command, path))
        if path.startswith("/api/agent"):
            return send(handler, 404, b"{}")
        self.authorizations.append(handler.headers.get("Authorization"))
        if self.fault(handler, path):
            return None
        found = re.fullmatch(r"(?:/api/models)?/(\w+/[\w.-]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        assert found is not None, path
        name, kind, revision, file = found.groups()
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return send(handler, 401, b'{"error": "who are you?"}')
        commits = self.repositories.get(name)
        if commits is None:
            return send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = list(commits)[-1] if revision in (None, "main") else self.tags.get(revision, revision)
        if commit not in commits:
            return send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if kind == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
                for path, content in files.items()
            ]
            return send(handler, 200, json.dumps(self.tree(entries)).encode())
        if kind != "resolve":
            return send(handler, 200, json.dumps({"id": name, "sha": commit}).encode())
        content, status = files[file], 200
        more = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit} | self.extra
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if part and self.ranges:
            start, end = int(part[1]), int(part[2] or len(content))
            more["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.sent += len(content) * (handler.command == "GET")
        return send(handler, status, content, more)

    def asked(self, *methods: str) -> set[str]:
        """The files asked for, since the log was last cleared."""
        return {path.split("/", 5)[5] for method, path in self.log if "/resolve/" in path and method in methods}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def send(handler: Any, status: int, content: bytes, more: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for key, value in ({"Content-Length": str(len(content))} | (more or {})).items():
        handler.send_header(key, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)


def digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def local(folder: Path) -> dict[str, bytes]:
    return {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(FormeryError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", '"')) and "Traceback" not in message
    return message


@pytest.fixture(autouse=True, scope="module")
def connections() -> Iterator[None]:
    """One client for all tests, since each reads all certificates of this machine."""
    yield
    huggingface_hub.close_session()


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The library turned to this hub, with an empty cache; connections elsewhere fail the test."""
    hosts = set()
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        hosts.add(address[0])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield server
    assert hosts <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("owner/name", True),
        ("openai-community/gpt2", True),
        ("a/b.c_d-1", True),
        ("owner/name@abc123", True),
        ("owner/name@v1.0", True),
        ("code", False),
        ("", False),
        ("owner/", False),
        ("/name", False),
        ("/owner/name", False),
        ("./name", False),
        ("../name", False),
        ("owner/..", False),
        ("owner/.name", False),
        ("~/name", False),
        ("owner/name/more", False),
        ("owner/name@", False),
        ("owner/name@refs/x", False),
        ("owner/name@../x", False),
        ("owner/name@a@b", False),
        ("owner\\name", False),
        ("C:/name", False),
        ("owner/name\n", False),
        ("owner/naïve", False),
        ("owner/na me", False),
    ],
)
def test_hub_ids(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one


def test_what_a_model_needs_arrives_and_nothing_else(hub: Hub) -> None:
    wanted = SMALL | {
        "generation_config.json": b"[1]",
        "vocab.json": b"[2]",
        "vocab.txt": b"a",
        "merges.txt": b"a b",
        "spiece.model": b"m",
        "source.spm": b"s",
        "chat_template.jinja": b"{{ x }}",
        "modules.json": b"[3]",
        "1_Pooling/config.json": b"[4]",
    }
    others = [
        *["README.md", ".gitattributes", "model.fp16.safetensors", "model-00001-of-00002.safetensors", "run.py"],
        *["consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "notes.txt"],
        *["flax_model.msgpack", "flax_model.msgpack.index.json", "model.gguf", "onnx/model.onnx", "onnx/config.json"],
        *["training_args.bin", ".eval/x.json", "2/deep/config.json", "openvino/openvino_tokenizer.json", "a b.json"],
    ]
    commit = hub.publish("us/all", {other: b"x" + other.encode() for other in others} | wanted)
    folder = fetch("us/all")
    assert local(folder) == wanted and folder.name == commit
    assert hub.asked("GET", "HEAD") == wanted.keys()


def test_a_second_call_asks_for_no_file(hub: Hub) -> None:
    commit = hub.publish("us/small", SMALL)
    folder = fetch("us/small")
    hub.log.clear()
    assert fetch("us/small") == folder and hub.asked("GET", "HEAD") == set()
    hub.log.clear()
    assert fetch(f"us/small@{commit}") == folder and hub.log == []


@pytest.mark.parametrize("weights", [True, False])
def test_the_shards_that_the_index_names_come_if_weights_are_wanted(hub: Hub, weights: bool) -> None:
    places = {f"t{one}": f"model-0000{one}-of-00002.safetensors" for one in (1, 2)}
    shards = {file: save({tensor: torch.ones(2)}) for tensor, file in places.items()}
    index = json.dumps({"weight_map": places}).encode()
    files = {"config.json": CONFIG, INDEX: index}
    hub.publish("us/two", files | shards | {"model-00003-of-00003.safetensors": b"x", "consolidated.safetensors": b"y"})
    assert local(fetch("us/two", weights=weights)) == files | (shards if weights else {})
    assert local(fetch("us/two")) == files | shards


def test_a_revision_stays_and_main_moves(hub: Hub) -> None:
    first = hub.publish("us/moving", SMALL)
    hub.tags = {"v1": first, first[:7]: first}
    old = fetch("us/moving")
    second = hub.publish("us/moving", SMALL | {"config.json": b"[1]"})
    hub.log.clear()
    new = fetch("us/moving")
    assert (old.name, new.name) == (first, second)
    assert hub.asked("GET") == {"config.json"}, "what has not changed is not fetched again"
    assert (new / "config.json").read_bytes() == b"[1]" and (old / "config.json").read_bytes() == CONFIG
    for pinned in (fetch("us/moving@v1"), fetch("us/moving", first), fetch("us/moving", first[:7])):
        assert pinned == old
    assert fetch("us/moving@v1", "v1") == old
    assert "v1" in refused(lambda: fetch("us/moving@v1", "main"))
    assert "no revision v2" in refused(lambda: fetch("us/moving@v2"))
    assert "no revision" in refused(lambda: fetch("us/moving", "0" * 40))


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", ".", "", "a\\b", "a b"])
def test_what_cannot_be_a_revision_is_never_asked_for(hub: Hub, revision: str) -> None:
    assert "no revision" in refused(lambda: fetch("us/small", revision))
    assert hub.log == []


@pytest.mark.parametrize("name", ["code", "../code", "a/b/c", "a--b/c", "a/b..c", "a/b.git"])
def test_what_cannot_be_a_name_is_never_asked_for(hub: Hub, name: str) -> None:
    assert name in refused(lambda: fetch(name)) and hub.log == []


def test_the_token_is_sent_and_needed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    hub.publish("us/private", SMALL)
    assert "HF_TOKEN" in refused(lambda: fetch("us/private"))
    assert set(hub.authorizations) == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.authorizations.clear()
    assert local(fetch("us/private")) == SMALL and headers("us/private")
    assert set(hub.authorizations) == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = refused(lambda: fetch("us/private"))
    assert "HF_TOKEN" in message and "hf_other" not in message


@pytest.mark.parametrize(
    ("status", "more", "says"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "there is no us/small at http"),
        (401, {"X-Error-Code": "RepoNotFound"}, "HF_TOKEN"),
        (404, {}, "there is no us/small at http"),
        (403, {"X-Error-Code": "GatedRepo"}, "us/small is gated: accept its terms"),
        (401, {"X-Error-Code": "GatedRepo"}, "us/small is gated: accept its terms"),
        (403, {}, "forbids access"),
        (500, {}, "(500): try again later"),
        (503, {}, "(503): try again later"),
        (429, {}, "(429): try again later"),
        (200, {}, "in no way that a hub does"),
    ],
)
@pytest.mark.parametrize("at", ["/api/models/us/small", "/resolve/"])
def test_refusals_become_sentences(hub: Hub, status: int, more: dict[str, str], says: str, at: str) -> None:
    if at == "/resolve/" and (status in (200, 404) or status >= 429):
        return  # There the library waits and tries again for a minute, or the answer means another thing.
    hub.publish("us/small", SMALL)
    hub.fault = lambda handler, path: at in path and [send(handler, status, b"<html>", more)] != []
    assert says in refused(lambda: fetch("us/small"))


@pytest.mark.parametrize(
    "answer", ["{}", "[]", "3", '{"id": "us/small"}', '{"id": 3, "sha": null}', "\x00", "[" * 10**5]
)
@pytest.mark.parametrize("at", ["/api/models/us/small", "/tree/"])
def test_nonsense_becomes_a_sentence(hub: Hub, answer: str, at: str) -> None:
    hub.publish("us/small", SMALL)
    hub.fault = lambda handler, path: at in path and [send(handler, 200, answer.encode())] != []
    refused(lambda: fetch("us/small"))


def test_nobody_there(hub: Hub) -> None:
    hub.close()
    message = refused(lambda: fetch("us/small"))
    assert "cannot be reached" in message and hub.url in message


def test_an_answer_that_does_not_come(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    done = threading.Event()
    hub.fault = lambda handler, path: done.wait(20)
    assert "does not answer in time" in refused(lambda: fetch("us/small"))
    done.set()


def test_what_the_disk_refuses(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("us/small", SMALL)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert "HF_HOME" in refused(lambda: fetch("us/small"))


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("us/small", SMALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(lambda: fetch("us/small"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch("us/small", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (fetch, headers):
        assert "HF_HUB_OFFLINE" in refused(lambda ask=ask: ask("us/small"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch("us/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert fetch("us/small") == folder and headers("us/small").keys() == TENSORS.keys()
    assert hub.log == []
    # A cache that others filled may lack the list of files.
    shutil.copytree(tmp_path / "cache", tmp_path / "bare", symlinks=True, ignore=shutil.ignore_patterns("trees"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "bare"))
    bare = fetch("us/small")
    assert local(bare) == SMALL
    (bare / WEIGHTS).unlink()
    assert "without its weights" in refused(lambda: fetch("us/small"))


def test_without_a_network_the_cache_suffices(hub: Hub) -> None:
    hub.publish("us/small", SMALL)
    folder = fetch("us/small")
    hub.close()
    assert fetch("us/small") == folder


def test_pickles_are_refused_unseen(hub: Hub) -> None:
    commit = hub.publish("us/old", {"config.json": CONFIG, "pytorch_model.bin": b"x", "training_args.bin": b"y"})
    message = refused(lambda: fetch("us/old"))
    assert "pickle (pytorch_model.bin), which can run any code" in message and "ask its owner" in message
    assert hub.asked("GET", "HEAD") <= {"config.json"}
    command = message.split("python -c ")[1]
    code = command.strip('."')
    compile(code, "command", "exec")
    assert "$" not in code and "`" not in code and all(one in code for one in ("GPT2LMHeadModel", "us/old", commit))
    assert "pickle" in refused(lambda: headers("us/old"))
    assert local(fetch("us/old", weights=False)) == {"config.json": CONFIG}
    hub.publish("us/evil", {"config.json": b'{"architectures": ["x\\"; rm -rf /"]}', "pytorch_model.bin": b"x"})
    message = refused(lambda: fetch("us/evil"))
    assert "AutoModel" in message and "rm -rf" not in message


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model.ckpt", "pickle (model.ckpt)"),
        ("tf_model.h5", "only config.json, tf_model.h5"),
        ("model.fp16.safetensors", "only config.json, model.fp16.safetensors"),
        ("optimizer.pt", "only config.json, optimizer.pt"),
        ("onnx/model.bin", "only config.json"),
    ],
)
def test_other_weights_are_named(hub: Hub, file: str, says: str) -> None:
    hub.publish("us/other", {"config.json": CONFIG, file: b"x"})
    message = refused(lambda: fetch("us/other"))
    assert says in message and "python" not in message
    assert file not in hub.asked("GET", "HEAD")


def test_a_repository_of_something_else(hub: Hub) -> None:
    hub.publish("us/text", {"README.md": b"hello"})
    assert "README.md" in refused(lambda: fetch("us/text", weights=False))


@pytest.mark.parametrize("told", [True, False], ids=["length told", "length untold"])
def test_half_a_file_is_never_taken_for_whole(hub: Hub, tmp_path: Path, told: bool) -> None:
    content = save({"t": torch.zeros(100_000)})
    hub.publish("us/cut", SMALL | {WEIGHTS: content})

    def cut(handler: Any, path: str) -> bool:
        if not path.endswith(WEIGHTS) or (handler.command == "HEAD" and told):
            return False
        if told and hub.log.count((handler.command, path)) > 1:
            send(handler, 500, b"")
            return True
        handler.send_response(200)
        handler.send_header("ETag", f'"{digest(content)}"')
        handler.send_header("X-Repo-Commit", next(iter(hub.repositories["us/cut"])))
        if told:
            handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content[: len(content) // 2])
        handler.close_connection = True
        return True

    hub.fault = cut
    refused(lambda: fetch("us/cut"))
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file() and one.stat().st_size > 1000]
    hub.fault = lambda handler, path: False
    assert (fetch("us/cut") / WEIGHTS).read_bytes() == content


@pytest.mark.parametrize(
    "file",
    [
        "../x.json",
        "a/../../x.json",
        "/tmp/x.json",
        "..\\x.json",
        "C:\\x.json",
        "C:x.json",
        "\\\\host\\share\\x.json",
        "..",
    ],
)
def test_a_name_that_leads_out_is_refused(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.publish("us/evil", SMALL | {file: b"evil"})
    assert "outside its folder" in refused(lambda: fetch("us/evil"))
    assert hub.asked("GET", "HEAD") == set()
    assert {one.name for one in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("up", ["{outside}/x", "../../../../../x", "..\\..\\x"])
def test_a_digest_that_is_a_path_is_refused(hub: Hub, tmp_path: Path, header: str, up: str) -> None:
    """The library makes files of these names in its cache, wherever they lead."""
    hub.publish("us/evil", SMALL)
    hub.extra = {header: up.format(outside=tmp_path)}
    assert "which is a path" in refused(lambda: fetch("us/evil"))
    assert {one.name for one in tmp_path.iterdir()} <= {"cache"} and not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("sha", ["../../../x", "main", "0" * 39, "0" * 39 + "G"])
def test_a_commit_that_is_none_is_refused(hub: Hub, tmp_path: Path, sha: str) -> None:
    hub.publish("us/evil", SMALL)
    told = json.dumps({"id": "us/evil", "sha": sha}).encode()
    hub.fault = lambda handler, path: path == "/api/models/us/evil" and [send(handler, 200, told)] != []
    assert "as the commit" in refused(lambda: fetch("us/evil"))
    assert {one.name for one in tmp_path.iterdir()} <= {"cache"}


def test_a_listed_digest_that_is_a_path_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.publish("us/evil", SMALL)
    lfs = {"oid": f"{tmp_path}/x", "size": 3, "pointerSize": 1}
    hub.tree = lambda entries: [one | {"lfs": lfs, "xetHash": "0" * 64} for one in entries]
    assert "which is a path" in refused(lambda: fetch("us/evil"))
    assert {one.name for one in tmp_path.iterdir()} <= {"cache"}


@pytest.mark.parametrize(
    "index",
    [
        *["{", "[]", '{"weight_map": []}', '{"weight_map": {"t": 3}}', '{"weight_map": {"t": "../x.safetensors"}}'],
        *['{"weight_map": {"t": "gone.safetensors"}}', '{"weight_map": {"t": "config.json"}}', "[" * 10**5, "\xff"],
    ],
)
def test_an_index_that_lies_is_refused(hub: Hub, index: str) -> None:
    hub.publish("us/evil", {"config.json": CONFIG, INDEX: index.encode("latin-1")})
    assert INDEX in refused(lambda: fetch("us/evil"))


@pytest.mark.parametrize("extra", [0, 3000], ids=["short header", "long header"])
def test_headers_are_read_without_the_weights(hub: Hub, extra: int) -> None:
    tensors = TENSORS | {f"layer.{one}.with.a.long.name.for.a.long.header": torch.zeros(1) for one in range(extra)}
    big = {"big": torch.zeros(1_000_000)}
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors") | {"big": "two.safetensors"}}
    files = {INDEX: json.dumps(index).encode(), "one.safetensors": save(tensors), "two.safetensors": save(big)}
    hub.publish("us/two", files)
    found = headers("us/two")
    assert hub.sent < sum(map(len, files.values())) - 3_500_000
    folder = fetch("us/two")
    assert found == {name: (entry.dtype, list(entry.shape)) for name, entry in table_of(folder).items()}
    hub.log.clear()
    assert headers("us/two") == found and hub.asked("GET", "HEAD") == set()


def test_a_hub_that_sends_whole_files_only(hub: Hub) -> None:
    hub.publish("us/big", SMALL | {WEIGHTS: save({"big": torch.zeros(1_000_000)})})
    hub.ranges = False
    assert "whole files only" in refused(lambda: headers("us/big"))
    hub.publish("us/small", SMALL)
    assert headers("us/small").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    "header",
    [
        *["{", "3", "[]", '{"t": 3}', '{"t": {}}', '{"t": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}'],
        *['{"t": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', '{"__metadata__": 3, "t": null}'],
        *['{"t": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}', "[" * 10**5],
    ],
)
def test_a_damaged_header_is_refused(hub: Hub, header: str) -> None:
    hub.publish("us/evil", {WEIGHTS: len(header).to_bytes(8, "little") + header.encode()})
    assert "damaged header" in refused(lambda: headers("us/evil"))


@pytest.mark.parametrize("start", [b"", b"abc", (2**40).to_bytes(8, "little")])
def test_a_file_that_is_no_safetensors_has_no_headers(hub: Hub, start: bytes) -> None:
    hub.publish("us/evil", {WEIGHTS: start})
    assert WEIGHTS in refused(lambda: headers("us/evil"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals(hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    hub.publish("us/small", SMALL)
    enable_progress_bars()  # whatever other libraries have done before
    session, verbosity = huggingface_hub.get_session(), logging.get_verbosity()
    before = {when: list(hooks) for when, hooks in session.event_hooks.items()}
    fetch("us/small", weights=False)
    refused(lambda: fetch("us/none"))
    assert capfd.readouterr() == ("", "")
    assert session.event_hooks == before and logging.get_verbosity() == verbosity and not are_progress_bars_disabled()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    fetch("us/small")
    assert "Fetching" in terminal.getvalue() and capfd.readouterr().out == ""


SCRIPT = """
import sys
hosts = []
sys.addaudithook(lambda event, values: hosts.append(values[1][0]) if event == "socket.connect" else None)
from formery.errors import FormeryError
from formery.models.hub.download import fetch
assert "huggingface_hub" not in sys.modules
for name in sys.argv[1:]:
    try:
        print(fetch(name))
    except FormeryError as error:
        print("refused:", error)
print(*set(hosts))
"""


def test_the_environment_is_heeded(server: Hub, tmp_path: Path) -> None:
    """In processes of their own, since the library reads its variables once."""
    server.token = "hf_secret"
    commit = server.publish("us/small", SMALL)
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1] / "src"), "HF_HOME": str(tmp_path)}

    def run(*names: str, **variables: str) -> list[str]:
        command = [sys.executable, "-c", SCRIPT, *names]
        done = subprocess.run(command, env=path | variables, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.splitlines()

    folder = tmp_path / "hub" / "models--us--small" / "snapshots" / commit
    assert run("us/small", HF_ENDPOINT=server.url, HF_TOKEN="hf_secret") == [str(folder), "127.0.0.1"]
    assert local(folder) == SMALL
    [found, message, hosts] = run("us/small", "us/other", HF_HUB_OFFLINE="1")
    assert (found, hosts) == (str(folder), "") and message.startswith("refused: us/other is not wholly in")


def test_a_model_of_the_hub_is_loaded_and_inspected(hub: Hub) -> None:
    theirs, folder = saved("llama")
    first = hub.publish("us/model", local(folder))
    hub.publish("us/model", local(saved("gpt2")[1]))
    found = formery.inspect("us/model", revision=first)
    assert found.family == "Llama 2, 3" and found.parameters == theirs.num_parameters()
    assert not (fetch("us/model", first, weights=False) / WEIGHTS).exists()
    tokens = torch.tensor([[9, 10, 11]])
    for model in (formery.load("us/model", revision=first), formery.load(f"us/model@{first}")):
        torch.testing.assert_close(model(tokens), theirs(input_ids=tokens).logits)
    assert formery.load("us/model").origin == "GPT2LMHeadModel"
    message = refused(lambda: formery.load("us/nothing"))
    assert "us/nothing" in message
