"""CL-LoRA's equations once more, on bare matrices: nothing of the package is used here, and of autograd the derivatives
of losses written out below."""

from __future__ import annotations

import torch
from torch import Tensor

Key = tuple[int, str]  # a block's number and a projection


class ByHand:
    """CL-LoRA with SGD on a TinyViT of four blocks; ``leave_out`` names what a faulty one would forget."""

    def __init__(
        self, base: dict[str, Tensor], shared_A: dict[Key, Tensor], leave_out: str, temperature: float
    ) -> None:
        self.base, self.A, self.leave_out, self.temperature = base, dict(shared_A), leave_out, temperature
        self.shared = {key: torch.zeros(8, A.shape[0], dtype=A.dtype) for key, A in shared_A.items()}
        self.teacher: dict[Key, Tensor] = {}
        self.old_mu: list[Tensor] = []

    def begin(self, A: dict[Key, Tensor], mu: Tensor, weight: Tensor, sigma: Tensor) -> None:
        """``mu`` [blocks, 3], columns of q, of k (which has no adapter) and of v."""
        self.specific_A = {key: t.clone() for key, t in A.items()}
        self.specific_B = {key: torch.zeros(8, t.shape[0], dtype=t.dtype) for key, t in A.items()}
        self.mu, self.weight, self.sigma = mu.clone(), weight.clone(), sigma.clone()
        self.momentum: dict[int, Tensor] = {}

    def parameters(self) -> list[Tensor]:
        specific = [*self.specific_A.values(), *self.specific_B.values()]
        return [*self.shared.values(), *specific, self.mu, self.weight, self.sigma]

    # The model

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.base[f"{name}.weight"]
            + (self.base[f"{name}.bias"])
        )

    def linear(self, x: Tensor, name: str, delta: Tensor | float = 0.0) -> Tensor:
        return x @ (self.base[f"{name}.weight"] + delta).T + self.base[f"{name}.bias"]

    def block(self, x: Tensor, i: int, deltas: dict[Key, Tensor]) -> Tensor:
        h = self.norm(x, f"blocks.{i}.norm1")
        q, k, v = (self.linear(h, f"blocks.{i}.{p}", deltas.get((i, p), 0.0)) for p in "qkv")
        heads = []
        for columns in (slice(0, 4), slice(4, 8)):
            scores = q[..., columns] @ k[..., columns].transpose(1, 2) / 2
            heads.append(torch.softmax(scores, -1) @ v[..., columns])
        x = x + self.linear(torch.cat(heads, -1), f"blocks.{i}.o")
        hidden = torch.tanh(self.linear(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.up"))
        return x + self.linear(hidden, f"blocks.{i}.down")

    def features(self, x: Tensor, blocks: int, deltas: dict[Key, Tensor]) -> Tensor:
        x = torch.cat([self.base["cls"].expand(len(x), 1, 8), self.linear(x, "embed")], 1)
        for i in range(blocks):
            x = self.block(x, i, deltas)
        return self.norm(x, "norm")[:, 0]

    def logits(self, features: Tensor) -> Tensor:
        rows = features / features.square().sum(1, keepdim=True).sqrt()
        return self.sigma * rows @ (self.weight / self.weight.square().sum(1, keepdim=True).sqrt()).T

    # A batch

    def batch(self, x: Tensor, labels: Tensor) -> None:
        if self.teacher:
            self.distil(x)
        self.learn(x, labels)

    def differentiate(self, parameters: list[Tensor]) -> None:
        for p in self.parameters():
            p.requires_grad_(any(p is q for q in parameters))

    def distil(self, x: Tensor) -> None:
        used = [*self.shared.values(), self.weight, self.sigma]
        self.differentiate(used)
        student = self.logits(self.features(x, 2, {k: B @ self.A[k] for k, B in self.shared.items()}))
        with torch.no_grad():
            features = self.features(x, 2, {k: B @ self.A[k] for k, B in self.teacher.items()})
        teacher = self.logits(features)
        if self.leave_out == "the gradient through the teacher":
            teacher = teacher.detach()
        teacher, student = teacher / self.temperature, student / self.temperature
        wanted = torch.exp(teacher) / torch.exp(teacher).sum(1, keepdim=True)
        given = student - torch.logsumexp(student, 1, keepdim=True)
        loss = 5 * -(wanted * given).sum(1).mean()
        if self.leave_out == "the loss without a factor of T²":
            loss = 4 * loss
        gradients = list(torch.autograd.grad(loss, used))
        for n, key in enumerate(self.shared):
            lengths = self.teacher[key].square().sum(1).sqrt()
            for j in range(8):
                if self.leave_out != "the reassignment":
                    gradients[n][j] *= 8 * lengths[j] / lengths.sum()
        if self.leave_out == "the rest of the first step":
            rest = [p for p in self.parameters() if all(p is not u for u in used)]
            used, gradients = used + rest, gradients + [torch.zeros_like(p) for p in rest]
        self.sgd(used, gradients)

    def learn(self, x: Tensor, labels: Tensor) -> None:
        used = self.parameters()
        self.differentiate(used)
        deltas = {k: B @ self.A[k] for k, B in self.shared.items()}
        for (i, p), B in self.specific_B.items():
            deltas[i, p] = self.mu[i - 2, "qkv".index(p)] * (B @ self.specific_A[i, p])
        logits = self.logits(self.features(x, 4, deltas))
        loss = (torch.logsumexp(logits, 1) - logits[torch.arange(len(x)), labels]).mean()
        columns = [0, 2] if self.leave_out == "the row of k" else [0, 1, 2]
        mu = self.mu[:, columns].flatten()
        for old in self.old_mu:
            other = old[:, columns].flatten()
            cosine = (mu @ other) / (mu.square().sum() * other.square().sum()).sqrt()
            loss = loss + 1e-4 * cosine.abs() / len(self.old_mu)
        gradients = torch.autograd.grad(loss, used, allow_unused=True)
        assert all(g is not None for g in gradients)
        frozen = len(self.shared) if self.leave_out == "the shared in the task's step" else 0
        self.sgd(used[frozen:], list(gradients[frozen:]))

    def sgd(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        self.differentiate([])
        for p, gradient in zip(parameters, gradients, strict=True):
            decay = torch.full_like(p, 1e-4)
            if self.leave_out == "the decay of k" and p is self.mu:
                decay[:, 1] = 0
            v = gradient + decay * p
            self.momentum[id(p)] = v = 0.9 * self.momentum[id(p)] + v if id(p) in self.momentum else v
            p -= 0.3 * v

    def end(self) -> None:
        self.teacher = {key: B.clone() for key, B in self.shared.items()}
        self.old_mu.append(self.mu.clone())
