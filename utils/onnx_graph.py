"""ONNX files from PyTorch: translate, repeat a step, shrink the weights, run."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = 2**31 - 2**20          # of one protobuf message
LEAST_HALVED = 1024                 # values of a weight that is worth a cast


def check_packages() -> None:
    """Raise ValueError unless all that writes and runs an ONNX file is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(PACKAGES)} (or uv run --group onnx)")


def to_onnx(network: nn.Module, example: dict[str, Tensor], output: str) -> "ModelProto":
    """Translate a network, with any batch size, by torch.onnx's exporter.

    Args:
        example: inputs by name, of batch size at least 2. The first dimension of each that has one is the batch.
        output: name of the one result.

    Raises:
        ValueError: the weights do not fit into one file.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import DeduplicateInitializersPass

    if sum(p.nbytes for p in network.parameters()) > MOST_BYTES:
        raise ValueError("this network is larger than 2 GiB in float32, more than one ONNX file holds; export it to .pt2")
    batch = torch.export.Dim("batch", min=1, max=65536)
    dynamic = {name: {0: batch} if value.dim() else None for name, value in example.items()}
    with warnings.catch_warnings():             # PyTorch's exporter warns of PyTorch's own code
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network.eval(), (), kwargs=example, dynamic_shapes=dynamic, dynamo=True, verbose=False,
                                    input_names=list(example), output_names=[output])
    model = ir.to_proto(DeduplicateInitializersPass(size_limit=2**20)(program.model).model)         # each block brings its own rotary table
    for node in model.graph.node:               # where in the Python source each node came from: a tenth of the file
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def repeat_step(model: "ModelProto", times: Sequence[float]) -> "ModelProto":
    """From one step (z, r, t, ...) -> z_r to a sampler (noise, ...) -> image that takes it along a grid of times.

    Args:
        model: a graph with these inputs, r and t scalars, and one output. The others, label and what else is told, stay as they are.
        times: from 1 down to 0; n + 1 times are n steps.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    (z, _, _, *others), result = graph.input, graph.output[0]
    pick = [helper.make_node("Add", ["i", "one"], ["next"]),
            helper.make_node("Gather", ["times", "i"], ["t"]),
            helper.make_node("Gather", ["times", "next"], ["r"]),
            helper.make_node("Identity", ["go_on"], ["go_on_out"])]
    i, go_on, go_on_out = (helper.make_tensor_value_info(name, kind, []) for name, kind in
                           [("i", TensorProto.INT64), ("go_on", TensorProto.BOOL), ("go_on_out", TensorProto.BOOL)])
    body = helper.make_graph([*pick, *graph.node], "step", [i, go_on, z], [go_on_out, result], value_info=graph.value_info)
    noise, image = onnx.ValueInfoProto(), onnx.ValueInfoProto()
    noise.CopyFrom(z)
    image.CopyFrom(result)
    noise.name, image.name = "noise", "image"
    constants = {"times": np.array(times, np.float32), "one": np.array(1), "num_steps": np.array(len(times) - 1), "always": np.array(True)}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    loop = helper.make_node("Loop", ["num_steps", "always", "noise"], ["image"], body=body)
    whole = helper.make_graph([loop], "sampler", [noise, *others], [image], [*graph.initializer, *initializers])
    return helper.make_model(whole, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions)


def store_half(model: "ModelProto") -> None:
    """Store float32 weights as float16, with a cast back that runs once, when the file is loaded. Nothing is rounded: those that float16
    cannot hold exactly (tables of sines, say) stay as they are, and so do small ones."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < LEAST_HALVED:
            continue
        half = values.astype(np.float16)
        if np.array_equal(half, values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def run_file(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function that runs an ONNX file by onnxruntime on the CPU: inputs by name in, its one result out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
