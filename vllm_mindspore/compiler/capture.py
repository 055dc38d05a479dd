"""Capture: vLLM's model called once with symbolic sizes → one functional FX graph with named inputs.

The model's own Python runs under `make_fx` (no Dynamo, no guards, no graph breaks): every tensor operation, also
inside `compute_logits` or a module vLLM does not compile, becomes a node. Parameters, buffers, KV caches and the
attention metadata are graph inputs; floating point parameters are captured as float32, so that the graph computes in
float32 whatever the weights' storage type is (operators read bf16 and fp16 weights directly).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Sizes of the example batch. Distinct, so that equal sizes share a symbol; large, so that none is mistaken for 0 or 1.
NUM_TOKENS, NUM_REQS, MAX_BLOCKS, NUM_SLOTS, NUM_ROWS, NUM_LOGITS = 8191, 61, 127, 4093, 2039, 1021
NUM_ALL_TOKENS = 16381  # of all data-parallel ranks


@dataclass(frozen=True)
class GraphInput:
    """One placeholder of the graph.

    kind: "weight" (name: qualified parameter or buffer name), "constant" (a tensor found inside the model),
    "tensor" (an input of each step), "kv_cache", "slot_mapping" or "block_table" (name: the attention layer).
    """

    kind: str
    name: str


@dataclass
class CapturedGraph:
    """A functional FX graph and what its placeholders are, in order."""

    name: str
    module: torch.fx.GraphModule
    inputs: list[GraphInput]
    fake_mode: FakeTensorMode
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def placeholders(self) -> dict[torch.fx.Node, GraphInput]:
        nodes = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        return dict(zip(nodes, self.inputs, strict=True))

    @property
    def results(self) -> list[torch.fx.Node]:
        """The nodes the graph returns."""
        output = next(node for node in self.module.graph.nodes if node.op == "output").args[0]
        return [node for node in (output if isinstance(output, (tuple, list)) else [output]) if node is not None]


class CaptureError(RuntimeError):
    """The model's Python could not be captured; the message names the model function and the cause."""


class Capture:
    """Collects the inputs of one graph, then traces a function of them."""

    def __init__(self, name: str):
        self.name = name
        self.fake_mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.inputs: list[GraphInput] = []
        self.fakes: list[torch.Tensor] = []
        self.weights: dict[int, tuple[str, torch.Tensor]] = {}  # by address

    def add_input(
        self, kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype, dynamic: tuple[int, ...] = ()
    ):
        """Add a placeholder; `dynamic` are the dimensions whose size is a symbol (equal sizes share one)."""
        example = torch.empty(shape, dtype=dtype, device="meta")
        sizes = [DimDynamic.DUCK if dim in dynamic else DimDynamic.STATIC for dim in range(len(shape))]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        with self.fake_mode:
            fake = self.fake_mode.from_tensor(
                example, static_shapes=not dynamic, symbolic_context=context if dynamic else None
            )
            fake = _on_cpu(fake)
        self.inputs.append(GraphInput(kind, name))
        self.fakes.append(fake)
        return fake

    def add_weights(self, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        """Add a model's parameters and buffers; returns their names → position among the inputs."""
        positions = {}
        for name, tensor in tensors.items():
            dtype = torch.float32 if tensor.dtype in FLOATS else tensor.dtype
            positions[name] = len(self.inputs)
            if tensor.numel():
                self.weights[tensor.untyped_storage().data_ptr()] = name, tensor
            self.add_input("weight", name, tuple(tensor.shape), dtype)
        return positions

    def trace(self, function: Callable[[list[torch.Tensor]], object]) -> CapturedGraph:
        """Run `function` on the inputs and return what it did.

        Raises:
            CaptureError: an operation depends on tensor values, or the model fails on symbolic sizes.
        """
        functional = dispatch_functionalize(
            lambda *tensors: function(list(tensors)),
            FunctionalTensorMode(pre_dispatch=True, _allow_token_discovery=False),
        )
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with self.fake_mode, torch.no_grad():
                module = make_fx(
                    functional,
                    pre_dispatch=True,
                    tracing_mode="real",
                    _allow_non_fake_inputs=True,
                    decomposition_table={},
                )(*self.fakes)
        except Exception as error:
            raise CaptureError(
                f"capturing {self.name}: {type(error).__name__}: {str(error).splitlines()[0]} The MindSpore backend "
                "captures models whose forward does not depend on tensor values and works for any number of tokens."
            ) from error
        finally:
            torch.set_default_dtype(default_dtype)
        graph = CapturedGraph(self.name, module, list(self.inputs), self.fake_mode)
        _lift_constants(graph, self.weights)
        module.graph.eliminate_dead_code()
        _drop_unused_inputs(graph)
        module.recompile()
        return graph


def _on_cpu(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="cpu")


def _lift_constants(captured: CapturedGraph, weights: dict[int, tuple[str, torch.Tensor]]) -> None:
    """Tensors that the model holds outside its parameters and buffers (ALiBi slopes, …) become inputs.

    A weight that the model refers to by a plain attribute (attention sinks) is the weight's input: it is not read yet.

    Raises:
        CaptureError: the model refers to a part of a weight by a plain attribute.
    """
    graph = captured.module.graph
    known_weights = {item.name: node for node, item in captured.placeholders.items() if item.kind == "weight"}
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    nodes: dict[str, torch.fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(captured.module, node.target)
        if not isinstance(value, torch.Tensor):
            continue
        name, weight = weights.get(value.untyped_storage().data_ptr() if value.numel() else -1, ("", None))
        if weight is not None:
            if (value.shape, value.stride()) != (weight.shape, weight.stride()):
                raise CaptureError(f"capturing {captured.name}: the model keeps a part of its weight {name} aside")
            node.replace_all_uses_with(known_weights[name])
            graph.erase_node(node)
            continue
        same = next((name for name, known in captured.constants.items() if _equal(known, value)), None)
        lifted = nodes.get(same)
        if lifted is None:
            name = f"constant_{len(captured.constants)}"
            with graph.inserting_after(last_input):
                lifted = graph.placeholder(name)
            lifted.meta["val"] = captured.fake_mode.from_tensor(value, static_shapes=True)
            if value.dim() == 0:
                lifted.meta["number"] = value.item()
            last_input = nodes[name] = lifted
            captured.constants[name] = value.detach()
            captured.inputs.append(GraphInput("constant", name))
        node.replace_all_uses_with(lifted)
        graph.erase_node(node)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))


def _drop_unused_inputs(captured: CapturedGraph) -> None:
    kept = []
    for node, graph_input in captured.placeholders.items():
        if node.users or graph_input.kind == "tensor":
            kept.append(graph_input)
        else:
            captured.module.graph.erase_node(node)
            captured.constants.pop(graph_input.name, None)
    captured.inputs = kept
