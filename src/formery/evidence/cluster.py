"""Checks of many papers on a Ray cluster: each on a node of its own, again elsewhere when its node dies.

Ray runs the tasks and knows which nodes live; here is only what a task is. The record of a check comes back as text and
is written where the sweep was begun, when it is of the very code that is there.
"""

import importlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formery.errors import FormeryError, first_line
from formery.evidence import record as records
from formery.evidence.compare import Comparison, compare
from formery.evidence.digest import digest
from formery.evidence.kept import folder as kept
from formery.evidence.measured import Budget
from formery.evidence.paper import paper
from formery.evidence.sweep import ATTEMPTS, Outcome, run

DECODES = "formery.generate.run"  # the module by whose digest two machines' code is told apart


def sweep_on_ray(
    address: str, slugs: Sequence[str], budget: Budget | None = None, folder: Path | None = None
) -> Iterator[Outcome]:
    """Runs the checks of these papers on the cluster at `address`, and gives each outcome when it is there.

    Raises FormeryError where Ray is not installed, or no cluster answers.
    """
    budget, folder = budget or Budget(), folder or records.records_folder()
    with connected(address) as ray:
        task = alone(ray, remote)
        waiting = {task.remote(slug, budget.plain()): slug for slug in slugs}
        while waiting:
            [done], _ = ray.wait([*waiting], num_returns=1)
            slug = waiting.pop(done)
            try:
                text, seconds = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                yield Outcome(slug, None, first_line(error.cause or error))
            except ray.exceptions.RayError as error:
                yield Outcome(slug, None, f"no node could finish it: {first_line(error)}", attempts=ATTEMPTS + 1)
            else:
                yield received(slug, text, seconds, folder)


def compare_on_ray(address: str, *given: Any, **options: Any) -> Comparison:
    """As `compare`, all of it on one node, so that its rounds interleave; again on another when that node dies.

    Raises FormeryError as `compare` does, where no cluster answers, and where the node has other code than is here.
    """
    with connected(address) as ray:
        try:
            comparison, code = ray.get(alone(ray, remote_compare).remote(given, options))
        except ray.exceptions.RayTaskError as error:
            raise FormeryError(f"{first_line(error.cause or error)}.") from error
        except ray.exceptions.RayError as error:
            raise FormeryError(f"no node could finish it: {first_line(error)}.") from error
    if code != digest(DECODES):
        raise FormeryError("the node that compared has other code than is here: install the same there.")
    found: Comparison = comparison
    return found


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster for as long as the block lasts, or as it is already."""
    try:
        import ray
    except ImportError as error:
        raise FormeryError("a cluster is reached by Ray: pip install 'formery[ray]'.") from error
    began = not ray.is_initialized()
    if began:
        _knock(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise FormeryError(f"no Ray cluster answers at {address}: {first_line(error)}.") from error
    try:
        yield ray
    finally:
        if began:
            ray.shutdown()


def alone(ray: Any, task: Callable[..., Any]) -> Any:
    """A function as a task that has a node for itself: it takes as many processors as the smallest node has."""
    cpus = min(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    return ray.remote(num_cpus=cpus, max_retries=ATTEMPTS)(task)


def _knock(address: str) -> None:
    """Raises FormeryError where nothing listens at host:port: Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # "auto", which Ray finds out itself
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise FormeryError(f"no Ray cluster answers at {address}: {first_line(error)}.") from error


def remote(slug: str, plain: dict[str, Any]) -> tuple[str, float]:
    """A check on a node: the text of its record, and its seconds; what it measured stays in the node's cache."""
    own = kept() / "sweep"
    own.mkdir(parents=True, exist_ok=True)
    record = run(slug, own, plain)
    return json.dumps(record.to_json()), record.seconds


def remote_compare(given: Sequence[Any], options: dict[str, Any]) -> tuple[Comparison, str]:
    """A comparison on a node, and the digest of the code that decoded there."""
    importlib.import_module("formery.methods").discover()  # papers lie above this room
    return compare(*given, **options), digest(DECODES)


def received(slug: str, text: str, seconds: float, folder: Path) -> Outcome:
    """Writes a record that came from a node, unless it is of other code than is here."""
    record = records.parsed(text, slug, f"what a node sent of {slug}")
    if record.digest != digest(paper(slug).module):
        return Outcome(slug, None, "its node has other code than is here: install the same there.", seconds)
    records.write(record, folder)
    return Outcome(slug, record, "", seconds)
