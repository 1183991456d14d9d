"""The memory that the slide encoder's inference needs, computed before anything is allocated.

Inference holds the residual stream, the keys and values of one layer and, in addition, only the temporary tensors of
one chunk of rows. This module counts all of them. If a slide cannot fit, the error states the memory that it needs; if
the limit is low, the chunks become smaller. All sizes are in bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from exaonepath.errors import MemoryLimitError, SettingsError
from exaonepath.ops.attention import cpu_kernel

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}

# Rows that the linear layers compute together. On a GPU, a slide of up to _ONE_CHUNK tokens is one chunk: with smaller
# chunks, kernel launches would take most of the time. For larger slides, 4,096 rows are enough to keep a GPU's matrix
# units busy, and 2,048 rows fit a CPU's cache.
_ONE_CHUNK = 16_384
_ROWS, _ROWS_CPU, _ROWS_MIN = 4096, 2048, 256
# Queries that attend together, as a multiple of the rows above: more queries share the cost of reading a tile of keys.
# On a GPU, 8,192 queries of 12 heads are 768 tiles, which fill all multiprocessors several times.
_ATTENTION_CHUNKS, _ATTENTION_CHUNKS_CPU = 2, 4
# Memory on a GPU in addition to the tensors. torch's allocator also serves the workspaces of cuBLAS and cuBLASLt, one
# of each for every handle and stream that computes products; the encoder uses one. The defaults depend on the version
# of torch: cuBLAS has 32 MiB on Hopper and 8.1 MiB on other cards, cuBLASLt 1 MiB, 32 MiB, or a part of cuBLAS's. Both
# count with their largest default. The environment variables CUBLAS_WORKSPACE_CONFIG and CUBLASLT_WORKSPACE_SIZE can
# set other sizes; `:4096:8`, which makes products deterministic, is 32 MiB.
_WORKSPACE_BYTES = 2 * (32 << 20)
# The allocator's own share: it takes memory from the driver in blocks of 2 and 20 MiB, and in multiples of 2 MiB. So
# 16 MiB are added and, as a divisor, 1/32 of the tensors.
_OVERHEAD_BYTES, _OVERHEAD_SHARE = _WORKSPACE_BYTES + (16 << 20), 32
# Rows of the rotation's tables that are computed at once, in float64.
_TABLE_ROWS = 1 << 16
# Bytes of index tensors per token: source, patch positions and rows, the inverse, float64 coordinates, segment bounds.
_INDEX_BYTES = 96
# If the features stay on the host, the tokens are sorted there. On the device are the float64 coordinates (16), the
# segments' offsets (8, if every segment is one token), and the work lists of the kernels for the two kinds of blocks
# (20) or, in place of them, the rows of segments of one length (16).
_INDEX_BYTES_STREAMED = 48
# Temporary bytes per token while a work list of the kernels is copied, if every segment is one token.
_LISTS_BYTES = 32
# Bytes per token while the tokens are sorted. Sorting runs on the device of the features.
_SORT_BYTES = 320


def parse_memory(text: int | str) -> int:
    """Bytes from a number or from text such as "12GB", "11.5 GiB" or "800MB" (GB is 10^9, GiB 2^30).

    Raises:
        SettingsError: `text` is not an amount of memory, or is not positive.
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
    """Sizes, dtypes and devices of one inference run.

    Attributes:
        tokens: T, valid patches and prefix tokens of all slides together. patches: rows of the caller, B * N.
        input_dim, embed_dim, hidden_dim, heads: sizes of the encoder.
        compute: dtype of the matrix products. stream: dtype of the residual stream.
        weights: bytes of all parameters and buffers. cast_weights: bytes of one block's weights in `compute`, if they
            are stored in another dtype, else 0.
        features: dtype of the caller's features. output: dtype of the embeddings.
        features_on_device, output_on_device: whether features and embeddings are on the device, not in the host's
            memory.
        positions: whether the slide has coordinates.
        backend: attention backend, resolved.
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
    features_on_device: bool
    output_on_device: bool
    positions: bool
    backend: str
    longest: int
    device: str


@dataclass(frozen=True)
class MemoryPlan:
    """Chunk sizes, and the bytes that they need on the model's device.

    Attributes:
        rows: rows that the linear layers compute together. attention_rows: queries that attend together.
        weights, features, index, tables, tokens, keys_values, output: bytes of each group of tensors. Not all of them
            exist at the same time.
        chunk: additional bytes while the blocks run.
        tensors: the peak of all tensors together. overhead: additional memory of the GPU's allocator and libraries.
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
        """Bytes that are needed on the device, weights included."""
        return self.tensors + self.overhead


def default_rows(tokens: int, device: str) -> int:
    """Rows that the linear layers compute together on a type of device, if memory is not limited."""
    if device == "cpu":
        return _ROWS_CPU
    return max(1, tokens) if tokens <= _ONE_CHUNK else _ROWS


def attention_rows(rows: int, tokens: int, device: str) -> int:
    """Queries that attend together, if the linear layers compute `rows` rows together."""
    return max(1, min(rows * (_ATTENTION_CHUNKS_CPU if device == "cpu" else _ATTENTION_CHUNKS), tokens))


def plan_memory(work: Workload, limit: int | None = None, *, where: str = "this device") -> MemoryPlan:
    """Choose chunk sizes that need at most `limit`, and compute the memory that they need.

    Args:
        work: the inference run.
        limit: bytes, weights included; None: no limit.
        where: name of the device, for the error.

    Returns:
        The plan; `total` is an upper bound.

    Raises:
        MemoryLimitError: even the smallest chunks do not fit; the message states the sizes and gives advice.
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
    queries = attention_rows(rows, work.tokens, work.device)
    width, small, wide = work.embed_dim, work.compute.itemsize, work.stream.itemsize
    table = max(4, small)
    features = work.patches * work.input_dim * work.features.itemsize if work.features_on_device else 0
    output = work.patches * (work.input_dim + width) * work.output.itemsize if work.output_on_device else 0
    index = (_INDEX_BYTES if work.features_on_device else _INDEX_BYTES_STREAMED) * work.tokens
    tables = 2 * work.tokens * (width // work.heads // 2) * table if work.positions else 0
    tokens = work.tokens * width * wide
    keys_values = 2 * work.tokens * width * small

    # Temporary tensors of a chunk. The steps of a pass run one after another, so the largest of them counts, not their
    # sum. A cast, if there is one, makes a copy of the norm's output; without it, the products read that output itself.
    cast = 0 if small == wide else small
    norm = rows * width * (wide + cast) + 8 * rows
    normed = rows * width * (cast or wide)
    # First pass: keys and values. Second pass: queries, their attention, and the MLP, whose input takes the place of
    # the attended queries if there is a cast.
    first = max(norm, normed + 2 * rows * width * small, _rotation(work, rows))
    mlp = max(2 * work.hidden_dim, work.hidden_dim + width) * rows * small + (0 if cast else normed)
    lists = _LISTS_BYTES * work.tokens if work.backend in ("triton", "cudnn") else 0
    second = max(norm, normed + rows * width * small, mlp, _attention(work, queries), lists)
    # Each pass casts the weights that it needs; the first one those of the keys and values, and perhaps of the queries.
    of_queries = width * width * small if work.cast_weights else 0
    first += 3 * (of_queries + width * small)
    second += max(0, work.cast_weights - 2 * of_queries)
    chunk = queries * width * small + max(first, second)
    embed = rows * (work.input_dim * (work.features.itemsize + small) + width * (small + 2 * wide))
    leave = rows * (width * (2 * wide + work.output.itemsize) + 2 * work.input_dim * max(4, work.output.itemsize))
    held = work.weights + features + index
    angles = 0 if not work.positions else 4 * 8 * min(work.tokens, _TABLE_ROWS) * (width // work.heads // 2)
    # One entry per phase: sorting, rotation tables, patch embedding, blocks, output. The peak is the largest of them.
    peak = max(
        work.weights + features + (_SORT_BYTES * work.tokens if work.features_on_device else 0),
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
    """Temporary bytes of a rotation by torch, 2,048 rows at once: a float32 copy, six halves, the result, its cast."""
    if not work.positions or work.backend in ("triton", "cudnn"):  # cuDNN's blocks are not rotated
        return 0
    rows = min(rows, 2048)
    wide = max(4, work.compute.itemsize)
    return rows * work.embed_dim * (5 * wide + work.compute.itemsize)


def _attention(work: Workload, queries: int) -> int:
    """Temporary bytes of the attention of `queries` rows."""
    width, small = work.embed_dim, work.compute.itemsize
    if work.backend == "triton":
        return 0
    rotation = _rotation(work, queries)
    if work.backend == "eager":
        scores = work.heads * queries * work.longest * 3 * max(4, small)
        return max(rotation, scores + 3 * work.tokens * width * small)
    if work.backend == "cudnn":
        return 2 * queries * width * small  # the result, and the result in the order of the queries
    # Short segments of a chunk are gathered into dense batches of at most 16,384 tokens. Five tensors of that size
    # exist: queries, keys, values, the result, and the result in its final order.
    gathered = 5 * min(queries, 1 << 14) * width * small
    result = 2 * queries * width * small
    if work.device != "cpu":
        return max(rotation, gathered, result)
    head = width // work.heads
    kernel = cpu_kernel.workspace_bytes(work.compute, head, work.longest)
    if kernel and work.longest <= cpu_kernel.max_length():
        return max(rotation, kernel)  # that of the keys
    # `cpu_attention`: keys and values of one head in float32, also their transposed copies, and two blocks of scores.
    scores = 2 * 4 * max(10 << 20, 64 * 4 * work.longest) // 4
    tiled = 4 * head * (2 * queries + 4 * work.longest) + scores
    return max(rotation, gathered, result, tiled, kernel)


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
        if half.total < plan.total:  # on the CPU, float32 has a kernel that needs less
            advice.append(f"compute in bfloat16 ({in_gb(half.total)})")
    if (work.features_on_device or work.output_on_device) and work.device != "cpu":
        streamed = _with_rows(replace(work, features_on_device=False, output_on_device=False), _ROWS_MIN)
        advice.append(f"leave features and embeddings in the host's memory (encode_streamed, {in_gb(streamed.total)})")
    advice.append("allow more memory" if work.device == "cpu" else "allow more memory, or run on the CPU")
    return (
        f"{work.patches} patches need {in_gb(plan.total)} on {where} in chunks of {plan.rows} rows ({parts}), but only "
        f"{in_gb(limit)} may be used: " + "; ".join(advice)
    )


def in_gb(size: int) -> str:
    """ "1.23 GB", rounded up, so that a limit of the stated size is enough."""
    return f"{-(-size // 10**7) / 100:.2f} GB"


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a GPU; None on a CPU, where the memory is not limited here."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    # torch keeps freed memory reserved for itself. The driver counts it as used, but this process can use it again.
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, allowed)) + reserved - allocated
