"""Transforms of measured values: the names that exist, and no other."""

import pytest
import torch

from exaonepath.alignment.standardization import transformed
from exaonepath.errors import SettingsError


def test_an_unknown_transform_is_refused():
    """It would be log1p without a word, for a misspelled "cpm_log1p" as well."""
    values = torch.tensor([[1.0, 3.0]])
    assert torch.equal(transformed(values, "none"), values)
    assert torch.equal(transformed(values, "log1p"), values.log1p())
    assert torch.allclose(transformed(values, "cpm_log1p"), (values / 4 * 1e6).log1p())
    for name in ("cpm_log", "log2", ""):
        with pytest.raises(SettingsError, match="unknown transform"):
            transformed(values, name)
