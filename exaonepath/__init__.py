"""Whole-slide pathology images to slide embeddings, and their alignment with molecular profiles.

The public API of both wings; importing it is cheap, since each name is imported when it is first used.

Slides (`exaonepath.slides`): `encode_slide`, `encode_slides`, and their stages `patchfy`, `extract_features`,
`embed_features_file`; `read_patches`, `read_contours`, `read_features`, `read_embedding` read what they wrote;
`collect_slide_vectors` gathers the embeddings of a folder in one table, and `read_slide_vectors` reads it;
`load_patch_encoder` and `load_slide_encoder` give the encoders; `pipeline` is both in one call, and
`exaonepath.adapters` has them in the forms of other libraries; `export_slides` and `import_features` write and read the
files of other tools.

Alignment (`exaonepath.alignment`): `load_cohort`, `train`, `load_alignment`, `evaluate`, and the loss
`PairwiseSigmoidLoss`.

Operations: `fragment_attention`.

`transformers.AutoModel` builds these models from published repositories, whichever of the two packages is imported
first.
"""

import lazy_loader

from exaonepath.registration import install

# Names and where they are defined: __init__.pyi, which type checkers read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

install()
