"""Pictures of a slide, its tissue, its patches and their embeddings. Needs the extra `viz` (matplotlib)."""

from exaonepath.plotting import require_matplotlib
from exaonepath.viz.colors import embedding_colors
from exaonepath.viz.overview import draw_overview

__all__ = ["draw_overview", "embedding_colors", "require_matplotlib"]
