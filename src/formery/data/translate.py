"""The work `translate`: English image captions into German, Multi30k (Elliott et al. 2016), raw and cased."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from sacrebleu.metrics import BLEU, CHRF

from formery.data.base import Example, Split, Work, check_outputs, check_split
from formery.data.sources import read
from formery.errors import FormeryError

FILES: dict[str, str] = {"train": "train", "valid": "val", "test": "test_2016_flickr"}


class Translate(Work[tuple[str, str]]):
    """29,000 / 1,014 / 1,000 sentence pairs; the test split is test_2016_flickr."""

    name: ClassVar = "translate"
    kind: ClassVar[Literal["encoder-decoder"]] = "encoder-decoder"
    description: ClassVar = "translate image captions from English into German (Multi30k)"
    higher_is_better: ClassVar = {"bleu": True, "chrf": True}

    def texts(self, split: Split) -> Iterator[tuple[str, str]]:
        """(source, target) pairs; raises FormeryError when the files are absent or differ in length."""
        check_split(split)
        names = [f"mt_multi30k/{FILES[split]}.{language}.gz" for language in ("en", "de")]
        source, target = (read(name).removesuffix("\n").split("\n") for name in names)
        if len(source) != len(target):
            raise FormeryError(
                f"{names[0]} has {len(source)} lines, {names[1]} has {len(target)}; fetch the dataset again."
            )
        return ((s.strip(), t.strip()) for s, t in zip(source, target, strict=True))

    def candidates(self, split: Split) -> Iterator[Example]:
        for line, (source, target) in enumerate(self.texts(split), 1):
            yield Example(source, target, f"{FILES[split]}:{line}")

    def quality(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float | str]:
        """Corpus BLEU (13a, cased) and chrF2, 0 to 100, with the signatures of sacreBLEU (Post 2018)."""
        check_outputs(outputs, examples)
        references = [[example.reference for example in examples]]
        bleu, chrf = BLEU(), CHRF()
        return {
            "bleu": bleu.corpus_score(outputs, references).score,
            "chrf": chrf.corpus_score(outputs, references).score,
            "signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }
