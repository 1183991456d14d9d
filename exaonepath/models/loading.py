"""Import path of version 0.1. The code is in `exaonepath.encoders.loading`."""

from exaonepath.encoders.loading import LoadedEncoder, load_patch_encoder, load_slide_encoder
from exaonepath.encoders.published import DEFAULT_WEIGHTS

__all__ = ["DEFAULT_WEIGHTS", "LoadedEncoder", "load_patch_encoder", "load_slide_encoder"]
