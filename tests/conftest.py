"""What all tests share: one thread, fixed seeds, unhurried Hypothesis, the compiled kernels where they can be built."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings

from formery.__main__ import main
from formery.errors import FormeryError
from formery.parts.native import build

# Before anything imports Triton: the kernels of graphics cards are carried out by its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("formery", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("formery")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors are fastest on one thread, and sums come out the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def kernels() -> None:
    with suppress(FormeryError):
        build.build()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs a command line in this process, at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Ran(stopped.value.code, out, err)

    return run


LONG = ("test_together", "test_sweep", "test_cards", "test_shards", "test_near_ties", "test_stree")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no process is left alone with one of them at the end."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
