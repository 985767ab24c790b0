"""Single files of the Hugging Face hub."""

from pathlib import Path
from typing import NamedTuple

import httpx

from trainer.config import ConfigError
from trainer.errors import reason


class Fetched(NamedTuple):
    """A file in the local cache, and the commit that it is of."""

    path: Path
    revision: str


def fetch(repo: str, name: str, revision: str | None, kind: str = "model", instead: str = "") -> Fetched:
    """Download one file, or find it in the cache. Raises ConfigError in one line where neither can be done.

    `instead` says what a user can do without the hub.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind))
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        raise ConfigError(
            f"{repo}: cannot fetch {name} at revision {revision or 'main'} from the hub ({reason(error)}); "
            f"{instead or 'check name and connection, or name a local folder'}"
        ) from error
    # <cache>/<repository>/snapshots/<commit>/<name>
    return Fetched(path, path.parents[name.count("/")].name)
