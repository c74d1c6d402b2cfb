"""What optimizers have in common that exchange signs of their momentum in place of gradients."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ops.compression import Errors, GradientCollective, SingleProcess, for_other_size
from ops.compression.collective import all_finite
from ops.optimizers.batch import BUCKET_ELEMENTS, Batch, compute_dtype, end_to_end, pieces
from ops.optimizers.buckets import Bucket, sizes_of
from ops.optimizers.moments import Arithmetic
from ops.optimizers.pays import MeasuredOptimizer, Verdict

log = logging.getLogger("slipstream.optimizers")

#: ``"auto"``: the variance stands where the sum of it was within this share of itself 1 / (1 - beta2) steps before, ten
#: times looked at in between (arXiv 2102.02888, section 7.1).
STABLE, LOOKS = 0.96, 10

FreezeStep = int | Literal["auto"]


def _nothing_if_finite(grads: Sequence[Tensor]) -> Tensor:
    """0-dim fp64: 0, or NaN where an element is no number."""
    finite = all_finite(grads)
    return torch.where(finite, 0.0, torch.nan).double()


class CompressedOptimizer(MeasuredOptimizer):
    """Base of optimizers that train in two stages.

    Up to ``freeze_step`` steps (the warm-up) gradients are averaged in full precision. Then the variance is frozen, and
    processes exchange the signs of their momenta; with ``compression="auto"`` only if that was measured to be faster
    then, else the warm-up goes on for good. **Gradients are each process's own**: neither DDP nor FSDP may
    average them; the optimizer does. All processes begin with the same weights.

    A gradient that is no number, on whichever process, skips the step on all of them (``skipped`` tells) and leaves
    every state as it was. Once signs are exchanged, a parameter that had gradients and has none counts as one of zeros,
    and one that has none before may not come.
    """

    #: Whether the last step was skipped.
    skipped: bool = False
    #: The norm that the last step's gradients had before they were clipped, the same on all processes; None where
    #: ``max_grad_norm`` is 0.
    grad_norm: float | None = None
    #: Whether signs have a scale for each parameter, or one for all of a bucket. That one would move a parameter of
    #: small gradients (a key's bias has roundings alone) as far as its neighbours: it is only right where momenta are
    #: brought to one size.
    scale_each: ClassVar[bool] = True

    def __init__(self, params: ParamsT, collective: GradientCollective | None, defaults: dict[str, Any]) -> None:
        if collective is not None and not hasattr(collective, "compressed_mean"):
            raise self.error(f"collective is {collective!r}: use one of ops.compression, or None for one process")
        self.collective: GradientCollective = collective or SingleProcess()
        self._errors: dict[int, Errors] = {}
        self._steps = 0
        self._frozen_at: int | None = None
        self._looks: list[tuple[float, float]] = []
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Checks the options of every moment-based optimizer, and those that these share."""
        super().check_options(options, where)
        freeze = options["freeze_step"]
        if freeze != "auto" and (not isinstance(freeze, int) or isinstance(freeze, bool) or freeze < 1):
            raise self.error(f'freeze_step{where} is {freeze!r}: use a number of steps from 1, or "auto"')
        self.check_number("max_grad_norm", options["max_grad_norm"], where)
        self.check_choice("bias_correction", options["bias_correction"], where, (True, False))

    @property
    def frozen(self) -> bool:
        """Whether the next step exchanges signs."""
        return self._frozen_at is not None

    @property
    def together(self) -> bool:
        """Whether all processes have the same weights."""
        return True

    def meet(self) -> None:
        """Brings weights and moments of all processes together now, to the last bit, where they are not already: to be
        called by all of them, before weights are saved or evaluated."""

    def start_together(self) -> None:
        """To be called by all processes where somebody has given them the same weights: those count from now on."""

    @_disable_dynamo
    @torch.no_grad()
    def update(self) -> None:
        """One step. All processes call it together."""
        self.check_step()
        self._freeze_where_due()
        if not self.averages():
            self._fill_gradients()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        square = self._mean_square(grads)
        self.skipped, self.grad_norm = not square < float("inf"), None
        if not self.skipped:
            averages = self.averages()
            if averages:
                self.collective.mean(grads).wait()
            self._clip(grads, None if averages else square)
            self.advance()
            self._steps += 1

    def averages(self) -> bool:
        """Whether this step is one of the mean gradient."""
        return not self.frozen

    def advance(self) -> None:
        """One step of the kind that is due."""
        if self.frozen:
            self.compressed_step()
            return
        self.mean_step()
        self._look()

    # ---- before the update ----

    def _freeze_where_due(self) -> None:
        wanted = self.defaults["freeze_step"]
        if not self.frozen and wanted != "auto" and self._steps >= wanted:
            self._freeze(self._steps)

    def _fill_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                known = "exp_avg" in self.state.get(parameter, {})
                if parameter.grad is None and known:
                    parameter.grad = torch.zeros_like(parameter)
                elif parameter.grad is not None and not known:
                    raise self.error(
                        f"{self.name_of(index, position)} has its first gradient behind the warm-up, where its "
                        "variance is not known: make the warm-up longer, or do not train it"
                    )

    def _mean_square(self, grads: Sequence[Tensor]) -> float:
        """The mean over processes of their squared gradient norms: no number where one of theirs is none. Raises where
        processes have not as many gradients, before these are exchanged."""
        # The norm is asked for where it clips, and once to tell whether somebody has averaged already.
        asked = self.defaults["max_grad_norm"] or not self._steps
        square = self._square(grads) if asked else _nothing_if_finite(grads)
        count = float(sum(grad.numel() for grad in grads))
        facts = torch.stack([square, square.square(), square.new_tensor(count), square.new_tensor(count * count)])
        self.collective.mean([facts]).wait()
        found, found_square, mean, mean_square = facts.tolist()
        if mean_square > mean**2 * (1 + 1e-9):
            raise self.error(
                f"processes have not the same gradients: {count:.0f} elements here, {mean:.1f} in the mean"
            )
        if self._steps == 0 and 0 < found_square <= found**2 * (1 + 1e-14):
            self._warn_of_one_gradient()
        return float(found)

    def _warn_of_one_gradient(self) -> None:
        """Of a norm that is the same on all processes to the last bit, which gradients of their own never have."""
        if self.collective.size > 1 and self.collective.rank == 0:
            log.warning(
                "%s: the gradients have the same norm on all %d processes, as DDP and FSDP leave them: averaged "
                "before, they save no traffic; train the bare model, or within DDP's no_sync()",
                type(self).__name__, self.collective.size,
            )  # fmt: skip

    @staticmethod
    def _square(grads: Sequence[Tensor]) -> Tensor:
        """The squared norm of all gradients, 0-dim fp64."""
        if not grads:
            return torch.zeros((), dtype=torch.float64)
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for grad in grads:
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
        norms = [torch._foreach_norm(each, 2, compute_dtype(each[0])) for each in alike.values()]
        squares = [torch.stack(each).double().square().sum().to(grads[0].device) for each in norms]
        return torch.stack(squares).sum()

    def _clip(self, grads: Sequence[Tensor], square: float | None) -> None:
        """By one factor on all processes. The norm is that of the mean gradient in the warm-up (``square`` is None, and
        all have it); behind it nobody knows the mean, and ``square`` is the mean of the processes' squared norms,
        which is no less."""
        limit = self.defaults["max_grad_norm"]
        if limit:
            norm = self.grad_norm = (float(self._square(grads)) if square is None else square) ** 0.5
            if norm > limit:
                torch._foreach_mul_(list(grads), limit / (norm + 1e-6))

    def _look(self) -> None:
        """Freezes the variance where it stands, if that is asked for."""
        span = max(round(1 / (1 - self.defaults["betas"][1]) / LOOKS), 1)
        if self.defaults["freeze_step"] != "auto" or (self._steps + 1) % span:
            return
        sums = [state["exp_avg_sq"].sum(dtype=torch.float64) for state in self.state.values() if "exp_avg_sq" in state]
        total = float(sum(value.item() for value in sums))
        rate = max(float(group["lr"]) for group in self.param_groups)
        self._looks.append((total, rate))
        self._looks = self._looks[-LOOKS - 1 :]
        (before, old_rate), full = self._looks[0], len(self._looks) == LOOKS + 1
        if full and rate <= old_rate and before * STABLE <= total <= before / STABLE:
            self._freeze(self._steps + 1)

    def _freeze(self, steps: int) -> None:
        if not self.compresses():
            return
        self._frozen_at = steps
        if self.collective.rank == 0:
            log.info("%s: the variance stands as it is after %d steps", type(self).__name__, steps)
        self.begin_compression()

    def begin_compression(self) -> None:
        """Called once, when the variance is frozen."""

    # ---- the two stages ----

    def warm_up(self, arithmetic: Arithmetic, batch: Batch, group: Mapping[str, Any]) -> None:
        """A step on mean gradients: AdamW's."""
        arithmetic.update_moments(batch, arithmetic.gradients(batch, False), *group["betas"])
        self.move(arithmetic, batch, group)

    def momentum(self, batch: Batch, grads: Sequence[Tensor], beta1: float, out: Tensor) -> None:
        """Writes what is exchanged to ``out``, end to end: the common momentum, moved by this process's gradient."""
        torch.lerp(end_to_end(batch.exp_avgs), end_to_end(grads), 1 - beta1, out=out)

    def finish(self, bucket: Bucket, group: Mapping[str, Any]) -> None:
        """A step along the mean momentum, which has come and becomes everybody's."""
        for piece, parts in bucket.arrived():
            torch._foreach_copy_(piece.batch.exp_avgs, parts)
            self.move(bucket.arithmetic, piece.batch, group)

    def mean_step(self) -> None:
        """A step on mean gradients, for all parameters."""
        for group in self.param_groups:
            for arithmetic, batch in self.batches(group):
                self.warm_up(arithmetic, batch, group)

    def compressed_step(self) -> None:
        """A step by signs: all buckets are on their way before the first one is waited for."""
        under_way: list[tuple[Bucket, Mapping[str, Any]]] = []
        group: Mapping[str, Any]
        for group in self.param_groups:
            for arithmetic, batch in self.batches(group, BUCKET_ELEMENTS):
                flat = torch.empty(sum(sizes_of(batch)), dtype=batch.exp_avgs[0].dtype, device=batch.device)
                for piece in pieces(batch):
                    grads = arithmetic.gradients(piece.batch, False)
                    self.momentum(piece.batch, grads, group["betas"][0], flat[piece.at])
                under_way.append((self.send(arithmetic, batch, flat, len(under_way)), group))
        for bucket, group in under_way:
            bucket.wait()
            self.finish(bucket, group)

    def send(self, arithmetic: Arithmetic, batch: Batch, flat: Tensor, index: int) -> Bucket:
        """Begins the exchange of the step's bucket ``index``."""
        parts = sizes_of(batch) if self.scale_each else None
        pending = self.collective.compressed_mean(flat, self._errors_of(index, flat), parts)
        return Bucket(arithmetic, batch, flat, pending.wait)

    def arrived_at_once(self, arithmetic: Arithmetic, batch: Batch) -> Bucket:
        """A bucket as if zeros had come."""
        flat = torch.zeros(sum(sizes_of(batch)), dtype=batch.exp_avgs[0].dtype, device=batch.device)
        return Bucket(arithmetic, batch, flat, lambda: None)

    def forget_errors(self) -> None:
        """Compensation begins anew."""
        self._errors.clear()

    def _errors_of(self, index: int, momentum: Tensor) -> Errors:
        found = self._errors.get(index)
        if found is None:
            found = self._errors[index] = Errors.zeros(
                momentum.numel(), self.collective.rank, self.collective.size, momentum.device
            )
        elif found.worker.numel() != momentum.numel():
            raise self.error(
                f"bucket {index} has {momentum.numel()} elements, and had {found.worker.numel()}: parameters may not "
                "come or go once signs are exchanged"
            )
        return found

    def corrections(self, batch: Batch, group: Mapping[str, Any]) -> list[tuple[float, float]]:
        """``(1 - beta1^t, 1 - beta2^t)``; the second one stands with the variance. Empty without bias correction."""
        if not group["bias_correction"]:
            return []
        beta1, beta2 = group["betas"]
        last = self._frozen_at
        return [(1 - beta1**t, 1 - beta2 ** (t if last is None else min(t, last))) for t in batch.steps]

    def move(self, arithmetic: Arithmetic, batch: Batch, group: Mapping[str, Any]) -> None:
        """``w = w - lr * direction``."""
        corrections = self.corrections(batch, group)
        directions = arithmetic.directions(batch, corrections, group["eps"], group["weight_decay"])
        arithmetic.add_scaled(batch, directions, self.rates(batch, -float(group["lr"])))

    @staticmethod
    def rates(batch: Batch, rate: float) -> Tensor:
        """The same for all of a batch, as :meth:`Arithmetic.add_scaled` takes it."""
        return torch.full((len(batch.params),), rate, dtype=batch.exp_avgs[0].dtype, device=batch.device)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """torch's, and ``compression``: the stage, and the errors of this process, which no other has."""
        return {**super().state_dict(), "compression": self.compression_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes :meth:`state_dict` back, bit for bit. Without ``compression`` (a state of torch's AdamW) the warm-up
        goes on.

        Errors of another rank or number of processes are not taken: compensation begins anew, with a warning. With
        those of all ranks (:meth:`join_ranks`) they are, on any number of processes.
        """
        super().load_state_dict(state_dict)
        if "compression" in state_dict:
            self.load_compression_state(state_dict["compression"])

    def split_ranks(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A :meth:`state_dict` as what all processes have alike, and what is this one's own: the errors.

        Raises :class:`OptimizerError` where processes have weights of their own.
        """
        if not self.together:
            raise self.error("processes have weights of their own at this step: call meet() on all of them, then save")
        compression = dict(state["compression"])
        return {**state, "compression": compression}, {"errors": compression.pop("errors")}

    @staticmethod
    def join_ranks(shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A state for :meth:`load_state_dict` from both parts, ``own`` those of all ranks of the run that was saved."""
        errors = [part["errors"] for part in own]
        return {**shared, "compression": {**shared["compression"], "errors_of_all_ranks": errors}}

    def compression_state(self) -> dict[str, Any]:
        """What :meth:`state_dict` has of the compression: numbers and tensors alone."""
        # One process compresses nothing and owes nothing.
        kept = {} if isinstance(self.collective, SingleProcess) else self._errors
        errors = {str(index): one.state_dict() for index, one in kept.items()}
        return {
            "steps": self._steps, "frozen_at": self._frozen_at, "looks": [list(look) for look in self._looks],
            "errors": errors, "rank": self.collective.rank, "size": self.collective.size,
            "verdict": None if self.verdict is None else asdict(self.verdict),
        }  # fmt: skip

    def load_compression_state(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`compression_state` back."""
        self._steps, self._frozen_at = state["steps"], state["frozen_at"]
        self._looks = [(float(total), float(rate)) for total, rate in state["looks"]]
        self._errors = {}
        rank, size = self.collective.rank, self.collective.size
        measured = state.get("verdict")
        # Another number of processes may have another network: it is measured again, if signs are not due already.
        self.verdict = Verdict(**measured) if measured and measured["size"] == size else None
        if "errors_of_all_ranks" in state:
            self._take_errors(state["errors_of_all_ranks"])
        elif (state["rank"], state["size"]) == (rank, size):
            self._errors = {int(index): self._here(Errors(**one)) for index, one in state["errors"].items()}
        elif state["errors"]:
            log.warning(
                "%s: the errors are those of rank %d of %d processes, this is rank %d of %d: compensation begins anew",
                type(self).__name__, state["rank"], state["size"], rank, size,
            )  # fmt: skip

    def _take_errors(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Those of all ranks that were saved, bucket by bucket."""
        rank, size = self.collective.rank, self.collective.size
        if isinstance(self.collective, SingleProcess):
            if ranks[0]:
                said = "%s: one process compresses nothing: the errors of %d processes are left out"
                log.warning(said, type(self).__name__, len(ranks))
            return
        for index in ranks[0]:
            with warnings.catch_warnings():
                if self._errors:  # the first bucket's warning is of all
                    warnings.simplefilter("ignore", UserWarning)
                one = for_other_size([Errors(**errors[index]) for errors in ranks], rank, size)
            self._errors[int(index)] = self._here(one)

    def _here(self, errors: Errors) -> Errors:
        device = self.param_groups[0]["params"][0].device
        return Errors(*(each.detach().to(device, copy=True) for each in (errors.worker, errors.server)))
