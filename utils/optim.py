"""Muon for the matrices inside the blocks, AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
semi-orthogonal matrix. `torch.optim.Muon` does so for one matrix at a time. A DiT has dozens of matrices in a few shapes, so here those
of equal shape are stacked, and every Newton-Schulz step is one batched product. A test holds the two equal.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.sharding import split_like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)       # quintic a s + b s^3 + c s^5: drives singular values to about 1 in 5 steps


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix U S V^T, by five steps of Newton-Schulz. matrices: (N, rows, columns); same shape out.

    bfloat16 on CUDA, where it is several times faster and precise enough; float32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    if tall:                                                # so that x x^T is the smaller product
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov's look-ahead, orthogonalised; updates of rows x columns scale by sqrt(max(1, rows / columns)).

    `found_inf`, if set, is a device tensor: where it is not 0 the weights stay as they are (torch's own fused optimizers
    know the same attribute).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, momenta, group["momentum"])         # in place: a gradient is used once
            updates = [whole(gradient) for gradient in gradients]
            by_shape = defaultdict(list)
            for i, p in enumerate(params):
                by_shape[p.shape].append(i)
            for (rows, columns), members in by_shape.items():
                update = orthogonalize(torch.stack([updates[i] for i in members])).float()
                stack = [params[i] for i in members]
                lr = group["lr"]
                decay = lr * group["weight_decay"]
                update = update * (lr * max(1, rows / columns) ** 0.5)
                if decay:
                    update = update + decay * torch.stack([whole(p) for p in stack])
                if self.found_inf is not None:
                    update = torch.where(self.found_inf > 0, 0.0, update)
                torch._foreach_sub_(stack, [split_like(part, p) for part, p in zip(update, stack)])


class Optimizer:
    """The optimizers of one network, driven as one.

    Args:
        network: a DiT; the matrices of its blocks' attention and MLP go to Muon.
        name: "muon" for Muon and AdamW, "adamw" for AdamW alone.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon.
        weight_decay: decoupled, for both.
    """

    def __init__(self, network: nn.Module, name: str, lr: float, muon_lr: float, weight_decay: float = 0.0):
        matrices, others = [], []
        for key, p in network.named_parameters():
            inner = key.startswith("blocks.") and (".attention." in key or ".mlp." in key) and p.ndim == 2
            (matrices if inner and name == "muon" else others).append(p)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            self.parts.append(Muon(matrices, lr=muon_lr, weight_decay=weight_decay))
        self.base_lr = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, lr_factor: float, skip: Tensor) -> None:
        """Update once with every learning rate times lr_factor; `skip` is a device bool, True leaves the weights alone."""
        for part, base_lr in zip(self.parts, self.base_lr):
            part.found_inf, part.grad_scale = skip.float(), None
            for group, lr in zip(part.param_groups, base_lr):
                group["lr"] = lr * lr_factor
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """Whole, also of a network that is split among the ranks: then all must call."""
        states = [part.state_dict() for part in self.parts]
        for state in states:
            state["state"] = {i: {key: whole(value) for key, value in values.items()} for i, values in state["state"].items()}
        return states

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            split = {i: {key: split_like(value, params[i]) if value.dim() else value for key, value in values.items()}
                     for i, values in state["state"].items()}
            part.load_state_dict({**state, "state": split})
