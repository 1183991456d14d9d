"""Values of patches, which pictures colour patches by, and what was computed of the slides of a folder.

The slide viewer and the pictures of `exaonepath heatmap` take them from here, so that both show the same.
"""
