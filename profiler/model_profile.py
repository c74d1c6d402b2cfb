"""``get_model_profile`` with the arguments and the meaning of DeepSpeed's, for scripts that call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from profiler.errors import ProfilerError
from profiler.ignored import without
from profiler.profile import profile
from profiler.units import quantity


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: Literal["forward", "generate"] = "forward",
) -> tuple[str, str, str] | tuple[int, int, int]:
    """FLOPs and multiply-accumulates of one call of a model in ``eval()``, and its parameters. The model is in the
    mode it was in when this returns or raises.

    Args:
        input_shape: call the model with one tensor of zeros, of its parameters' type and on their device.
        args, kwargs: call it with these.
        print_profile: time the call too, and print the tables.
        detailed, module_depth, top_modules: as ``profiler.tables.text`` has them.
        warm_up: calls before the first that is timed.
        as_string: ``("2.72 G", "1.36 GMACs", "22.7 M")``; else exact integers.
        output_file: write the tables there rather than print them.
        ignore_modules: classes that are no rows of their own: what they do is their parents'.
        mode: "generate" calls ``model.generate``.

    Raises:
        ProfilerError: no model, nothing to call it with, both kinds of input, an unknown mode, a model that cannot
            generate; as for ``profile``.
    """
    call = _call(model, mode)
    given = _arguments(model, input_shape, args)
    named = dict(kwargs or {})
    if not given and not named:
        raise ProfilerError("nothing to call the model with: give input_shape, or args, or kwargs")
    with _evaluating(model):
        report = profile(
            lambda: call(*given, **named), model, mode="call", warm_up=warm_up, repeats=3 if print_profile else 0
        )
    if ignore_modules:
        report = without(report, model, ignore_modules)
    if print_profile:
        report.write(("table",), output_file, module_depth, top_modules, detailed)
    work, parameters = report.counts.total("forward"), report.counts.root.total_parameters
    if as_string:
        return quantity(work.flops), quantity(work.macs, "MACs"), quantity(parameters)
    return work.flops, work.macs, parameters


def _call(model: nn.Module, mode: str) -> Callable[..., Any]:
    if not isinstance(model, nn.Module):
        raise ProfilerError(f"get_model_profile takes an nn.Module, not {type(model).__name__}")
    if mode not in ("forward", "generate"):
        raise ProfilerError(f"mode is {mode!r}: there are 'forward' and 'generate'")
    if mode == "forward":
        return model
    generate = getattr(model, "generate", None)
    if generate is None:
        raise ProfilerError(f"{type(model).__name__} has no generate: give mode='forward'")
    found: Callable[..., Any] = generate
    return found


def _arguments(model: nn.Module, shape: tuple[int, ...] | None, args: Sequence[Any]) -> tuple[Any, ...]:
    if shape is None:
        return tuple(args)
    if args:
        raise ProfilerError("both input_shape and args are given: the model takes one or the other")
    if not isinstance(shape, tuple) or not shape:
        raise ProfilerError(f"input_shape is {shape!r}: give a tuple of sizes, (batch, channels, height, width) say")
    parameter = next((one for one in model.parameters() if one.is_floating_point()), torch.empty(0))
    return (torch.zeros(shape, dtype=parameter.dtype, device=parameter.device),)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in ``eval()``, and afterwards as it was, one by one: parts of a model may differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
