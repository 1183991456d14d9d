"""Triton kernels, installed as `exaonepath.kernels`. Imports nothing heavy: Triton is loaded by whoever asks for a kernel."""
