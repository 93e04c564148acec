"""Download from the Hugging Face hub and publish to it; the only code that uses the network."""

from __future__ import annotations

import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from tadsr.checkpoints.hub_files import UNREADABLE, Snapshot, may_pass, retry, status_of
from tadsr.checkpoints.json_files import user_path
from tadsr.checkpoints.layout import (
    BASE_MODEL_MIRRORS,
    NATIVE,
    OFFICIAL,
    Component,
    WeightFile,
    choose_weight_file,
)
from tadsr.errors import CheckpointError, reason_of

_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
_TIMEOUT_S = 20


def needed_files(
    all_files: Sequence[str],
    *,
    variant: str | None = None,
    adapter: str | None = None,
    needs_adapter: bool = True,
) -> list[str]:
    """Choose the files of a repository that loading reads; `adapter` is a path within it."""
    names = set(all_files)
    inside: dict[str, list[str]] = defaultdict(list)
    for path in map(PurePosixPath, names):
        inside[str(path.parent)].append(path.name)
    vae = OFFICIAL.component("vae")
    is_official = vae.config in inside[vae.folder]
    fmt = OFFICIAL if is_official else NATIVE
    if not is_official and "model_index.json" not in names:
        raise CheckpointError(
            "a repository must have model_index.json (native) or time_vae/ (published), found "
            f"{', '.join(sorted(names)[:8]) or 'no files'}; it holds no TADSR checkpoint"
        )
    if adapter or (is_official and needs_adapter):
        _require([adapter or fmt.adapter_file], names)
    wanted = {*fmt.root_files, adapter or fmt.adapter_file}
    for component in fmt.components:
        files = inside[component.folder]
        if not files and not component.is_required:
            continue
        _require([f"{component.folder}/{component.config}"], names)
        chosen = [component.config, *component.other_files]
        if component.stems:
            weights = choose_weight_file(files, component, fmt, variant, f"{component.folder}/")
            chosen.append(weights.name)
            if weights.is_index:
                chosen += _shards(files, weights, component)
        wanted.update(f"{component.folder}/{name}" for name in chosen)
    text_encoder, tokenizer = (fmt.component(n).folder for n in ("text_encoder", "tokenizer"))
    has_tokenizer = any(needed <= set(inside[tokenizer]) for needed in _TOKENIZERS)
    can_embed = has_tokenizer if inside[text_encoder] else inside["prompt_embeddings"]
    if not can_embed:
        raise CheckpointError(
            "it must hold text_encoder/ and tokenizer/ with vocab.json and merges.txt or "
            "tokenizer.json, or prompt_embeddings/: without either no prompt can be embedded"
        )
    return sorted(wanted & names)


def download(
    repo_id: str,
    *,
    adapter: str | Path | None = None,
    needs_adapter: bool = True,
    variant: str | None = None,
    names: Callable[[Sequence[str]], Sequence[str]] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Fetch what loading needs of a hub repository into the hub's cache.

    What is cut is resumed, now or by the next call; what arrived is checked against the hashes
    that the hub lists, and not fetched again. Where the hub cannot be reached, the cache is used if
    it has the repository.

    Args:
        adapter: A local file, or a path within the repository; None for the usual one.
    """
    cache = None if cache_dir is None else user_path(cache_dir)
    is_local = adapter is not None and os.path.exists(user_path(adapter))
    inside = None if adapter is None or is_local else str(adapter)

    def choose(files: Sequence[str]) -> list[str]:
        if names is not None:
            return _require(names(files), files)
        return needed_files(
            files, variant=variant, adapter=inside, needs_adapter=needs_adapter and not is_local
        )

    def from_cache(why: str) -> Path:
        return _from_cache(repo_id, revision, cache, choose, why)

    revision = revision or None
    Snapshot(repo_id, revision or constants.DEFAULT_REVISION)  # it may be no name at all
    if local_files_only or constants.HF_HUB_OFFLINE:
        return from_cache("only the cache may be used")
    try:
        info = _list(repo_id, revision, token)
    except Exception as error:  # each HTTP library raises its own types
        if not may_pass(error):
            raise _explain(repo_id, revision, error) from error
        try:
            return from_cache("")
        except CheckpointError:
            raise _explain(repo_id, revision, error) from error
    files = {file.rfilename: file for file in info.siblings or ()}
    snapshot = Snapshot(repo_id, str(info.sha), cache, token)
    try:
        snapshot.fetch([files[name] for name in choose(list(files))])
        snapshot.refer(revision or constants.DEFAULT_REVISION)
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id} on the hub: {error}") from error
    except Exception as error:  # as above
        raise _explain(repo_id, revision, error) from error
    return snapshot.folder


def publish(
    repo_id: str,
    write: Callable[[Path], object],
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a folder to a hub repository in one commit; the repository is made if it is new."""
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
        reason = f"cannot be: {reason_of(error)}; name it 'owner/name'"
    elif isinstance(error, LocalTokenNotFoundError) or status == 401:
        reason = "needs a login: `hf auth login` with a token that may write, or give token="
    elif status == 403:
        reason = "is not yours to write to: use a token that may, or another owner's name"
    elif isinstance(error, RevisionNotFoundError):
        reason = f"has no branch {revision!r}: make it first or leave revision out"
    else:
        reason = f"could not be written ({reason_of(error)}): nothing was published, try again"
    return CheckpointError(f"the repository {repo_id} on the hub {reason}")


def _list(repo_id: str, revision: str | None, token: str | bool | None) -> ModelInfo:
    """Ask the hub what a repository holds; where nobody answers, once only."""
    # Not list_repo_files: that retries for half a minute where there is no network.
    return retry(
        lambda: HfApi().model_info(
            repo_id, revision=revision, token=token, timeout=_TIMEOUT_S, files_metadata=True
        ),
        again=lambda error: status_of(error) is not None and may_pass(error),
    )


def _require(names: Sequence[str], files: Iterable[str]) -> list[str]:
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(
            f"it must hold {', '.join(names)}, but lacks {', '.join(missing)}; copy them into one "
            "folder and give its path"
        )
    return list(names)


def _from_cache(
    repo_id: str,
    revision: str | None,
    cache_dir: Path | None,
    choose: Callable[[Sequence[str]], object],
    why: str,
) -> Path:
    place = cache_dir or constants.HF_HUB_CACHE
    advice = f"connect once, or copy the folder here and give its path instead{_mirrors(repo_id)}"
    snapshot = Snapshot.in_cache(repo_id, revision, cache_dir)
    if snapshot is None:
        raise CheckpointError(
            f"{repo_id} must be in the hub's cache ({place}) because {why}, but is not there; "
            f"{advice}"
        )
    try:
        choose(snapshot.files())
    except CheckpointError as error:
        raise CheckpointError(
            f"{repo_id} must be whole in the hub's cache ({place}) because {why}, but is not: "
            f"{error}; {advice}"
        ) from error
    return snapshot.folder


def _shards(names: Sequence[str], index: WeightFile, component: Component) -> list[str]:
    """Return the shards beside an index: of its suffix, and of its variant if it has one."""
    stems = "|".join(map(re.escape, component.stems))
    variant = re.escape(f".{index.variant}") if index.variant else ""
    shard = re.compile(
        rf"(?:{stems})(?:{variant}-\d+-of-(\d+)|-\d+-of-(\d+){variant})\.{index.suffix}"
    )
    counts = {n: found[1] or found[2] for n in names if (found := shard.fullmatch(n))}
    if set(map(int, counts.values())) != {len(counts)}:
        raise CheckpointError(
            f"all shards of {index.name} must be there, found {', '.join(sorted(counts)) or 'none'}"
        )
    return list(counts)


def _explain(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    status = status_of(error)
    if isinstance(error, GatedRepoError):
        reason = (
            "asks for consent: accept its terms on its page, then `hf auth login`, or give the "
            "token of an account that has"
        )
    elif isinstance(error, RevisionNotFoundError):
        reason = f"has no revision {revision!r}: leave revision out or check it on its page"
    elif isinstance(error, RepositoryNotFoundError):
        reason = (
            "does not exist or is private: check the spelling; for a private one `hf auth login` "
            f"or give token={_mirrors(repo_id)}"
        )
    elif isinstance(error, HFValidationError):
        reason = f"cannot be: {reason_of(error)}; name it 'owner/name'"
    elif status == 401:
        reason = (
            "asks who you are, and your token is missing, wrong or expired: `hf auth login`, or "
            "give token="
        )
    elif status == 403:
        reason = "may not be read with this token: use one that may, or ask its owner"
    elif status == 429:
        reason = "was asked for too often from here (429): wait some minutes, or `hf auth login`"
    elif status is not None:
        reason = f"is not served at the moment (status {status}): try again later"
    elif isinstance(error, OSError) and error.errno:
        reason = f"cannot be stored ({reason_of(error)}): mend that, or give another cache_dir"
    elif isinstance(error, UNREADABLE):
        reason = (
            f"is listed in a form that cannot be read ({reason_of(error)}): check HF_ENDPOINT, and "
            "whether the network asks for a login first"
        )
    else:
        reason = f"cannot be reached ({reason_of(error)}): check the connection"
    if may_pass(error):
        reason += "; what has arrived is kept, and another call goes on from there"
    return CheckpointError(f"the repository {repo_id} on the hub {reason}")


def _mirrors(repo_id: str) -> str:
    """Return where Stable Diffusion 2.1-base is, for an error about one that is not found."""
    names = [name for name in BASE_MODEL_MIRRORS if name != repo_id]
    if PurePosixPath(repo_id).name != PurePosixPath(names[0]).name:
        return ""
    return f"; copies of Stable Diffusion 2.1-base are {' and '.join(names)}"
