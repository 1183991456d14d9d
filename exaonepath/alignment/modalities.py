"""The five modalities of a patient: the slide and four molecular profiles."""

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
