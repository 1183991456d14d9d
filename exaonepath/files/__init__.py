"""What is stored on disk: atomic files, the HDF5 gate, and the rule by which a stored result is used again."""
