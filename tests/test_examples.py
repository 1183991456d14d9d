"""The examples that need no data run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_aggregator_is_the_same_with_varlen_attention():
    command = [sys.executable, str(EXAMPLES / "vit_aggregator.py"), "--device", "cpu", "--patches", "150"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "embeddings and gradients agree" in done.stdout
    padded, packed = (float(gigabytes) for gigabytes in re.findall(r"([\d.]+) GB saved", done.stdout))
    assert packed < padded
