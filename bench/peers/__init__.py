"""Every way to compute attention inside fragments that torch offers, and FlashAttention 3 if installed; one a file."""

from __future__ import annotations

from . import cudnn, dense_mask, efficient, flash, flash3, flex, sdpa_loop, varlen
from .base import Peer

PEERS: tuple[Peer, ...] = (
    varlen.PEER,
    flash.PEER,
    flash3.PEER,
    cudnn.PEER,
    efficient.PEER,
    *sdpa_loop.PEERS,
    flex.PEER,
    flex.STATIC,
    dense_mask.PEER,
)

__all__ = ["PEERS", "Peer"]
