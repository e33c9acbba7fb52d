"""Trainings by many processes: they learn what one learns, go on with any number, and outlive a process that dies."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import together_runs as together
import torch
from hypothesis import given
from hypothesis import strategies as st

from formery.errors import FormeryError
from formery.train import next_token, train
from formery.train import sharded_checkpoint as parts
from formery.train.alone import newest
from formery.train.layout import Layout
from formery.train.objective import target_count
from formery.train.together import part

TOLERANCE = 2e-6  # of losses near 4.6: a few units of rounding in float32, summed in another order


def torchrun(processes: int, *jobs: dict[str, Any], restarts: int = 0) -> subprocess.CompletedProcess[str]:
    given = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--standalone", together.__file__]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *given, json.dumps(jobs)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def losses(out: Path, column: str = "loss") -> list[float]:
    with (out / "log.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run kept last, however it was kept."""
    found = newest(out)
    assert found is not None
    return {name: tensor for name, tensor in found[1]().items() if not name.startswith("random/")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one, two and four processes; those of two go on with one's, and four with theirs."""
    folder = tmp_path_factory.mktemp("together")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for model in ("decoder", "translator"):
        together.run(str(folder / f"one-{model}"), model)
    together.run(str(folder / "one-recompute"), recompute=True)
    together.run(str(folder / "passed-on"), stop=3)
    torch.set_num_threads(threads)
    at = str(folder)
    two = torchrun(
        2,
        {"out": f"{at}/two-decoder"}, {"out": f"{at}/two-translator", "model": "translator"},
        {"out": f"{at}/two-recompute", "recompute": True}, {"out": f"{at}/two-heads", "tensor_parallel": 2},
        {"out": f"{at}/two-heads-translator", "model": "translator", "tensor_parallel": 2},
        {"out": f"{at}/passed-on", "stop": 5, "resume": True},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    four = torchrun(
        4,
        {"out": f"{at}/four-decoder"}, {"out": f"{at}/four-heads", "tensor_parallel": 2, "recompute": True},
        {"out": f"{at}/passed-on", "stop": 7, "resume": True},
    )  # fmt: skip
    assert four.returncode == 0, four.stderr
    together.run(str(folder / "passed-on"), resume=True)
    return folder


RUNS = [
    "two-decoder", "two-translator", "two-recompute", "two-heads", "two-heads-translator", "four-decoder",
    "four-heads", "one-recompute", "passed-on",
]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_many_learn_what_one_learns(folder: Path, name: str) -> None:
    alone = folder / ("one-translator" if "translator" in name else "one-decoder")
    here, there = losses(folder / name), losses(alone)
    assert len(here) == len(there) == together.PLAN.steps
    assert max(abs(a - b) / b for a, b in zip(here, there, strict=True)) < TOLERANCE
    here, there = (losses(one, "evaluation/loss") for one in (folder / name, alone))
    assert max(abs(a - b) / b for a, b in zip(here[-1:], there[-1:], strict=True)) < TOLERANCE
    kept, wanted = weights(folder / name), weights(alone)
    assert kept.keys() == wanted.keys()
    for key, tensor in wanted.items():
        # Adam moves a weight whose gradient is all but zero by its sign: that of single ones may differ.
        apart = (kept[key].float() - tensor.float()).norm() / (tensor.float().norm() + 1e-6)
        assert float(apart) < 2e-3, key


@pytest.mark.parametrize(("name", "processes"), [("two-decoder", 2), ("two-heads", 2), ("four-heads", 4)])
def test_the_model_is_whole_in_every_process_afterwards(folder: Path, name: str, processes: int) -> None:
    told = {(folder / name / f"whole-{rank}.txt").read_text() for rank in range(processes)}
    assert len(told) == 1
    kept = weights(folder / name)
    digest = sum(float(one.double().abs().sum()) for key, one in kept.items() if key.startswith("model/"))
    assert float(told.pop()) == pytest.approx(digest, rel=1e-12)


def test_only_the_last_checkpoint_stays(folder: Path) -> None:
    assert [one.name for one in parts.steps(folder / "two-decoder")] == ["step-00000008"]
    assert not parts.steps(folder / "passed-on") and (folder / "passed-on" / "last.safetensors").exists()
    assert not [one for one in folder.rglob("*") if one.suffix in (".pt", ".pkl", ".distcp") or one.name == ".metadata"]


def test_a_process_that_is_killed_stops_the_others_and_torchrun_begins_again(folder: Path, tmp_path: Path) -> None:
    ran = torchrun(2, {"out": str(tmp_path / "run"), "deadly": 13}, restarts=1)  # in the seventh step
    assert ran.returncode == 0, ran.stderr
    [said] = [line for line in ran.stderr.splitlines() if line.startswith("formery:")]
    assert "another process of this training has died" in said and "--resume" in said
    assert "Traceback" not in ran.stderr
    assert losses(tmp_path / "run") == losses(folder / "two-decoder")
    kept, wanted = weights(tmp_path / "run"), weights(folder / "two-decoder")
    assert all(torch.equal(kept[name], tensor) for name, tensor in wanted.items())


KILLED = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch, torch.distributed as dist
from formery.train.sharded_checkpoint import Saver, read, read_data

torch.set_num_threads(1)
out, kills = Path(sys.argv[1]), int(sys.argv[2])
chance = random.Random(5)
last, written = 0, 0

def write(first):
    store = dist.FileStore(str(out / f"store-{first}"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    saver = Saver(out, dist.group.WORLD, True)
    for step in range(first, first + 10**6):
        tensors = {f"t{i}": torch.full((97, 131), float(step)) for i in range(12)}
        saver.begin(tensors, {"step": step, "plan": {}})
        for tensor in tensors.values():
            tensor.zero_()  # what is written was copied

for kill in range(kills):
    child = os.fork()
    if child == 0:
        try:
            write(last + 1)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    time.sleep(0.03 + 0.3 * chance.random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended by itself"
    data = read_data(out)
    if data is None:
        continue
    assert data["step"] >= last, (data, last)
    written += data["step"] - last
    last = data["step"]
    tensors = read(out)
    assert len(tensors) == 12 and all((one == float(last)).all() for one in tensors.values()), last
print(kills, "kills", written, "checkpoints")
"""


def test_a_checkpoint_killed_at_any_moment_leaves_one_that_is_whole(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "55"], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    kills, _, written, _ = ran.stdout.split()
    assert int(kills) == 55 and int(written) > 55


@given(st.integers(1, 9), st.integers(1, 6), st.data())
def test_each_row_is_learnt_from_in_one_process(rows: int, size: int, data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(1, 5)) for _ in range(rows)]
    positions = torch.tensor([[at if at < length else -1 for at in range(6)] for length in lengths])
    batch = {"tokens": torch.arange(rows * 6).view(rows, 6), "positions": positions, "step": torch.tensor(7)}
    split = [part(batch, rank, size) for rank in range(size)]
    counted = [mine["tokens"][:, 0].tolist() for mine, count in split if count]
    seen = sorted(first // 6 for some in counted for first in some)
    assert len(seen) == len(set(seen)) and {row for row, length in enumerate(lengths) if length > 1} <= set(seen)
    assert sum(count for _, count in split) == target_count(batch)
    assert all(len(mine["tokens"]) >= 1 and int(mine["step"]) == 7 for mine, _ in split)


def test_what_is_no_batch_of_rows_is_told() -> None:
    with pytest.raises(FormeryError, match="2 and 3 rows cannot be spread over 2 processes"):
        part({"tokens": torch.zeros(2, 4), "others": torch.zeros(3, 4)}, 0, 2)
    with pytest.raises(FormeryError, match="no rows"):
        part({"step": torch.tensor(1)}, 0, 2)


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(FormeryError, match="4 processes cannot be put into groups of 3"):
        Layout(tensor_parallel=3).check(4)
    with pytest.raises(FormeryError, match="groups of 0"):
        Layout(tensor_parallel=0).check(4)


@pytest.mark.parametrize("damage", ["pointer", "folder", "file"])
def test_a_damaged_checkpoint_is_told(folder: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    kept = folder / "two-decoder"
    for path in kept.rglob("*"):
        if path.is_file():
            (out / path.relative_to(kept)).parent.mkdir(parents=True, exist_ok=True)
            (out / path.relative_to(kept)).write_bytes(path.read_bytes())
    [step] = parts.steps(out)
    if damage == "pointer":
        (out / "last.json").write_text((out / "last.json").read_text()[:40])
    elif damage == "folder":
        (out / "last.json").write_text((out / "last.json").read_text().replace(step.name, "../step-00000008"))
    else:
        shard = max(step.iterdir())
        shard.write_bytes(shard.read_bytes()[:-64])
    plan = replace(together.PLAN, label="decoder")
    with pytest.raises(FormeryError, match=r"damaged|no whole checkpoint"):
        train(together.decoder(), next_token, together.texts(), plan, out, resume=True, progress=False)


def test_a_checkpoint_of_another_model_is_told(folder: Path) -> None:
    with pytest.raises(FormeryError, match="belongs to another model"):
        parts.load(folder / "two-decoder", {"model/other": torch.zeros(3)})
