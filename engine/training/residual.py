"""What a residual block does with its hidden states, read off one run of it: the branches that it adds, and its output.

A block may be run with the residual branches ``B`` scaled by ``s`` without a change to its code. :func:`trace` runs
it once and notes which operation made what from the hidden states ``x``. The residual stream shows in that graph: its
tensors are the ones that every path from ``x`` to the output passes. Where such a tensor is the sum of the one before
it and something else, the something is a branch, and the submodule that returned it is where the branch can be
scaled:

- pre-norm, ``h = x + A(N(x)); y = h + F(N(h))``: the stream is x, h, y, the branches are A and F;
- post-norm, ``h = N(x + A(x)); y = N(h + F(h))``: the stream is x, the sum, h, the sum, y, the branches A and F.

If a branch cannot be told apart so (it is not what a submodule returns, or ``(x + A(x)) + F(x)``) but ``x`` reaches
the output by additions alone, the whole block can be scaled: ``x + s (y - x)``. If neither holds, nothing can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.errors import EngineError
from engine.training.scaled_product import is_product

#: Operations after which the values of hidden states are still the same.
_SAME_VALUES = frozenset(
    f"aten.{name}" for name in ("alias", "clone", "view", "_unsafe_view", "_to_copy", "squeeze", "unsqueeze")
)
_ADDITIONS = frozenset(("aten.add", "aten.add_"))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """A function that ``torch.compile`` leaves alone, with whatever it calls."""
    return cast(_Function, torch.compiler.disable(function))


@dataclass(frozen=True)
class Residual:
    """What one block does.

    branches: submodules whose outputs are the residual branches, to be scaled there; none means that the block is
        scaled as a whole.
    extras: how many values the block returns after its hidden states, in a tuple; None if it returns a plain tensor.
    """

    branches: tuple[str, ...]
    extras: int | None

    @property
    def rule(self) -> str:
        """In words: what is scaled."""
        return f"branches {', '.join(self.branches)}" if self.branches else "the whole block, x + (block(x) - x) / p"

    def passed_through(self, hidden: Tensor) -> Any:
        """What the block's caller gets if the block is left out: ``hidden``, and None in the place of each old-style
        cache (keys and values in a tuple), which is then good for nothing."""
        return hidden if self.extras is None else (hidden, *[None] * self.extras)


def hidden_states(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first floating-point tensor, positional before named."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise EngineError(f"{name} is called without a floating-point tensor, so it has no hidden states: not a block")


def output_of(name: str, output: Any, hidden: Tensor) -> tuple[Tensor, int | None]:
    """The hidden states that a block returned, and :attr:`Residual.extras`.

    Raises:
        EngineError: the output is of another kind or shape, or holds tensors (attentions) that a dropped block cannot
        give.
    """
    rest = output[1:] if isinstance(output, tuple) else ()
    new = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(new, Tensor):
        raise EngineError(
            f"{name} returns {type(output).__name__}: a block returns a tensor, or a tuple that starts with one"
        )
    if new.shape != hidden.shape:
        raise EngineError(
            f"{name} makes {list(new.shape)} of hidden states {list(hidden.shape)}: not a residual block, it cannot be "
            "dropped; name another stack by its path"
        )
    if any(isinstance(value, Tensor) for value in rest):
        raise EngineError(
            f"{name} returns more tensors than its hidden states (attentions, position biases), which a dropped layer "
            "cannot give: turn output_attentions off, or train this model without layer drop"
        )
    return new, len(rest) if isinstance(output, tuple) else None


@uncompiled
def trace(
    name: str,
    block: nn.Module,
    forward: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    excluded: Collection[int] = (),
) -> Residual:
    """Runs ``forward(*args, **kwargs)`` of ``block`` once, as in evaluation, and reads off what it does.

    Leaves no mark: no gradients, torch's random state and the modules' modes as before, no entry in a cache (those are
    replaced by None). ``name`` is the block's in messages; ``excluded`` are ids of submodules that must not be scaled.

    Raises:
        EngineError: the block is none (see :func:`output_of`), adds nothing to its hidden states, or normalises after
            a sum whose branch is not what a submodule returns.
    """
    given = hidden_states(name, args, kwargs)
    hidden = given.detach().clone()  # a block may write into its argument

    def own(value: Any) -> Any:
        if value is given:
            return hidden
        return None if _is_cache(value) else value  # not to be filled by a run that does not count

    flow = _Flow(hidden)
    with _unmarked(block, hidden), _outputs_noted(block, flow, excluded), flow:
        output = forward(*map(own, args), **{key: own(value) for key, value in kwargs.items()})
    new, extras = output_of(name, output, hidden)
    if extras and any(_is_cache(value) for value in (*args, *kwargs.values())):
        raise EngineError(
            f"{name} returns its cache, which a dropped layer cannot fill: set the model's config.use_cache to false"
        )
    end = flow.node.get(id(new), 0)
    added, whole = flow.branches(end), flow.is_sum(end)
    modules = flow.modules_of([branch for branch in added if branch is not None])
    if added and None not in added and modules is not None:
        return Residual(modules, extras)
    if whole and hidden._version == 0:
        return Residual((), extras)
    if whole:
        raise EngineError(
            f"{name} adds to its hidden states in place and no submodule returns what it adds, so that it cannot be "
            "scaled: write the sum as x = x + ..."
        )
    if not added:
        raise EngineError(
            f"{name} adds nothing to its hidden states: not a residual block; name another stack by its path"
        )
    raise EngineError(
        f"{name} normalises or scales its hidden states, and what it adds to them is not what submodules of its own "
        "return, so that it cannot be scaled: make each branch the output of a submodule, as in x + self.branch(x)"
    )


@dataclass
class _Call:
    """An output of a submodule: its name, what it is, and the operation that made the tensor."""

    module: str
    usable: bool
    product: bool
    dropout: bool
    node: int | None


class _Flow(TorchDispatchMode):
    """The operations that depend on the hidden states, numbered from 1 as they run; 0 is the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = ["hidden states"]
        self.parents: list[tuple[int, ...]] = [()]
        self.sums = [False]
        self.node = {id(hidden): 0}
        self.calls: list[_Call] = []
        self._alive = [hidden]  # an id is good for as long as its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        parents = tuple(self.node[id(tensor)] for tensor in inputs if id(tensor) in self.node)
        if parents:
            name = str(func.overloadpacket)
            self.parents.append(parents)
            self.names.append(name)
            self.sums.append(name in _ADDITIONS and (kwargs or {}).get("alpha", 1) == 1)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.node[id(leaf)] = len(self.parents) - 1
                    self._alive.append(leaf)
        return output

    def branches(self, end: int) -> list[int | None]:
        """The branch of each sum on the stream between the hidden states and ``end``.

        None stands for a sum of two things of which neither is the stream before it: ``(x + A(x)) + F(x)``.
        """
        stream = self._stream(end)
        found: list[int | None] = []
        for before, after in pairwise(stream):
            others = [parent for parent in self.parents[after] if parent != before]
            if self.sums[after] and before in self.parents[after] and len(others) == 1:
                found.append(others[0])
            elif self.sums[after] and len(self.parents[after]) == 2:
                found.append(None)
        return found

    def is_sum(self, end: int) -> bool:
        """Whether the hidden states reach ``end`` by additions alone."""
        reached = {0}
        for node in range(1, end + 1):
            keeps = self.sums[node] or self.names[node] in _SAME_VALUES
            if keeps and reached.intersection(self.parents[node]):
                reached.add(node)
        return end in reached and any(self.sums[node] for node in reached if node)

    def modules_of(self, branches: Sequence[int]) -> tuple[str, ...] | None:
        """For each branch, a submodule that returned it and never anything else; None if one has none.

        That is the linear layer whose product it is if only dropout and the modules around both come after it, since
        scaling a weight may be less to compute; else the outermost one.
        """
        pure = {call.module for call in self.calls if call.usable}
        pure -= {call.module for call in self.calls if call.node not in branches}
        names = []
        for branch in branches:
            made = [call for call in self.calls if call.node == branch and call.module in pure]
            if not made:
                return None
            first, *rest = made
            keeps = all(call.dropout or first.module.startswith(f"{call.module}.") for call in rest)
            names.append(first.module if first.product and keeps else made[-1].module)
        return tuple(dict.fromkeys(names))

    def _stream(self, end: int) -> list[int]:
        """The nodes that every path from 0 to ``end`` passes."""
        wanted = {end}
        for node in range(end, 0, -1):
            if node in wanted:
                wanted.update(self.parents[node])
        reach = dict.fromkeys(wanted, 0)
        for node in wanted:
            for parent in self.parents[node]:
                reach[parent] = max(reach[parent], node)
        stream, furthest = [], 0
        for node in sorted(wanted):
            if furthest <= node:
                stream.append(node)
            furthest = max(furthest, reach[node])
        return stream


def _is_cache(value: Any) -> bool:
    """Whether an argument is a Hugging Face cache."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


@contextmanager
def _unmarked(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Evaluation mode without gradients; the random state and each module's mode are put back."""
    modes = [(module, module.training) for module in block.modules()]
    device = hidden.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type), torch.no_grad():
        block.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def _outputs_noted(block: nn.Module, flow: _Flow, excluded: Collection[int]) -> Iterator[None]:
    """Notes in ``flow.calls`` what each submodule returns (of a tuple, the first value)."""

    def noting(name: str, usable: bool) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            node = flow.node.get(id(first))
            flow.calls.append(_Call(name, usable, is_product(module), type(module) is nn.Dropout, node))

        return note

    with ExitStack() as stack:
        for name, module in block.named_modules():
            if name:
                handle = module.register_forward_hook(noting(name, id(module) not in excluded))
                stack.callback(handle.remove)
        yield
