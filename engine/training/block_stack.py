"""Where a model keeps its residual blocks: found by itself, or at the paths that the user names.

A stack is an ``nn.ModuleList`` or ``nn.Sequential`` of at least two different modules of one class. Structure is all
that can be looked at before data comes; whether a module really is a residual block shows in its first forward pass
(:mod:`engine.training.residual`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from engine.errors import EngineError

#: Modules are stages if stacks inside of them hold more than this share of their parameters.
STAGE_SHARE = 0.75


@dataclass(frozen=True)
class BlockStack:
    """Residual blocks in the order in which hidden states pass them.

    paths: the lists that hold them, as in ``model.get_submodule``; names: each block's own path; blocks: the modules.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    @property
    def class_name(self) -> str:
        """The blocks' class."""
        return class_name(self.blocks[0])

    def __str__(self) -> str:
        return f"{' + '.join(self.paths)} ({len(self.blocks)} {self.class_name})"


def find_stack(model: nn.Module, paths: str | Sequence[str] | None = None) -> BlockStack:
    """The stack at ``paths``, or else the one with the most parameters.

    A path is given from the root (``"bert.encoder.layer"``) or from further in, where only one stack ends so
    (``"encoder.layer"``). Several paths make one stack, numbered on in their order. Without a path, a list of *stages*
    (modules that mostly consist of stacks of normalised blocks, as in Swin) gives way to the blocks of all its stages.

    Raises:
        EngineError: no stack, an unknown or ambiguous path, or one to something else. Lists the stacks there are.
    """
    stacks = list(_stacks(model))
    if paths is None:
        if not stacks:
            raise EngineError(
                f"no stack of residual blocks in {type(model).__name__}: needed is an nn.ModuleList or nn.Sequential "
                "of at least two different modules of one class that have submodules; name one by its path"
            )
        return max(_without_stages(stacks), key=lambda stack: _size(*stack.blocks))
    wanted = (paths,) if isinstance(paths, str) else tuple(paths)
    if not wanted:
        raise EngineError(f"paths is empty: give at least one path of a stack, or None; {_candidates(stacks)}")
    parts = [_at(model, path, stacks) for path in wanted]
    stack = _joined(parts)
    if len({id(block) for block in stack.blocks}) < len(stack.blocks):
        raise EngineError(f"paths {', '.join(stack.paths)} share blocks: name each stack once")
    return stack


def has_stack(model: nn.Module) -> bool:
    """Whether :func:`find_stack` finds one by itself."""
    return any(True for _ in _stacks(model))


def class_name(module: nn.Module) -> str:
    """The name of a module's class; of the class that was compiled for what ``torch.compile`` returned."""
    return type(getattr(module, "_orig_mod", module)).__name__


def _stack(path: str, module: nn.Module) -> BlockStack | None:
    """What the module at ``path`` holds if it is a stack."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return None
    blocks = tuple(module)
    alike = len({type(block) for block in blocks}) == 1 and len({id(block) for block in blocks}) == len(blocks)
    if len(blocks) < 2 or not alike:
        return None
    return BlockStack((path,), tuple(f"{path}.{index}".lstrip(".") for index in range(len(blocks))), blocks)


def _stacks(model: nn.Module) -> Iterator[BlockStack]:
    """Every stack of modules that have submodules (a lone linear or norm layer is no block) and parameters."""
    for path, module in model.named_modules():
        stack = _stack(path, module)
        if stack and all(any(True for _ in block.children()) for block in stack.blocks) and _size(*stack.blocks):
            yield stack


def _at(model: nn.Module, path: str, stacks: Sequence[BlockStack]) -> BlockStack:
    """The stack that one path of the user names."""
    modules = dict(model.named_modules())
    names = [path] if path in modules else [name for name in modules if name.endswith(f".{path}")]
    if not names:
        raise EngineError(f'no module "{path}" in {type(model).__name__}; {_candidates(stacks)}')
    if len(names) > 1:
        raise EngineError(f'"{path}" may be any of {", ".join(names)}: give the whole path')
    stack = _stack(names[0], modules[names[0]])
    if stack is None:
        raise EngineError(
            f'"{path}" is a {type(modules[names[0]]).__name__} and no stack: needed is an nn.ModuleList or '
            f"nn.Sequential of at least two different modules of one class; {_candidates(stacks)}"
        )
    return stack


def _candidates(stacks: Sequence[BlockStack]) -> str:
    listed = ", ".join(str(stack) for stack in stacks)
    return f"stacks here: {listed}" if listed else "there is no stack of blocks in this model"


def _without_stages(stacks: Sequence[BlockStack]) -> list[BlockStack]:
    """The stacks, each list of stages replaced by the joined blocks of its stages.

    Members are stages if each contains a stack, and these hold nearly all of the members' parameters, norms among
    them; or all of them. Experts of a mixture hold no norms, so that layers that contain experts stay what they are.
    """
    found = []
    for outer in stacks:
        stages = [[stack for stack in stacks if f"{stack.paths[0]}.".startswith(f"{name}.")] for name in outer.names]
        inner = [stack for stage in stages for stack in stage]
        if not all(stages) or not _are_stages(outer, inner):
            found.append(outer)
            continue
        largest = max(inner, key=lambda stack: _size(*stack.blocks))
        found.append(_joined([stack for stack in inner if stack.class_name == largest.class_name]))
    return found


def _are_stages(outer: BlockStack, inner: Sequence[BlockStack]) -> bool:
    blocks = [block for stack in inner for block in stack.blocks]
    share = _size(*blocks) / _size(*outer.blocks)
    return share == 1.0 or (share > STAGE_SHARE and all(_has_norm(block) for block in blocks))


def _has_norm(block: nn.Module) -> bool:
    return any("norm" in type(module).__name__.lower() for module in block.modules())


def _size(*modules: nn.Module) -> int:
    """Parameters of modules, each counted once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _joined(parts: Sequence[BlockStack]) -> BlockStack:
    return BlockStack(
        tuple(path for part in parts for path in part.paths),
        tuple(name for part in parts for name in part.names),
        tuple(block for part in parts for block in part.blocks),
    )
