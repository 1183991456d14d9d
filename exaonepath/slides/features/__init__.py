"""Patch features: patches are read, preprocessed and encoded; runs can be resumed, and unreadable patches are
listed."""
