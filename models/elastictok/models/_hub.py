"""Models on the Hugging Face hub: `hf:owner/name`, or `hf:owner/name@revision`.

Needs the extra `hub`; huggingface_hub is imported only when such a name is used.
"""

import re
from pathlib import Path
from types import ModuleType

from ._describe import ModelFileError
from ._weights import INDEX, SHARDS, WEIGHTS

PREFIX = "hf:"
_REFERENCE = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def snapshot(reference: str) -> Path:
    """The folder of a repository's model in the local cache, downloaded if it is not there.

    **Raises:** `ModelFileError` if that cannot be, with what to do.
    """
    repository, revision = _parse(reference)
    hub = _hub()
    try:
        folder = hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["config.json", WEIGHTS, INDEX, SHARDS],
        )
    except hub.errors.RepositoryNotFoundError as error:
        raise ModelFileError(
            f"{reference}: there is no such repository, or you may not read it; check the name, or "
            "log in by `hf auth login`"
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise ModelFileError(f"{reference}: the repository has no revision {revision}") from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise ModelFileError(
            f"{reference} is not in the cache ({hub.constants.HF_HUB_CACHE}) and the hub cannot be "
            "reached, or HF_HUB_OFFLINE is set: fetch it where there is a network by `hf download "
            f"{repository}` and copy the cache, or load a folder"
        ) from error
    except (hub.errors.HfHubHTTPError, OSError) as error:
        raise ModelFileError(f"{reference} could not be fetched: {error}") from error
    return Path(folder)


def upload(folder: Path, reference: str, *, private: bool, message: str, keep: str) -> str:
    """Sends a model folder to a repository, as one commit that deletes other weights in it.

    **Arguments:**

    - `keep`: a file that is not sent if the repository has one.

    **Returns:** the address of the commit.
    """
    repository, revision = _parse(reference)
    api = _hub().HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=revision,
        commit_message=message,
        ignore_patterns=[keep] if api.file_exists(repository, keep, revision=revision) else None,
        delete_patterns=[WEIGHTS, INDEX, SHARDS],
    )
    return commit.commit_url


def _parse(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(
            f"{reference!r} does not name a repository; write hf:owner/name or "
            "hf:owner/name@revision"
        )
    return match["repository"], match["revision"]


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ModelFileError(
            'names that begin with "hf:" need huggingface_hub: pip install "elastictok[hub]"'
        ) from error
    return huggingface_hub
