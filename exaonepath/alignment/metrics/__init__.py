"""What a trained model is worth: retrieval, probes, survival, geometry of the embeddings, exports, pictures.

The metric modules (`retrieval`, `probes`, `survival`, `geometry`, `intervals`) know no model: arrays in, numbers out.
"""
