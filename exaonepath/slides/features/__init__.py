"""Features of patches: read, preprocessed, encoded; resumable, with a list of what could not be read."""
