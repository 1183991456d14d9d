"""Simple methods on the same inputs, patients and splits as the model: what its numbers have to be compared with."""
