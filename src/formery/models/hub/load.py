"""From a published folder to a model of our parts: configuration read, header checked, weights placed."""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formery.data.published import read_tokenizer
from formery.errors import FormeryError, first_line, shown
from formery.models import weights
from formery.models.conventions import Conventions, tokens
from formery.models.filling import Group, fill
from formery.models.hub import sentences
from formery.models.hub.config import Config, read_json
from formery.models.hub.family import Family, family_of
from formery.models.hub.names import groups
from formery.models.weights import Entry

CONFIG, GENERATION, PREPROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
_FROM_GENERATION = (
    "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
)  # fmt: skip


def is_published(folder: Path) -> bool:
    """Whether the folder is in the manner of Hugging Face."""
    return (folder / CONFIG).is_file()


def load(folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    """The model in a published folder; raises FormeryError, saying what and where, for anything that does not fit."""
    found = renamed(weights.table_of(folder))
    model, family = laid_out(folder, found)
    wanted = places(model, family, found)
    fill(model, wanted, found, dtype, device)
    model.tokenizer = sentences.lowering(folder, read_tokenizer(folder))
    if (folder / PREPROCESSOR).is_file() and hasattr(model, "preprocessor"):
        model.preprocessor = read_json(folder / PREPROCESSOR)
    return model.eval()


def renamed(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors by today's names: the first BERTs called a norm's weight gamma, and its bias beta.

    Raises FormeryError where a tensor is there under both names.
    """
    endings = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    named: dict[str, Entry] = {}
    for name, entry in found.items():
        old = next((one for one in endings if name.endswith(one)), "")
        new = name.removesuffix(old) + endings.get(old, "")
        if new in named:
            raise FormeryError(f"{entry.path} has {shown(new)} under its older name too, and one of the two is wrong.")
        named[new] = entry
    return named


def laid_out(folder: Path, found: Mapping[str, Entry]) -> tuple[Any, Family]:
    """The model that a folder's configuration tells of, on the meta device (shapes without memory), and its family."""
    config = configuration(folder, found)
    family = family_of(config)
    try:
        with torch.device("meta"):
            model = family.build(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise FormeryError(
            f"{config.where} tells of a {family.title} that cannot be built ({first_line(error)})."
        ) from error
    model = sentences.headed(folder, model)
    model.conventions = conventions(config)
    model.origin = family.architectures[0]
    return model, family


def configuration(folder: Path, found: Mapping[str, Entry]) -> Config:
    """The folder's settings; what its generation settings say of special tokens goes before what the model's do."""
    data = read_json(folder / CONFIG)
    if (folder / GENERATION).is_file():
        given = read_json(folder / GENERATION)
        data |= {name: given[name] for name in _FROM_GENERATION if given.get(name) is not None}
    return Config(data, str(folder / CONFIG), found.keys())


def conventions(config: Config) -> Conventions:
    """Which tokens end a text, fill rows, or are never written; FormeryError where the settings are no tokens."""

    def listed(name: str) -> tuple[int, ...]:
        value = config.get(name, default=[])
        return tuple(tokens(f"{config.where}: {name}", [value] if isinstance(value, int) else value))

    bad = config.get("bad_words_ids", default=[])
    if not isinstance(bad, list):
        raise config.wrong("bad_words_ids", "should be a list of lists of tokens")
    alone = [one[0] for one in bad if isinstance(one, list) and len(one) == 1]
    return Conventions(
        stop=listed("eos_token_id") or None,
        begin=next(iter(listed("bos_token_id")), None),
        pad=next(iter(listed("pad_token_id")), None),
        suppressed=tuple(dict.fromkeys([*listed("suppress_tokens"), *tokens("bad_words_ids", alone)])),
        suppressed_first=listed("begin_suppress_tokens"),
    )


def places(model: Any, family: Family, found: Mapping[str, Entry]) -> list[Group]:
    """Where each weight lies; raises FormeryError for missing, unknown or misshapen tensors."""
    all_groups = groups(model, family.places(model))
    prefix = f"{family.base}." if family.base else ""
    if prefix and not any(name.startswith(prefix) for name in found):
        all_groups = [Group(one.stored.removeprefix(prefix), one.ours, one.layout) for one in all_groups]
    parameters = dict(model.named_parameters())
    wanted = {one.stored: one.shape(parameters) for one in all_groups}
    known = {name: entry for name, entry in found.items() if name in wanted or not _beside(name, family, found)}
    weights.check(_shown(found), known, wanted)
    return all_groups


def _beside(name: str, family: Family, found: Mapping[str, Entry]) -> bool:
    """Whether a tensor may lie beside the weights: it can be computed, or is a copy of another."""
    bare = name.removeprefix(f"{family.base}.") if family.base else name
    if any(fnmatch.fnmatchcase(bare, pattern) for pattern in family.derived):
        return True
    original = family.copies.get(name)
    if original is not None and original not in found:
        original = original.removeprefix(f"{family.base}.")
    if original is None or original not in found:
        return False
    ours, theirs = found[name], found[original]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not _equal(ours, theirs):
        raise FormeryError(
            f"{ours.path}: {name} should be a copy of {original}, since the configuration ties the two, but they "
            "differ; if they are meant to, set tie_word_embeddings to false in config.json."
        )
    return True


def _equal(ours: Entry, theirs: Entry) -> bool:
    with weights.opened(ours.path) as one, weights.opened(theirs.path) as other:
        return torch.equal(one.get_tensor(ours.name), other.get_tensor(theirs.name))


def _shown(found: Mapping[str, Entry]) -> Path:
    """The file, or the folder of the shards."""
    paths = {entry.path for entry in found.values()}
    first = next(iter(paths), Path())
    return first if len(paths) <= 1 else first.parent

