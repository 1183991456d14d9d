"""Names of devices and dtypes."""

import contextlib

import pytest
import torch

from exaonepath.device import inference, resolve_device, resolve_dtype
from exaonepath.errors import BackendError, DeviceError


def test_auto_and_cpu():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu0", "xla", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(DeviceError):
        resolve_device(name)


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cpu"):
        resolve_device("cuda")


def test_dtypes():
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16
    assert resolve_dtype(torch.float16, cpu) == torch.float16
    for wrong in ("int8", torch.int64, torch.float64):
        with pytest.raises(DeviceError):
            resolve_dtype(wrong, cpu)


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_auto_dtype_asks_the_card(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_dtype("auto", torch.device("cuda")) == dtype


def test_running_out_of_memory_is_a_typed_error():
    def fill():
        with inference(torch.device("cpu"), torch.float32, "a slide of 3 patches"):
            raise torch.OutOfMemoryError("too much")

    with pytest.raises(BackendError, match="a slide of 3 patches does not fit"):
        fill()


def test_evaluation_mode_is_restored_for_each_part():
    """Frozen parts of a model in training stay in evaluation mode, also after an error inside the block."""
    from exaonepath.device import evaluating

    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)))
    model.train()
    model[1].eval()
    before = [part.training for part in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise KeyError
    assert [part.training for part in model.modules()] == before
