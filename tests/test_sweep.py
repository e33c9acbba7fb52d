"""Checks of many papers: each in a process of its own, again when it is killed, on a cluster that loses a node."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formery.data.base import Example
from formery.errors import FormeryError
from formery.evidence import record as records
from formery.evidence import sweep as sweeping
from formery.evidence.cluster import compare_on_ray, received, sweep_on_ray
from formery.evidence.measured import Budget
from formery.evidence.sweep import Outcome, sweep
from formery.methods import discover

SMALL = Budget(examples=1, max_new_tokens=2, rounds=1, seeds=(0,))
CLOCK = ("speedup", "other_share")  # what the clock says is never the same
SLUGS = ["speculative-sampling", "medusa"]
real_data = pytest.mark.skipif(
    not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data"
)


def by_slug(outcomes: Iterator[Outcome]) -> dict[str, Outcome]:
    return {one.slug: one for one in outcomes}


def same(one: records.Record, other: records.Record) -> bool:
    """Whether two records say the same of what does not depend on the clock."""

    def timeless(record: records.Record) -> Any:
        rows = []
        for row in record.rows:
            counted = {k: v for k, v in row.numbers.items() if not k.endswith("ing_share") and k not in CLOCK}
            rows.append((row.work, row.batch, row.setting, counted))
        return record.slug, record.digest, record.models, rows

    return timeless(one) == timeless(other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """A sweep of two papers and of one that is none, side by side."""
    folder = tmp_path_factory.mktemp("records")
    return by_slug(sweep([*SLUGS, "no-such-paper"], 2, SMALL, folder))


@real_data
def test_each_check_gives_its_record_or_says_why_not(alone: dict[str, Outcome]) -> None:
    assert alone.keys() == {*SLUGS, "no-such-paper"}
    for slug in SLUGS:
        record = alone[slug].record
        assert record is not None and record.slug == slug and record.budget == SMALL.plain()
        assert (alone[slug].problem, alone[slug].attempts) == ("", 1)
    assert alone["no-such-paper"].record is None
    assert alone["no-such-paper"].problem.startswith("there is no paper named 'no-such-paper'")


@real_data
def test_a_check_that_is_killed_is_begun_again_and_goes_on(
    alone: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    popen = sweeping.subprocess.Popen

    def noted(*given: Any, **options: Any) -> Any:
        begun.append(popen(*given, **options))
        return begun[-1]

    monkeypatch.setattr(sweeping.subprocess, "Popen", noted)
    part = tmp_path / ".medusa.part.jsonl"

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if part.exists() and len(part.read_text().splitlines()) > 2:
                os.kill(begun[0].pid, signal.SIGKILL)
                return
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    [outcome] = sweep(["medusa"], budget=SMALL, folder=tmp_path)
    killer.join()
    assert outcome.attempts == 2 and outcome.record is not None
    wanted = alone["medusa"].record
    assert wanted is not None and same(outcome.record, wanted)
    assert not part.exists()


def test_a_check_that_always_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = sweeping.subprocess.Popen
    monkeypatch.setattr(
        sweeping.subprocess, "Popen", lambda given, **options: popen(["/bin/sh", "-c", "kill -9 $$"], **options)
    )
    [outcome] = sweep(["medusa"], budget=SMALL, folder=tmp_path)
    assert outcome.record is None and outcome.attempts == sweeping.ATTEMPTS
    assert outcome.problem == "its process was killed by signal 9, 3 times"


def test_leaving_early_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    popen = sweeping.subprocess.Popen

    def sleeper(*_: Any, **options: Any) -> Any:
        begun.append(popen(["/bin/sh", "-c", "exit 0" if not begun else "sleep 60"], **options))
        return begun[-1]

    monkeypatch.setattr(sweeping.subprocess, "Popen", sleeper)
    running = sweep(["medusa", "eagle"], 2, SMALL, tmp_path)
    assert next(running).slug == "medusa"
    running.close()  # type: ignore[attr-defined]
    assert [one.poll() for one in begun] == [0, -signal.SIGKILL]
    with pytest.raises(FormeryError, match="at least 1"):
        next(sweep(["medusa"], 0))


@real_data
def test_a_record_of_other_code_is_not_written(alone: dict[str, Outcome], tmp_path: Path) -> None:
    discover()
    made = alone["medusa"].record
    assert made is not None
    fine = received("medusa", json.dumps(made.to_json()), 1.0, tmp_path)
    assert fine.record == made == records.read("medusa", tmp_path)
    other = received("medusa", json.dumps({**made.to_json(), "digest": "0" * 64}), 1.0, tmp_path / "none")
    assert other.record is None and "other code" in other.problem and not (tmp_path / "none").exists()
    with pytest.raises(FormeryError, match="is no record"):
        received("medusa", "{", 1.0, tmp_path)


@real_data
def test_a_cluster_that_loses_a_node_finishes(alone: dict[str, Outcome], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    utilities = pytest.importorskip("ray.cluster_utils")
    discover()
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = utilities.Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()

        killed = threading.Event()

        def kill() -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                tasks = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
                if tasks >= 2:
                    cluster.remove_node(second, allow_graceful=False)
                    killed.set()
                    return
                time.sleep(0.05)

        killer = threading.Thread(target=kill)
        killer.start()
        found = by_slug(sweep_on_ray(cluster.address, [*SLUGS, "no-such-paper"], SMALL, tmp_path))
        killer.join()
        assert killed.is_set()
        work = [Example("def add(a, b):\n", "    return a + b\n", "one")]
        compared = compare_on_ray(cluster.address, "code-draft", work, ["aggressive-decoding"], max_new_tokens=4)
        assert [row.method for row in compared.rows] == ["greedy", "aggressive-decoding"] and len(compared.outputs) == 1
        with pytest.raises(FormeryError, match="there is no method named 'agressive-decoding'"):
            compare_on_ray(cluster.address, "code-draft", work, ["agressive-decoding"])
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert found.keys() == {*SLUGS, "no-such-paper"}
    assert found["no-such-paper"].problem.startswith("there is no paper named")
    for slug in SLUGS:
        record, wanted = found[slug].record, alone[slug].record
        assert record is not None and wanted is not None and same(record, wanted)
        assert records.read(slug, tmp_path) == record


def test_no_cluster_is_told() -> None:
    pytest.importorskip("ray")
    with pytest.raises(FormeryError, match="no Ray cluster answers at 127.0.0.1:1"):
        next(sweep_on_ray("127.0.0.1:1", ["medusa"]))
