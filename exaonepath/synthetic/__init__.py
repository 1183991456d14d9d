"""Synthetic H&E-like slides: real files that OpenSlide opens, of any size, made without holding the image in memory.

For tests, demos and benchmarks; nothing here has diagnostic meaning.
"""

from exaonepath.synthetic.slide import make_slide

__all__ = ["make_slide"]
