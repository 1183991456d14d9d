"""The operations in plain torch, as obvious as possible: the one truth that tests and benchmarks compare with.

Nothing here is meant to be fast, and nothing here calls the code it is the reference of.
"""
