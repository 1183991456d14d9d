"""Frozen launch settings of the kernels, per architecture, dtype and head dimension. Never chosen at run time.

With each row, the kernel compiles ahead of time without register spills inside a loop, in every variant that is
launched (float32 on sm_90: at most one instruction in a hundred), and fits the shared memory of its architectures.
`tests/ops/attention/kernel_resources/` contains the resources for each version of triton that users get, and
`test_triton_compile.py` compares the kernels with them. docs/triton.md says which settings were timed on a GPU, and how
the others were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of a tile, warps, depth of the software pipeline, and how blocks without a mask are loaded.

    `descriptors`: through tensor descriptors, by the copy engine (TMA) of sm_90 and later. Tensors that a descriptor
    cannot describe (it needs a base and strides of a multiple of 16 bytes) are loaded through pointers all the same.
    `sums`: number of partial sums that the forward kernel keeps for each row of probabilities, 1 or 8.
    `masked`: tokens of a block in the loop with masks; 0: as many as in the other loop. A smaller block computes fewer
    scores that the masks then discard, and needs fewer registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    sums: int = 1
    masked: int = 0

    def columns_below(self, triton: tuple[int, ...]) -> int:
        """Under this version of triton, fewer values than this are loaded as a column (`load_values`)."""
        return 32 * self.num_warps if triton < (3, 7) else 0


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of the three kernels.

    `precision`: precision of float32 products. `cudnn_from`: if there is only one segment, without rotation, and it has
    at least this many tokens, the backend "auto" uses cuDNN without gradients; None: never, or not measured.
    """

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_gradient: LaunchConfig
    precision: str
    cudnn_from: int | None = None


@dataclass(frozen=True)
class RotateConfig:
    """Elements of a head and number of heads that one program of the rotation processes, and its warps."""

    elements: int
    heads: int
    num_warps: int

    def tokens(self, head_dim: int) -> int:
        """Number of tokens that one program processes."""
        return self.elements // head_dim


# 16 bytes per load, and four heads per program: the angles are read once for all four.
ROTATE = RotateConfig(2048, 4, 4)

_Row = (
    tuple[int, int, int, int]
    | tuple[int, int, int, int, bool]
    | tuple[int, int, int, int, bool, int]
    | tuple[int, int, int, int, bool, int, int]
)


def _config(forward: _Row, query_gradient: _Row, key_gradient: _Row, precision: str = "tf32x3") -> AttentionConfig:
    return AttentionConfig(
        LaunchConfig(*forward), LaunchConfig(*query_gradient), LaunchConfig(*key_gradient), precision
    )


# By (bytes per element, head dimension). Four warps if there are enough registers: then two programs share a
# multiprocessor, and the softmax of one runs at the same time as the products of the other.
_SM_90 = {
    (2, 32): _config((128, 64, 4, 3), (128, 64, 4, 2), (64, 128, 8, 2)),
    (2, 64): _config((128, 64, 4, 3, True, 8), (64, 64, 4, 3, True), (128, 64, 4, 2, True, 1, 64)),
    (2, 128): _config((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    # Two warps: with four, some products use instructions for a whole group of warps, and with D = 32 those of
    # triton 3.6 read beyond the shared memory (seen on a GPU, by NVIDIA's memory checker).
    (4, 32): _config((32, 32, 2, 2), (32, 32, 2, 2), (16, 32, 2, 2)),
    (4, 64): _config((32, 32, 2, 2), (32, 32, 2, 2), (16, 32, 4, 2)),
    (4, 128): _config((32, 16, 8, 2), (16, 16, 4, 1), (32, 16, 8, 1)),
}
_SM_100 = {
    (2, 32): _config((128, 128, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2)),
    (2, 64): _config((128, 128, 8, 3), (128, 64, 4, 2), (64, 128, 8, 2)),
    (2, 128): _config((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (4, 32): _config((64, 32, 8, 2), (64, 16, 8, 2), (32, 64, 8, 2)),
    (4, 64): _config((64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 4, 1)),
    (4, 128): _config((32, 32, 8, 2), (16, 16, 4, 1), (32, 16, 8, 1)),
}
# sm_80, 86, 89 and 120.
_SMALL = {
    (2, 32): _config((128, 128, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2)),
    (2, 64): _config((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (2, 128): _config((128, 32, 8, 3), (64, 32, 4, 2), (32, 32, 4, 2)),
    (4, 32): _config((64, 32, 8, 2), (64, 16, 8, 2), (16, 64, 8, 2)),
    (4, 64): _config((64, 32, 8, 2), (32, 16, 8, 2), (16, 16, 4, 1)),
    (4, 128): _config((32, 32, 8, 2), (16, 32, 8, 1), (32, 16, 8, 1)),
}
# The interpreter on a CPU: small tiles, so that small tests contain every kind of tile.
_INTERPRETER = _config((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), "ieee")


def attention_config(capability: tuple[int, int] | None, itemsize: int, head_dim: int) -> AttentionConfig:
    """Settings for a compute capability (None: the interpreter), bytes per element, and head dimension."""
    if capability is None:
        return _INTERPRETER
    return {9: _SM_90, 10: _SM_100}.get(capability[0], _SMALL)[itemsize, head_dim]
