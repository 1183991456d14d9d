"""Tensors in `.pt` files: written by `torch.save`, and read by its safe loader only, as plain tensors of numbers."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ForeignFileError
from exaonepath.exchange.slide_patches import ArrayMatrix, Matrix
from exaonepath.files.atomic import atomic_path, output_error


def write_tensor(path: Path, values: Matrix | np.ndarray) -> None:
    """Write a plain tensor, whole or not at all. A matrix passes through a temporary file, so memory stays bounded.

    Raises:
        OutputError: the file cannot be written.
        DataFileError: a vector cannot be written.
    """
    import torch

    with atomic_path(path) as temporary, _mapped(path, values) as array:
        try:
            with temporary.open("wb") as file:
                torch.save(torch.from_numpy(array), file)
        except RuntimeError as exc:  # torch's own writer turns an OSError into this
            cause = exc.__cause__ or exc.__context__
            raise output_error(path, cause if isinstance(cause, OSError) else OSError(str(exc))) from exc


@contextmanager
def _mapped(path: Path, values: Matrix | np.ndarray) -> Iterator[np.ndarray]:
    """The numbers as one array: those of a matrix are written next to the output and mapped."""
    if isinstance(values, np.ndarray):
        yield np.array(values)
        return
    if 0 in values.shape:
        yield np.empty(values.shape, values.dtype)
        return
    with tempfile.TemporaryFile(dir=path.parent) as file:
        for _, part in values.parts():
            file.write(part.data)
        file.flush()
        yield np.memmap(file, values.dtype, "r+", shape=values.shape)


def read_tensor(path: Path) -> np.ndarray:
    """The one tensor of a `.pt` file, as float16, float32 or float64; memory-mapped where its format allows.

    Nothing but a tensor is read: no pickled object is built, whatever the file holds.

    Raises:
        DataFileError: the file is missing or cannot be read, or holds anything else than a tensor of floating-point
            numbers that lies in this file.
    """
    import torch

    try:
        size = path.stat().st_size
        packed = zipfile.is_zipfile(path)
        if packed:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ForeignFileError(f"{path} is a compressed archive, which torch.save does not write")
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except pickle.UnpicklingError as exc:
        raise ForeignFileError(
            f"{path} holds other objects than tensors, which are not read; save the tensor alone (torch.save)"
        ) from exc
    except OSError as exc:
        raise DataFileError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise DamagedFileError(f"{path} cannot be read as a tensor: {' '.join(str(exc).split())[:200]}") from exc
    if type(value) is not torch.Tensor:
        raise ForeignFileError(f"{path} holds a {type(value).__name__}, not one tensor; save the tensor alone")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ForeignFileError(
            f"{path} holds a tensor of {value.dtype} ({value.layout}), not of floating-point numbers"
        )
    if value.numel() * value.element_size() > size:  # repeated by strides of zero
        raise ForeignFileError(f"{path} declares {list(value.shape)}, more numbers than its {size} bytes hold")
    if value.dtype == torch.bfloat16:
        value = value.float()
    return value.detach().numpy()


def tensor_matrix(path: Path) -> ArrayMatrix:
    """A tensor [N, D], or [1, N, D], as a matrix.

    Raises:
        DataFileError: see `read_tensor`; or it has another shape.
    """
    values = read_tensor(path)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2:
        raise DataFileError(f"{path} holds a tensor {list(values.shape)}, not features [N, D]")
    return ArrayMatrix(values)


def stem(path: str | os.PathLike[str]) -> str:
    """The name of a file without `.h5` or `.pt`, the only endings that are removed: ids may hold dots."""
    name = Path(path).name
    return name[:-3] if name.endswith((".h5", ".pt")) else name
