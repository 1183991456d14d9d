"""Files on disk: atomic writing, strict reading of HDF5, and the rule by which a stored result is used again."""
