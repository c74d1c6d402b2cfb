"""What a Transformer is: the facts that the one model implementation walks.

A model family (``engine/families``) turns a checkpoint's ``config.json`` into a :class:`ModelSpec`; nothing behind that
door knows Hugging Face's attribute names. All sizes are counts of elements, never bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

#: ``gelu`` is the exact erf form, ``gelu_tanh`` the tanh approximation, ``quick_gelu`` is ``x * sigmoid(1.702 x)``.
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"]
NormKind = Literal["layernorm", "rmsnorm"]
#: ``pre``: x + f(norm(x)); ``post``: norm(x + f(x)), as in the original Transformer and BERT.
NormPlacement = Literal["pre", "post"]
Task = Literal[
    "causal_lm", "embedding", "sequence_classification", "token_classification", "question_answering", "masked_lm"
]

#: What makes scores of a sequence classifier's outputs: one label of several, each label alone, or a plain number.
Scores = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class NoPositions:
    """The model is given no positions (or takes them from elsewhere)."""


@dataclass(frozen=True)
class LearnedPositions:
    """A table of ``count`` learned vectors; the token at position p takes row ``p + offset`` (OPT: 2, RoBERTa: pad +
    1)."""

    count: int
    offset: int = 0


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary embedding (Su et al., arXiv 2104.09864) of the first ``dim`` elements of each query and key head.

    ``inv_freq`` holds ``dim / 2`` radians per position, any scaling of long contexts already applied; ``factor``
    multiplies the cosines and sines (YaRN). ``interleaved`` pairs elements (2i, 2i + 1) as GPT-J does, else (i, i + dim
    / 2).
    """

    dim: int
    inv_freq: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class ALiBiPositions:
    """Attention with linear biases (Press et al., arXiv 2108.12409): ``slopes[h] * (key position - query
    position)``."""

    slopes: tuple[float, ...]


Positions = NoPositions | LearnedPositions | RotaryPositions | ALiBiPositions


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What stands on the last layer: ``pick token -> dense -> activation -> norm -> project -> out``, each step
    optional.

    task:       whose outputs these are.
    outputs:    rows of the output projection (vocabulary or labels); 0 where there is none (an encoder's pooler).
    first_token: take the first token of each sequence (BERT's ``[CLS]``) instead of every token.
    dense:      a square [hidden, hidden] layer with bias before the output, followed by ``activation``.
    norm:       a norm of the model's kind after the dense layer (masked LM).
    bias:       the output projection has a bias.
    tied:       the output projection is the token embedding.
    labels:     names of the outputs, where the checkpoint gives them.
    scores:     what makes scores of the outputs.
    """

    task: Task
    outputs: int
    first_token: bool = False
    dense: bool = False
    activation: Activation | None = None
    norm: bool = False
    bias: bool = False
    tied: bool = False
    labels: tuple[str, ...] = ()
    scores: Scores = "softmax"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The facts of one Transformer. See the module's docstring; fields that most models share have defaults.

    head_dim:         size of one head; not always ``hidden / heads``.
    kv_heads:         heads of keys and values; each serves ``heads / kv_heads`` query heads (GQA).
    ffn:              width of the feed-forward layer; ``gated`` multiplies it by ``activation(gate)``.
    attention_scale:  factor on the scores before softmax (GPT-Neo has 1.0).
    scores_in_fp32:   scores are computed and normalized in fp32 whatever the compute dtype (GPT-Neo).
    attention_softcap: ``cap * tanh(scores / cap)`` before the mask, or None.
    windows:          per layer, how many last keys a query sees, itself included; None is all of them.
    max_positions:    longest sequence in tokens.
    token_types:      rows of the token type (segment) embedding, 0 without one.
    embedding_size:   width of the token embedding where a projection brings it to ``hidden``, else None.
    embedding_norm:   a norm follows the embeddings (in post-norm models the first pending norm).
    final_norm:       a norm stands behind the last layer (pre-norm models).
    final_softcap:    ``cap * tanh(logits / cap)``, or None.
    """

    family: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    activation: Activation
    norm: NormKind
    norm_eps: float
    placement: NormPlacement
    positions: Positions
    max_positions: int
    attention_scale: float
    causal: bool
    gated: bool = False
    scores_in_fp32: bool = False
    attention_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    token_types: int = 0
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = False
    final_softcap: float | None = None
    head: HeadSpec | None = None

    def __post_init__(self) -> None:
        """Facts that no kernel could honour are refused here, so that a wrong family fails at once and by name."""
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.family}: {self.heads} heads are not a multiple of {self.kv_heads} KV heads")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"{self.family}: {len(self.windows)} windows for {self.layers} layers")
        rotary = self.positions
        if isinstance(rotary, RotaryPositions) and (
            rotary.dim > self.head_dim or len(rotary.inv_freq) * 2 != rotary.dim
        ):
            raise ValueError(f"{self.family}: rotary size {rotary.dim} does not fit head size {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys (and of its values)."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_width(self) -> int:
        """Width of the token embedding table."""
        return self.embedding_size or self.hidden

    def window(self, layer: int) -> int | None:
        """How many last keys a query of ``layer`` sees, or None for all."""
        return self.windows[layer] if self.windows else None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its canonical name, with its logical shape ([out, in] for a linear layer)."""
        return dict(_weights(self))

    def parameters(self) -> int:
        """Number of parameters, tied weights once."""
        total = 0
        for shape in self.weight_shapes().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total


Named = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, out: int, inner: int, bias: bool) -> Named:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, size: int, kind: NormKind) -> Named:
    yield f"{name}.weight", (size,)
    if kind == "layernorm":
        yield f"{name}.bias", (size,)


def _weights(spec: ModelSpec) -> Named:
    yield "embed.token.weight", (spec.vocab_size, spec.embedding_width)
    if isinstance(spec.positions, LearnedPositions):
        yield "embed.position.weight", (spec.positions.count, spec.hidden)
    if spec.token_types:
        yield "embed.token_type.weight", (spec.token_types, spec.hidden)
    if spec.embedding_size is not None:
        yield "embed.project.weight", (spec.hidden, spec.embedding_size)
    if spec.embedding_norm:
        yield from _norm("embed.norm", spec.hidden, spec.norm)
    for layer in range(spec.layers):
        yield from _layer_weights(spec, f"layers.{layer}")
    if spec.final_norm:
        yield from _norm("final_norm", spec.hidden, spec.norm)
    if spec.head is not None:
        yield from _head_weights(spec, spec.head)


def _layer_weights(spec: ModelSpec, at: str) -> Named:
    yield from _norm(f"{at}.attn_norm", spec.hidden, spec.norm)
    yield from _linear(f"{at}.q", spec.q_size, spec.hidden, spec.qkv_bias)
    yield from _linear(f"{at}.k", spec.kv_size, spec.hidden, spec.qkv_bias)
    yield from _linear(f"{at}.v", spec.kv_size, spec.hidden, spec.qkv_bias)
    if spec.qk_norm:
        yield f"{at}.q_norm.weight", (spec.head_dim,)
        yield f"{at}.k_norm.weight", (spec.head_dim,)
    yield from _linear(f"{at}.out", spec.hidden, spec.q_size, spec.out_bias)
    yield from _norm(f"{at}.ffn_norm", spec.hidden, spec.norm)
    if spec.gated:
        yield from _linear(f"{at}.gate", spec.ffn, spec.hidden, spec.ffn_bias)
    yield from _linear(f"{at}.up", spec.ffn, spec.hidden, spec.ffn_bias)
    yield from _linear(f"{at}.down", spec.hidden, spec.ffn, spec.ffn_bias)


def _head_weights(spec: ModelSpec, head: HeadSpec) -> Named:
    if head.dense:
        yield from _linear("head.dense", spec.hidden, spec.hidden, True)
    if head.norm:
        yield from _norm("head.norm", spec.hidden, spec.norm)
    width = spec.hidden
    if head.task in ("causal_lm", "masked_lm") and spec.embedding_size is not None:
        yield "head.project.weight", (spec.embedding_size, spec.hidden)
        width = spec.embedding_size
    if head.outputs and not head.tied:
        yield "head.out.weight", (head.outputs, width)
    if head.outputs and head.bias:
        yield "head.out.bias", (head.outputs,)
