"""Readers of slide files: one interface, and an implementation for each way to get at the pixels."""
