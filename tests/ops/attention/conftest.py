"""Makes the helper modules in this folder importable: in pytest's importlib mode, no folder of tests is a package."""

import importlib.util
import sys
from pathlib import Path

import pytest

from exaonepath.ops.extension import load_extension

for helper in ("attention_cases", "machine_code", "compile_ahead"):
    spec = importlib.util.spec_from_file_location(helper, Path(__file__).with_name(f"{helper}.py"))
    sys.modules[helper] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[helper])


@pytest.fixture
def calls(monkeypatch):
    """Calls of the attention of the C++ extension."""
    extension, _ = load_extension()
    made = []
    for name in ("attention_cpu", "attention_backward_cpu"):
        real = getattr(extension, name)
        monkeypatch.setattr(extension, name, lambda real=real, name=name, **kw: (made.append(name), real(**kw))[1])
    return made
