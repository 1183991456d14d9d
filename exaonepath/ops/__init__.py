"""Operations of the models: checked, differentiable, with a choice of backends.

`attention.layout` sorts tokens once, `attention.rotary` computes angles from coordinates, and
`attention.fragment_attention` computes attention inside segments. `attention.varlen` is the same with the arguments of
other libraries, for models that are not ours.
"""

from exaonepath.ops.attention.fragment_attention import ATTENTION_BACKENDS, fragment_attention, resolve_backend
from exaonepath.ops.attention.layout import FragmentLayout, Segments, build_fragment_layout
from exaonepath.ops.attention.rotary import Rotation, apply_rotation, rotary_periods
from exaonepath.ops.attention.varlen import varlen_attention

__all__ = [
    "ATTENTION_BACKENDS",
    "FragmentLayout",
    "Rotation",
    "Segments",
    "apply_rotation",
    "build_fragment_layout",
    "fragment_attention",
    "resolve_backend",
    "rotary_periods",
    "varlen_attention",
]
