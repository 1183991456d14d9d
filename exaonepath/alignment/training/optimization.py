"""The optimiser: AdamW with weight decay for matrices only, a warmup and cosine schedule, and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from exaonepath.alignment.modalities import WSI
from exaonepath.alignment.training.settings import OptimizerSettings

# The last parts of the parameter names of temperature and bias in `PairwiseSigmoidLoss`.
_LOGIT_PARAMETERS = ("log_t", "bias")
_LOSS_PREFIX = "loss."


def is_logit_parameter(name: str) -> bool:
    """Whether a parameter of the alignment model is t or b of the pairs."""
    return name.startswith(_LOSS_PREFIX) and name.rsplit(".", 1)[-1] in _LOGIT_PARAMETERS


def lr_share(name: str, settings: OptimizerSettings) -> float:
    """Learning rate of a parameter of the alignment model, in multiples of `settings.peak`."""
    parts = name.split(".")
    if is_logit_parameter(name):
        share = settings.logit_lr_share
    elif parts[0] == "omics" and parts[2] in ("ffn", "ffn_norm"):
        share = settings.ffn_lr_share
    elif parts[0] == "omics":
        share = settings.omics_lr_share
    elif "projections" in parts:
        of_slide = WSI in parts[-1].split("_to_")
        share = settings.slide_projection_lr_share if of_slide else settings.projection_lr_share
    else:
        share = None
    return 1.0 if share is None else share


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW for all parameters that require a gradient: decay for matrices, none for norms, biases, tokens, t and b.

    The parameters of one decay and one share of the learning rate (`lr_share`) are one group.
    """
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            logit = is_logit_parameter(name)
            decayed = not logit and (parameter.ndim == 2 or "projections" in name)
            groups.setdefault((logit, not decayed, lr_share(name, settings)), []).append(parameter)
    tables = [
        {"params": parameters, "weight_decay": 0.0 if plain else settings.weight_decay, "lr_share": share}
        for (_, plain, share), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(tables, lr=settings.peak, betas=settings.betas)


def learning_rate(step: int, total: int, settings: OptimizerSettings) -> float:
    """Learning rate of step 0 .. total - 1: linear warmup, then half a cosine down to `min_lr_share`."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    if step < warmup:
        return settings.peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    floor = settings.min_lr_share
    return settings.peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times the group's share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """2-norm over all gradients, float32; 0 if there are none."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


class AveragedWeights:
    """Exponential moving average of the trained parameters, in float32; its decay increases during the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {n: p.detach().clone().float() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after `step` steps to the average."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                self.tensors[name].lerp_(parameter.detach().float(), 1 - keep)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averaged ones; a second call restores them."""
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                kept = parameter.detach().clone().float()
                parameter.copy_(self.tensors[name])
                self.tensors[name] = kept

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the average from the tensors of a checkpoint."""
        for name, tensor in tensors.items():
            self.tensors[name] = tensor.to(self.tensors[name].device, copy=True)
