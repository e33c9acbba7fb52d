"""Checkpoints from the Hugging Face hub, by their id: the few files that make a model, in the hub library's own cache.

What a repository or a server says is checked before it becomes a path in that cache; pickles are never fetched; a file
counts as whole when it has the size that the repository lists.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from formery.errors import FormeryError
from formery.models.hub.session import session
from formery.models.weights import INDEX, PICKLES, WEIGHTS, table

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:@({_WORD}))?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(rf"{_WORD}\.safetensors")
# Beside the weights: settings, tokenizers, and the settings of the layers that sentence-transformers adds.
_SMALL = re.compile(
    r"[\w-][\w.-]*(?<!\.bin\.index)(?<!\.h5\.index)(?<!\.msgpack\.index)\.json|[\w-][\w.-]*\.(model|spm)|vocab\.txt|"
    r"merges\.txt|chat_template\.jinja|\d+_\w+/config\.json",
    re.ASCII,
)
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[\w.-]*")
# Others keep to numbers, but in formats that are not read here.
_PICKLES = PICKLES - {".h5", ".msgpack"}
_LARGEST_INDEX = 100_000_000


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a hub repository: "owner/name", or "owner/name@revision"."""
    return _ID.fullmatch(name) is not None


def fetch(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The local folder of a hub repository's checkpoint, named after its commit; only what is missing is fetched.

    revision: a branch, tag or commit, also as "owner/name@revision"; the main branch unless given. weights: whether
    the safetensors come too. Raises FormeryError where there is no such repository or revision, or no access to it,
    where it holds no safetensors, where the hub cannot be reached and the cache lacks a file, and where the disk
    refuses.
    """
    name, revision = _parted(name, revision)
    with session(name, revision):
        snapshot = _look(name, revision)
        wanted = [file for file in snapshot.files if _SMALL.fullmatch(file)]
        if weights:
            wanted += _weight_files(snapshot)
        if not wanted:
            raise FormeryError(f"{name} holds no file of a checkpoint, {_some(snapshot.files)}.")
        return snapshot.download(wanted)


def headers(name: str, revision: str | None = None) -> dict[str, tuple[str, list[int]]]:
    """The type ("F32") and shape of each tensor of a hub repository, read from its files' headers without the weights.

    Raises FormeryError as `fetch` does, and where a header is damaged.
    """
    name, revision = _parted(name, revision)
    with session(name, revision):
        snapshot = _look(name, revision)
        files = _weight_files(snapshot)
        with ThreadPoolExecutor(max_workers=8) as pool:
            tables = list(pool.map(snapshot.header, files))
    return {tensor: entry for one in tables for tensor, entry in one.items()}


def _parted(name: str, revision: str | None) -> tuple[str, str | None]:
    """The repository and the revision, either of which may come with the name."""
    match = _ID.fullmatch(name)
    if match is None:
        raise FormeryError(f"{name!r:.200} is no repository of the hub: give owner/name, or owner/name@revision.")
    if revision is not None and match[2] not in (None, revision):
        raise FormeryError(f"{name} names one revision and {revision!r:.200} another; give one of them.")
    revision = revision if revision is not None else match[2]
    if revision is not None and not _REVISION.fullmatch(revision):
        raise FormeryError(f"{revision!r:.200} is no revision: give a branch, a tag or a commit.")
    return match[1], revision


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one commit: its files with their sizes; `whole` is False where only the cache could be asked."""

    name: str
    commit: str
    files: Mapping[str, int]
    whole: bool

    def download(self, wanted: Sequence[str]) -> Path:
        """The folder, after all the wanted files are there."""
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(self.name, revision=self.commit, allow_patterns=list(wanted)))
        for file in wanted:
            path = folder / file
            if (size := path.stat().st_size) != self.files[file]:
                # The library knows the size from the answer alone, which need not tell it.
                for damaged in {path.resolve(), path}:
                    damaged.unlink()
                raise FormeryError(
                    f"{file} of {self.name} came with {size} of {self.files[file]} bytes and was removed; try again."
                )
        return folder

    def header(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """The tensors of one file: from the cache, or by reading its beginning over the network."""
        from huggingface_hub import HfApi, try_to_load_from_cache
        from huggingface_hub.errors import SafetensorsParsingError

        if isinstance(cached := try_to_load_from_cache(self.name, file, revision=self.commit), str):
            return {tensor: (entry.dtype, list(entry.shape)) for tensor, entry in table(Path(cached)).items()}
        try:
            found = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.commit).tensors
        except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError) as error:
            raise FormeryError(f"{file} of {self.name} has a damaged header, or is no safetensors file.") from error
        for tensor, info in found.items():
            shaped = isinstance(info.shape, list) and all(type(one) is int and one >= 0 for one in info.shape)
            if not (shaped and isinstance(info.dtype, str)):
                raise FormeryError(f"{file} of {self.name} has a damaged header: {tensor} has no type and shape.")
        return {tensor: (info.dtype, info.shape) for tensor, info in found.items()}


def _look(name: str, revision: str | None) -> _Snapshot:
    """What a repository holds, as the hub tells or, where it cannot be reached, as the cache remembers."""
    import httpx2
    from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    commit = HfApi().resolve_revision(name, revision=revision).resolved
    if not _COMMIT.fullmatch(commit):
        raise FormeryError(f"the hub tells of {commit!r:.100} as the commit of {name}, which is none.")
    try:
        files = {one.path: one.size for one in get_cached_repo_tree(name, revision=commit)}
    except CachedRepoTreeNotFoundError:
        try:
            entries = HfApi().list_repo_tree(name, recursive=True, revision=commit)
            files = {one.path: one.size for one in entries if isinstance(one, RepoFile)}
        except (OfflineModeIsEnabled, httpx2.TransportError):
            folder = Path(snapshot_download(name, revision=commit, local_files_only=True))
            paths = {one.relative_to(folder).as_posix(): one for one in folder.rglob("*") if one.is_file()}
            return _Snapshot(name, commit, {file: one.stat().st_size for file, one in paths.items()}, False)
    for file, size in files.items():
        if not isinstance(file, str) or type(size) is not int or _leads_out(file):
            raise FormeryError(f"{name} lists a file {file!r:.200}, which would lie outside its folder: not fetched.")
    return _Snapshot(name, commit, files, True)


def _leads_out(file: str) -> bool:
    """Whether a name is anything but a place below the folder, on this system or another."""
    windows = PureWindowsPath(file)
    return PurePosixPath(file).is_absolute() or bool(windows.anchor) or ".." in windows.parts


def _weight_files(snapshot: _Snapshot) -> list[str]:
    """The one file of weights or the shards that the index names; raises FormeryError where there is neither."""
    if WEIGHTS in snapshot.files:
        return [WEIGHTS]
    if INDEX not in snapshot.files:
        raise _no_weights(snapshot)
    where = f"{INDEX} of {snapshot.name}"
    if snapshot.files[INDEX] > _LARGEST_INDEX:
        raise FormeryError(f"{where} has {snapshot.files[INDEX]} bytes, more than any list of tensors needs.")
    index = snapshot.download([INDEX]) / INDEX
    try:
        data: Any = json.loads(index.read_bytes())
        shards = list(dict.fromkeys(data["weight_map"].values()))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise FormeryError(f"{where} is damaged: it does not tell which file holds which tensor.") from error
    for shard in shards:
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard) or shard not in snapshot.files:
            lacking = "is not there" if snapshot.whole else "is not in the cache"
            raise FormeryError(f"{where} names the shard {shard!r:.200}, which {lacking}.")
    return shards


def _no_weights(snapshot: _Snapshot) -> FormeryError:
    name = snapshot.name
    if not snapshot.whole:
        return FormeryError(f"the cache holds {name} without its weights: fetch it once while the hub can be reached.")
    files = [file for file in snapshot.files if "/" not in file]
    pickles = [file for file in files if Path(file).suffix in _PICKLES and not _TRAINING.fullmatch(file)]
    if not pickles:
        return FormeryError(f"{name} holds no {WEIGHTS} and no {INDEX}, {_some(files)}.")
    pickle = min(pickles, key=lambda file: (not file.startswith("pytorch_model"), file))
    advice = "ask its owner for safetensors"
    if pickle.startswith("pytorch_model"):
        source, folder = f"'{name}', revision='{snapshot.commit}'", name.split("/")[1]
        advice += (
            " or, where you trust the source, convert it and give the new folder: python -c "
            f"\"import transformers as t; [c.from_pretrained({source}).save_pretrained('{folder}') "
            f'for c in (t.AutoTokenizer, t.{_architecture(snapshot)})]"'
        )
    return FormeryError(
        f"{name} has its weights only as a pickle ({pickle}), which can run any code when opened and is never opened "
        f"here: {advice}."
    )


def _architecture(snapshot: _Snapshot) -> str:
    """The class of transformers that a configuration names, so that a conversion keeps all weights."""
    if 0 < snapshot.files.get("config.json", 0) < _LARGEST_INDEX:
        config = snapshot.download(["config.json"]) / "config.json"
        try:
            data: Any = json.loads(config.read_bytes())
            if re.fullmatch(r"[A-Za-z]\w*", data["architectures"][0], re.ASCII):
                return data["architectures"][0]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            pass
    return "AutoModel"


def _some(files: Iterable[str]) -> str:
    """What is there instead, in few words."""
    named = sorted(files)
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    return f"only {', '.join(named[:5])}{more}" if named else "nothing at all"
