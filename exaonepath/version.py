"""The version, apart from everything heavy, so that any module may import it."""

__version__ = "0.1.0"
