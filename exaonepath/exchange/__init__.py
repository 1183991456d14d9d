"""File layouts of other tools, a module each: they are written from the patches of a slide, and read if they hold
features.

Nothing here knows where this package keeps its results; `exaonepath.slides.exporting` and `importing` do.
"""
