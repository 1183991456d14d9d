"""Reads safetensors files strictly, into private memory.

The safetensors library maps a file into memory, so the parameters of a model stay linked to the file: if the file is
overwritten in place, a running model changes silently, and if it is shortened, the process is killed. Here every byte
is read once. Layout: 8 bytes with the length of a JSON header; the header, with "name": {"dtype", "shape",
"data_offsets"} and "__metadata__"; the values, little-endian, without gaps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from exaonepath.errors import WeightsError
from exaonepath.files.strict_json import parse_json, shown

# A tensor uses about 150 bytes of the header; models of this family have a few hundred tensors.
_MAX_HEADER = 16 * 2**20
_MAX_NAME = 512
_MAX_RANK = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in its file; `start` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, in the order of their data.

    Raises:
        WeightsError: the file is not a complete safetensors file, or values are not floating point numbers of 16 to 64
            bits. A quantized model's integers are meaningless without its scales, and would be cast silently.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise WeightsError(f"no usable safetensors weights at {where}: {size:,} bytes, cut short or of another format")
    if length > _MAX_HEADER:
        raise WeightsError(f"{where}: a header of {length:,} bytes; models of this family need a few kilobytes")
    header = parse_json(file.read(length), f"the header of {where}")
    if not isinstance(header, dict):
        raise WeightsError(f"the header of {where} is not a JSON object")
    _check_metadata(header.pop("__metadata__", {}), where)
    tensors = {name: _stored(name, entry, 8 + length, where) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, tensor in ordered.items():
        if tensor.start != position:
            raise WeightsError(f"{where}: the values of {shown(name)} overlap with others, or leave a gap before them")
        position = tensor.end
    if position != size:
        raise WeightsError(
            f"no usable safetensors weights at {where}: {size:,} bytes where its header describes {position:,}; the "
            "file was cut short or has something appended"
        )
    return ordered


def read_tensor(file: BinaryIO, name: str, tensor: StoredTensor, where: str) -> Tensor:
    """The values of a tensor, on the CPU, in memory that is not shared with the file.

    Raises:
        WeightsError: the file became shorter, cannot be read, or the tensor contains NaN or infinity.
    """
    values = torch.empty(tensor.shape, dtype=tensor.dtype)
    if values.numel():
        file.seek(tensor.start)
        view = values.view(-1).view(torch.uint8).numpy().data
        try:
            count = file.readinto(view)  # type: ignore[attr-defined]
        except OSError as exc:
            raise WeightsError(f"{where} cannot be read: {exc}") from exc
        if count != len(view):
            raise WeightsError(f"{where} became shorter while it was read")
        # NaN propagates through a minimum, so the minimum and maximum are finite only if all values are. This needs one
        # pass without a copy; isfinite takes twenty times as long.
        if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            bad = int(values.numel() - torch.isfinite(values).sum())
            raise WeightsError(
                f"{where}: {bad:,} of {values.numel():,} values of {shown(name)} are NaN or infinite, and so would be "
                "every embedding; the file is damaged, or its training diverged"
            )
    return values


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"the header of {where} is damaged: its metadata must be texts by name")
    if metadata.get("format") in ("tf", "flax"):
        raise WeightsError(f"{where} holds weights of {metadata['format']}, whose layout differs; save them from torch")


def _stored(name: str, entry: Any, base: int, where: str) -> StoredTensor:
    if len(name) > _MAX_NAME:
        raise WeightsError(f"the header of {where} is damaged: a tensor's name has {len(name):,} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"the header of {where} is damaged: {shown(name)} is {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise WeightsError(
            f"{where}: {shown(name)} is stored as {shown(dtype)}; weights are read as F32, F64, F16 or BF16. Store "
            "them unquantized, and quantize the model after it is loaded"
        )
    if not (_are_counts(shape) and len(shape) <= _MAX_RANK and _are_counts(offsets) and len(offsets) == 2):
        raise WeightsError(f"the header of {where} is damaged: {shown(name)} has {shown(shape)} at {shown(offsets)}")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise WeightsError(
            f"the header of {where} is damaged: {shown(name)} of shape {shown(shape)} as {dtype} takes "
            f"{shown(math.prod(shape) * _DTYPES[dtype].itemsize)} bytes, and it states {shown(offsets)}"
        )
    return StoredTensor(_DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
