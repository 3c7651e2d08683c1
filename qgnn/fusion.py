"""What stands between two parts of a frozen model, taken over by the first: batch normalisation, a summand, ReLU, the codes of the second
(A2Q eq. 18, proofs 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from .lowering import ADD, ADD_TO, RELU, Lowered
from .parts import Affine, Codec, Finisher, Operand, Product


def _is(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in functions


def fuse(lowered: Lowered, shapes: dict[fx.Node, torch.Size]) -> None:
    """Lets every part that finishes rows take over what only reads its result: batch normalisation, a summand, ReLU, the next part's codes.

    ``shapes``: of the values of the program, as far as they are known; a summand must have the shape of the sum.
    """
    program = lowered.program
    for node in list(program.nodes):
        part = lowered.parts.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, Finisher):
            while len(node.users) == 1 and _take_over(lowered, node, part, next(iter(node.users)), shapes):
                pass
    program.lint()


def _take_over(
    lowered: Lowered, node: fx.Node, part: Finisher, user: fx.Node, shapes: dict[fx.Node, torch.Size]
) -> bool:
    """Whether ``part`` could take over the one step that reads its result."""
    next_part = lowered.parts.get(str(user.target)) if user.op == "call_module" else None
    plain = not part.relu and part.post_scale is None
    if part.following:
        return False
    if _is(user, RELU) and plain:
        part.relu = True
    elif isinstance(next_part, Affine):
        part.absorb_affine(next_part.scale, next_part.shift, node.kwargs.get("addend") is not None)
    elif (_is(user, ADD) or (_is(user, ADD_TO) and user.args[0] is node)) and plain and not user.kwargs:
        first, second = user.args
        other = second if first is node else first
        if node.kwargs.get("addend") is not None:
            return False
        if not isinstance(other, fx.Node) or other is node or shapes.get(other, 0) != shapes.get(node, 1):
            return False
        if lowered.root(other) is not lowered.root(node):  # as many rows on these data, but not on others
            return False
        node.kwargs = {**node.kwargs, "addend": other}
    elif isinstance(next_part, Codec) and next_part.fuses and user.args[0] is node:
        part.following.append(next_part)
        if len(user.args) > 1:
            node.kwargs = {**node.kwargs, "following": user.args[1]}
    elif isinstance(next_part, Operand) and isinstance(part, Product):
        part.following.append(next_part)
    else:
        return False
    user.prepend(node)  # what the user read beside it is known there
    user.replace_all_uses_with(node)
    lowered.program.erase_node(user)
    if isinstance(next_part, Affine):
        del lowered.parts[str(user.target)]
    return True


def run(lowered: Lowered, inputs: Sequence[Any]) -> tuple[Any, dict[fx.Node, torch.Size]]:
    """The result of a program that nothing was taken over in, on given inputs, and the shapes of its float values."""
    shapes: dict[fx.Node, torch.Size] = {}
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in lowered.program.nodes:
        args = map_arg(node.args, lambda n: values[n])
        kwargs = map_arg(node.kwargs, lambda n: values[n])
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "call_function":
            values[node] = node.target(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_module":
            values[node] = lowered.parts[str(node.target)](*args, **kwargs)
        else:
            return args[0], shapes
        if isinstance(values[node], Tensor):
            shapes[node] = values[node].shape
    raise AssertionError("a program ends with its output")
