"""Patch features: reading, preprocessing, encoding; runs can be resumed, and unreadable patches are listed."""
