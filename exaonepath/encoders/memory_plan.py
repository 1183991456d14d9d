"""How much memory the slide encoder's inference takes, worked out before anything is allocated.

Inference holds the residual stream, the keys and values of one layer and, beside them, only what a chunk of rows needs.
Everything is counted here, so that a slide that cannot fit is refused with the figure it would need, and a tight limit
is met by smaller chunks. Sizes are bytes throughout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from exaonepath.errors import MemoryLimitError, SettingsError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}

# Rows that go through the linear layers together. A slide that fits one chunk of a GPU is not cut: launches would
# dominate. Beyond that, 4,096 rows fill a GPU's matrix units, and 2,048 a CPU's cache.
_ONE_CHUNK = 16_384
_ROWS, _ROWS_CPU, _ROWS_MIN = 4096, 2048, 256
# Queries that attend together, in chunks of rows: more of them share what a tile of keys costs to read.
_ATTENTION_CHUNKS = 4
# What the allocator and cuBLAS take beyond the tensors on a GPU: workspace, and blocks rounded up to 2 MiB.
_OVERHEAD_BYTES, _OVERHEAD_SHARE = 80 << 20, 32
# Rows of the rotation's tables made at once, in float64.
_TABLE_ROWS = 1 << 16
# Index tensors of a token: source, patch positions and rows, the inverse, coordinates in float64, bounds of segments.
_INDEX_BYTES = 96
# Of a token while the tokens are sorted, which is done where the features lie.
_SORT_BYTES = 320


def parse_memory(text: int | str) -> int:
    """Bytes from a number or from text such as "12GB", "11.5 GiB" or "800MB" (GB is 10^9, GiB 2^30).

    Raises:
        SettingsError: not an amount of memory, or not positive.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise SettingsError(f"an amount of memory is a number of bytes or text such as 12GB, got {text!r}")
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", str(text))
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise SettingsError(f"{text!r} is not an amount of memory; write it as 12GB, 11.5GiB or 800MB")
    size = int(float(match[1]) * unit)
    if size <= 0:
        raise SettingsError(f"an amount of memory must be positive, got {text!r}")
    return size


@dataclass(frozen=True)
class Workload:
    """What is to be computed, and where its parts lie.

    Attributes:
        tokens: T, valid patches and prefix tokens of all slides together. patches: rows of the caller, B * N.
        input_dim, embed_dim, hidden_dim, heads: of the encoder.
        compute: dtype of the matrix products. stream: dtype of the residual stream.
        weights: bytes of all parameters and buffers. cast_weights: bytes of one block's weights in `compute`, where
            that is not the dtype they are kept in, else 0.
        features: dtype of the caller's features. output: dtype of the embeddings.
        features_here, output_here: features lie, and embeddings go, on the device rather than in the host's memory.
        positions: the slide has coordinates.
        backend: of attention, resolved.
        longest: tokens of the longest segment.
        device: type of the device.
    """

    tokens: int
    patches: int
    input_dim: int
    embed_dim: int
    hidden_dim: int
    heads: int
    compute: torch.dtype
    stream: torch.dtype
    weights: int
    cast_weights: int
    features: torch.dtype
    output: torch.dtype
    features_here: bool
    output_here: bool
    positions: bool
    backend: str
    longest: int
    device: str


@dataclass(frozen=True)
class MemoryPlan:
    """Chunk sizes, and the bytes they lead to on the model's device.

    Attributes:
        rows: rows that go through the linear layers together. attention_rows: queries that attend together.
        weights, features, index, tables, tokens, keys_values, output: bytes of what is held; not all at once.
        chunk: bytes beside them while the blocks run.
        tensors: the peak of all tensors together. overhead: what the GPU's allocator and libraries take beyond them.
    """

    rows: int
    attention_rows: int
    weights: int
    features: int
    index: int
    tables: int
    tokens: int
    keys_values: int
    output: int
    chunk: int
    tensors: int
    overhead: int

    @property
    def total(self) -> int:
        """Bytes the device needs, weights included."""
        return self.tensors + self.overhead


def default_rows(tokens: int, device: str) -> int:
    """Rows that go through the linear layers together where memory does not matter, on a type of device."""
    if device == "cpu":
        return _ROWS_CPU
    return max(1, tokens) if tokens <= _ONE_CHUNK else _ROWS


def plan_memory(work: Workload, limit: int | None = None, *, where: str = "this device") -> MemoryPlan:
    """Pick chunk sizes that keep within `limit`, and say what they need.

    Args:
        work: what is to be computed.
        limit: bytes, weights included; None: no limit.
        where: the device, for the error.

    Returns:
        The plan; `total` is an upper bound.

    Raises:
        MemoryLimitError: not even the smallest chunks fit; the message has the figures and what helps.
    """
    rows = default_rows(work.tokens, work.device)
    while True:
        plan = _with_rows(work, rows)
        if limit is None or plan.total <= limit:
            return plan
        if rows <= _ROWS_MIN:
            raise MemoryLimitError(_refusal(work, plan, limit, where))
        rows = max(_ROWS_MIN, rows // 2)


def _with_rows(work: Workload, rows: int) -> MemoryPlan:
    rows = max(1, min(rows, work.tokens))
    queries = max(1, min(_ATTENTION_CHUNKS * rows, work.tokens))
    width, small, wide = work.embed_dim, work.compute.itemsize, work.stream.itemsize
    table = max(4, small)
    features = work.patches * work.input_dim * work.features.itemsize if work.features_here else 0
    output = work.patches * (work.input_dim + width) * work.output.itemsize if work.output_here else 0
    index = _INDEX_BYTES * work.tokens
    tables = 2 * work.tokens * (width // work.heads // 2) * table if work.positions else 0
    tokens = work.tokens * width * wide
    keys_values = 2 * work.tokens * width * small

    cast = 0 if small == wide else small
    norm = rows * width * (wide + cast) + 8 * rows
    linear = rows * (width * cast + max(2 * width, 2 * work.hidden_dim, width) * small)
    if not cast:
        linear += rows * width * wide  # the norm's output is what the products read
    beside = max(norm, linear, _rotation(work, rows), _attention(work, queries))
    chunk = work.cast_weights + queries * width * small + beside
    embed = rows * (work.input_dim * (work.features.itemsize + small) + width * (small + 2 * wide))
    leave = rows * (width * (2 * wide + work.output.itemsize) + 2 * work.input_dim * max(4, work.output.itemsize))
    held = work.weights + features + index
    angles = 0 if not work.positions else 4 * 8 * min(work.tokens, _TABLE_ROWS) * (width // work.heads // 2)
    peak = max(
        work.weights + features + (_SORT_BYTES * work.tokens if work.features_here else 0),
        held + tables + angles,
        held + tables + tokens + work.cast_weights + embed,
        held + tables + tokens + keys_values + chunk,
        held + tables + tokens + output + leave,
    )
    overhead = _OVERHEAD_BYTES + peak // _OVERHEAD_SHARE if work.device == "cuda" else 0
    return MemoryPlan(
        rows, queries, work.weights, features, index, tables, tokens, keys_values, output, chunk, peak, overhead
    )


def _rotation(work: Workload, rows: int) -> int:
    """Beside heads that torch rotates, 2,048 rows at once: a float32 copy, six halves, the result, its rounded form."""
    if not work.positions or work.backend == "triton":
        return 0
    rows = min(rows, 2048)
    wide = max(4, work.compute.itemsize)
    return rows * work.embed_dim * (5 * wide + work.compute.itemsize)


def _attention(work: Workload, queries: int) -> int:
    """Beside `queries` rows that attend."""
    width, small = work.embed_dim, work.compute.itemsize
    if work.backend == "triton":
        return 0
    rotation = _rotation(work, queries)
    if work.backend == "eager":
        scores = work.heads * queries * work.longest * 3 * max(4, small)
        return max(rotation, scores + 3 * work.tokens * width * small)
    # Short segments of a chunk are gathered, at most 16,384 tokens at once: queries, keys, values, result, reordered.
    gathered = 5 * min(queries, 1 << 14) * width * small
    result = 2 * queries * width * small
    if work.device != "cpu":
        return max(rotation, gathered, result)
    # `cpu_attention`: one head's keys and values in float32, twice for the transposition, and two blocks of scores.
    head = width // work.heads
    scores = 2 * 4 * max(10 << 20, 64 * 4 * work.longest) // 4
    tiled = 4 * head * (2 * queries + 4 * work.longest) + scores
    return max(rotation, gathered, result, tiled)


def _refusal(work: Workload, plan: MemoryPlan, limit: int, where: str) -> str:
    held = {
        "weights": plan.weights,
        "features": plan.features,
        "tokens": plan.tokens,
        "keys and values": plan.keys_values,
        "positions and indices": plan.tables + plan.index,
        "embeddings": plan.output,
    }
    parts = ", ".join(f"{name} {in_gb(size)}" for name, size in held.items() if size)
    advice = []
    if work.compute.itemsize > 2:
        half = _with_rows(replace(work, compute=torch.bfloat16, cast_weights=work.weights // 6), _ROWS_MIN)
        advice.append(f"compute in bfloat16 ({in_gb(half.total)})")
    if (work.features_here or work.output_here) and work.device != "cpu":
        streamed = _with_rows(replace(work, features_here=False, output_here=False), _ROWS_MIN)
        advice.append(f"leave features and embeddings in the host's memory (encode_streamed, {in_gb(streamed.total)})")
    advice.append("allow more memory" if work.device == "cpu" else "allow more memory, or run on the CPU")
    return (
        f"{work.patches} patches need {in_gb(plan.total)} on {where} in chunks of {plan.rows} rows ({parts}), but only "
        f"{in_gb(limit)} may be used: " + "; ".join(advice)
    )


def in_gb(size: int) -> str:
    """ "1.23 GB", rounded up: a limit of the figure named is enough."""
    return f"{-(-size // 10**7) / 100:.2f} GB"


def available_memory(device: torch.device) -> int | None:
    """Bytes this process could still allocate on a GPU; None where that is not known, or not limited (CPU)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, allowed)) + reserved - allocated
