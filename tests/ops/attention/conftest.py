"""Makes the helper modules in this folder importable: in pytest's importlib mode, no folder of tests is a package."""

import importlib.util
import sys
from pathlib import Path

for helper in ("attention_cases", "machine_code", "compile_ahead"):
    spec = importlib.util.spec_from_file_location(helper, Path(__file__).with_name(f"{helper}.py"))
    sys.modules[helper] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[helper])
