"""A program that ``torch.export.save`` wrote, run without ``torch.export.load``.

``torch.export.load`` (torch 2.14) trusts its file: it unpickles example inputs, tensors and objects that the file marks
as pickled; it gives symbolic expressions to ``sympy.sympify``, which evaluates them; it looks up operators as
attributes of the module ``torch``; it writes names from the file into Python code and runs that. So a program is read
here from its JSON and its raw tensors alone and run operator by operator, with the ATen operators that it names.
Refused are operators of other libraries, pickled tensors, compiled code, control flow, and string arguments other than
modes, so that no operator is given the name of a file.

Layout and fields: torch/_export/serde/schema.py (schema version 8) and torch/export/pt2_archive/_package.py. Torch 2.7
and older lay their files out otherwise: loaded and saved again with a newer torch, they can be read.
"""

import ast
import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segbatch.errors import ConfigError
from segbatch.models.checkpoint import read_state
from segbatch.models.graph_outputs import Declared

_AGAIN = "load it with torch.export.load and save it again with torch.export.save of torch 2.8 or newer"
_SCHEMA_MAJOR = 8
_SMALLEST_SAID = 2
"""torch.export assumes sizes of 2 or more where nobody says otherwise, and does not insist on it."""

# torch/_export/serde/schema.py: ScalarType, MemoryFormat, Layout
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7

_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.([a-z_]\w*)\.(\w+)", re.ASCII | re.IGNORECASE)
_NO_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "lshift", "rshift"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "getitem"),
        )
    },
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_not", "sym_max", "sym_min")},
    "torch.sym_ite": torch.sym_ite,
    "math.trunc": math.trunc,
}
_SIGNS: dict[type[ast.AST], Callable[..., Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod},
    **{ast.USub: operator.neg, ast.Not: operator.not_, ast.Eq: operator.eq, ast.NotEq: operator.ne},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
}
"""What conditions on sizes are made of."""
_MODES = {
    *("approximate", "equation", "indexing", "interpolation_mode", "mode", "ord", "padding", "padding_mode", "reduce"),
    *("rounding_mode", "assert_msg", "msg"),
}
"""Arguments that may be strings."""
_SYMBOL = re.compile(r"(?:Symbol\('(\w+)'[^()]*\)|(\w+))", re.ASCII)
_MULTIPLE = re.compile(r"(?:Mul\(Integer\((\d+)\), Symbol\('(\w+)'[^()]*\)\)|(\d+)\*(\w+))", re.ASCII)


class Archive:
    """The zip file that torch writes: members below one folder."""

    def __init__(self, data: bytes, where: str) -> None:
        """Read the list of members.

        Raises:
            ConfigError: not a zip file, or members of one name, of which torch might read another one.
        """
        self.where = where
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{where} is not a file that torch wrote: {error}", "check the path") from error
        self._members = {m.filename.partition("/")[2]: m for m in self._zip.infolist()}
        if len({name.lower() for name in self._members}) != len(self._zip.infolist()):
            raise ConfigError(f"{where} has several members of one name", "export the network again")

    @property
    def names(self) -> list[str]:
        """Paths below the archive's folder."""
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """Content of a member.

        Raises:
            ConfigError: it is not there, or damaged.
        """
        if name not in self._members:
            raise ConfigError(f"{self.where} has no {name}", "check the path, or export the network again")
        try:
            return self._zip.read(self._members[name])
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise ConfigError(f"{self.where}: {name} is damaged: {error}", "copy the file anew") from error

    def texts(self, folder: str) -> dict[str, str]:
        """Text files of a folder by name; what is no UTF-8 is left out."""
        found: dict[str, str] = {}
        for name in self._members:
            if name.startswith(folder) and name != folder:
                found[name.removeprefix(folder)] = self.read(name).decode("utf-8", "replace")
        return found


class Side(NamedTuple):
    """A size of the input.

    Attributes:
        fixed: None where it is free.
        divisor: what it must be a multiple of.
        low, high: limits; None for no upper one.
    """

    fixed: int | None
    divisor: int = 1
    low: int = 0
    high: int | None = None


class _Ref(NamedTuple):
    """A value of the graph, by name."""

    name: str


class _Step(NamedTuple):
    call: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: Any
    spent: tuple[str, ...]


class Program:
    """A program with one tensor as its input.

    Attributes:
        sides: of the input.
        dtype: of the input, numpy's name.
        outputs: what it gives, in its order.
    """

    def __init__(self, archive: Archive) -> None:
        """Read the program; its tensors are read by ``load``.

        Raises:
            ConfigError: another layout, operators that are not run here, or not one input.
        """
        self._archive = archive
        content = _content(archive)
        try:
            module = content["graph_module"]
            graph, signature = module["graph"], module["signature"]
            self._input, self._sources = _inputs(signature, archive.where)
            names = _outputs(signature, archive.where)
            meta = graph["tensor_values"][self._input]
            self.sides = [_side(s, content["range_constraints"], archive.where) for s in meta["sizes"]]
            self.dtype = str(_DTYPES.get(meta["dtype"], "object")).removeprefix("torch.")
            given = _given_names(module, len(names))
            self.outputs = [_declared(given[i], graph["tensor_values"][n]) for i, n in enumerate(names)]
            self._guards = _guards(content.get("guards_code", []), self._input, meta["sizes"], archive.where)
            self._graph = _Graph(graph, archive.where, names)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ConfigError(f"{archive.where}: models/model.json is not understood: {error!r}", _AGAIN) from error
        self._values: dict[str, Any] | None = None

    def load(self) -> None:
        """Read the tensors, once.

        Raises:
            ConfigError: they are missing, damaged or pickled.
        """
        if self._values is None:
            tensors = {**_tensors(self._archive, "constants"), **_tensors(self._archive, "weights")}
            missing = [s for s in self._sources.values() if isinstance(s, _Ref) and s.name not in tensors]
            if missing:
                raise ConfigError(f"{self._archive.where} lacks the tensor {missing[0].name}", "export it again")
            sources = self._sources.items()
            self._values = {n: tensors[s.name] if isinstance(s, _Ref) else s for n, s in sources}

    def __call__(self, photos: Tensor) -> dict[str, Tensor]:
        """Run it; any number of threads may.

        Raises:
            RuntimeError: sizes outside the program's limits, and what the operators raise.
        """
        self.load()
        for size, side in zip(photos.shape, self.sides, strict=True):
            if (side.low > _SMALLEST_SAID and size < side.low) or (side.high is not None and size > side.high):
                limits = f"{side.low} to {'any' if side.high is None else side.high}"
                raise RuntimeError(f"a side is {size}, the program was exported for {limits}")
        for text, guard in self._guards:
            if not _on_sizes(guard, self._input, photos.shape):
                raise RuntimeError(f"the program was not exported for such sizes: {text} does not hold")
        found = self._graph.run({**(self._values or {}), self._input: photos})
        return {o.name: value for o, value in zip(self.outputs, found, strict=True)}


def _content(archive: Archive) -> Any:
    names = archive.names
    if any(n.startswith("data/aotinductor/") for n in names):
        raise ConfigError(f"{archive.where} holds compiled code", "give what torch.export.save writes, uncompiled")
    if "models/model.json" not in names:
        raise ConfigError(f"{archive.where} is not laid out as torch.export.save does: no models/model.json", _AGAIN)
    try:
        content = json.loads(archive.read("models/model.json"))
        major = content["schema_version"]["major"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{archive.where}: models/model.json is not readable: {error!r}", _AGAIN) from error
    if major != _SCHEMA_MAJOR:
        raise ConfigError(f"{archive.where} has schema version {major}, {_SCHEMA_MAJOR} is understood", _AGAIN)
    return content


def _inputs(signature: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Name of the photo input, and by name what else goes in: a tensor's name as ``_Ref``, or a number."""
    photos: list[str] = []
    sources: dict[str, Any] = {}
    for spec in signature["input_specs"]:
        [(kind, given)] = spec.items()
        if kind == "user_input" and "as_tensor" in given["arg"]:
            photos.append(given["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            sources[given["arg"]["name"]] = _Ref(given[f"{kind}_name"])
        elif kind == "constant_input":
            [(_, value)] = given["value"].items()
            sources[given["name"]] = None if "as_none" in given["value"] else value
        else:
            raise ConfigError(f"{where}: an input of the kind {kind} is not understood", "export it with one tensor")
    if len(photos) != 1:
        raise ConfigError(f"{where} has {len(photos)} inputs: {', '.join(photos)}", "export it with one tensor")
    return photos[0], sources


def _outputs(signature: Any, where: str) -> list[str]:
    names = []
    for spec in signature["output_specs"]:
        [(kind, given)] = spec.items()
        if kind != "user_output":
            raise ConfigError(f"{where} changes its own state when it is run ({kind})", "export it after .eval()")
        if "as_tensor" in given["arg"]:
            names.append(given["arg"]["as_tensor"]["name"])
    return names


def _given_names(module: Any, count: int) -> list[str]:
    """Keys of the dictionary that the network gives, else numbers."""
    tree = json.loads(module["module_call_graph"][0]["signature"]["out_spec"])[1]
    if tree["type"] in ("builtins.dict", "collections.OrderedDict"):
        keys = json.loads(tree["context"])
        if len(keys) == count:
            return [str(k) for k in keys]
    return [str(i) for i in range(count)]


def _declared(name: str, meta: Any) -> Declared:
    dtype = _DTYPES.get(meta["dtype"], torch.complex64)
    kind = "f" if dtype.is_floating_point else "b" if dtype == torch.bool else "c" if dtype.is_complex else "i"
    return Declared(name, tuple(s.get("as_int") for s in meta["sizes"]), kind)


def _side(size: Any, ranges: Mapping[str, Any], where: str) -> Side:
    if "as_int" in size:
        return Side(int(size["as_int"]))
    text = size["as_expr"]["expr_str"]
    single, multiple = _SYMBOL.fullmatch(text), _MULTIPLE.fullmatch(text)
    if single is None and multiple is None:
        raise ConfigError(f"{where}: a side of its input is {text}", "export it with free sides, or multiples")
    factor = int(multiple[1] or multiple[3]) if multiple else 1
    symbol = (multiple[2] or multiple[4]) if multiple else single and (single[1] or single[2])
    limits = ranges.get(str(symbol) if factor == 1 else f"{factor}*{symbol}", {})
    return Side(None, factor, limits.get("min_val") or 0, limits.get("max_val"))


def _guards(texts: Sequence[str], name: str, sizes: Any, where: str) -> list[tuple[str, ast.expr]]:
    """What must hold for the sizes of the input, so that the program is the one that the network would run.

    Raises:
        ConfigError: it is no arithmetic on these sizes.
    """
    example = [s["as_int"] if "as_int" in s else s["as_expr"]["hint"]["as_int"] for s in sizes]
    found = []
    for text in texts:
        try:
            guard = ast.parse(text, mode="eval").body
            _on_sizes(guard, name, example)
        except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"{where}: the condition {text[:80]} is not understood", "export it for free sizes"
            ) from error
        found.append((text, guard))
    return found


def _on_sizes(node: ast.expr, name: str, sizes: Sequence[int]) -> Any:
    """The value of arithmetic on ``L['name'].size()[i]``.

    Raises:
        ValueError: it is something else.
    """
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return node.value
        case ast.Subscript(
            ast.Call(ast.Attribute(ast.Subscript(ast.Name("L"), ast.Constant(owner)), "size"), [], []),
            ast.Constant(int(axis)),
        ) if owner == name and 0 <= axis < len(sizes):
            return sizes[axis]
        case ast.UnaryOp(sign, value) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_on_sizes(value, name, sizes))
        case ast.BinOp(left, sign, right) if type(sign) in _SIGNS:
            return _SIGNS[type(sign)](_on_sizes(left, name, sizes), _on_sizes(right, name, sizes))
        case ast.Compare(left, signs, rights) if all(type(c) in _SIGNS for c in signs):
            values = [_on_sizes(v, name, sizes) for v in (left, *rights)]
            return all(_SIGNS[type(c)](a, b) for c, a, b in zip(signs, values, values[1:], strict=False))
        case ast.BoolOp(sign, parts):
            truths = [_on_sizes(p, name, sizes) for p in parts]
            return all(truths) if isinstance(sign, ast.And) else any(truths)
        case ast.Call(ast.Attribute(ast.Name("torch"), "sym_max" | "sym_min" as which), parts, []):
            values = [_on_sizes(p, name, sizes) for p in parts]
            return max(values) if which == "sym_max" else min(values)
    raise ValueError(ast.dump(node))


class _Graph:
    """Steps that turn named values into others."""

    def __init__(self, content: Any, where: str, outputs: Sequence[str] | None = None) -> None:
        self.inputs = [i["as_tensor"]["name"] if "as_tensor" in i else _number_name(i) for i in content["inputs"]]
        results = [_argument(o, where) for o in content["outputs"]]
        self._outputs = results if outputs is None else [_Ref(n) for n in outputs]
        steps = [_step(node, where) for node in content["nodes"]]
        self._steps = _with_spent(steps, self._outputs)

    def run(self, values: dict[str, Any]) -> list[Any]:
        """The outputs; ``values`` are the inputs by name, and are used up."""
        for step in self._steps:
            args = [_filled(a, values) for a in step.args]
            found = step.call(*args, **{k: _filled(a, values) for k, a in step.kwargs.items()})
            _bind(step.outputs, found, values)
            for name in step.spent:
                del values[name]
        return [_filled(o, values) for o in self._outputs]


def _number_name(argument: Any) -> str:
    [(_, value)] = argument.items()
    return str(value["as_name"])


def _with_spent(steps: Sequence[_Step], outputs: Sequence[Any]) -> list[_Step]:
    """The same steps, each letting go of the values that no later one wants."""
    wanted = {r for o in outputs for r in _refs(o)}
    done = []
    for step in reversed(steps):
        inside = {r for a in (*step.args, *step.kwargs.values()) for r in _refs(a)} | set(_bound(step.outputs))
        done.append(step._replace(spent=tuple(sorted(inside - wanted))))
        wanted |= inside
    return done[::-1]


def _refs(template: Any) -> Iterable[str]:
    if isinstance(template, _Ref):
        yield template.name
    elif isinstance(template, list):
        for part in template:
            yield from _refs(part)


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    """An argument with names replaced by values."""
    if isinstance(template, _Ref):
        return values[template.name]
    return [_filled(part, values) for part in template] if isinstance(template, list) else template


def _bound(template: Any) -> Iterable[str]:
    if isinstance(template, str):
        yield template
    elif isinstance(template, list):
        for part in template:
            yield from _bound(part)


def _bind(template: Any, found: Any, values: dict[str, Any]) -> None:
    """Give results their names."""
    if isinstance(template, str):
        values[template] = found
    elif isinstance(template, list):
        for part, value in zip(template, found, strict=True):
            _bind(part, value, values)


def _step(node: Any, where: str) -> _Step:
    target, given = node["target"], node["inputs"]
    outputs = [_output(o, where) for o in node["outputs"]]
    if target == _NO_GRADIENTS:
        inner = _Graph(given[1]["arg"]["as_graph"]["graph"], where)
        several = outputs[0] if len(outputs) == 1 and isinstance(outputs[0], list) else outputs
        return _Step(_inner(inner), [_argument(i["arg"], where) for i in given[2:]], {}, several, ())
    named = outputs[0] if len(outputs) == 1 else outputs or None
    if target in _ON_NUMBERS:
        return _Step(_ON_NUMBERS[target], [_argument(i["arg"], where) for i in given], {}, named, ())
    call = _operator(target, where)
    arguments = {i["name"]: _argument(i["arg"], where, i["name"]) for i in given}
    if arguments.get("training") is True or arguments.get("train") is True:
        raise ConfigError(f"{where} was exported in training mode ({target})", "export it after .eval()")
    return _Step(call, [], arguments, named, ())


def _inner(graph: _Graph) -> Callable[..., list[Any]]:
    """A graph within a graph as a function."""

    def call(*values: Any) -> list[Any]:
        return graph.run(dict(zip(graph.inputs, values, strict=True)))

    return call


def _operator(target: str, where: str) -> Callable[..., Any]:
    match = _OPERATOR.fullmatch(target)
    if match is None:
        raise ConfigError(f"{where} needs {target}, which is not run here", "export it without, or give it as ONNX")
    namespace, name, overload = match.groups()
    if namespace == "torchvision":
        try:
            import torchvision  # noqa: F401 - makes its operators known
        except ImportError as error:
            raise ConfigError(f"{where} needs the package torchvision", "pip install 'segbatch[pretrained]'") from error
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ConfigError(f"{where} needs the operator {target}, which torch {torch.__version__} lacks", _AGAIN)
    return found


def _argument(argument: Any, where: str, name: str = "") -> Any:
    """What an operator is given: a value, a ``_Ref``, or a list of these."""
    [(kind, value)] = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_int", "as_float", "as_bool", "as_ints", "as_floats", "as_bools"):
        return value
    if kind in ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
        return _ref(value)
    if kind in ("as_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_ref(v) for v in value]
    if kind == "as_optional_tensor":
        return _optional(value)
    if kind == "as_optional_tensors":
        return [_optional(v) for v in value]
    if kind == "as_string" and name in _MODES:
        return value
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _MEMORY_FORMATS[value]
    if kind == "as_layout" and value == _STRIDED:
        return torch.strided
    if kind == "as_device":
        return torch.device("cpu")
    raise ConfigError(f"{where}: an argument {name} of the kind {kind} is not understood", "give the network as ONNX")


def _ref(value: Mapping[str, Any]) -> Any:
    """The name of a value, or the number that stands in its place."""
    [(kind, content)] = value.items()
    return _Ref(content) if kind in ("name", "as_name") else content


def _optional(value: Mapping[str, Any]) -> Any:
    return _Ref(value["as_tensor"]["name"]) if "as_tensor" in value else None


def _output(argument: Any, where: str) -> Any:
    """The name of a result, a list of names, or None for what nobody wants."""
    found = _argument(argument, where)
    return [part.name for part in found] if isinstance(found, list) else found and found.name


def _tensors(archive: Archive, kind: str) -> dict[str, Tensor]:
    """``weights`` or ``constants`` by name."""
    legacy, listing = f"data/{kind}/model.pt", f"data/{kind}/model_{kind}_config.json"
    if legacy in archive.names:
        return dict(read_state(archive.read(legacy), f"{archive.where}: {legacy}"))
    try:
        config = json.loads(archive.read(listing))["config"]
        return {name: _tensor(archive, kind, name, entry) for name, entry in config.items()}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{archive.where}: {listing} is not understood: {error!r}", "copy the file anew") from error


def _tensor(archive: Archive, kind: str, name: str, entry: Any) -> Tensor:
    meta = entry["tensor_meta"]
    if entry["use_pickle"] or meta is None:
        raise ConfigError(f"{archive.where}: {name} is pickled, no plain tensor", "give the network as ONNX")
    sizes, strides = ([int(s["as_int"]) for s in meta[key]] for key in ("sizes", "strides"))
    data = archive.read(f"data/{kind}/{entry['path_name']}")
    dtype = _DTYPES[meta["dtype"]]
    if not data:
        return torch.zeros(sizes, dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"]))
