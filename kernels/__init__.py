"""Triton kernels, installed as `exaonepath.kernels`. This package does not import triton; the kernels' modules do."""
