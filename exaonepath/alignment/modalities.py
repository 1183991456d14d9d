"""The modalities of a patient: the slide, the four molecular profiles of the paper, and further ones by name."""

from __future__ import annotations

from collections.abc import Iterable

from exaonepath.errors import SettingsError

WSI = "wsi"
# The order of the paper; pairs and embeddings have this order.
OMICS = ("rna", "snp", "cnv", "methylation")
MODALITIES = (WSI, *OMICS)

# Changes of F-RoPE for ablations; the weights have the same shapes in every mode.
ROPE_MODES = {
    "full": "rotation by position, attention inside fragments",
    "no_rotation": "fragments kept, positions unknown",
    "no_fragments": "rotation by position, attention across fragments",
    "off": "neither: every block is a NoPE block",
    "shuffled": "positions permuted among the patches of the slide",
}

# "fused" names the embedding of all modalities; the others are arguments of `encode_patient`.
_RESERVED = (WSI, "fused", "totals", "self")
# The projection from a to b is the parameter `a_to_b`, so that a name with this part would make two of them equal.
_JOINT = "_to_"


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of modalities, each once: the slide, the four of the paper in its order, then any others by name."""
    rank = {name: at for at, name in enumerate(MODALITIES)}
    return tuple(sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name)))


def columns_of(names: Iterable[str]) -> tuple[str, ...]:
    """Columns of a table of availability: the five of the paper, also those that `names` lacks, then any others."""
    return in_order((*MODALITIES, *names))


def name_problem(name: str) -> str | None:
    """Why a word cannot name a molecular modality; None if it can."""
    if not name.isidentifier():
        return "a name must be a word of letters, digits and underscores that begins with a letter"
    if name in _RESERVED:
        return "this name has another meaning"
    if _JOINT in f"_{name}_":
        return f"names of parameters are joined by {_JOINT!r}, so a name must not have it"
    return None


def check_further(names: Iterable[str]) -> tuple[str, ...]:
    """The names of further molecular modalities, in order.

    Raises:
        SettingsError: a name cannot be used, is one of `OMICS`, or two differ in case only.
    """
    given = tuple(names)
    for name in given:
        problem = "the model has it anyway" if name in OMICS else name_problem(name)
        if problem:
            raise SettingsError(f"{name!r} cannot name a further modality: {problem}")
    folded = [name.lower() for name in (*given, *OMICS)]
    if twice := sorted({name for name in given if folded.count(name.lower()) > 1}):
        raise SettingsError(f"names of modalities must differ in more than case: {', '.join(twice)}")
    return in_order(given)
