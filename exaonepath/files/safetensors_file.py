"""Reading safetensors files into private memory, strictly.

The safetensors library maps a file into memory, so that the parameters of a model stay what the file holds: a file that
is overwritten in place changes a running model without a word, and one that is shortened kills the process. Here every
byte is read once. The layout: 8 bytes, the length of a JSON header; the header, "name": {"dtype", "shape",
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

# A tensor takes about 150 bytes of header; models of this family have a few hundred.
_MAX_HEADER = 16 * 2**20
_MAX_NAME = 512
_MAX_RANK = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file; `start` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, where: str) -> dict[str, StoredTensor]:
    """The tensors of a file, by name, in the order of their data.

    Raises:
        WeightsError: not a whole safetensors file, or values stored as anything but floating point numbers of 16 to 64
            bits: a quantized model's integers mean nothing without its scales, and would be cast without a word.
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
    """The values of a tensor, on the CPU, in memory of its own.

    Raises:
        WeightsError: the file became shorter, cannot be read, or holds NaN or infinity there.
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
        # NaN passes through a minimum; one pass without a copy, where isfinite takes twenty times as long.
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
