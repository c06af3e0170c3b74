"""Data sets of the Hugging Face hub: told apart from files, pinned to a commit, fetched; errors in one sentence."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lark.common.errors import LarkError

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(source: str | Path) -> bool:
    """Whether `owner/name` means a data set of the hub: there is no such file or folder here."""
    return isinstance(source, str) and bool(_ID.fullmatch(source)) and not Path(source).exists()


def commit_of(source: str, revision: str | None, *, setting: str) -> str:
    """The commit, 40 hex digits, that `revision` (a commit, branch or tag; None: main) stands for today.

    Asks the hub unless it is a commit already. Raises ValueError naming `setting`.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with hub_errors(source, revision, setting):
        commit = HfApi().dataset_info(source, revision=revision).sha
    assert commit, "the hub names the commit of what it shows"
    return commit


def fetched(source: str, commit: str, patterns: Sequence[str], *, setting: str) -> Path:
    """The folder with the data set's files that match one of `patterns`, from the hub's cache or the hub.

    Raises ValueError naming `setting`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(source, commit, setting):
        return Path(snapshot_download(source, repo_type="dataset", revision=commit, allow_patterns=list(patterns)))


class HubError(LarkError):
    """What the hub had to say, and what to do."""


@contextmanager
def hub_errors(source: str, revision: str | None, setting: str) -> Iterator[None]:
    """Errors of the hub's library as HubError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whatever client the library uses
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    local = f"set {setting} to a local copy"
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{source}"
        raise HubError(
            f"{setting}={source} is given only to accounts that have accepted its terms: accept them at {page} and set "
            f"HF_TOKEN to a token of that account, or {local}"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{setting}={source} has no revision {revision}: set another, or {local}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"{setting}={source} is neither a file here nor a data set of the hub that you may read: correct it, set "
            f"HF_TOKEN if it is private, or {local}"
        ) from error
    except (HTTPError, OSError) as error:  # no network, not in the cache, a broken transfer
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(
            f"{setting}={source} (revision {revision or 'main'}) is not in the hub's cache and cannot be fetched "
            f"({reason[:200]}): connect to the network, or {local}"
        ) from error
