"""Frozen launch settings of the kernels, per architecture and dtype. Tuned in bench/, never at run time.

Starting points, not measured yet: block sizes that fit the shared memory of each architecture at head dimension 64
(99 KB on sm_86/89/120, 163 on sm_80, 227 on sm_90/100).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """Rows and columns of a tile, warps, and depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of the three kernels; `precision` is what float32 products run in."""

    forward: LaunchConfig
    query_gradient: LaunchConfig
    key_gradient: LaunchConfig
    precision: str


def attention_config(capability: tuple[int, int] | None, itemsize: int, head_dim: int) -> AttentionConfig:
    """Settings for a compute capability (None: the interpreter on a CPU), bytes per element, and head dimension."""
    if capability is None:
        small = LaunchConfig(32, 32, 4, 1)
        return AttentionConfig(small, small, small, "ieee")
    big_memory = capability[0] in (9, 10) or capability == (8, 0)
    stages = 2 if head_dim > 64 or capability[0] == 12 else 3
    if itemsize == 4:
        config = LaunchConfig(64, 32, 4, 2)
        return AttentionConfig(config, config, config, "tf32x3")
    forward = LaunchConfig(
        128, 128 if capability[0] == 9 and head_dim <= 64 else 64, 4 if head_dim <= 64 else 8, stages
    )
    backward = LaunchConfig(64, 128 if big_memory and head_dim <= 64 else 64, 4, 2)
    return AttentionConfig(forward, backward, backward, "tf32x3")
