"""The GPU for tests of the sigmoid loss."""

import pytest
import torch

from exaonepath.ops.sigmoid_loss.engine import why_not


@pytest.fixture
def card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := why_not("cuda", device, torch.bfloat16):
        pytest.skip(reason)
    return device
