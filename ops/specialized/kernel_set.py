"""The ``specialized`` kernel set: a decoder's step in one resident kernel, an encoder's forward in one graph."""

from __future__ import annotations

import logging

import torch

from ops.collective import Collective
from ops.errors import KernelError
from ops.generic.kernel_set import GenericKernels, assert_plain_weights
from ops.plan import Bucket, Decoder, DecodeState, StepPlan
from ops.quantization.scheme import Scheme
from ops.spec import ModelSpec
from ops.specialized import encoder, persistent
from ops.triton_support import assert_runs
from ops.weights import ModelWeights

log = logging.getLogger("slipstream.kernels")


class SpecializedKernels(GenericKernels):
    """Decode steps of up to 16 rows by a persistent kernel; encoders' steps of a few tokens by another, of some more by
    fused tiles, where those were measured ahead.

    What those do not serve (a prompt's prefill, larger batches, longer texts) runs as in ``generic``, where the matrix
    product is the limit and cuBLAS is hard to beat.
    """

    name = "specialized"

    def assert_supports(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, scheme: Scheme | None = None
    ) -> None:
        """fp16 and bf16, on Hopper or newer for decoders; raises with the reason and what to set."""
        assert_runs(self.name, device, dtype)
        assert_plain_weights(self.name, scheme)
        reason = persistent.unsupported(spec, None, dtype, device) if spec.causal else encoder.supports(spec, dtype)
        if reason is not None:
            raise KernelError(f'kernels "{self.name}" do not run this model here: {reason}; set "kernels" to "generic"')

    def plan(self, spec: ModelSpec, weights: ModelWeights, bucket: Bucket, collective: Collective) -> StepPlan:
        """The encoder path for encoders, whose persistent kernel compiles here (seconds, the first time); else, and for
        what that path does not take, the plan of ``generic``."""
        generic = super().plan(spec, weights, bucket, collective)
        if spec.causal or bucket.kind != "encode" or collective.size > 1:
            return generic
        return encoder.encoder_step_plan(spec, weights, self, generic)

    def decoder(self, spec: ModelSpec, weights: ModelWeights, state: DecodeState, collective: Collective) -> Decoder:
        """The persistent kernel where it serves so many rows in one process, else the decode plan."""
        reason = f"{collective.size} processes share the model" if collective.size > 1 else None
        if reason is None:
            reason = persistent.unfit(spec, state.rows, state.keys[0].device)
        if reason is None:
            return persistent.PersistentDecoder(spec, weights, state)
        log.warning("decode steps of %d rows run as in generic: %s", state.rows, reason)
        return super().decoder(spec, weights, state, collective)
