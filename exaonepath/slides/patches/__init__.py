"""Patching: where the tissue of a slide is, and the grid of patches on it."""
