"""The draw: from a step's logits to its tokens, without a word to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.costs import region
from ops.sampling.logits import (
    apply_temperature,
    first_maximum,
    keep_top_k,
    keep_top_p,
    largest,
    masses,
    penalize_repetition,
    suppress_eos,
)
from ops.sampling.random import philox_uniform
from ops.sampling.state import SamplingState


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model's own distribution, before any processor; fp32.

    chosen:       [B], of the token taken.
    top_tokens:   [B, n] int64, the n most probable tokens, descending (order and choice among equal logits are not
    defined).
    top_logprobs: [B, n], theirs.
    """

    chosen: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True, eq=False)
class SampleOutput:
    """One step's result.

    tokens:   [B] int64.
    valid:    [B] bool; False where the largest logit is NaN or infinite (an overflow in the model, or every token
    removed).
              That row's token is then some id of the vocabulary, so that steps already under way stay within bounds;
              the engine reads ``valid`` with the tokens and ends the row with an error.
    logprobs: None unless asked for.
    """

    tokens: Tensor
    valid: Tensor
    logprobs: TokenLogprobs | None = None


def sample(logits: Tensor, state: SamplingState, *, logprobs: int | None = None) -> SampleOutput:
    """The next token of each row of ``logits`` [B, V] (any floating dtype; computed in fp32), and the state advanced
    in place.

    Processors as in Hugging Face's ``generate``: repetition penalty, minimum of new tokens, then for sampled rows
    temperature, top-k, top-p. Greedy rows take the first largest logit. Sampled rows invert the cumulative
    distribution, in the order of
    token ids, at their one Philox number: a row's tokens depend on its own logits, parameters, seed and counter alone.
    ``logprobs=n`` adds :func:`token_logprobs` with n alternatives.
    """
    with region("sampling", "sampling"):
        return _sample(logits, state, logprobs)


def _sample(logits: Tensor, state: SamplingState, logprobs: int | None) -> SampleOutput:
    plan = state.plan
    scores = logits.to(torch.float32)
    if plan.penalty:
        assert state.seen is not None
        scores = penalize_repetition(scores, state.seen, state.repetition_penalty)
    if plan.minimum:
        scores = suppress_eos(scores, state.counter, state.min_new_tokens, state.eos)
    top, tokens = first_maximum(scores)
    if not plan.greedy:
        tokens = torch.where(state.temperature == 0, tokens, _draw(scores, top, state))
    state.advance(tokens)
    chances = None if logprobs is None else token_logprobs(logits, tokens, logprobs)
    return SampleOutput(tokens, top.isfinite(), chances)


def token_logprobs(logits: Tensor, tokens: Tensor, top_n: int = 0) -> TokenLogprobs:
    """Log-softmax of the raw ``logits`` [B, V] in fp32 at ``tokens`` [B], and at the ``top_n`` most probable tokens."""
    scores = logits.to(torch.float32)
    total = scores.logsumexp(1, keepdim=True)
    chosen = scores.gather(1, tokens.unsqueeze(1)) - total
    top = scores.topk(min(top_n, scores.shape[1]))
    return TokenLogprobs(chosen.squeeze(1), top.indices, top.values - total)


def _draw(scores: Tensor, top: Tensor, state: SamplingState) -> Tensor:
    """Temperature, top-k and top-p, those of them that some row needs, and a token [B] of what is left.

    The token is the one at which the cumulative mass first exceeds the row's uniform number times the total.
    """
    plan = state.plan
    scores = apply_temperature(scores, state.temperature)
    mass = masses(scores, apply_temperature(top.unsqueeze(1), state.temperature))
    ordered = largest(scores, plan.ordered) if plan.ordered else scores
    if plan.top_k:
        mass.mul_(keep_top_k(scores, state.top_k, ordered))
    if plan.top_p:
        mass.mul_(keep_top_p(scores, mass, state.top_p, ordered))
    cumulative = mass.cumsum(1)
    total = cumulative[:, -1:]
    uniform = philox_uniform(state.seed, state.counter).unsqueeze(1)
    target = (uniform * total.to(torch.float64)).to(torch.int64)
    place = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    # A row of NaN has no order to search: any id of the vocabulary will do, see SampleOutput.valid.
    return place.clamp(max=scores.shape[1] - 1)
