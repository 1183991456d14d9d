"""Training of the alignment model: `run.train(settings, out)`, from the shell `exaonepath train`.

Nothing is imported here: the settings alone are needed to show a command's help, and cohorts need the extra `train`.
"""
