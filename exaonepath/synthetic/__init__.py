"""Synthetic H&E-like slides: real files that OpenSlide can open, of any size, written without the whole image in
memory.

For tests, demos and benchmarks; they have no diagnostic meaning.
"""

from exaonepath.synthetic.slide import make_slide

__all__ = ["make_slide"]
