import copy

import pytest
import torch

from models import DiT
from utils.optim import Muon, Optimizer, orthogonalize

SHAPES = [(64, 64), (128, 64), (64, 128), (64, 64)]


def matrices(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torch_muon(weight_decay):
    """Three updates; the tolerance is bfloat16's, in which torch orthogonalises."""
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in matrices(0)] for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=weight_decay)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, nesterov=True, weight_decay=weight_decay)
    for step in range(3):
        for p, q, gradient in zip(ours, theirs, matrices(step + 1)):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, matrices(0)):
        assert (p - q).norm() < 0.02 * (q - start).norm()


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_orthogonalize(shape):
    """Singular values near 1 (but for the tiniest, which five steps cannot lift), vectors kept, and a stack is its members."""
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(stack)
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.quantile(0.1) and values.max() < 1.3
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    assert (result - u @ vh).norm() < 0.35 * (u @ vh).norm()
    for one, matrix in zip(result, stack):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], one, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_zero_or_none_moves_nothing():
    weights = [torch.nn.Parameter(m) for m in matrices(0)]
    before = [w.detach().clone() for w in weights]
    weights[0].grad = torch.zeros_like(weights[0])
    Muon(weights, lr=0.02).step()
    assert all(torch.equal(w, b) for w, b in zip(weights, before))


def network_with_gradients(value: float = 1e-3) -> DiT:
    torch.manual_seed(0)
    network = DiT("DiT-Nano/4", 8, 1, 10)
    for p in network.parameters():
        p.grad = torch.full_like(p, value) + 1e-3 * torch.randn_like(p)
    return network


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest():
    network = network_with_gradients()
    adamw, muon = Optimizer(network, "muon", 1e-3, 0.02).parts
    names = {p: name for name, p in network.named_parameters()}
    of_muon = {names[p].split(".", 2)[2] for p in muon.param_groups[0]["params"]}
    assert of_muon == {"attention.qkv.weight", "attention.out.weight", "mlp.hidden.weight", "mlp.out.weight"}
    assert len(muon.param_groups[0]["params"]) == 4 * 4
    assert len(adamw.param_groups[0]["params"]) + 16 == len(names)
    adamw, muon = (part.param_groups[0] for part in Optimizer(network, "muon", 1e-3, 0.02, 0.3).parts)
    assert (adamw["lr"], adamw["weight_decay"], adamw["betas"]) == (1e-3, 0.3, (0.9, 0.95))
    assert (muon["lr"], muon["weight_decay"], muon["momentum"]) == (0.02, 0.3, 0.95)
    (alone,) = Optimizer(network, "adamw", 1e-3, 0.02).parts
    assert len(alone.param_groups[0]["params"]) == len(names)


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_skip_leaves_every_weight_alone(value):
    network = network_with_gradients(value)
    before = copy.deepcopy(network.state_dict())
    optimizer = Optimizer(network, "muon", 1e-3, 0.02, weight_decay=0.1)
    optimizer.step(1.0, skip=torch.tensor(True))
    assert all(torch.equal(before[name], p) for name, p in network.state_dict().items())
    if value == value:
        optimizer.step(1.0, skip=torch.tensor(False))
        assert not any(torch.equal(before[name], p) for name, p in network.named_parameters())


def test_learning_rate_factor_scales_the_step():
    """Whatever the factor of the step before."""
    moves = []
    for factor in (0.0, 0.5, 1.0):
        network = network_with_gradients()
        before = copy.deepcopy(network.state_dict())
        optimizer = Optimizer(network, "muon", 1e-3, 0.02)
        optimizer.step(0.0, skip=torch.tensor(False))
        optimizer.step(factor, skip=torch.tensor(False))
        moves.append(torch.cat([(p - before[name]).flatten() for name, p in network.named_parameters()]))
    assert moves[0].abs().max() == 0 < moves[2].abs().max()
    torch.testing.assert_close(2 * moves[1], moves[2], rtol=1e-3, atol=1e-6)


def test_gradients_are_dropped():
    network = network_with_gradients()
    Optimizer(network, "muon", 1e-3, 0.02).zero_grad()
    assert all(p.grad is None for p in network.parameters())


def test_state_round_trip_is_exact():
    results = []
    for reload in (False, True):
        network = network_with_gradients()
        optimizer = Optimizer(network, "muon", 1e-3, 0.02)
        optimizer.step(1.0, skip=torch.tensor(False))
        if reload:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Optimizer(network, "muon", 1e-3, 0.02)
            optimizer.load_state_dict(state)
        optimizer.step(0.7, skip=torch.tensor(False))
        results.append(network.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
