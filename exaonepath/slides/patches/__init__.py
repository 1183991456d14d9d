"""Patching: finds the tissue of a slide and computes the grid of patches on it."""
