"""Reference implementations in plain torch, as simple as possible, for comparison in tests and benchmarks.

They are not meant to be fast, and do not call the code that they are compared with.
"""
