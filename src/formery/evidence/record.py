"""A record: what a paper's check saw, on which machine, and the digest of the code that it holds for."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from formery.errors import FormeryError
from formery.evidence.digest import digest
from formery.evidence.kept import Kept
from formery.evidence.measured import Row
from formery.evidence.verdict import Criterion, Verdict, judge
from formery.files import atomic_write

PACKAGE = Path(__file__).parents[1]
SHIPPED = PACKAGE / "shipped"  # looked at from here, so that a list of papers need not import torch
KEPT = Kept("weights", "sha256")


@dataclass(frozen=True)
class Record:
    """One run of a check.

    models: the shipped models and guides that it ran, each with a digest of its files. digest: of the code that
    it holds for. seconds: that the check took, without what an interrupted run before it had measured already.
    """

    slug: str
    verdict: Verdict
    claims: str
    criteria: list[Criterion]
    rows: list[Row]
    baseline: str
    notes: list[str]
    budget: dict[str, int | list[int]]
    models: dict[str, str]
    machine: dict[str, str | int | float | None]
    versions: dict[str, str]
    date: str
    seconds: float
    digest: str
    format: int = field(default=1)

    def to_json(self) -> dict[str, Any]:
        """Plain data; each criterion with whether it holds."""
        data = asdict(self)
        for plain, criterion in zip(data["criteria"], self.criteria, strict=True):
            plain["holds"] = criterion.holds
        return data


def records_folder() -> Path:
    """Where records are: `evidence` at the root of a checkout, else the copies that come with the package."""
    root = PACKAGE.parents[1]
    if (root / "pyproject.toml").is_file() and root / "src" / PACKAGE.name == PACKAGE:
        return root / "evidence"
    return PACKAGE / "evidence" / "records"


def write(record: Record, folder: Path | None = None) -> Path:
    """Writes the record to SLUG.json, whole or not at all; gives the path."""
    path = (folder or records_folder()) / f"{record.slug}.json"
    text = json.dumps(record.to_json(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read(slug: str, folder: Path | None = None) -> Record | None:
    """The record of a paper, None where there is none yet; raises FormeryError for a file that is no record.

    A record whose verdict is not what its criteria give is none: nobody types a verdict.
    """
    path = (folder or records_folder()) / f"{slug}.json"
    if not path.is_file():
        return None
    try:
        return parsed(path.read_bytes(), slug, str(path))
    except OSError as error:
        raise FormeryError(f"{path} cannot be read: {error.strerror or error}.") from error


def parsed(text: bytes | str, slug: str, path: str) -> Record:
    """The record of a paper from its text, which is in, or will be in, that file; FormeryError where it is none."""
    try:
        record = pydantic.TypeAdapter(Record).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FormeryError(f"{path} is no record: {where}: {first['msg']}; verify {slug} again.") from error
    if record.format != 1 or record.slug != slug:
        raise FormeryError(
            f"{path} is a record of {record.slug!r}, format {record.format}; verify {slug} again."
        )
    if record.verdict != judge(record.criteria):
        raise FormeryError(
            f"{path} says {record.verdict!r}, its criteria {judge(record.criteria)!r}; verify {slug} again."
        )
    return record


def stale(record: Record, module: str) -> bool:
    """Whether the code in `module`, or a model that comes with it, is no longer what the record holds for."""
    return record.digest != digest(module) or record.models != model_digests(record.models)


def model_digests(names: Iterable[str]) -> dict[str, str]:
    """A digest of the files of each shipped model or guide, "absent" where there is no such one."""
    there = set(shipped_names())
    found = {name: _files_digest(SHIPPED / name) if name in there else "absent" for name in sorted(names)}
    KEPT.save()
    return found


def shipped_names() -> list[str]:
    """All models and guides that come with the package."""
    return sorted(path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob("**/formery.json"))


def _files_digest(folder: Path) -> str:
    files = [folder / name for name in ("formery.json", "model.safetensors", "tokenizer.json")]
    parts = [f"{path.name} {KEPT.of(path, _sha256)}\n" for path in files if path.is_file()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
