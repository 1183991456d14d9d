"""The five modalities of a patient: the slide and four molecular profiles."""

WSI = "wsi"
# The order of the paper; pairs and embeddings have this order.
OMICS = ("rna", "snp", "cnv", "methylation")
MODALITIES = (WSI, *OMICS)
