"""Metrics of a trained model: retrieval, probes, survival, geometry of the embeddings.

The metric modules (`retrieval`, `probes`, `survival`, `geometry`, `intervals`) do not depend on a model: they compute
numbers from arrays.
"""
