"""The frozen model: a program of integer parts (:mod:`qgnn.parts`) and the float functions between them."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from .graph import Graph
from .parts import Attention, Codec, Finisher, Operand, graph_of, graphs_of


@dataclass(frozen=True)
class LayerReport:
    """One frozen layer, on the data that it was frozen with; bytes are those allocated.

    Attributes:
        name, kind: of the layer: "gcn", "gat", "gin", "sage", "linear", or "float" for one that integers do not run.
        reason: why it stays in float; "" for the others.
        coding: how its input is coded (:class:`qgnn.parts.CodecSpec`); "" for a layer that reads none.
        average_bits: mean width of its input over the nodes.
        launches: kernel launches on bound input.
        code_bytes: packed codes of its input; input_fp32_bytes: the same map in FP32.
        step_bytes: steps, widths and places of the input's rows.
        operand_bytes, operand_fp32_bytes: codes of the operand of the aggregation (0 for a linear layer).
        weight_bytes: packed weight; weight_step_bytes: its steps; weight_fp32_bytes: the weight in FP32.
        max_difference: largest |integer - fake-quantized| value of its input and operand.
        differing_codes, differing_operand_codes: codes of the input, and of the operand of the aggregation, that differ from the fake-quantized
            model's.
        ties: those of them that float rounding decided otherwise: the value lies at the border of two codes.
        inherited: the others, which follow from a differing code before.
    """

    name: str
    kind: str
    reason: str
    coding: str
    average_bits: float
    launches: int
    code_bytes: int
    input_fp32_bytes: int
    step_bytes: int
    operand_bytes: int
    operand_fp32_bytes: int
    weight_bytes: int
    weight_step_bytes: int
    weight_fp32_bytes: int
    max_difference: float
    differing_codes: int
    differing_operand_codes: int
    ties: int
    inherited: int


@dataclass(frozen=True)
class FreezeReport:
    """What freezing did, and how far the integer model is from the fake-quantized one.

    Attributes:
        layers: one record a layer, in the order in which they run.
        max_difference: largest |integer - fake-quantized| output; max_relative: the same over the largest |output|.
        mismatched_predictions: rows whose largest output is another.
        ties: codes that float rounding decided otherwise, over all layers; inherited: codes that differ because of these.
        packed_bytes, fp32_bytes: codes of every feature map (inputs and operands), and the same maps in FP32.
    """

    layers: list[LayerReport]
    max_difference: float
    max_relative: float
    mismatched_predictions: int
    ties: int
    inherited: int
    packed_bytes: int
    fp32_bytes: int

    def __str__(self) -> str:
        """A table of the layers, and what the whole model is like."""
        heads = ("layer", "kind", "bits", "launches", "packed B", "FP32 B", "codes differ", "ties", "max difference")
        rows = [
            (
                r.name,
                r.kind,
                f"{r.average_bits:.2f}" if r.coding else "-",
                str(r.launches),
                f"{r.code_bytes + r.operand_bytes + r.weight_bytes:,}",
                f"{r.input_fp32_bytes + r.operand_fp32_bytes + r.weight_fp32_bytes:,}",
                str(r.differing_codes + r.differing_operand_codes),
                str(r.ties),
                r.reason or f"{r.max_difference:.1e}",
            )
            for r in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
        ]
        return "\n".join(
            [
                *lines,
                f"largest difference of an output {self.max_difference:.1e}, relative {self.max_relative:.1e}; "
                f"{self.mismatched_predictions} predictions differ; {self.ties} codes by ties, {self.inherited} because of these",
            ]
        )


def _prepares(model: IntegerModel, node: fx.Node, ready: set[fx.Node]) -> bool:
    """Whether a step belongs to what is bound: it picks an input, sorts its edges, or packs it."""
    if not ready.issuperset(node.all_input_nodes):
        return False
    if node.op == "call_module":
        return isinstance(model.part(str(node.target)), Codec | Operand)
    return node.target in (graph_of, graphs_of, operator.getitem, getattr, "get")


class IntegerModel(nn.Module):
    """A frozen model.

    ``model(x, edge_index)`` packs ``x`` and runs; ``model.bind(x, edge_index)`` packs once, and ``model()`` then runs on what was bound: two
    kernel launches a GCN layer. The arguments are those of the model that was frozen (``inputs``), an ``edge_index`` may be a
    :class:`qgnn.Graph`. Results are the same to the bit in every run, on any number of threads and for every schedule, and several threads may run
    one model at a time.

    Args:
        program: the steps, a graph of :mod:`torch.fx` whose modules are ``parts``.
        parts: integer parts, and modules that stay in float, by name.
        kinds: kind of every layer, :class:`LayerReport`, in order; floats: those that stay in float, and why.
    """

    def __init__(
        self, program: fx.Graph, parts: dict[str, nn.Module], kinds: dict[str, str], floats: dict[str, str]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.program, self.kinds, self.floats = program, kinds, floats
        self.inputs = [str(node.target) for node in program.nodes if node.op == "placeholder"]
        self.report: FreezeReport | None = None
        self.bound: tuple[Any, ...] | None = None
        # A tuple: their modules are registered as parts.
        self._programs = self._split()
        self._captured: _Captured | None = None
        self.eval()

    def part(self, name: str) -> nn.Module:
        """The part of a name."""
        return self.parts[name]

    def _split(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """What packs the inputs and sorts the edges, and the rest."""
        first, rest = fx.Graph(), fx.Graph()
        ready: set[fx.Node] = set()
        prepared: dict[fx.Node, fx.Node] = {}
        for node in self.program.nodes:
            if node.op == "placeholder" or _prepares(self, node, ready):
                ready.add(node)
                prepared[node] = first.node_copy(node, lambda n: prepared[n])
        later = [node for node in self.program.nodes if node not in ready]
        needed = list(dict.fromkeys(n for node in later for n in node.all_input_nodes if n in ready))
        first.output(tuple(prepared[n] for n in needed))
        values = {n: rest.placeholder(n.name) for n in needed}
        for node in later:
            values[node] = rest.node_copy(node, lambda n: values[n])
        return fx.GraphModule(self.parts, first, "Prepare"), fx.GraphModule(self.parts, rest, "Run")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModel:
        # devices only: steps are float32, whatever type is asked for
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]  # torch leaves Module._apply untyped
        tensors = [*self.buffers(), *self.parameters()]
        if self.bound is not None and tensors:
            device = tensors[0].device
            self.bound = tree_map(lambda v: v.to(device) if isinstance(v, Tensor | Graph) else v, self.bound)
        self._captured = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None, "_programs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._programs = self._split()

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if len(args) + len(kwargs) != len(self.inputs) or set(given) != set(self.inputs):
            raise ValueError(f"pass {' and '.join(self.inputs)}, or nothing to run on what was bound")
        return [given[name] for name in self.inputs]

    @torch.no_grad()
    def bind(self, *args: Any, **kwargs: Any) -> IntegerModel:
        """Packs the inputs once and keeps them; returns the model."""
        self.bound = self._programs[0](*self._arguments(args, kwargs))
        self._captured = None
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the frozen model, float32, of its arguments, or of what was bound.

        Raises:
            ValueError: nothing is bound and nothing is given, or some arguments only; a map does not fit its layer.
        """
        prepare, run = self._programs
        if args or kwargs:
            return run(*prepare(*self._arguments(args, kwargs)))
        if self.bound is None:
            names = ", ".join(self.inputs)
            raise ValueError(f"the model has no data bound: pass {names}, or call bind({names}) first")
        return run(*self.bound) if self._captured is None else self._captured()

    def capture(self) -> IntegerModel:
        """Records the launches on what is bound as one CUDA graph, which ``model()`` then replays; returns the model.

        Raises:
            ValueError: the model is not on a GPU, or nothing is bound.
        """
        devices = {tensor.device.type for tensor in self.buffers()}
        if devices != {"cuda"} or self.bound is None:
            raise ValueError("a CUDA graph needs the model on a GPU, with data bound")
        run, bound = self._programs[1], self.bound
        codecs = [part for part in self.parts.values() if isinstance(part, Codec)]
        self._captured = _Captured(
            lambda: run(*bound), next(self.buffers()).device, lambda: [c.remembered for c in codecs]
        )
        return self

    @contextmanager
    def recording(self) -> Iterator[dict[str, list[Any]]]:
        """Collects what every part returns, by its name, while the context is open."""
        outputs: dict[str, list[Any]] = {name: [] for name in self.parts}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, out: outputs[name].append(out)

        hooks = [module.register_forward_hook(keep(name)) for name, module in self.parts.items()]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def launches(self) -> dict[str, int]:
        """Kernel launches of every layer on a bound input; hubs add one to clear their counters."""
        counts = dict.fromkeys(self.kinds, 0)
        for node in self._programs[1].graph.nodes:
            part = self.parts[str(node.target)] if node.op == "call_module" else None
            if isinstance(part, Codec | Operand | Finisher):
                apart = (
                    isinstance(part, Attention) and "target" in node.kwargs
                )  # its destinations have scores of their own
                counts[part.layer] += part.launches + apart
        return counts


class _Captured:
    """A CUDA graph of one call. Its memory holds one result, so callers take turns and get a copy. ``kept()`` is what the recorded kernels read
    beside arguments: other calls let go of it, the graph must not."""

    def __init__(self, call: Callable[[], Any], device: torch.device, kept: Callable[[], object]) -> None:
        self.lock, self.device, self.done = threading.Lock(), device, torch.cuda.Event()
        with torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()  # compiles what is not compiled yet
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.out = call()
            except RuntimeError as error:
                raise ValueError(f"a step of this model waits for the GPU, so it is no CUDA graph: {error}") from error
            self.kept = kept()
            self.done.record()

    def __call__(self) -> Any:
        with self.lock, torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.done)
            self.graph.replay()
            out = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self.out)
            self.done.record()
            return out
