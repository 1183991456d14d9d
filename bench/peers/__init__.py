"""Every way to compute attention inside fragments that torch itself offers, one adapter a file."""

from __future__ import annotations

from . import cudnn, dense_mask, efficient, flash, flex, sdpa_loop, varlen
from .base import Peer

PEERS: tuple[Peer, ...] = (
    varlen.PEER,
    flash.PEER,
    cudnn.PEER,
    efficient.PEER,
    *sdpa_loop.PEERS,
    flex.PEER,
    flex.STATIC,
    dense_mask.PEER,
)

__all__ = ["PEERS", "Peer"]
