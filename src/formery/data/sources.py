"""Where real data are on this machine, and how to fetch them from the people who publish them.

A data file has a name like "mt_multi30k/train.en.gz". It is looked for below the folder that FORMERY_DATA
names, then in the cache (FORMERY_CACHE, or the platform's own cache folder).
"""

import gzip
import logging
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from formery.errors import FormeryError, unknown


@dataclass(frozen=True)
class Dataset:
    """Files that somebody publishes below `base_url`: name -> sha256."""

    name: str
    folder: str
    home: str
    base_url: str
    licence: str
    files: Mapping[str, str]


GITHUB = "https://raw.githubusercontent.com"
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="multi30k",
            folder="mt_multi30k",
            home="https://github.com/multi30k/dataset",
            base_url=f"{GITHUB}/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw",
            licence="no formal licence; derived from Flickr30k, for non-commercial research and education",
            files={
                "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
                "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
                "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
                "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
                "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
                "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
            },
        ),
        Dataset(
            name="tiny-shakespeare",
            folder="lm_tinyshakespeare",
            home="https://github.com/karpathy/char-rnn",
            base_url=f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare",
            licence="public domain (Shakespeare)",
            files={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
        ),
        Dataset(
            name="wikitext-2",
            folder="lm_wikitext2",
            home="https://github.com/pytorch/examples",
            base_url=f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2",
            licence="CC BY-SA 3.0 and GFDL (Wikipedia text; Merity et al. 2016)",
            files={
                "train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
                "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            },
        ),
    )
}


def cache() -> Path:
    """The folder that `get` fills."""
    return Path(os.environ.get("FORMERY_CACHE") or pooch.os_cache("formery"))


def find(name: str) -> Path:
    """The file of that name, or it packed as `.gz`; raises FormeryError, saying how to get it, if absent."""
    roots = [Path(root) for root in (os.environ.get("FORMERY_DATA"), cache()) if root]
    for root in roots:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    fetch = [
        f"`formery data get {d.name}` fetches it"
        for d in DATASETS.values()
        if name.startswith(f"{d.folder}/")
    ]
    how = " or ".join([*fetch, "set FORMERY_DATA to a folder that has it"])
    raise FormeryError(f"the data file {name} is not in {' or '.join(map(str, roots))}: {how}.")


def read(name: str) -> str:
    """The text of a data file, unpacked; raises FormeryError when it is absent or damaged."""
    path = find(name)
    try:
        content = path.read_bytes()
        if not content:
            raise EOFError("it is empty")
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FormeryError(
            f"the data file {path} cannot be read: {error}; remove it and fetch it again."
        ) from error


def to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def get(name: str, base_url: str | None = None, tell: Callable[[str], None] = to_stderr) -> list[Path]:
    """Fetches a dataset into the cache, each file checked and then moved into place whole; gives the paths.

    What is there already and right is kept. `base_url` names a mirror; `tell` gets where the data are from
    and under which licence. Raises FormeryError for a name that is not known, an address that does not
    answer or a wrong checksum.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    dataset = DATASETS[name]
    folder = cache() / dataset.folder
    tell(f"{dataset.name} from {dataset.home}; licence: {dataset.licence}.")
    return [
        download(f"{(base_url or dataset.base_url).rstrip('/')}/{file}", checksum, folder / file)
        for file, checksum in dataset.files.items()
    ]


def download(url: str, checksum: str, path: Path) -> Path:
    """Fetches one file of a known sha256; raises FormeryError, leaving `path` as it was, when that fails."""
    pooch.get_logger().setLevel(logging.WARNING)
    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    try:
        pooch.retrieve(url, f"sha256:{checksum}", fname=path.name, path=path.parent, downloader=fetch)
    except requests.HTTPError as error:
        raise FormeryError(f"cannot fetch this file: {error}; check the address or try later.") from error
    except requests.RequestException as error:
        raise FormeryError(
            f"cannot fetch {url} ({type(error).__name__}); check the network, or put the file at {path}."
        ) from error
    except ValueError as error:
        raise FormeryError(
            f"what {url} gave is not the published file (its sha256 is not {checksum}); nothing was kept."
        ) from error
    except OSError as error:
        raise FormeryError(
            f"cannot write {path}: {error.strerror or error}; nothing was changed there."
        ) from error
    return path
