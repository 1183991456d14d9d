"""Triton kernels, installed as `exaonepath.kernels`. Importing this loads no Triton: who needs a kernel does."""
