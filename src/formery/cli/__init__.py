"""The command line: it reads what is asked for, has the rooms below do it, and prints what they give."""

from formery.cli import catalogue, decoding, serving, training  # each makes its commands known
from formery.cli.app import INTERRUPTED, app

__all__ = ["INTERRUPTED", "app", "catalogue", "decoding", "serving", "training"]
