"""The sigmoid loss over all pairs of modalities: the public operation, its tile passes and its backends."""
