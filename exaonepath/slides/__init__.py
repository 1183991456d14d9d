"""The stages from a slide file to embeddings: patches, patch features, embeddings."""
