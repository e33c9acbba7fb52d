"""The catalogue as pages: search, a page for each paper and each work, and a viewer of decoding."""

import importlib.util

from formery.errors import FormeryError


def need() -> None:
    """FormeryError where what serves pages is not installed."""
    missing = [name for name in ("starlette", "uvicorn", "pygments") if importlib.util.find_spec(name) is None]
    if missing:
        raise FormeryError(f"the pages need {' and '.join(missing)}: pip install 'formery[web]'.")
