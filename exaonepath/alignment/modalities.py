"""The five modalities of a patient: the slide and four molecular profiles."""

WSI = "wsi"
# The order of the paper; pairs are formed, and embeddings listed, in it.
OMICS = ("rna", "snp", "cnv", "methylation")
MODALITIES = (WSI, *OMICS)
