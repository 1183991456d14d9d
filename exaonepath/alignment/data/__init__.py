"""Cohorts of patients: reading, checks, splits and standardisation of molecular tables and slides, for training."""

from __future__ import annotations

from importlib.util import find_spec

import lazy_loader

from exaonepath.errors import MissingDependencyError

for _package in ("anndata", "pandas", "pyarrow", "scipy"):
    if find_spec(_package) is None:
        raise MissingDependencyError(
            f"cohorts of patients need {_package}, which is not installed: pip install 'exaonepath[train]'"
        )

# Imported at their first use: reading the header of a table needs none of the packages that a cohort needs. The names,
# and the modules that define them, are in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
