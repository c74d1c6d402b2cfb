"""0/1 Adam: AdamW whose processes exchange one bit an element, and behind the warm-up not at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ops.compression import GradientCollective
from ops.optimizers.batch import BUCKET_ELEMENTS, Batch, flattened, pieces
from ops.optimizers.buckets import Bucket
from ops.optimizers.compressed import CompressedOptimizer
from ops.optimizers.moments import Arithmetic
from ops.optimizers.pays import Compression

_COUNTS = ("interval", "updates", "counted", "local_interval", "local_steps", "alone")


class ZeroOneAdam(CompressedOptimizer):
    """0/1 Adam (Lu et al., arXiv 2202.06009), with the schedule of DeepSpeed's implementation.

    Up to step ``var_freeze_step``, at every ``interval``-th step (1 at first, doubled after every
    ``var_update_scaler`` such
    steps) the processes' mean gradient moves m and v as in AdamW. At the steps between, the mean of their gradients'
    error-compensated signs moves m alone. Then v stands, the errors are forgotten, and each process goes its own way::

        m = beta1 m + (1 - beta1) g_own       u = u + lr (m / (sqrt(v) + eps) + weight_decay w)       w = w - lr (...)

    until, after ``interval`` steps (1 at first, doubled every ``local_step_scaler`` steps up to
    ``local_step_clipper``), all
    go from where they last were together, along the mean of ``u (sqrt(v) + eps)`` as signs, whose share of the learning
    rates is the new m.

    params, collective, lr, betas, eps, weight_decay, max_grad_norm: as for :class:`OneBitAdam`.
    bias_correction: divides m by ``1 - beta1^t`` and v by ``1 - beta2^k`` behind its k-th update. False is what
        DeepSpeed does.
    compression: "always", or "auto": before the first exchange of signs (or at var_freeze_step, if that is earlier) a
        step by a full mean of gradients and one by a compressed exchange are timed, and where the latter is not faster
        all steps are AdamW's: no signs, and no steps alone, though these would save messages.
    var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper: DeepSpeed's names and defaults.

    Between two exchanges processes have weights of their own: call :meth:`meet` before saving or evaluating.
    """

    shaped_state: ClassVar[tuple[str, ...]] = (*CompressedOptimizer.shaped_state, "met_weight")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        collective: GradientCollective | None = None,
        var_freeze_step: int = 100000,
        compression: Compression = "always",
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        bias_correction: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "freeze_step": var_freeze_step, "compression": compression,
            "var_update_scaler": var_update_scaler, "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper, "bias_correction": bias_correction, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "maximize": False, "foreach": foreach,
        }  # fmt: skip
        self._interval, self._updates, self._counted = 1, 0, 0
        self._local_interval, self._local_steps, self._alone = 1, 0, 0
        self._rates: list[float] = []
        super().__init__(params, collective, defaults)

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Checks what all share, and the intervals."""
        super().check_options(options, where)
        if options["freeze_step"] == "auto":
            raise self.error(f"var_freeze_step{where} is 'auto': use a number of steps")
        for name in ("var_update_scaler", "local_step_scaler", "local_step_clipper"):
            if not isinstance(options[name], int) or isinstance(options[name], bool) or options[name] < 1:
                raise self.error(f"{name}{where} is {options[name]!r}: use a whole number from 1")

    @property
    def together(self) -> bool:
        """Whether all processes have the same weights."""
        return self._alone == 0 or self.collective.size == 1

    @torch.no_grad()
    def meet(self) -> None:
        """An exchange before its time, where processes are not together."""
        if self.together:
            return
        self._fill_gradients()
        each = [(i, self.batches(group, BUCKET_ELEMENTS, counts=False)) for i, group in enumerate(self.param_groups)]
        self._meet([(*batch, i) for i, batches in each for batch in batches])

    @torch.no_grad()
    def start_together(self) -> None:
        """What each process has gone alone counts no more."""
        self._alone, self._rates = 0, [0.0] * len(self.param_groups)

    def compresses(self) -> bool:
        """Whether signs are exchanged once that is due; where not, all steps are of mean gradients."""
        pays = super().compresses()
        if not pays:
            self._interval = 1
        return pays

    def averages(self) -> bool:
        """Whether this step is one of the mean gradient."""
        return not self.frozen and (self._steps + 1) % self._interval == 0

    def advance(self) -> None:
        """One step of the kind that is due."""
        if self.frozen:
            self._local_step()
        elif self.averages():
            self._variance_step()
        else:
            self.compressed_step()

    # ---- the first stage ----

    def _variance_step(self) -> None:
        self._updates += 1
        self.mean_step()
        self._counted += 1
        if self._counted >= self.defaults["var_update_scaler"] and self.compresses():
            self._counted, self._interval = 0, 2 * self._interval

    def momentum(self, batch: Batch, grads: Sequence[Tensor], beta1: float, out: Tensor) -> None:
        """What is exchanged between two updates of the variance: the gradient."""
        torch.cat([grad.reshape(-1) for grad in grads], out=out)

    def finish(self, bucket: Bucket, group: Mapping[str, Any]) -> None:
        """A step along the momentum that the gradients' signs move."""
        for piece, parts in bucket.arrived():
            torch._foreach_lerp_(piece.batch.exp_avgs, parts, 1 - group["betas"][0])
            self.move(bucket.arithmetic, piece.batch, group)

    def corrections(self, batch: Batch, group: Mapping[str, Any]) -> list[tuple[float, float]]:
        """Those of as many updates as each moment has had. Empty without bias correction."""
        if not group["bias_correction"]:
            return []
        beta1, beta2 = group["betas"]
        return [(1 - beta1**t, 1 - beta2 ** max(self._updates, 1)) for t in batch.steps]

    # ---- state ----

    def compression_state(self) -> dict[str, Any]:
        """With the intervals, and where between two exchanges this process stands."""
        own = {name: getattr(self, f"_{name}") for name in _COUNTS}
        return {**super().compression_state(), **own, "rates": list(self._rates)}

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`compression_state` back."""
        super().load_compression_state(state)
        for name in _COUNTS:
            setattr(self, f"_{name}", state[name])
        self._rates = [float(rate) for rate in state["rates"]]

    # ---- local steps ----

    def begin_compression(self) -> None:
        """The errors of gradients say nothing of momenta."""
        self.forget_errors()
        self._rates = [0.0] * len(self.param_groups)

    def _local_step(self) -> None:
        batches: list[tuple[Arithmetic, Batch, int]] = []
        for index, group in enumerate(self.param_groups):
            rate = float(group["lr"])
            self._rates[index] += rate
            for arithmetic, batch in self.batches(group, BUCKET_ELEMENTS):
                if self._alone == 0:
                    self._remember(batch)
                for piece in pieces(batch):
                    grads = arithmetic.gradients(piece.batch, False)
                    torch._foreach_lerp_(piece.batch.exp_avgs, grads, 1 - group["betas"][0])
                    self.move(arithmetic, piece.batch, group)
                batches.append((arithmetic, batch, index))
        self._alone += 1
        if self._alone >= self._local_interval:
            self._meet(batches)
        self._local_steps += 1
        if self._local_steps == self.defaults["local_step_scaler"]:
            self._local_steps = 0
            self._local_interval = min(2 * self._local_interval, self.defaults["local_step_clipper"])

    def _meet(self, batches: Sequence[tuple[Arithmetic, Batch, int]]) -> None:
        """All go from where they last were together, by the mean of what they have gone since."""
        under_way: list[tuple[Bucket, list[Tensor], int]] = []
        for arithmetic, batch, index in batches:
            group = self.param_groups[index]
            denominators = self._denominators(batch, group)
            gone = torch._foreach_sub(self._met(batch), batch.weights)
            torch._foreach_mul_(gone, denominators)
            bucket = self.send(arithmetic, batch, flattened(gone), len(under_way))
            under_way.append((bucket, denominators, index))
        for bucket, denominators, index in under_way:
            bucket.wait()
            met, rate = self._met(bucket.batch), self._rates[index]
            for piece, parts in bucket.arrived():
                part = piece.batch
                if rate:  # at rate 0 nothing was gone, which says nothing of the momentum
                    torch._foreach_copy_(part.exp_avgs, torch._foreach_div(parts, rate))
                torch._foreach_div_(parts, piece.of(denominators))
                # From the weights that all had: going back by steps would leave each process a rounding of its own.
                torch._foreach_copy_(part.weights, piece.of(met))
                bucket.arithmetic.add_scaled(part, parts, self.rates(part, -1.0))
        self._alone, self._rates = 0, [0.0] * len(self.param_groups)

    def _denominators(self, batch: Batch, group: Mapping[str, Any]) -> list[Tensor]:
        corrections = self.corrections(batch, group) or [(1.0, 1.0)] * len(batch.params)
        first, second = zip(*corrections, strict=True)
        found = torch._foreach_div(batch.exp_avg_sqs, second)
        torch._foreach_sqrt_(found)
        torch._foreach_add_(found, group["eps"])
        torch._foreach_mul_(found, first)
        return list(found)

    def _remember(self, batch: Batch) -> None:
        """The weights at which all are together."""
        for parameter, weight in zip(batch.parameters, batch.weights, strict=True):
            state = self.state[parameter]
            if "met_weight" not in state:
                state["met_weight"] = torch.empty_like(weight)
        torch._foreach_copy_(self._met(batch), batch.weights)

    def _met(self, batch: Batch) -> list[Tensor]:
        return [self.state[parameter]["met_weight"] for parameter in batch.parameters]
