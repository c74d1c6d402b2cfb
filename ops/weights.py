"""Where weights come from, and how a kernel set holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from ops.costs import Parameters, Weight
from ops.errors import KernelError
from ops.quantization.scheme import Scheme
from ops.quantization.tensor import QuantizationError, QuantizedTensor
from ops.spec import ModelSpec

T = TypeVar("T")


@runtime_checkable
class WeightSource(Protocol):
    """Named tensors to read: safetensors files, a live ``state_dict``, a renaming of either.

    Reading is lazy and by slice, so that a rank reads only what it keeps and the whole checkpoint is never resident
    twice.
    """

    @property
    def version(self) -> int:
        """Changes whenever a tensor may have changed; packed weights are current while it does not."""
        ...

    def names(self) -> Collection[str]:
        """Every tensor's name, in a stable order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, read from the header alone. Raises ``KeyError`` for a name that is not there."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's stored dtype."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or rows ``[rows.start, rows.stop)`` of its first axis, in its stored dtype; not to be modified.

        May be a view of mapped or live memory: copy out of it at once.
        """
        ...

    def locate(self, name: str) -> str:
        """Where the tensor lies, for messages: ``model-00002-of-00003.safetensors: layers.3.mlp.weight``."""
        ...


@runtime_checkable
class QuantizedSource(Protocol):
    """A :class:`WeightSource` that holds some weights quantized already."""

    def quantized(self, name: str) -> QuantizedTensor:
        """The quantized weight ``name``, on the CPU; may be views of mapped memory."""
        ...


class PackedWeight(Protocol):
    """A weight in a layout of some kernel's own."""

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it lies in."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """``x W^T``: [T, in] to [T, out] in ``x``'s dtype."""
        ...


#: Turns a plain weight [out, in] into the form a kernel set reads; ``shared``: the plain tensor has another user and
#: stays.
PackWeight = Callable[..., "Tensor | PackedWeight"]
#: The same for a quantized weight, given the compute dtype.
PackQuantized = Callable[[QuantizedTensor, torch.dtype], "QuantizedTensor | PackedWeight"]


def plain(weight: Tensor, *, shared: bool = False) -> Tensor | PackedWeight:
    """No packing: the weight as it is."""
    return weight


def canonical(weight: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor | PackedWeight:
    """No packing: the quantized weight in its saved form."""
    return weight


@dataclass(frozen=True)
class Linear:
    """A linear layer ``y = x W^T + b``: weight [out, in], bias [out] or None."""

    weight: Tensor | QuantizedTensor | PackedWeight
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """Weights of a LayerNorm (weight, bias) or an RMSNorm (weight alone), both [size]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Embeddings:
    """Tables of the input: token [vocabulary, width], position, token type, projection to ``hidden``, norm. ``dtype``
    is that of the model's activations, which a lookup in a quantized table gives."""

    dtype: torch.dtype
    token: Tensor | QuantizedTensor
    position: Tensor | None
    token_type: Tensor | None
    project: Linear | None
    norm: Norm | None

    @property
    def table(self) -> Tensor:
        """The token embedding for kernels that read a plain one: quantized weights have not come this far."""
        if isinstance(self.token, QuantizedTensor):
            raise KernelError('these kernels read a plain token embedding: set "kernels" to "eager"')
        return self.token


@dataclass(frozen=True)
class LayerWeights:
    """One layer, fused as the macro-ops read it: ``qkv`` is [q + k + v, hidden]; ``up`` is [gate + up, hidden] if
    gated."""

    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    ffn_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class HeadWeights:
    """What stands on the last layer (see :class:`ops.spec.HeadSpec`)."""

    dense: Linear | None
    norm: Norm | None
    project: Linear | None
    out: Linear | None


@dataclass(frozen=True)
class ModelWeights:
    """A packed model, on one device in one compute dtype."""

    embed: Embeddings
    layers: tuple[LayerWeights, ...]
    final_norm: Norm | None
    head: HeadWeights | None
    version: int


def parameters(*parts: Linear | Norm | Tensor | QuantizedTensor | None) -> Parameters:
    """Weights and biases as they are packed."""
    known = []
    for part in parts:
        both = (part.weight, part.bias) if isinstance(part, Linear | Norm) else (part,)
        known += [weight for weight in both if weight is not None]
    return tuple(Weight(id(weight), math.prod(weight.shape), weight.nbytes) for weight in known)


def model_parameters(spec: ModelSpec, weights: ModelWeights) -> dict[str, Parameters]:
    """By part of the model, as :func:`ops.macro_ops.walk` names them. A norm counts at the product that it stands
    before, or behind (post-norm); an output projection that is the token embedding counts there, however it is
    packed."""
    embed, head, pre = weights.embed, weights.head, spec.placement == "pre"
    found = {"embed": parameters(embed.token, embed.position, embed.token_type, embed.project, embed.norm)}
    for index, layer in enumerate(weights.layers):
        at, attn_norm, ffn_norm = f"layers.{index}", layer.attn_norm, layer.ffn_norm
        found |= {
            f"{at}.qkv": parameters(attn_norm if pre else None, layer.qkv, layer.q_norm, layer.k_norm),
            f"{at}.attend": (),
            f"{at}.attention_out": parameters(layer.out, None if pre else attn_norm),
            f"{at}.ffn_up": parameters(ffn_norm if pre else None, layer.up),
            f"{at}.ffn_down": parameters(layer.down, None if pre else ffn_norm),
        }
    found["final"] = parameters(weights.final_norm)
    if head is not None:
        tied = spec.head is not None and spec.head.tied
        out = head.out.bias if tied and head.out is not None else head.out
        found["head"] = parameters(head.dense, head.norm, head.project, out)
    return found


class Packer:
    """Copies canonical weights out of a source into fused tensors, one at a time, so that nothing is resident twice.

    ``layer_done`` is called after each layer. What ``scheme`` names is quantized as it is read, or read as it is from a
    :class:`QuantizedSource`; ``pack_quantized`` then derives what the kernels read.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        pack_weight: PackWeight = plain,
        layer_done: Callable[[], object] = lambda: None,
        scheme: Scheme | None = None,
        pack_quantized: PackQuantized = canonical,
    ) -> None:
        self.spec, self.source, self.device, self.dtype, self.pack_weight = spec, source, device, dtype, pack_weight
        self.scheme, self.pack_quantized = scheme, pack_quantized
        self.shapes = spec.weight_shapes()
        self.layer_done = layer_done
        self._room = torch.empty(0, dtype=dtype, device=device)

    def pack(self) -> ModelWeights:
        """The whole model: on ``device``, in ``dtype``."""
        spec = self.spec
        version = self.source.version
        embed = self._embeddings()
        layers = tuple(self._layer(f"layers.{i}") for i in range(spec.layers))
        head = self._head(embed.token) if spec.head is not None else None
        return ModelWeights(embed, layers, self._norm("final_norm"), head, version)

    def _shape(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Shape of the named tensors stacked along their first axis, or None if the spec has none of them."""
        shapes = [self.shapes[name] for name in names if name in self.shapes]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes else None

    def _fill(self, out: Tensor, names: Sequence[str]) -> Tensor:
        row = 0
        for name in names:
            rows = self.shapes[name][0]
            out[row : row + rows].copy_(self.source.read(name))
            row += rows
        return out

    def _tensor(self, *names: str) -> Tensor | None:
        shape = self._shape(names)
        return None if shape is None else self._fill(torch.empty(shape, dtype=self.dtype, device=self.device), names)

    def _linear(self, *names: str) -> Linear | None:
        weights = [f"{name}.weight" for name in names]
        shape = self._shape(weights)
        if shape is None:
            return None
        bias = self._tensor(*(f"{name}.bias" for name in names))
        if self._quantizes(names):
            return Linear(self.pack_quantized(self._quantized(names), self.dtype), bias)
        if self.pack_weight is plain:
            return Linear(_present(self._tensor(*weights)), bias)
        raw = self._fill(self._borrow(shape), weights)
        packed = self.pack_weight(raw)
        return Linear(raw.clone() if packed is raw else packed, bias)

    def _quantizes(self, names: Sequence[str]) -> bool:
        return self.scheme is not None and names[0] in self.scheme.modules

    def _quantized(self, names: Sequence[str]) -> QuantizedTensor:
        """The named weights one below the other. Rows are quantized each by itself, so fusing them afterwards is the
        same."""
        return QuantizedTensor.stack([quantized_weight(self.source, self.scheme, n, self.device) for n in names])

    def _borrow(self, shape: tuple[int, ...]) -> Tensor:
        """Room for a plain weight that lives only until it is packed: always the same room.

        Fresh tensors in turn with packed ones leave the heap full of holes: SmolLM2 took 1.2 times its size that way.
        """
        size = math.prod(shape)
        if self._room.numel() < size:
            self._room = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._room[:size].view(shape)

    def _norm(self, name: str) -> Norm | None:
        weight = self._tensor(f"{name}.weight")
        return None if weight is None else Norm(weight, self._tensor(f"{name}.bias"))

    def _embeddings(self) -> Embeddings:
        token: Tensor | QuantizedTensor
        if self._quantizes(["embed.token"]):
            token = self._quantized(["embed.token"])
        else:
            token = _present(self._tensor("embed.token.weight"))
        return Embeddings(
            dtype=self.dtype,
            token=token,
            position=self._tensor("embed.position.weight"),
            token_type=self._tensor("embed.token_type.weight"),
            project=self._linear("embed.project"),
            norm=self._norm("embed.norm"),
        )

    def _layer(self, at: str) -> LayerWeights:
        layer = self._layer_weights(at)
        self.layer_done()
        return layer

    def _layer_weights(self, at: str) -> LayerWeights:
        ffn = (f"{at}.gate", f"{at}.up") if self.spec.gated else (f"{at}.up",)
        return LayerWeights(
            attn_norm=_present(self._norm(f"{at}.attn_norm")),
            qkv=_present(self._linear(f"{at}.q", f"{at}.k", f"{at}.v")),
            q_norm=self._norm(f"{at}.q_norm"),
            k_norm=self._norm(f"{at}.k_norm"),
            out=_present(self._linear(f"{at}.out")),
            ffn_norm=_present(self._norm(f"{at}.ffn_norm")),
            up=_present(self._linear(*ffn)),
            down=_present(self._linear(f"{at}.down")),
        )

    def _head(self, token: Tensor | QuantizedTensor) -> HeadWeights:
        head = self.spec.head
        assert head is not None
        out = self._linear("head.out")
        if head.tied:
            weight: Tensor | QuantizedTensor | PackedWeight
            if isinstance(token, QuantizedTensor):
                weight = self.pack_quantized(token, self.dtype)
            else:
                weight = self.pack_weight(token, shared=True)
            out = Linear(weight, self._tensor("head.out.bias"))
        return HeadWeights(self._linear("head.dense"), self._norm("head.norm"), self._linear("head.project"), out)


def quantized_weight(source: WeightSource, scheme: Scheme | None, module: str, device: torch.device) -> QuantizedTensor:
    """The weight of the canonical ``module`` as ``scheme`` says, or as the source holds it already."""
    assert scheme is not None, "asked for what a scheme names"
    name = f"{module}.weight"
    if isinstance(source, QuantizedSource):
        return source.quantized(name).to(device, copy=True)
    out, inner = source.shape(name)
    try:
        return scheme.quantized(lambda rows: source.read(name, rows), (out, inner), device)
    except QuantizationError as error:
        raise QuantizationError(f"{source.locate(name)}: {error}") from None


def _present(value: T | None) -> T:
    assert value is not None, "ModelSpec.weight_shapes lists a weight that every model has"
    return value
