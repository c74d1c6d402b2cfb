"""One pre-training run of the layer drop's convergence benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.convergence_data import Corpus
from benchmarks.convergence_loop import PreTraining, Settings
from benchmarks.masked_lm import MaskedLM, Norm, loss, masked_lm
from benchmarks.steps import adamw_loop
from engine.training.checkpoint import Stateful
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop
from engine.training.random_state import RandomState

#: Where an arm's norms stand, and whether layers are dropped. ``postln_pld`` is for the ablation.
ARMS: Mapping[str, tuple[Norm, bool]] = {
    "postln": ("postln", False),
    "preln": ("preln", False),
    "preln_pld": ("preln", True),
    "postln_pld": ("postln", True),
}


@dataclass(frozen=True)
class Run(Settings):
    """What is trained, whether under torch.compile, and at which theta layers are dropped."""

    compiled: bool = False
    theta: float = 0.5


class Training(PreTraining):
    """A run that is going on."""

    def __init__(self, run: Run, corpus: Corpus, device: torch.device) -> None:
        super().__init__(run, corpus, device)
        norm, drops = ARMS[run.arm]
        self._layers = float(run.shape.layers)
        self._model = masked_lm(norm, run.shape, run.seed).to(device)
        if run.compiled:
            self._model.compile()
        self.drop = LayerDrop(run.theta, total_steps=run.steps, seed=run.seed) if drops else None
        self.loop: Loop = adamw_loop(
            self._model,
            loss,
            precision=run.precision,
            device=device,
            lr=run.lr,
            steps=run.steps,
            warmup=int(run.warmup * run.steps),
            features=() if self.drop is None else (self.drop,),
        )

    @property
    def model(self) -> MaskedLM:
        """What is trained."""
        return self._model

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loop.progress.step

    def objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        return {
            "model": self.model,
            "optimizer": self.loop.progress.optimizer,
            "loop": self.loop,
            "batches": self.batches,
            "curve": self.curve,
            "random": RandomState(),
        }

    def advance(self, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, float]]:
        """One step; the curve keeps the layers that ran."""
        report = self.loop.train_batch([batch])
        return report.loss, {"layers": report.metrics.get("layer_drop/layers", self._layers)}

    def about(self) -> dict[str, object]:
        """What is dropped."""
        return {"stack": "" if self.drop is None else self.drop.describe()}
