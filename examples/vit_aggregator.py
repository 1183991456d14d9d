"""Replace the attention of a ViT-style slide aggregator, written here in plain torch, by `varlen_attention`.

    python examples/vit_aggregator.py

The aggregator turns the patch features of each slide into one embedding. A batch of slides of different lengths is
first padded to the longest and masked, as is usual, and then packed without padding. Both have to give the same
embeddings and the same gradients; time and memory of a training step are printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from exaonepath.ops import Segments, varlen_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # three times [..., H, D] to one


class Block(nn.Module):
    """A transformer layer; everything but `attend` treats each token by itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(attend(q, k, v).flatten(-2))
        return x + self.mlp(self.norm_2(x))


class Aggregator(nn.Module):
    """Patch features of slides, each [N, F], to embeddings [B, E]: the output of a CLS token in front of each slide."""

    def __init__(self, features: int = 256, width: int = 128, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.project, self.cls = nn.Linear(features, width), nn.Parameter(torch.randn(1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def padded(self, slides: list[Tensor]) -> Tensor:
        """Slides padded to the longest: [B, L, E], with a mask of the tokens that exist."""
        x = nn.utils.rnn.pad_sequence([self.tokens(slide) for slide in slides], batch_first=True)
        lengths = torch.tensor([1 + len(slide) for slide in slides], device=x.device)
        mask = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return self.run(x, attend)[:, 0]

    def packed(self, slides: list[Tensor]) -> Tensor:
        """Slides one after another: [T, E], without padding and without a mask."""
        x = torch.cat([self.tokens(slide) for slide in slides])
        cu_seqlens = torch.tensor([0, *(1 + len(slide) for slide in slides)]).cumsum(0)
        segments = Segments.from_cu_seqlens(cu_seqlens, x.device)  # once for all layers

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return varlen_attention(q, k, v, segments)

        return self.run(x, attend)[segments.offsets[:-1]]

    def tokens(self, slide: Tensor) -> Tensor:
        return torch.cat([self.cls, self.project(slide)])

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x)


def step(model: Aggregator, embed: Callable[[list[Tensor]], Tensor], slides: list[Tensor]) -> dict[str, Tensor]:
    """Embeddings, and the gradients of their weighted sum."""
    model.zero_grad()
    embeddings = embed(slides)
    embeddings.mul(torch.linspace(-1, 1, embeddings.shape[1], device=embeddings.device)).sum().backward()
    return {"embeddings": embeddings.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Shortest time in seconds, and GB that one run saves for its backward pass."""
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds), sum(saved.values()) / 1e9


def main() -> None:
    """Both aggregators on the same slides: compare, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patches", type=int, default=800, help="patches of the largest slide")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = arguments.device
    model = Aggregator().to(device)
    shares = (1.0, 0.6, 0.3, 0.2, 0.1, 0.05, 0.0)  # the last slide has no patch, only its CLS token
    slides = [torch.randn(int(share * arguments.patches), 256, device=device) for share in shares]
    ways = {"padded, masked": model.padded, "packed": model.packed}

    results = {name: step(model, embed, slides) for name, embed in ways.items()}
    worst = 0.0
    for part, expected in results["padded, masked"].items():
        error = float((results["packed"][part] - expected).norm() / expected.norm().clamp(min=1e-6))
        worst = max(worst, error)
        if not error < 1e-3:  # float32 sums in another order; a GPU may round products to tf32
            sys.exit(f"{part} differs by {error:.1e}")
    sys.stdout.write(f"embeddings and gradients agree to {worst:.1e} (relative)\n")

    sys.stdout.write(f"a training step with {len(slides)} slides of 0 to {arguments.patches} patches on {device}:\n")
    for name, embed in ways.items():
        seconds, gigabytes = measure(lambda embed=embed: step(model, embed, slides), device, arguments.repeats)
        sys.stdout.write(f"{name:<16} {1e3 * seconds:9.1f} ms {gigabytes:8.3f} GB saved for the backward pass\n")


if __name__ == "__main__":
    main()
