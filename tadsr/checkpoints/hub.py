"""Download from the Hugging Face hub and publish to it; the only code that uses the network."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tadsr.checkpoints.layout import BASE_MODEL_MIRRORS, NATIVE, OFFICIAL, choose_weight_file
from tadsr.errors import CheckpointError

_TIMEOUT_S = 20


def needed_files(
    all_files: Sequence[str], *, variant: str | None = None, adapter: str | None = None
) -> list[str]:
    """Choose the files of a repository that loading reads.

    Args:
        all_files: Paths within the repository, with "/".
        variant: Weight files' variant, or None.
        adapter: A path within the repository to read adapters from; None for the usual file.

    Returns:
        Their paths, sorted: no second weights in another format, nothing unrelated.

    Raises:
        CheckpointError: The repository has no checkpoint, or not the variant.
    """
    names = set(all_files)
    is_official = f"{OFFICIAL.component('vae').folder}/config.json" in names
    fmt = OFFICIAL if is_official else NATIVE
    if not is_official and "model_index.json" not in names:
        raise CheckpointError(
            "a repository must have model_index.json (native) or time_vae/ (published), found "
            f"{', '.join(sorted(names)[:8]) or 'no files'}; it holds no TADSR checkpoint"
        )
    wanted = {*fmt.root_files, adapter or fmt.adapter_file}
    for component in fmt.components:
        inside = [
            PurePosixPath(f).name for f in names if str(PurePosixPath(f).parent) == component.folder
        ]
        chosen = [component.config, *component.other_files]
        if component.stems and (inside or component.is_required):
            weights = choose_weight_file(inside, component, fmt, variant, f"{component.folder}/")
            chosen.append(weights.name)
            if weights.is_index:
                chosen += _shards(inside, weights.name, component.stems)
        wanted.update(f"{component.folder}/{name}" for name in chosen)
    return sorted(wanted & names)


def download(
    repo_id: str,
    *,
    adapter: str | Path | None = None,
    variant: str | None = None,
    names: Callable[[Sequence[str]], Sequence[str]] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Fetch what loading needs of a hub repository into the hub's cache.

    Interrupted downloads resume, and files in the cache are not fetched again. Without a
    connection the cache is used if it has the repository.

    Args:
        repo_id: "owner/name".
        adapter: A local file, or a path within the repository; None for the usual one.
        variant: Weight files' variant, or None.
        names: Chooses the files to fetch from those of the repository, instead of a checkpoint's;
            all must be there.
        revision: Branch, tag or commit.
        cache_dir: The cache; None for the hub's usual place.
        local_files_only: Never connect.
        token: Access token; None for the stored one.

    Returns:
        The folder of the snapshot.

    Raises:
        CheckpointError: The repository is absent, private, unreachable or no checkpoint.
    """
    where = {"revision": revision, "cache_dir": cache_dir}
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _from_cache(repo_id, where, "only the cache may be used")
    try:
        # Not list_repo_files: that retries for half a minute where there is no network.
        info = HfApi().model_info(repo_id, revision=revision, token=token, timeout=_TIMEOUT_S)
    except Exception as error:  # each HTTP library raises its own types
        if _is_final(error):
            raise _explain(repo_id, revision, error) from error
        return _from_cache(repo_id, where, f"the hub cannot be reached ({_short(error)})")
    files = [sibling.rfilename for sibling in info.siblings or ()]
    inside = None if adapter is None or Path(adapter).exists() else str(adapter)
    try:
        if names is None:
            chosen = needed_files(files, variant=variant, adapter=inside)
        else:
            chosen = _require(names(files), files)
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id} on the hub: {error}") from error
    try:
        # The hub reads these as patterns, so names are escaped to mean themselves.
        patterns = [glob.escape(name) for name in chosen]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, token=token, **where))
    except Exception as error:  # as above
        raise _explain(repo_id, revision, error) from error


def publish(
    repo_id: str,
    write: Callable[[Path], object],
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a folder to a hub repository, in one commit; the repository is made if it is new.

    Args:
        repo_id: "owner/name".
        write: Fills the folder at a path that does not exist yet; called once the hub has agreed.
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch that exists; None for the main one.
        commit_message: None for a plain one.
        token: Access token; None for the stored one.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: The hub refuses, cannot be reached, or the folder cannot be written.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # each HTTP library raises its own types
        raise _explain_publishing(repo_id, revision, error) from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write(folder)
        try:
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or "Upload a TADSR model",
            )
        except Exception as error:  # as above
            raise _explain_publishing(repo_id, revision, error) from error
    return str(commit.commit_url)


def _explain_publishing(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        reason = f"cannot be: {_short(error)}; name it 'owner/name'"
    elif isinstance(error, LocalTokenNotFoundError) or status == 401:
        reason = "needs a login: `hf auth login` with a token that may write, or give token="
    elif status == 403:
        reason = "is not yours to write to: use a token that may, or another owner's name"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"has no branch {revision!r}: make it first or leave revision out"
    else:
        reason = f"could not be written ({_short(error)}): nothing was published, try again"
    return CheckpointError(f"the repository {repo_id} on the hub {reason}")


def _require(names: Sequence[str], files: Sequence[str]) -> list[str]:
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(
            f"it must hold {', '.join(names)}, but lacks {', '.join(missing)}; copy them into one "
            "folder and give its path"
        )
    return list(names)


def _from_cache(repo_id: str, where: dict[str, object], why: str) -> Path:
    try:
        return Path(snapshot_download(repo_id, local_files_only=True, **where))
    except (LocalEntryNotFoundError, FileNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{repo_id} must be in the hub's cache ({where['cache_dir'] or constants.HF_HUB_CACHE})"
            f" because {why}, but is not there; connect once, or copy the folder here and give its "
            f"path instead{_mirrors(repo_id)}"
        ) from error


def _shards(names: Sequence[str], index_name: str, stems: Sequence[str]) -> list[str]:
    """Return shards beside an index: same suffix, and its variant wherever the name has it."""
    suffix = "safetensors" if ".safetensors." in index_name else "bin"
    variant = index_name.rpartition(".index")[2].removesuffix(".json").strip(".")
    return [
        n
        for n in names
        if n.startswith(tuple(stems))
        and n.endswith(f".{suffix}")
        and "-of-" in n
        and ((f".{variant}-" in n or f".{variant}." in n) if variant else n.count(".") == 1)
    ]


def _is_final(error: Exception) -> bool:
    """Tell an answer of the hub from a lack of connection."""
    final = (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError)
    return isinstance(error, final)


def _explain(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    if isinstance(error, GatedRepoError):
        reason = "asks for consent: accept its terms on its page, then `hf auth login`"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"has no revision {revision!r}: leave revision out or check it on its page"
    elif isinstance(error, RepositoryNotFoundError):
        reason = (
            "does not exist or is private: check the spelling; for a private one `hf auth login` "
            f"or give token={_mirrors(repo_id)}"
        )
    else:
        reason = f"could not be downloaded ({_short(error)}): try again, it resumes"
    return CheckpointError(f"the repository {repo_id} on the hub {reason}")


def _mirrors(repo_id: str) -> str:
    """Return where Stable Diffusion 2.1-base is, for an error about one that is not found."""
    names = [name for name in BASE_MODEL_MIRRORS if name != repo_id]
    if PurePosixPath(repo_id).name != PurePosixPath(names[0]).name:
        return ""
    return f"; copies of Stable Diffusion 2.1-base are {' and '.join(names)}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
