"""The Hugging Face hub: ids told apart from files, commits, downloads, and its errors in one sentence.

Student weights go through transformers, which asks the hub itself; `describe_refusal` explains its errors too.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lark.common.errors import LarkError

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(LarkError):
    """Says what the hub refused and what to do about it."""


def is_hub_id(source: str | Path) -> bool:
    """Tell whether `owner/name` means a data set of the hub: no file or folder here has that name."""
    return isinstance(source, str) and bool(_ID.fullmatch(source)) and not Path(source).exists()


def find_commit(source: str, revision: str | None, *, setting: str) -> str:
    """Return the commit, 40 hex digits, that `revision` (a commit, branch or tag; None: main) stands for today.

    Asks the hub unless it is a commit already. Raises HubError naming `setting`.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with data_set_errors(source, revision, setting=setting):
        commit = HfApi().dataset_info(source, revision=revision).sha
    assert commit, "the hub names the commit of what it shows"
    return commit


def download_dataset(source: str, commit: str, patterns: Sequence[str], *, setting: str) -> Path:
    """Return the folder with the data set's files that match one of `patterns`, from the hub's cache or the hub.

    Raises HubError naming `setting`.
    """
    from huggingface_hub import snapshot_download

    with data_set_errors(source, commit, setting=setting):
        return Path(snapshot_download(source, repo_type="dataset", revision=commit, allow_patterns=list(patterns)))


def data_set_errors(source: str, revision: str | None, *, setting: str) -> AbstractContextManager[None]:
    """Turn errors about a data set that `setting` names into a HubError."""
    return hub_errors(source, revision, shown=f"{setting}={source}", remedy=f"set {setting} to a local copy")


@contextmanager
def hub_errors(source: str, revision: str | None, *, shown: str, remedy: str) -> Iterator[None]:
    """Turn errors of the hub's library about a data set into a HubError.

    shown: what the user asked for, which begins the sentence.   remedy: what helps without the hub.
    """
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  (of whatever client the library uses)
    )

    try:
        yield
    except (HFValidationError, HTTPError, OSError) as error:
        clause = describe_refusal(error, source, revision)
        if clause is None:  # no network, a file missing in the cache, a broken transfer
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
            clause = (
                f"(revision {revision or 'main'}) is not in the hub's cache and cannot be fetched ({reason[:200]}): "
                "connect to the network"
            )
        raise HubError(f"{shown} {clause}, or {remedy}") from error


def describe_refusal(error: BaseException, source: str, revision: str | None, *, kind: str = "dataset") -> str | None:
    """Say in one clause what the hub refused and what helps; None if it refused nothing.

    error: of huggingface_hub, or of a library that raised its own error from one.
    kind: dataset | model.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    terms = f"accept its terms at https://huggingface.co/{'datasets/' * (kind == 'dataset')}{source}"
    for cause in chain:
        if isinstance(cause, GatedRepoError):
            return (
                f"is given only to accounts that have accepted its terms: {terms} and set HF_TOKEN to a token of that "
                "account"
            )
        if isinstance(cause, RevisionNotFoundError):
            return f"has no revision {revision}: set another"
        if isinstance(cause, RepositoryNotFoundError | HFValidationError):
            return (
                f"is neither a file here nor a {kind} of the hub that you may read: correct it, {terms} if it has any, "
                "and set HF_TOKEN to a valid token if it is private"
            )
    return None
