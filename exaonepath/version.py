"""The version: read by the build without importing the package, and by every module that stamps a file."""

__version__ = "0.2.0"
