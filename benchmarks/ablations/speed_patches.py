"""What might make an update cheaper and has no flag, to be timed as rows of `benchmarks.throughput`; see `patches`."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_student
from benchmarks.ablations.changes import STUDENTS, TEACHERS, change
from models import dit
from utils import optim
from utils.guidance import Velocity


def guidance_at_once() -> None:
    """The teacher with and without the label is one call of twice the rows, not two calls."""
    plain = train_student.guided_velocity

    def guided_velocity(v: Velocity, null_class: int, *rest: Any) -> Velocity:
        def guided(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            v_y, v_null = v(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_class)])).chunk(2)
            return plain(lambda z, t, label: v_y if label is y else v_null, null_class, *rest)(z, t, y)

        return guided

    change(STUDENTS, "guided_velocity", guided_velocity)


def ema_every(count: int) -> None:
    """The average takes in every count-th update only, as much of it as of `count` equal ones."""
    class Rarely(ModelEmaV3):
        def get_decay(self, step: int | None = None) -> float:
            return super().get_decay(step) ** count

        def update(self, model: nn.Module, step: int | None = None) -> None:
            if step is None or step % count == 0:
                super().update(model, step)

    change([*TEACHERS, *STUDENTS], "ModelEmaV3", Rarely)


def muon_every(count: int) -> None:
    """Momenta are orthogonalised in every count-th update; between, the last result is applied again."""
    plain, calls, kept = optim.orthogonalize, Counter(), {}

    def orthogonalize(matrices: Tensor) -> Tensor:
        shape = matrices.shape                              # one stack of each shape in an update
        if calls[shape] % count == 0:
            kept[shape] = plain(matrices)
        calls[shape] += 1
        return kept[shape]

    change([optim], "orthogonalize", orthogonalize)


def drawn_once() -> None:
    """Noise, times and coins are those of the first update for ever: what is saved bounds what drawing them otherwise could save."""
    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        kept: dict[str, Any] = {}

        def draw(*args: Any, **named: Any) -> Any:
            what = str([value for value in args if not isinstance(value, torch.Generator)])
            if what not in kept:
                kept[what] = function(*args, **named)
            return kept[what]

        return draw

    change([*TEACHERS, *STUDENTS], "torch", SimpleNamespace(**{**vars(torch), "randn": once(torch.randn), "rand": once(torch.rand)}))
    for scripts, names in ((TEACHERS, ["draw_times"]), (STUDENTS, ["draw_times", "draw_intervals"])):
        for name in names:
            change(scripts, name, once(getattr(scripts[0], name)))


def attention_by(backend: SDPBackend) -> None:
    """Attention forward and backward by one of PyTorch's backends in place of our kernel. MATH: two products and a softmax, compiled."""
    compile_blocks, plain = dit.DiT.compile_blocks, dit.attend

    def attend(*inputs: Any) -> Tensor:
        with sdpa_kernel(backend):
            return plain(*inputs)

    def with_that(self: dit.DiT, *args: int) -> None:
        compile_blocks(self, *args)                         # nothing is compiled before its first call
        for part in self.modules():
            if isinstance(part, dit.Attention):
                part.attend = attend

    change([dit.DiT], "compile_blocks", with_that)
