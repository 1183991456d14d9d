"""Training of the alignment model: `run.train(settings, out)`, or `exaonepath train` in a shell.

This file imports nothing: the help of a command needs only the settings, and cohorts need the extra `train`.
"""
