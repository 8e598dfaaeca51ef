"""A transformer with a pool of 65,536 rank-1 experts for an MLP: python examples/peer_layer.py [--steps N] [...]

Each token chooses its experts by product keys (PEER, arXiv 2407.04153, here without the activation of an expert: what
is not linear is the choice and its weights). As there, the pool takes the place of one MLP. The model learns the
characters of Python's own standard library beside the same transformer with a dense MLP of as many multiplications a
token. Prints losses, what held-out modules cost in bits a character, how many experts are used, and time and memory of
a training step against the form that copies the rows of chosen experts.

The gradient of a pool is dense, as is the state of AdamW: every step reads and writes all 2·E·width numbers of the pool
several times, chosen or not. At this width that is bearable, and there is no weight decay, which would wear off experts
that nobody chooses.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Else the profiled step says that it starts and stops, and warns of memory from before it, across the progress bars.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora_kernels import ProductKeyScores, explain, rank1_experts
from clora_kernels.continual.extras import require
from clora_kernels.testing import peak_memory, take_turns

TRAINING = (
    "argparse", "ast", "calendar", "configparser", "datetime", "difflib", "doctest", "inspect", "mailbox", "optparse",
    "pdb", "pickle", "pickletools", "pydoc", "statistics", "subprocess", "tarfile", "threading", "turtle", "typing",
)  # fmt: skip
HELD_OUT = ("heapq", "textwrap")
WIDTH, ATTENTION_HEADS, CONTEXT, BATCH = 64, 4, 64, 16
KEY_FEATURES = 16
LR = 2e-3


class Text(NamedTuple):
    """Characters as numbers, those to learn from and those held out, and how many there are."""

    training: Tensor
    held_out: Tensor
    vocabulary: int


def load_text() -> Text:
    """Source of the standard library of the Python that runs. What is not ASCII counts as one character."""
    parts = [[Path(importlib.util.find_spec(name).origin).read_bytes() for name in of] for of in (TRAINING, HELD_OUT)]
    training, held_out = (torch.frombuffer(bytearray(b"\n".join(p)), dtype=torch.uint8).long() for p in parts)
    return Text(training.clamp(max=127), held_out.clamp(max=127), 128)


def batches(text: Tensor, steps: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Windows [BATCH, CONTEXT + 1] at random places."""
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(CONTEXT + 1)].to(device)


class ExpertMLP(nn.Module):
    """y = Σ_i weight_i · (x·a_e) · b_e over the experts e that a token chooses by product keys."""

    def __init__(self, width: int, experts: int, k: int, heads: int, backend: str) -> None:
        super().__init__()
        self.scores = ProductKeyScores(width, experts, k, heads=heads, key_features=KEY_FEATURES, batch_norm=True)
        self.experts_A = nn.Parameter(torch.randn(experts, width) * width**-0.5)
        self.experts_B = nn.Parameter(torch.randn(experts, width) * width**-0.5)
        self.backend = backend

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """What the call computes with, by the names of :func:`clora_kernels.rank1_experts`."""
        indices, weights = self.scores(x)
        pool = {"experts_A": self.experts_A, "experts_B": self.experts_B}
        return {"x": x, **pool, "indices": indices, "gates": weights}

    def forward(self, x: Tensor) -> Tensor:
        return rank1_experts(**self.arguments(x), backend=self.backend)

    def multiplications(self) -> int:
        """Of a token: query, keys, and both sides of the experts."""
        width, heads, side = self.experts_A.shape[1], self.scores.heads, self.scores.keys.shape[1]
        query, keys = width * 2 * heads * KEY_FEATURES, 2 * heads * side * KEY_FEATURES
        return query + keys + heads * self.scores.k * 2 * width


def dense_mlp(width: int, multiplications: int) -> nn.Module:
    hidden = max(multiplications // (2 * width), 1)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        S, L, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(S, L, 3, ATTENTION_HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(S, L, WIDTH))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Characters [S, L] to the scores [S, L, vocabulary] of those that follow. The last MLP is the one to compare."""

    def __init__(self, vocabulary: int, *mlps: nn.Module) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*map(Block, mlps))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(self.characters(tokens) + places)))


class Options(NamedTuple):
    """Of one run; see the command's help."""

    steps: int = 200
    experts: int = 65536
    k: int = 8
    heads: int = 4
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    seed: int = 0
    backend: str = "auto"


def make_models(vocabulary: int, options: Options) -> dict[str, Transformer]:
    """The transformer with a pool and the one with a dense MLP, which start as the same but for these."""
    torch.manual_seed(options.seed)
    pool = ExpertMLP(WIDTH, options.experts, options.k, options.heads, options.backend)
    models = {}
    for name, mlp in (("experts", pool), ("dense", dense_mlp(WIDTH, pool.multiplications()))):
        torch.manual_seed(options.seed)
        models[name] = Transformer(vocabulary, dense_mlp(WIDTH, pool.multiplications()), mlp).to(options.device)
    return models


def scores_of(model: nn.Module, windows: Tensor, options: Options) -> Tensor:
    """Those of the characters [S·L] that follow each but the last, in fp32."""
    with torch.autocast(options.device.type, options.dtype, enabled=options.dtype != torch.float32):
        return model(windows[:, :-1]).float().flatten(0, 1)


def loss_of(model: nn.Module, windows: Tensor, options: Options) -> Tensor:
    """Mean cross-entropy of a character, in nats."""
    return F.cross_entropy(scores_of(model, windows, options), windows[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, options: Options, name: str = "") -> list[float]:
    """The loss of every step."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    model.train()
    losses = []
    for windows in tqdm(batches(text, options.steps, generator, options.device), name, options.steps, unit="step"):
        loss = loss_of(model, windows, options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, options: Options) -> tuple[float, float]:
    """Bits a character of held-out text, and the share of characters that are guessed."""
    model.eval()
    length = (len(text) - 1) // CONTEXT * CONTEXT
    windows = torch.cat([text[:length].view(-1, CONTEXT), text[CONTEXT : length + 1 : CONTEXT, None]], 1)
    bits = guessed = 0.0
    for part in windows.to(options.device).split(8 * BATCH):
        scores, right = scores_of(model, part, options), part[:, 1:].flatten()
        bits += F.cross_entropy(scores, right, reduction="sum").item() / math.log(2)
        guessed += (scores.argmax(-1) == right).sum().item()
    return bits / length, guessed / length


@torch.no_grad()
def count_experts(model: Transformer, windows: Tensor, options: Options) -> Tensor:
    """How often each expert is chosen for these windows."""
    chosen: list[Tensor] = []
    scores = model.blocks[-1].mlp.scores
    hook = scores.register_forward_hook(lambda module, inputs, found: chosen.append(found[0]))
    loss_of(model.eval(), windows, options)
    hook.remove()
    return torch.bincount(chosen[0].flatten(), minlength=scores.experts)


def compare_steps(models: dict[str, Transformer], windows: Tensor, options: Options, seconds: float) -> list[str]:
    """Lines on time and memory of forward and backward: this backend, the form that copies rows, the dense MLP."""

    def forward(name: str, backend: str) -> Tensor:
        models[name].blocks[-1].mlp.backend = backend
        return loss_of(models[name].train(), windows, options)

    def backward(name: str, loss: Tensor) -> None:
        models[name].zero_grad()
        loss.backward()

    steps = {f"experts, {options.backend}": ("experts", options.backend)}
    steps |= {"experts, reference": ("experts", "reference"), "dense": ("dense", "")}
    turns = {
        label: (functools.partial(forward, name, backend), functools.partial(backward, name))
        for label, (name, backend) in steps.items()
    }
    rounds = take_turns(turns, options.device, seconds, least=3)
    lines = []
    for label, (name, _) in steps.items():
        models[name].zero_grad()
        _, peak = peak_memory(lambda turn=turns[label]: turn[1](turn[0]()), options.device)
        median = statistics.median(rounds[label].both)
        lines.append(f"{label:<22}{1e3 * median:>12.1f} ms{peak / 2**20:>12.1f} MiB")
    return lines


def parse(argv: list[str] | None) -> Options:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what in (
        ("steps", "training steps"),
        ("experts", "of each pool, a square"),
        ("k", "experts that a head chooses"),
        ("heads", "that choose for a token"),
        ("seed", "of weights and batches"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(default, name), help=f"{what} (default: %(default)s)"
        )
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--backend", default="auto", help="of rank1_experts (default: %(default)s)")
    given = vars(parser.parse_args(argv))
    if given["steps"] < 1:
        parser.error(f"--steps: got {given['steps']}, expected at least 1")
    try:
        device = torch.device(given["device"])
        x = torch.zeros(1, 4, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: got {given['device']}: {str(error).splitlines()[0]}")
    try:  # whatever the layer refuses, before anything is made
        small = ExpertMLP(4, given["experts"], given["k"], given["heads"], given["backend"]).to(device).eval()
        explain(rank1_experts, **small.arguments(x), backend=small.backend)
    except ValueError as error:
        parser.error(f"--{error}")
    return Options(**{**given, "device": device, "dtype": getattr(torch, given["dtype"])})


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    try:
        require("tqdm")
    except ImportError as error:
        sys.exit(f"this example {error}")
    torch.set_num_threads(1)  # the matrices are small
    begun = time.perf_counter()
    text = load_text()
    print(f"{len(text.training)} characters to learn from, {len(text.held_out)} held out")
    models = make_models(text.vocabulary, options)
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")
    losses = {name: train(model, text.training, options, name) for name, model in models.items()}
    print(f"{'mean loss of steps':<22}{'experts':>10}{'dense':>10}")
    size = max(options.steps // 8, 1)
    for start in range(0, options.steps, size):
        means = [sum(part := of[start : start + size]) / len(part) for of in losses.values()]
        print(f"{start + 1:>6} to {min(start + size, options.steps):<12}" + "".join(f"{m:>10.3f}" for m in means))
    for name, model in models.items():
        bits, guessed = evaluate(model, text.held_out, options)
        print(f"held out, {name}: {bits:.3f} bits a character, {guessed:.1%} of the characters guessed")
    windows = next(batches(text.held_out, 1, torch.Generator().manual_seed(options.seed), options.device))
    counts = count_experts(models["experts"], windows, options)
    top = counts.sort(descending=True).values[: max(options.experts // 100, 1)].sum() / counts.sum()
    print(f"{int((counts > 0).sum())} of {options.experts} experts are used by {windows[:, 1:].numel()} characters; "
          f"{top:.0%} of the choices fall on 1 % of the pool")  # fmt: skip
    print(f"{'forward + backward':<22}{'median':>15}{'peak memory':>16}")
    print("\n".join(compare_steps(models, windows, options, seconds=4)))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
