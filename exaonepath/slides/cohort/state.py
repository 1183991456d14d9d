"""The state of a slide, from the files of an output folder: what `--dry-run` and `exaonepath status` show.

| state | what the files show |
|---|---|
| new | nothing |
| partial | some stages, or a part of one |
| running | a process claims it, and is not known to have ended |
| failed | the last try ended with an error |
| stale | a result that is damaged, or that was made from other inputs or settings |
| finished | the embedding |
| empty | the embedding of a slide without a patch |
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from exaonepath.errors import DataFileError, ExaonePathError, FileBusyError, OutputError
from exaonepath.files.embeddings import ATTRIBUTES as EMBEDDING_ATTRIBUTES
from exaonepath.files.features import ATTRIBUTES as FEATURES_ATTRIBUTES
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.hdf5_output import encodable
from exaonepath.files.processes import is_running, process_space
from exaonepath.slides.cohort.claim_file import Holder, read_claim
from exaonepath.slides.cohort.failures import FailureRecord, read_failure
from exaonepath.slides.features.partial import partial_files
from exaonepath.slides.outputs import CLAIMS, FAILURES, OutputPaths, output_paths

State = Literal["new", "partial", "running", "failed", "stale", "finished", "empty"]

_PATCHES_ATTRIBUTES = ("n_coords", "no_patch", "settings_hash", "slide_fingerprint", "slide_path", "slide_mtime_ns")
_MAX_REASON = 1 << 12


@dataclass(frozen=True)
class SlideState:
    """The state of one slide.

    Attributes:
        id: of the slide.
        state: see the module.
        reason: why it is stale, empty or has failed; or what is noteworthy about its claim.
        slide: path of the slide file, as its results state it; empty if they do not.
        patient: as its embedding states it.
        n_patches: patches with an embedding; of an unfinished slide, patches to be encoded; None if not known.
        n_failed: patches that could not be read.
        holder: the process that claims the slide, or did until it was killed.
        heartbeat_s: seconds since the claim was renewed, by the clock of this machine; None unless it is running.
        failure: the last failure, if the slide has not been finished since.
        quarantined: it has failed so often that it is not tried again by itself.
        weights: of the slide encoder.
        random_weights: whether the embedding has no meaning.
    """

    id: str
    state: State = "new"
    reason: str = ""
    slide: str = ""
    patient: str = ""
    n_patches: int | None = None
    n_failed: int = 0
    holder: Holder | None = None
    heartbeat_s: float | None = None
    failure: FailureRecord | None = None
    quarantined: bool = False
    weights: str = ""
    random_weights: bool = False


@dataclass(frozen=True)
class Expected:
    """The inputs of the results that a run would make for a slide, as far as they are known without the weights.

    Attributes:
        slide_fingerprint, slide_path: the slide.
        patches_hash: hash of the settings of its patches.
        attrs: attributes of the embedding, such as "weights" or "dtype", and the values that they would have.
        features_wanted: whether the features have to remain.
        patch_embeddings_wanted: whether the patch embeddings have to remain.
    """

    slide_fingerprint: str
    slide_path: str
    patches_hash: str
    attrs: Mapping[str, Any]
    features_wanted: bool = False
    patch_embeddings_wanted: bool = False


@dataclass(frozen=True)
class _Found:
    """What lies on disk: attributes of each file; None if there is no such file, an error if it cannot be used."""

    patches: dict[str, Any] | ExaonePathError | None
    features: dict[str, Any] | ExaonePathError | None
    embedding: dict[str, Any] | ExaonePathError | None
    patch_embeddings: bool = False


def stored_state(
    out: str | os.PathLike[str], name: str, paths: OutputPaths | None = None, *, partial: bool | None = None
) -> SlideState:
    """The state of a slide without a look at the slide itself.

    Args:
        out: output folder.
        name: the id.
        paths: the files of the slide, if they are known.
        partial: whether an unfinished features stage has left a file, if that is known.

    Raises:
        DataFileError: the layout of the folder is not known (see `read_layout`).
        OutputError: a claim cannot be read.
    """
    paths = paths or output_paths(out, name)
    found = _Found(None, None, _attributes(paths.embedding, EMBEDDING_ATTRIBUTES))
    if found.embedding is None or isinstance(found.embedding, ExaonePathError):
        found = replace(found, patches=_attributes(paths.patches, _PATCHES_ATTRIBUTES))
    return _with_claim(out, _from_files(out, name, paths, found, partial, slide_is_open=False))


def slide_state(out: str | os.PathLike[str], name: str, expected: Expected) -> SlideState:
    """The state of a slide with regard to the results that a run would make.

    Args:
        out: output folder.
        name: the id.
        expected: the inputs of these results.

    Raises:
        DataFileError, OutputError: see `stored_state`.
    """
    paths = output_paths(out, name)
    found = _Found(
        _attributes(paths.patches, _PATCHES_ATTRIBUTES),
        _attributes(paths.features, FEATURES_ATTRIBUTES),
        _attributes(paths.embedding, EMBEDDING_ATTRIBUTES),
        _has_patch_embeddings(paths.embedding),
    )
    state = _from_files(out, name, paths, found, None, slide_is_open=True)
    if state.state in ("finished", "empty", "partial"):
        reason = _why_stale(found, expected, finished=state.state != "partial")
        if reason:
            state = replace(state, state="stale", reason=reason)
        elif state.state == "finished" and state.n_failed:
            state = replace(state, reason=f"{state.n_failed} patches could not be read; they are tried again")
    return _with_claim(out, state)


def _from_files(
    out: str | os.PathLike[str],
    name: str,
    paths: OutputPaths,
    found: _Found,
    partial: bool | None,
    *,
    slide_is_open: bool,
) -> SlideState:
    embedding, patches = found.embedding, found.patches
    state = SlideState(name)
    if isinstance(embedding, dict):
        state = _of_embedding(name, embedding)
        if state.state == "empty":
            stored = patches if patches is not None else _attributes(paths.patches, _PATCHES_ATTRIBUTES)
            state = replace(state, reason=str(stored.get("no_patch", "")) if isinstance(stored, dict) else "")
        if state.state != "partial":
            return _unless_changed(paths, state, embedding, slide_is_open)
    if isinstance(patches, dict):
        state = replace(
            state, state="partial", slide=str(patches.get("slide_path", "")), n_patches=patches.get("n_coords")
        )
    elif partial if partial is not None else bool(partial_files(paths.features)):
        state = replace(state, state="partial")
    failure = read_failure(Path(out, FAILURES, f"{name}.json"))
    if failure is not None:
        given_up = failure.quarantined and failure.is_about(Path(failure.slide))
        slide = state.slide or failure.slide
        return replace(state, state="failed", slide=slide, failure=failure, quarantined=given_up, reason=failure.reason)
    for file in (embedding, patches, found.features):
        if isinstance(file, ExaonePathError):
            return replace(state, state="stale", reason=str(file))
    skipped = _first_line(paths.skipped)
    if skipped and state.state == "new":
        return replace(state, state="failed", reason=skipped)
    return state


def _of_embedding(name: str, attrs: dict[str, Any]) -> SlideState:
    n_patches, n_failed = int(attrs.get("n_patches", 0)), int(attrs.get("n_failed", 0))
    empty = not n_patches and not n_failed
    state: State = "partial" if not attrs.get("complete") else "empty" if empty else "finished"
    return SlideState(
        name,
        state,
        slide=str(attrs.get("slide_path", "")),
        patient=str(attrs.get("patient", "")),
        n_patches=n_patches,
        n_failed=n_failed,
        weights=str(attrs.get("weights", "")),
        random_weights=bool(attrs.get("random_weights", False)),
    )


def _unless_changed(paths: OutputPaths, state: SlideState, attrs: Mapping[str, Any], slide_is_open: bool) -> SlideState:
    """The state, or "stale" if the slide file or the features were written to after the embedding was made."""
    if not slide_is_open:  # otherwise its content is compared
        then, now = attrs.get("slide_mtime_ns"), _mtime_ns(Path(state.slide)) if state.slide else None
        if now is not None and isinstance(then, int) and now > then:
            reason = "the slide file was written to since; the next run compares its content"
            return replace(state, state="stale", reason=reason)
    of_features, made = _mtime_ns(paths.features), _mtime_ns(paths.embedding)
    if of_features is not None and made is not None and of_features > made:
        features = _attributes(paths.features, FEATURES_ATTRIBUTES)
        known = attrs.get("features_settings_hash")
        if isinstance(features, dict) and known is not None and features.get("settings_hash") != known:
            return replace(state, state="stale", reason="its features were made again since, with other settings")
    return state


def _why_stale(found: _Found, expected: Expected, *, finished: bool) -> str:
    """Why stored results would be made again, a phrase; empty if they would be used."""
    stored = [
        (what, attrs)
        for what, attrs in (("patches", found.patches), ("features", found.features), ("embedding", found.embedding))
        if isinstance(attrs, dict)
    ]
    for what, attrs in stored:
        fingerprint = attrs.get("slide_fingerprint")
        if fingerprint is None or fingerprint == expected.slide_fingerprint:
            continue
        if attrs.get("slide_path") == encodable(expected.slide_path):
            return f"its {what} were made from other content of the slide file"
        return f"its {what} belong to a different slide, {attrs.get('slide_path')}: give this slide another id"
    patches = found.patches
    if isinstance(patches, dict) and patches.get("settings_hash") != expected.patches_hash:
        return "its patches were made with other settings"
    made = dict(found.embedding) if isinstance(found.embedding, dict) else {}
    if isinstance(found.features, dict):  # for embeddings of versions that did not state these
        features = found.features
        made.setdefault("features_computed_in", features.get("dtype"))
        made.setdefault("preprocessing", features.get("preprocessing"))
        made.setdefault("feature_dtype", features.get("feature_dtype", "float32"))
        made.setdefault("weights", features.get("weights"))
    for key, value in expected.attrs.items():
        if made.get(key) is not None and made[key] != value:
            return f"it was made with {key.replace('_', ' ')} {made[key]}, not {value}"
    if not finished:
        return ""
    if expected.features_wanted and found.features is None:
        return "its features were not kept, and are wanted"
    if expected.patch_embeddings_wanted and not found.patch_embeddings:
        return "its patch embeddings were not kept, and are wanted"
    return ""


def _with_claim(out: str | os.PathLike[str], state: SlideState) -> SlideState:
    path = Path(out, CLAIMS, f"{state.id}.json")
    claim = read_claim(path)
    if claim is None:
        return state
    holder, written = claim.holder, _mtime_ns(path)
    if holder is not None and holder.space == process_space() and not is_running(holder.pid, holder.started):
        reason = f"process {holder.pid} on {holder.host} was killed while it worked on it"
        return replace(state, holder=holder, reason=state.reason or reason)
    age = None if written is None else max(0.0, time.time() - written / 1e9)
    return replace(state, state="running", holder=holder, heartbeat_s=age)


def _attributes(path: Path, names: tuple[str, ...]) -> dict[str, Any] | ExaonePathError | None:
    if not path.exists():
        return None
    try:
        with open_h5(path) as file:
            return file.attributes(names)
    except (DataFileError, FileBusyError, OutputError) as exc:
        return exc if path.exists() else None


def _has_patch_embeddings(path: Path) -> bool:
    with suppress(DataFileError, FileBusyError), open_h5(path) as file:
        return "patch_embedding" in file
    return False


def _mtime_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except (OSError, ValueError):
        return None


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(_MAX_REASON).strip()
    except OSError:
        return ""
