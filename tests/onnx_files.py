"""Small ONNX files, made operator by operator."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

Sizes = Sequence[int | str | None]
FLOAT, UINT8, INT64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
FREE: Sizes = ("n", 3, "h", "w")
OPSET = 17


def file(
    nodes: Sequence[Any],
    outputs: Mapping[str, tuple[int, Sizes | None]],
    values: Mapping[str, NDArray[Any]] | None = None,
    photo: tuple[int, Sizes] = (FLOAT, FREE),
    metadata: Mapping[str, str] | None = None,
    more_inputs: Sequence[str] = (),
) -> bytes:
    """A file with the input ``photo``."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, *photo) for name in ("photo", *more_inputs)],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(v, name) for name, v in (values or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    helper.set_model_props(model, dict(metadata or {}))
    data: bytes = model.SerializeToString()
    return data


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    """One operator."""
    return helper.make_node(operator, list(inputs), [output], **attributes)


def scaled(factor: float = 1.0, shape: Sizes | None = FREE, **more: Any) -> bytes:
    """Scores that are ``factor`` times what is fed."""
    nodes = [node("Mul", ["photo", "factor"], "scores")]
    return file(nodes, {"scores": (FLOAT, shape)}, {"factor": np.array(factor, np.float32)}, **more)


def constant_outputs(
    given: Mapping[str, NDArray[Any]], size: tuple[int, int], batch: int = 1, last: bool = False, **more: Any
) -> bytes:
    """A file that gives these arrays for every batch of photos of that size; ``last``: channels last."""
    nodes = [node("Identity", [f"{name}_value"], name) for name in given]
    values = {f"{name}_value": array for name, array in given.items()}
    kinds = {name: FLOAT if array.dtype.kind == "f" else INT64 for name, array in given.items()}
    outputs = {name: (kinds[name], array.shape) for name, array in given.items()}
    shape = (batch, *size, 3) if last else (batch, 3, *size)
    return file(nodes, outputs, values, photo=(FLOAT, shape), **more)


def unet(net: nn.Module) -> bytes:
    """The padded U-Net of depth 2 with its own encoder, of any size and batch; logits."""
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    nodes: list[Any] = []

    def block(prefix: str, source: str) -> str:
        for i in (1, 2):
            conv, normal, relu = (f"{prefix}.{part}{i}" for part in ("conv", "bn", "relu"))
            nodes.append(node("Conv", [source, f"{conv}.weight"], conv, pads=[1, 1, 1, 1]))
            parts = [f"{normal}.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
            nodes.append(node("BatchNormalization", [conv, *parts], normal, epsilon=1e-5))
            nodes.append(node("Relu", [normal], relu))
            source = relu
        return source

    fine = block("encoder.levels.0", "photo")
    nodes.append(node("MaxPool", [fine], "pooled", kernel_shape=[2, 2], strides=[2, 2]))
    deep = block("encoder.levels.1", "pooled")
    up = ["decoder.up.0.weight", "decoder.up.0.bias"]
    nodes.append(node("ConvTranspose", [deep, *up], "upped", strides=[2, 2]))
    nodes.append(node("Concat", [fine, "upped"], "both", axis=1))
    last = block("decoder.levels.0", "both")
    nodes.append(node("Conv", [last, "head.weight", "head.bias"], "logits"))
    values = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return file(nodes, {"logits": (FLOAT, ("n", len(state["head.bias"]), "h", "w"))}, values)
