"""A paper's card: what it does and claims, and the check that measures the claim."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from formery.errors import FormeryError, unknown
from formery.evidence.measured import Budget, Measured

Training = Literal["", "none", "added", "whole"]
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Paper:
    """One paper, in our own words.

    slug: its name here. part: of a transformer, that it changes ("decoding"). domain: what it was shown on.
    does, claims: a sentence or two. needs: what a full test of the claim would need that is not at hand.
    check: measures the claim within a budget; None until there is one. works: what the check runs on.
    name: what it is called for short. training: "none" (a trained model is taken as it is), "added" (small parts are
    trained on top of it, or it is tuned a little), "whole" (a model is trained with it). sought: what those look for
    whom it would help, in their words. related: by slug, what a paper
    shares with this one. added: the day it came in here. module: holds its code; filled by `publish`.
    """

    slug: str
    title: str
    year: int
    part: str
    domain: str
    does: str
    claims: str
    needs: str = ""
    check: Callable[[Budget], Measured] | None = None
    works: tuple[str, ...] = ()
    name: str = ""
    training: Training = ""
    sought: str = ""
    related: Mapping[str, str] = field(default_factory=dict)
    added: str = ""
    module: str = ""

    def __post_init__(self) -> None:
        if not SLUG.fullmatch(self.slug):
            raise FormeryError(
                f"{self.slug!r} is no slug: lower-case words and digits, joined by single hyphens."
            )
        for name in ("title", "part", "domain", "does", "claims"):
            if not getattr(self, name).strip():
                raise FormeryError(f"the paper {self.slug} has no {name}; say it in a sentence.")
        if self.training not in get_args(Training):
            raise FormeryError(f"the paper {self.slug} trains {self.training!r}; there are none, added and whole.")
        if not 1900 <= self.year <= 2100:
            raise FormeryError(f"the paper {self.slug} is from {self.year}, which is no year of publication.")


PAPERS: dict[str, Paper] = {}


def publish(paper: Paper) -> Paper:
    """Makes a paper known by its slug; called in the module that holds its code."""
    if not paper.module:
        # As `namedtuple` and `Enum` do: the caller is the module that the record will hold for.
        paper = replace(paper, module=sys._getframe(1).f_globals["__name__"])
    if PAPERS.get(paper.slug, paper).module != paper.module:
        raise FormeryError(
            f"two papers are named {paper.slug}: in {PAPERS[paper.slug].module} and {paper.module}."
        )
    PAPERS[paper.slug] = paper
    return paper


def paper(slug: str) -> Paper:
    """The paper of that slug; raises FormeryError, with the nearest slugs, when there is none."""
    if slug not in PAPERS:
        raise unknown("paper", slug, PAPERS)
    return PAPERS[slug]
