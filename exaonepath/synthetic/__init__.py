"""Synthetic H&E-like slides: real files that OpenSlide opens, of any size, made without holding the image in memory.

For tests, demos and benchmarks; nothing here has diagnostic meaning.
"""

from exaonepath.synthetic.slide import make_slide
from exaonepath.synthetic.tissue import Tissue

__all__ = ["Tissue", "make_slide"]
