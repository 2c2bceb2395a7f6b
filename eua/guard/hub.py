"""Find and upload one file of a model, in its folder or in its repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from eua.errors import EUAError, in_one_line


class MissingFileError(EUAError):
    """The folder or repository does not contain the file; nothing else is wrong."""


def find_file(
    place: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The path of ``name`` in a folder, or of a copy downloaded from a repository on the hub.

    Args:
        place: a folder, which takes precedence, or a repository. A ``Path`` is always a folder.
        name: of the file.
        revision, subfolder, token, cache_dir, force_download, local_files_only: as in transformers' ``from_pretrained``.

    Raises:
        MissingFileError: if the folder or repository or, offline, its downloaded part has no such file.
        EUAError: if there is no such repository, or if the hub cannot be reached.
    """
    path = Path(place, subfolder, name)
    if path.is_file():
        return path
    if os.path.isfile(place):
        raise EUAError(f"{place} is a file, but a folder or a repository on the hub is expected: pass the file's folder.")
    if isinstance(place, os.PathLike) or os.path.exists(place) or not _can_be_repository(place):
        raise MissingFileError(f"{Path(place, subfolder)} contains no {name}")
    nowhere = f"{place!r} is not a folder on this machine, and"
    try:
        downloaded = hf_hub_download(
            place,
            name,
            revision=revision,
            subfolder=subfolder or None,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    except LocalEntryNotFoundError as error:
        if local_files_only or constants.HF_HUB_OFFLINE:
            raise MissingFileError(f"{nowhere} its {name} was not downloaded before, and downloads are turned off") from error
        raise EUAError(
            f"{nowhere} the hub cannot be reached to look for its {name} ({in_one_line(error)}): check the connection, or set "
            "HF_HUB_OFFLINE=1 to use only files that were downloaded before."
        ) from error
    except EntryNotFoundError as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise MissingFileError(f"The repository {place} on the hub contains no {Path(subfolder, name)}{at}") from error
    except RevisionNotFoundError as error:
        raise EUAError(
            f"The repository {place} on the hub has no revision {revision!r}: check the branch, tag or commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise EUAError(
            f"{nowhere} the hub has no such repository that you may read ({in_one_line(error)}): check the name, and log in "
            "(`hf auth login`, or token=...) if it is private or gated."
        ) from error
    except Exception as error:  # from huggingface_hub and its HTTP client, whose errors have no other common base class
        raise EUAError(
            f"{nowhere} its {name} cannot be downloaded from the hub ({in_one_line(error)}): check the connection."
        ) from error
    return Path(downloaded)


def send_file(
    path: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload one file, and nothing else, to a repository, which is created if it does not exist.

    Raises:
        EUAError: if the name cannot be a repository's, or if the hub does not accept the upload.
    """
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        return api.upload_file(
            path_or_fileobj=path,
            path_in_repo=path.name,
            repo_id=repository,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    except Exception as error:  # as in find_file
        raise EUAError(
            f"{path.name} cannot be uploaded to {repo_id!r} ({in_one_line(error)}): check the name, the connection, and that "
            "you are logged in with a token that may write (`hf auth login`, or token=...)."
        ) from error


def _can_be_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
