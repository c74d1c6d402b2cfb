"""Which weights of a model are rounded while it trains, in what groups, and by what schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config_schema.quantize_training import QuantizeTraining
from engine.errors import EngineError
from engine.training.block_stack import BlockStack
from ops.quantization import BitSchedule, QuantizedTensor, fake_quantize, quantize

SECTION = "$.quantize_training"
_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight that is rounded.

    name:       of the module that holds it, the first where several share it.
    layer:      name of the block that it stands in, else of the module. block: the block's index, or None.
    transposed: stored as [in, out] (GPT-2's Conv1D); groups run along ``in`` in any case.
    group_size: columns that share a scale, None for the whole row.
    """

    name: str
    layer: str
    block: int | None
    parameter: nn.Parameter
    transposed: bool
    group_size: int | None
    symmetric: bool
    schedule: BitSchedule

    @property
    def logical(self) -> Tensor:
        """The weight as [out, in], without its graph."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    def rounded(self, bits: int, generator: torch.Generator | None = None) -> Tensor:
        """The weight at ``bits``, as it is stored: to nearest, or stochastically by ``generator``."""
        rounding: Any = "nearest" if generator is None else "stochastic"
        found = fake_quantize(
            self.logical,
            bits=bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            rounding=rounding,
            generator=generator,
        )
        return found.T.contiguous() if self.transposed else found

    def quantized(self, bits: int) -> QuantizedTensor:
        """What an engine serves: it dequantizes to :meth:`rounded`'s numbers, bit for bit."""
        return quantize(self.logical, bits=bits, group_size=self.group_size, symmetric=self.symmetric)


def find_weights(model: nn.Module, chosen: QuantizeTraining, stack: BlockStack | None) -> tuple[RoundedWeight, ...]:
    """The weights of linear layers and embeddings that the section ``chosen`` does not leave out.

    Raises :class:`EngineError` where there are none, a pattern names no such module, modules that share a weight are
    to be rounded in two ways, or DeepSpeed's groups are none of ours.
    """
    modules = dict(_modules(model))
    if not modules:
        raise EngineError(f"{SECTION}: {type(model).__name__} has no linear layer and no embedding to round")
    left_out = _left_out(model, chosen, modules)
    schedules = _schedules(chosen, modules)
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        users.setdefault(id(module.weight), []).append(name)
    found = []
    for names in users.values():
        _assert_one_way(names, left_out, schedules)
        if names[0] not in left_out:
            found.append(_weight(names, modules[names[0]], schedules[names[0]], chosen, stack))
    if not found:
        raise EngineError(f"{SECTION}: every linear layer and embedding is left out, so nothing is rounded")
    return tuple(found)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and token embeddings whose weights are trained, by name. Of a model that does not say which
    embedding is that of the tokens, all; other embeddings are served as they are."""
    ask = getattr(model, "get_input_embeddings", None)
    tokens = None if ask is None else ask()
    for name, module in model.named_modules():
        embeds = isinstance(module, nn.Embedding) and tokens in (None, module)
        if not (embeds or isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        if isinstance(module.weight, nn.Parameter) and module.weight.requires_grad:
            yield name, module


def _is_conv1d(module: nn.Module) -> bool:
    return any(f"{kind.__module__}.{kind.__name__}" == _CONV1D for kind in type(module).__mro__)


def _left_out(model: nn.Module, chosen: QuantizeTraining, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    found = {name for pattern in chosen.exclude for name in _named(pattern, modules, "exclude")}
    if not chosen.embedding:
        found |= {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    if not chosen.head:
        body = getattr(model, "base_model_prefix", "")
        if not body or not hasattr(model, body):
            raise EngineError(
                f"{SECTION}.head: {type(model).__name__} does not say which part is its body, as Hugging Face's models "
                "with a head do: name its output layers in exclude instead"
            )
        found |= {name for name in modules if not name.startswith(f"{body}.")}
    return frozenset(found)


def _schedules(chosen: QuantizeTraining, modules: Mapping[str, nn.Module]) -> dict[str, BitSchedule]:
    section = (chosen.start_bits, chosen.target_bits, chosen.quantize_period)
    bits = dict.fromkeys(modules, section)
    for index, rule in enumerate(chosen.rules):
        patterns = (rule.modules,) if isinstance(rule.modules, str) else rule.modules
        for pattern in patterns:
            for name in _named(pattern, modules, f"rules[{index}].modules"):
                said = (rule.start_bits, rule.target_bits, rule.quantize_period)
                start, target, period = (a if a is not None else b for a, b in zip(said, section, strict=True))
                bits[name] = (start, target, period)
    return {
        name: BitSchedule(*numbers, chosen.schedule_offset, chosen.quantize_change_ratio)
        for name, numbers in bits.items()
    }


def _named(pattern: str, modules: Mapping[str, nn.Module], key: str) -> list[str]:
    """Names of modules that a pattern names, or that stand in one that it names."""
    found = [
        name
        for name in modules
        if any(fnmatchcase(path, pattern) for path in accumulate(name.split("."), lambda a, b: f"{a}.{b}"))
    ]
    if not found:
        raise EngineError(
            f'{SECTION}.{key}: "{pattern}" names no linear layer and no embedding; there are {_listed(list(modules))}'
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _assert_one_way(names: Sequence[str], left_out: frozenset[str], schedules: Mapping[str, BitSchedule]) -> None:
    first = names[0]
    for name in names[1:]:
        if (name in left_out) != (first in left_out) or schedules[name] != schedules[first]:
            raise EngineError(
                f"{SECTION}: {first} and {name} are one weight, and are to be rounded in two ways: say the same of "
                "both (embedding and head, exclude, rules)"
            )


def _weight(
    names: Sequence[str], module: nn.Module, schedule: BitSchedule, chosen: QuantizeTraining, stack: BlockStack | None
) -> RoundedWeight:
    parameter, name = cast(nn.Parameter, module.weight), names[0]
    if isinstance(parameter, DTensor):
        raise EngineError(f"{SECTION}: {name} is sharded, and groups need whole weights: replicate the model")
    transposed = _is_conv1d(module)
    out, inner = parameter.shape[::-1] if transposed else parameter.shape
    size = chosen.group_size
    if chosen.quantize_groups is not None:
        size = _size_of_groups(name, chosen.quantize_groups, out, inner, transposed)
    blocks = () if stack is None else stack.names
    block = next((at for at, path in enumerate(blocks) if name.startswith(f"{path}.")), None)
    layer = name if block is None else blocks[block]
    return RoundedWeight(name, layer, block, parameter, transposed, size, chosen.q_type == "symmetric", schedule)


def _size_of_groups(name: str, groups: int, out: int, inner: int, transposed: bool) -> int | None:
    """Columns of a group, where DeepSpeed cuts the weight, row behind row, into ``groups`` of one size.

    Several whole rows become rows with a scale each, which is finer.
    """
    where = f"{SECTION}.quantize_groups: {groups} groups of {name}"
    if transposed and groups > 1:
        raise EngineError(
            f"{where}, which is stored as [in, out], would each take all outputs of some inputs: scales belong to "
            "outputs here; set group_size instead"
        )
    if out % groups == 0:
        return None
    per_row = groups // out
    if groups % out or inner % per_row:
        raise EngineError(
            f"{where} [{out}, {inner}] are neither whole rows nor equal parts of rows: set group_size instead"
        )
    return inner // per_row
