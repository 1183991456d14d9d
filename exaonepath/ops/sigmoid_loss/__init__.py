"""The sigmoid loss over all pairs of modalities: the public operation, its passes and engines."""
