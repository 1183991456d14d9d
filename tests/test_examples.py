"""The examples that need no data run as they stand."""

import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_aggregator_is_the_same_with_varlen_attention(warm_package):
    code = f"import runpy; runpy.run_path({str(EXAMPLES / 'vit_aggregator.py')!r}, run_name='__main__')"
    done = warm_package.run(code, "--device", "cpu", "--patches", "150")
    assert done.returncode == 0, done.stderr
    assert "embeddings and gradients agree" in done.stdout
    padded, packed = (float(gigabytes) for gigabytes in re.findall(r"([\d.]+) GB saved", done.stdout))
    assert packed < padded
