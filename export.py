"""Export a student as one file for other programs: ONNX, or a PyTorch program. It is compared with the network before it is kept.

    python export.py checkpoints/student-mnist.safetensors mnist.onnx                       noise and label in, image out, in one step
    python export.py checkpoints/student-mnist.safetensors mnist.onnx --num-steps 4 --half True         four steps, weights in float16
    python export.py checkpoints/student-mnist.safetensors step.onnx --form step            z, r, t and label in, z_r out
    python export.py checkpoints/student-mnist.safetensors mnist.onnx --guidance-input True             noise, label and guidance scale in
    python export.py checkpoints/student-mnist.safetensors mnist.pt2                        torch.export.load("mnist.pt2").module()
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.fx import GraphModule

from models import build_network
from utils.checkpoints import load_network
from utils.config import check_file, check_writable, parse_config, public, require, written
from utils.errors import run_script
from utils.flow import step
from utils.onnx_graph import check_packages, repeat_step, run_file, store_half, to_onnx
from utils.sampling import sample_average_velocity, time_grid

TOLERANCE = 1e-4            # largest difference of any value from the network, images being about 2 wide,
OWN = 10                    # or this many times what float32 makes of the network itself: few steps can multiply a rounding error


@dataclass(frozen=True)
class Config:
    checkpoint: Annotated[str, tyro.conf.Positional]        # a student: safetensors file, checkpoint folder, or run folder
    target: Annotated[str, tyro.conf.Positional]            # file to write, ending in .onnx or .pt2
    form: Literal["sampler", "step"] = "sampler"            # sampler: noise to image; step: one step from t to r, for a loop of your own
    num_steps: int = 1                                      # network evaluations of a sampler
    guidance_scale: float | None = None                     # scale to build in, if the student learned a range; None: its default
    guidance_input: bool = False                            # make the scale an input, one for all images, if the student learned a range
    half: bool = False                                      # with .onnx: weights in float16, half the file; arithmetic stays float32
    replace: bool = False                                   # overwrite an existing file

    def __post_init__(self) -> None:
        require(self, "num_steps", self.num_steps >= 1, "at least 1")
        require(self, "num_steps", self.num_steps == 1 or self.form == "sampler", "left out with --form step, which is one")
        require(self, "target", Path(self.target).suffix in (".onnx", ".pt2"), "a name that ends in .onnx or .pt2")
        check_file(self, "target")
        require(self, "guidance_input", not self.guidance_input or self.guidance_scale is None, "False with --guidance-scale")
        require(self, "half", not self.half or self.target.endswith(".onnx"), "False for .pt2")


def scale_of_all(guidance: Tensor | None, images: Tensor) -> dict[str, Tensor]:
    """What a network is told besides: one scale () for all images (B, ...), if there is one."""
    return {} if guidance is None else {"guidance_scale": guidance.expand(images.shape[0])}


class Step(nn.Module):
    """z_r = z - (t - r) u(z, r, t, label). z: (B, C, H, W); r, t: scalars (); label: (B,) long. Returns (B, C, H, W).

    guidance: scale () of a student that is told it, within its range, which a file does not check.
    """

    def __init__(self, u: nn.Module):
        super().__init__()
        self.u = u

    def forward(self, z: Tensor, r: Tensor, t: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
        r, t = r.expand(z.shape[0]), t.expand(z.shape[0])
        return step(z, r, t, self.u(z, r, t, label, **scale_of_all(guidance, z)))


class Sampler(nn.Module):
    """noise: (B, C, H, W), standard Gaussian; label: (B,) long. Returns images (B, C, H, W), near [-1, 1] and not clipped.

    guidance: as of `Step`.
    """

    def __init__(self, u: nn.Module, num_steps: int):
        super().__init__()
        self.u, self.num_steps = u, num_steps

    def forward(self, noise: Tensor, label: Tensor, guidance: Tensor | None = None) -> Tensor:
        return sample_average_velocity(partial(self.u, **scale_of_all(guidance, noise)), noise, label, self.num_steps)


def in_precision_of(network: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, floats in the precision of the network's weights."""
    precision = next(network.parameters()).dtype
    return {name: value.to(precision) if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(Config, argv, __doc__)
    target = Path(cfg.target)
    onnx = target.suffix == ".onnx"
    if target.exists() and not cfg.replace:
        raise ValueError(f"{target} exists; use --replace True to overwrite it")
    check_writable(target)
    if onnx:
        check_packages()
    network, metadata = load_network(cfg.checkpoint, build_network)
    if metadata["kind"] != "student":
        raise ValueError(f"{cfg.checkpoint} is a {metadata['kind']}; a student is what samples in few steps")
    if cfg.guidance_input and network.guidance_range is None:
        raise ValueError(f"--guidance-input True: {cfg.checkpoint} has its guidance inside, of one scale; none can be chosen")
    if cfg.half:
        for weight in network.parameters():                 # rounded before the check below, not after it
            weight.copy_(weight.half())
    shape = network.shape
    is_step = cfg.form == "step"
    u = network.at_guidance(cfg.guidance_scale)
    whole = Step(u) if is_step else Sampler(u, cfg.num_steps)

    def of_step(batch_size: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(batch_size)
        z = torch.randn(batch_size, *shape, generator=draw)
        label = torch.randint(network.null_class + 1, (batch_size,), generator=draw)
        chosen = dict(guidance=torch.empty(()).uniform_(*network.guidance_range, generator=draw)) if cfg.guidance_input else {}
        return dict(z=z, r=torch.tensor(0.25), t=torch.tensor(0.75), label=label, **chosen)

    def example(batch_size: int) -> dict[str, Tensor]:
        inputs = of_step(batch_size)
        if is_step:
            return inputs
        return dict(noise=inputs["z"], **{name: value for name, value in inputs.items() if name not in ("z", "r", "t")})

    target.parent.mkdir(parents=True, exist_ok=True)
    information = dict(form=cfg.form, num_steps=None if is_step else cfg.num_steps, classes=metadata["classes"], shape=shape,
                       guidance_scale=cfg.guidance_scale or metadata["config"].get("guidance_scale"),       # with a range: what is usual
                       guidance_range=network.guidance_range if cfg.guidance_input else None,
                       autoencoder=public(metadata).get("autoencoder"), step=metadata["step"])
    with written(target) as temporary:
        if onnx:
            # A sampler's graph is one step repeated by a loop: unrolled, four steps take minutes to translate.
            model = to_onnx(Step(u), of_step(2), output="z_r")
            if not is_step:
                model = repeat_step(model, time_grid(cfg.num_steps))
            if cfg.half:
                store_half(model)
            for key, value in information.items():
                model.metadata_props.add(key=key, value=json.dumps(value))
            temporary.write_bytes(model.SerializeToString())
            run = run_file(temporary)
            truth = copy.deepcopy(whole).double()
        else:
            batch = torch.export.Dim("batch", min=1, max=65536)
            inputs = tuple(example(2).values())
            program = torch.export.export(whole, inputs, dynamic_shapes=[{0: batch} if value.dim() else None for value in inputs])
            for graph in (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)):
                for node in graph.nodes:
                    node.meta.pop("stack_trace", None)      # where the code lies on this machine
            torch.export.save(program, temporary, extra_files={"information.json": json.dumps(information)})
            loaded, truth = torch.export.load(temporary).module(), whole

            def run(inputs: dict[str, Tensor]) -> Tensor:
                return loaded(*inputs.values())

        def errors(inputs: dict[str, Tensor]) -> tuple[float, float]:
            exact = truth(**in_precision_of(truth, inputs))
            return tuple((found - exact).abs().max().item() for found in (run(inputs), whole(**inputs)))

        worst, own = torch.tensor([errors(example(1)), errors(example(3))]).amax(0).tolist()        # not a number stays one
        if not worst <= (allowed := max(TOLERANCE, OWN * own)):
            raise RuntimeError(f"{target} differs from the network by {worst:.1e}, more than {allowed:.0e}: not kept")
    if metadata.get("autoencoder"):
        print(f"note: it makes latents; {metadata['autoencoder']['source']} decodes them")
    print(f"{target}: {cfg.form}, {target.stat().st_size / 1e6:.1f} MB; largest difference {worst:.1e}")


if __name__ == "__main__":
    run_script(main)
