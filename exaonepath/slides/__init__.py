"""A slide file becomes vectors: patches, features of patches, embeddings."""
