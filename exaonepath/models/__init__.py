"""Import path of version 0.1, deprecated. The code is in `exaonepath.encoders` and `exaonepath.alignment.model`."""

import warnings

from exaonepath.encoders.composite import ExaonePathModel
from exaonepath.encoders.configuration import (
    ExaonePathConfig,
    ExaonePathPatchEncoderConfig,
    ExaonePathSlideEncoderConfig,
)
from exaonepath.encoders.patch_encoder import ExaonePathPatchEncoderModel
from exaonepath.encoders.slide_encoder import ExaonePathSlideEncoderModel, SlideEncoderOutput

# Importing a module of this package runs this file first, so one warning serves all of them.
warnings.warn(
    "exaonepath.models is deprecated since 0.2 and will be removed in 0.4: import the same names from exaonepath (for "
    "example, from exaonepath import ExaonePathSlideEncoderModel) or from exaonepath.encoders and "
    "exaonepath.alignment.model",
    DeprecationWarning,
    stacklevel=2,
)

__all__ = [
    "ExaonePathConfig",
    "ExaonePathModel",
    "ExaonePathPatchEncoderConfig",
    "ExaonePathPatchEncoderModel",
    "ExaonePathSlideEncoderConfig",
    "ExaonePathSlideEncoderModel",
    "SlideEncoderOutput",
]
