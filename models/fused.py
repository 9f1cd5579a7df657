"""Which parts of a network are computed by our own kernels, on the GPUs that they were made for."""

from torch import nn

from models import dit, fused_attention, fused_mlp


def fuse(network: nn.Module) -> None:
    """From now on, in bfloat16, the MLPs of a DiT and the gradients of its attention are computed by our kernels."""
    for part in network.modules():
        if isinstance(part, dit.MLP):
            part.two_products = fused_mlp.two_products
        elif isinstance(part, dit.Attention):
            part.attend = fused_attention.attend
