"""Analyses of a trained model that labs ask for, beyond retrieval, probes and survival; see docs/evaluation.md.

Each is a function of a `Context` that returns plain JSON types. What it cannot compute is an entry of the notes, which
the report prints: "not evaluated because ...".
"""
