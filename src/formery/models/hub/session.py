"""The hub library as it is wanted here: quiet unless somebody watches, in time, careful with what a server says."""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from formery.errors import FormeryError

if TYPE_CHECKING:
    from httpx2 import Request, Response
    from huggingface_hub.errors import HfHubHTTPError

_Error = TypeVar("_Error", bound=BaseException)


@contextmanager
def session(name: str, revision: str | None) -> Iterator[None]:
    """A time in which the library works for one repository; what goes wrong becomes one sentence.

    Raises FormeryError where the library raises anything.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import disable_progress_bars, logging

    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            # Whoever sets the variable to 0 wants to see the bars in any case.
            if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
                stack.enter_context(disable_progress_bars())
        hooks = get_session().event_hooks
        for when, hook in (("request", in_time), ("response", no_paths)):
            hooks[when].append(hook)
            stack.callback(hooks[when].remove, hook)
        try:
            yield
        except FormeryError:
            raise
        except Exception as error:  # A server's nonsense makes the library fail in any way.
            raise FormeryError(sentence(error, name, revision)) from error


def in_time(request: "Request") -> None:
    """Limits the waits for which the library sets no limit."""
    from huggingface_hub import constants

    if request.method in ("GET", "HEAD"):
        limits = request.extensions.get("timeout", {})
        for kind in ("connect", "read"):
            if limits.get(kind) is None:
                limits = limits | {kind: constants.HF_HUB_DOWNLOAD_TIMEOUT}
        request.extensions["timeout"] = limits


def no_paths(response: "Response") -> None:
    """Refuses paths where the library expects digests, which it makes into paths, and whole files instead of parts.

    Raises FormeryError, before the library sees the answer.
    """
    host, named = response.url.host, [response.headers.get("X-Repo-Commit", "")]
    if response.request.method == "HEAD":
        named += [response.headers.get(one, "").removeprefix("W/") for one in ("ETag", "X-Linked-Etag")]
    if re.search("/api/models/[^/]+/[^/]+/tree/", response.url.path) and response.is_success:
        response.read()
        named += [str(one["lfs"]["oid"]) for one in response.json() if one.get("lfs")]
    if paths := [one for one in named if "/" in one or "\\" in one]:
        raise FormeryError(f"{host} gives {paths[0]!r:.200} as the digest of a file, which is a path: not fetched.")
    part = re.fullmatch(r"bytes=(\d+)-(\d+)", response.request.headers.get("Range", ""))
    if part and response.is_success:
        unknown = 0 if response.status_code == 206 else sys.maxsize
        if int(response.headers.get("Content-Length", unknown)) > int(part[2]) - int(part[1]) + 1:
            raise FormeryError(f"{host} sends whole files only, so the headers of their weights cannot be read alone.")


def sentence(error: BaseException, name: str, revision: str | None) -> str:
    """What went wrong, told once and with what to do."""
    import httpx2
    from huggingface_hub import constants, errors

    hub, cache, which = constants.ENDPOINT, constants.HF_HUB_CACHE, name + (f" at {revision}" if revision else "")
    if refusal := _among(error, errors.HfHubHTTPError):
        return _refused(refusal, hub, name, which, revision or "main")
    if _among(error, errors.OfflineModeIsEnabled):
        return f"{which} is not wholly in {cache}, and HF_HUB_OFFLINE is set: unset it to fetch what is missing."
    if lost := _among(error, httpx2.TransportError):
        kind = "does not answer in time" if isinstance(lost, httpx2.TimeoutException) else "cannot be reached"
        reason = f" ({str(lost).rstrip('.'):.200})" if str(lost) else ""
        return f"{hub} {kind}{reason}, and {which} is not wholly in {cache}: check the network, then try again."
    if _among(error, errors.HFValidationError):
        return f"{name} cannot be the name of a hub repository ({str(error).rstrip('.'):.200})."
    if isinstance(error, OSError) and error.errno is not None:
        return f"{cache} cannot be written or read ({error.strerror}): repair that, or set HF_HOME to another folder."
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"a file of {name} was cut short on its way and is not kept: try again."
    reason = f"{type(error).__name__}: {str(error).rstrip('.'):.200}"
    return f"{hub} answered the request for {which} in no way that a hub does ({reason}): check HF_ENDPOINT."


def _refused(error: "HfHubHTTPError", hub: str, name: str, which: str, revision: str) -> str:
    """What an answer with an error status means."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms at {hub}/{name}, and set HF_TOKEN to a token of that account."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision}: give a branch, a tag or a commit that {hub}/{name} lists."
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"there is no {name} at {hub}, or it is private: check the name, or set HF_TOKEN to a token for it."
    if status == 403:
        return f"{hub} forbids access to {name}: set HF_TOKEN to a token that may read it."
    return f"{hub} answered the request for {which} with an error ({status}): try again later."


def _among(error: BaseException, kind: type[_Error]) -> _Error | None:
    """The error or the nearest of its causes that is of this kind."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, kind):
            return cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None
