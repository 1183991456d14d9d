"""Read the weights of one model from one or several safetensors files, and check names, shapes and values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import BinaryIO

from torch import Tensor

from exaonepath.encoders.repository import Repository
from exaonepath.errors import SettingsError, WeightsError
from exaonepath.files.safetensors_file import StoredTensor, read_header, read_tensor
from exaonepath.files.strict_json import parse_json, shown

_MAX_INDEX = 16 * 2**20
_MAX_SHARDS = 256  # all are open at once
_SHOWN_KEYS = 12
_SHARD = re.compile(r"[^/\\:\0]{1,240}\.safetensors")


def read_weights(
    repository: Repository,
    expected: Mapping[str, tuple[int, ...]],
    optional: Iterable[str] = (),
    variant: str | None = None,
) -> dict[str, Tensor]:
    """Read model.safetensors, or the shards that model.safetensors.index.json names.

    Names and shapes are compared before any value is read, so no more memory is allocated than the files contain.

    Args:
        repository: location of the files.
        expected: shape of every tensor of the model.
        optional: patterns of names that may be missing.
        variant: read model.VARIANT.safetensors instead.

    Returns:
        Every tensor of the files, on the CPU, in the order of the files.

    Raises:
        WeightsError: files are missing, damaged or replaced while they are read; tensors are missing, unexpected or
            misshapen (all are listed), not floating point, or not finite.
    """
    with ExitStack() as stack:
        files = _open_files(repository, _suffix(variant), stack)
        headers = {name: read_header(file, repository.location(name)) for name, (file, _) in files.items()}
        for name, (_, indexed) in files.items():
            if indexed is not None and indexed != set(headers[name]):
                some = sorted(indexed ^ set(headers[name]))
                raise WeightsError(f"{repository.location(name)} does not match its index: {_some(some)}")
        stored = {key: tensor for header in headers.values() for key, tensor in header.items()}
        _check_fit(str(repository), expected, stored, tuple(optional))
        state = {
            key: read_tensor(files[name][0], key, tensor, repository.location(name))
            for name, header in headers.items()
            for key, tensor in header.items()
        }
    repository.check_unchanged()
    return state


def check_keys(where: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> None:
    """Raise `WeightsError` that lists all keys of the three kinds, if there are any."""
    problems = [
        f"{kind}: {_some(sorted(keys))}"
        for kind, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise WeightsError(f"the weights at {where} do not fit the model; " + "; ".join(problems))


def _check_fit(
    where: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], optional: tuple[str, ...]
) -> None:
    missing = [key for key in expected if key not in stored and not any(re.search(p, key) for p in optional)]
    misshapen = [
        f"{key} (file {list(stored[key].shape)}, model {list(shape)})"
        for key, shape in expected.items()
        if key in stored and stored[key].shape != shape
    ]
    check_keys(where, missing, [key for key in stored if key not in expected], misshapen)


def _suffix(variant: str | None) -> str:
    if variant is None:
        return ""
    if not isinstance(variant, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", variant):
        raise SettingsError(f"variant must be a word such as fp16, got {variant!r}")
    return f".{variant}"


def _open_files(repository: Repository, suffix: str, stack: ExitStack) -> dict[str, tuple[BinaryIO, set[str] | None]]:
    """Open files by name, each with the tensors that the index assigns to it (None: there is no index)."""
    single, index = f"model{suffix}.safetensors", f"model.safetensors.index{suffix}.json"
    file = repository.open(single, stack)
    if file is not None:
        return {single: (file, None)}
    data = repository.read(index, _MAX_INDEX)
    if data is None:
        raise repository.missing(f"{single} (safetensors is the only format that is read)")
    files: dict[str, tuple[BinaryIO, set[str] | None]] = {}
    for name, keys in _shards(data, repository.location(index)).items():
        shard = repository.open(name, stack)
        if shard is None:
            raise WeightsError(f"{repository.location(index)} names {name}, which does not exist: copy all shards")
        files[name] = (shard, keys)
    return files


def _shards(data: bytes, where: str) -> dict[str, set[str]]:
    index = parse_json(data, where)
    entries = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(entries, dict) or not entries or not isinstance(index.get("metadata", {}), dict):
        raise WeightsError(f'{where} is no index of shards: {{"metadata": {{}}, "weight_map": {{tensor: file}}}}')
    shards: dict[str, set[str]] = {}
    for key, name in entries.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name) or name.startswith("."):
            raise WeightsError(
                f"{where} places {shown(key)} in {shown(name)}; weights are read from files in the index's folder "
                "whose names end in .safetensors, and from nothing else"
            )
        shards.setdefault(name, set()).add(key)
    if len(shards) > _MAX_SHARDS:
        raise WeightsError(f"{where} names {len(shards):,} files; a model of this family needs a few")
    return dict(sorted(shards.items()))


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(key if key.isprintable() else shown(key) for key in keys[:_SHOWN_KEYS]) + more
