"""The pages: start to first page, how long a search and a page take, a minute of many readers, and the end."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench import report
from bench.table import progress
from formery.catalog import cards
from formery.errors import FormeryError

QUERIES = ("smaller kv cache without retraining", "faster speech recognition", "forecast traffic", "explain a neuron")
STARTS, TIMES, READERS, SECONDS = 5, 50, 50, 60
COMMANDS = {"help": ["--help"], "papers": ["papers"], "papers QUERY": ["papers", QUERIES[0]]}


@dataclass
class Row:
    """A figure with its spread: what was timed, in milliseconds (or the unit in its name)."""

    name: str
    median: float
    low: float
    high: float
    count: int


def row(name: str, values: list[float]) -> Row:
    """The median and the range."""
    return Row(name, statistics.median(values), min(values), max(values), len(values))


@contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[str], float]]:
    """A server of its own: where it is, its process, and the milliseconds until its first page was there."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "formery", "web", "--port", "0"]
        process = subprocess.Popen(command, stderr=said, text=True)
        try:
            address = _address(said, process)
            with httpx.Client(base_url=address, timeout=30) as client:
                assert client.get("/").status_code == 200
            yield address, process, 1000 * (time.perf_counter() - began)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _address(said: Any, process: subprocess.Popen[str]) -> str:
    """Where the server says it is."""
    for _ in range(3000):
        said.seek(0)
        for word in said.read().split():
            if word.startswith("http://"):
                return str(word)
        if process.poll() is not None:
            said.seek(0)
            raise FormeryError(f"the server did not start: {said.read().strip()}")
        time.sleep(0.01)
    raise FormeryError("the server did not say where it is.")


def measure(asked: Any) -> int:
    """All of it; 1 where a request was neither answered nor refused, or the end was not clean."""
    console, told = Console(), Console(stderr=True)
    rows = []
    starts, times, seconds = (2, 5, 3) if asked.quick else (STARTS, TIMES, SECONDS)
    with progress(told, "start") as tell:
        for name, arguments in COMMANDS.items():
            tell(0, 0, name)
            rows.append(row(f"formery {name}", [_command(arguments) for _ in range(starts)]))
        first = []
        for _ in range(starts):
            with served() as (_, _, spent):
                first.append(spent)
        rows.append(row("start to first page", first))
    with served() as (address, process, _):
        with progress(told, "pages") as tell, httpx.Client(base_url=address, timeout=30) as client:
            for name, paths in _asked().items():
                tell(0, 0, name)
                rows.append(row(name, [_fetch(client, paths[i % len(paths)]) for i in range(times)]))
        with progress(told, f"{READERS} readers"):
            load = _load(address, process, seconds)
        process.send_signal(signal.SIGINT)
        began = time.perf_counter()
        code = process.wait(30)
        load |= {"exit_code": code, "seconds_to_end": time.perf_counter() - began}
    for one in rows:
        console.print(f"{one.name:24} {one.median:8.1f} ms ({one.low:.1f}–{one.high:.1f}, {one.count} times)")
    console.print(json.dumps(load, indent=1))
    if asked.json:
        report.write(asked.json, {**report.document([asdict(one) for one in rows], [], times), "load": load})
    return int(bool(load["failed"]) or code != 0)


def _command(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "formery", *arguments], check=True, capture_output=True)
    return 1000 * (time.perf_counter() - began)


def _asked() -> dict[str, list[str]]:
    slugs = random.Random(0).sample(sorted(cards()), 40)
    return {
        "search page": [f"/?q={query.replace(' ', '+')}" for query in QUERIES],
        "whole list": ["/"],
        "page of a paper": [f"/papers/{slug}.html" for slug in slugs],
        "page of a checked paper": ["/papers/eagle.html", "/papers/aggressive-decoding.html"],
        "page of a work": ["/works/code.html"],
    }


def _fetch(client: httpx.Client, path: str) -> float:
    began = time.perf_counter()
    assert client.get(path).status_code == 200, path
    return 1000 * (time.perf_counter() - began)


def _load(address: str, process: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    """Many readers for a while, some of whom watch; what came of their requests, and the server's memory."""
    counts: Counter[str] = Counter()
    spent: list[float] = []
    memory = [_resident(process.pid)]
    warm = {"model": "code", "method": "greedy", "prompt": "x = ", "tokens": 4}
    httpx.post(f"{address}watch/run", json=warm, timeout=120).raise_for_status()  # torch and the weights are read now
    end = time.perf_counter() + seconds
    paths = [path for some in _asked().values() for path in some]

    def read(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=address, timeout=60) as client:
            while time.perf_counter() < end:
                began = time.perf_counter()
                try:
                    if chance.random() < 0.1:
                        asked = {"model": "code", "method": "eagle", "prompt": f"def f{number}(x):\n", "tokens": 16}
                        code = client.post("/watch/run", json=asked).status_code
                    else:
                        code = client.get(chance.choice(paths)).status_code
                    counts[str(code)] += 1
                except httpx.HTTPError as error:
                    counts[type(error).__name__] += 1
                spent.append(1000 * (time.perf_counter() - began))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for one in readers:
        one.start()
    while any(one.is_alive() for one in readers):
        time.sleep(min(1.0, seconds / 4))
        memory.append(_resident(process.pid))
    fine = {"200", "429", "503"}
    half = memory[len(memory) // 2 :]
    return {
        "readers": READERS,
        "seconds": seconds,
        "answers": dict(counts),
        "failed": sum(number for code, number in counts.items() if code not in fine),
        "median_milliseconds": statistics.median(spent),
        "longest_milliseconds": max(spent),
        "memory_mib_before_torch": memory[0],
        "memory_mib_at_half": half[0],
        "memory_mib_at_end": half[-1],
    }


def _resident(process: int) -> float:
    """A process's memory, in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
