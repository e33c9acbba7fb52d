"""Beyond one process: what a plan says of memory beside what processes take, and how fast things go.

Memory is that of the whole process, above what it had before the model was there. glibc would keep freed blocks of up
to 32 MB for later; it is told to give them back, so that what is measured is what is in use.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from formery.data.code import Code
from formery.data.tokenise import tokenise
from formery.evidence.machine import machine, versions
from formery.evidence.sweep import sweep
from formery.files import atomic_write
from formery.models import load
from formery.web.table import listing
from formery.web.words import size

MEMORY = [  # model, precision, recomputed, processes that share layers; processes
    ("decoder", "float32", False, 1, 1), ("decoder", "float32", True, 1, 1), ("decoder", "bfloat16", False, 1, 1),
    ("decoder", "float32", False, 1, 2), ("decoder", "float32", True, 1, 2), ("decoder", "float32", False, 2, 2),
    ("decoder", "float32", False, 1, 4), ("decoder", "float32", True, 2, 4), ("translator", "float32", False, 1, 1),
    ("translator", "float32", False, 1, 2),
]  # fmt: skip
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
PLANNED = """
import json, sys
from bench.scale_step import training
from formery.train.estimate import need
from formery.train.layout import Layout
model, precision, recompute, shared, processes = json.loads(sys.argv[1])
print(need(training(model, precision), processes, Layout(recompute, shared)).total)
"""


def measure(asked: Namespace) -> int:
    """Measures all, prints it and keeps it."""
    quick = asked.quick
    found = {
        "memory": [_memory(one) for one in (MEMORY[:2] if quick else MEMORY)],
        "training": _training(4 if quick else 12),
        "tokenising": _tokenising(2 if quick else 30),
        "sweep": _sweep(1 if quick else 5),
        "machine": machine(),
        "versions": versions(),
    }
    if asked.json:
        with atomic_write(asked.json) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    _show(found)
    return 0


def say(what: str) -> None:
    """Tells what is measured now."""
    print(f"{what} …", file=sys.stderr)


def _run(code: list[str], **environment: str) -> str:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(code, check=True, capture_output=True, text=True, env=given).stdout.splitlines()[-1]


def _steps(processes: int, *given: Any, **environment: str) -> dict[str, float]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    told: dict[str, float] = json.loads(_run([*launch, "-m", "bench.scale_step", json.dumps(given)], **environment))
    return told


def _memory(case: tuple[str, str, bool, int, int]) -> dict[str, Any]:
    *given, processes = case
    say(f"memory: {case}")
    planned = int(_run([sys.executable, "-c", PLANNED, json.dumps(case)]))
    peak = _steps(processes, *given, 3, 1, **GIVEN_BACK)["peak"]
    kept = _steps(processes, *given, 3, 1)["peak"]
    names = ("model", "precision", "recompute", "tensor_parallel", "processes")
    return {**dict(zip(names, case, strict=True)), "planned": planned, "measured": peak, "measured_as_it_comes": kept}


def _training(count: int) -> list[dict[str, Any]]:
    """Tokens a second: one process with both cores, and two with one each; in turn, three times."""
    cases = [(1, 1), (1, 2), (2, 1)]
    taken: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(3):
        for processes, threads in cases:
            say(f"training: {processes} processes, {threads} threads each")
            told = _steps(processes, "decoder", "float32", False, 1, count, threads)
            taken[processes, threads].append(16 * 256 / told["seconds"])
    return [
        {"processes": p, "threads": t, "tokens_per_second": statistics.median(v), "low": min(v), "high": max(v)}
        for (p, t), v in taken.items()
    ]


def _tokenising(megabytes: int) -> list[dict[str, Any]]:
    tokenizer = load("code").tokenizer
    assert tokenizer is not None
    texts = list(Code().texts("train"))
    found = []
    with TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.jsonl")
        with corpus.open("w") as file:
            while file.tell() < megabytes * 1e6:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for jobs in (1, 2):
            say(f"tokenising with {jobs} processes")
            began = time.perf_counter()
            tokenise([corpus], tokenizer, Path(folder, str(jobs)), jobs=jobs, piece=2**22)
            taken, read = time.perf_counter() - began, corpus.stat().st_size
            found.append({"jobs": jobs, "bytes": read, "bytes_per_second": read / taken})
    return found


def _sweep(count: int) -> dict[str, float]:
    """The seconds that a task of a sweep costs besides its check: of papers that there are not."""
    say("sweeps")
    began = time.perf_counter()
    for _ in sweep(["none"] * count):
        pass
    local = (time.perf_counter() - began) / count
    from formery.evidence.cluster import sweep_on_ray
    from formery.methods import discover

    discover()
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    list(sweep_on_ray("auto", ["none"] * 2))  # a node's first task imports all
    began = time.perf_counter()
    list(sweep_on_ray("auto", ["none"] * count))
    on_ray = (time.perf_counter() - began) / count
    ray.shutdown()
    return {"tasks": count, "process": local, "ray": on_ray}


def _show(found: dict[str, Any]) -> None:
    console = Console()
    rows = [
        (
            f"{one['model']}, {one['precision']}{', recomputed' if one['recompute'] else ''}"
            f"{', layers shared' if one['tensor_parallel'] > 1 else ''}",
            str(one["processes"]), size(one["planned"]), size(one["measured"]),
            f"{one['planned'] / one['measured'] - 1:+.1%}", size(one["measured_as_it_comes"]),
        )
        for one in found["memory"]
    ]  # fmt: skip
    console.print(listing(("training", "processes", "planned", "measured", "off", "as it comes"), rows, numbers=5))
    for one in found["training"]:
        console.print(
            f"{one['processes']} processes of {one['threads']} threads: {one['tokens_per_second']:,.0f} tokens/s "
            f"({one['low']:,.0f}-{one['high']:,.0f})"
        )
    for one in found["tokenising"]:
        console.print(f"tokenising, {one['jobs']} processes: {one['bytes_per_second'] / 1e6:.1f} MB/s")
    console.print(f"a task of a sweep: {found['sweep']['process']:.2f} s here, {found['sweep']['ray']:.2f} s on Ray")
