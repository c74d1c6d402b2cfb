"""Is this engine right? Compares it with Hugging Face's own implementation of the same weights, in the same
precision."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.checkpoint.pretrained import pretrained
from engine.errors import EngineError
from engine.inference.inputs import Rows, rows_from
from ops.spec import Task

if TYPE_CHECKING:
    from engine.engine import Engine

#: Differences are judged against the largest value of Hugging Face's fp32 outputs: a few roundings of the compute
#: dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
AUTO_CLASSES: dict[Task, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "embedding": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
}
DEFAULT_LENGTHS = (17, 1, 9)


@dataclass(frozen=True)
class Verification:
    """How far the engine's outputs lie from Hugging Face's in fp32.

    difference: largest absolute difference of an output.
    largest:    largest absolute output of Hugging Face's.
    tolerance:  allowed ``difference / largest`` in the engine's precision.
    agreement:  share of rows whose largest output is the same one.
    """

    difference: float
    largest: float
    tolerance: float
    agreement: float
    rows: int
    what: str

    @property
    def relative(self) -> float:
        """difference / largest."""
        return self.difference / self.largest if self.largest else self.difference

    @property
    def ok(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.relative <= self.tolerance

    def __str__(self) -> str:
        verdict = "agrees with" if self.ok else "DIFFERS from"
        return (
            f"{self.what}: {verdict} Hugging Face in fp32: largest difference {self.difference:.2e}, "
            f"{self.relative:.2e} of the largest output (allowed {self.tolerance:.0e}); "
            f"the largest output is the same one in {self.agreement:.1%} of {self.rows} rows"
        )


def verify(engine: Engine, batch: Any, live: Any) -> Verification:
    """Runs ``batch`` (anything ``engine(...)`` takes; None is three short rows of token ids) through both."""
    if engine.plan.scheme is not None:
        raise EngineError(
            'verify: Hugging Face has no such weights to compare with: set "precision" to "fp32" or "bf16"'
        )
    spec = engine.spec
    task: Task = spec.head.task if spec.head is not None else "embedding"
    if batch is None:
        generator = torch.Generator().manual_seed(0)
        lengths = [min(n, spec.max_positions) for n in DEFAULT_LENGTHS]
        batch = [torch.randint(spec.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    rows = rows_from(batch, engine.text)
    ours = _flat(engine(rows_to_batch(rows)), rows, task)
    theirs = _reference(engine, rows, task, live)
    if not bool(torch.isfinite(ours).all()):
        raise EngineError(f'the outputs are not finite in {engine.plan.dtype}: set "precision" to "fp32"')
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    return Verification(
        difference=float((ours - theirs).abs().max()),
        largest=float(theirs.abs().max()),
        tolerance=TOLERANCES[engine.plan.dtype],
        agreement=same,
        rows=ours.shape[0],
        what=f"{engine.plan.family.name} {task} ({engine.plan.kernels}, {engine.plan.dtype}, {engine.plan.device})",
    )


def rows_to_batch(rows: Rows) -> dict[str, Tensor]:
    """``rows`` as a batch padded on the right."""
    longest = max(len(row) for row in rows.ids)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows.ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows.ids])
    batch = {"input_ids": ids, "attention_mask": mask}
    if rows.types is not None:
        batch["token_type_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in rows.types])
    return batch


def _reference(engine: Engine, rows: Rows, task: Task, live: Any) -> Tensor:
    """Hugging Face's outputs in fp32, row by row, so that no padding plays a part."""
    import transformers

    if live is None:
        plan = engine.plan
        extra = {"gguf_file": plan.gguf_file} if plan.gguf_file else {}
        loader = getattr(transformers, AUTO_CLASSES[task])
        assert plan.directory is not None
        model = pretrained(loader, plan.directory, **extra).to(plan.device).float()
    else:
        model = live
    training = model.training
    model.eval()
    outs = []
    try:
        for index, row in enumerate(rows.ids):
            batch = {"input_ids": torch.tensor([row], device=model.device)}
            if rows.types is not None and engine.spec.token_types:
                batch["token_type_ids"] = torch.tensor([rows.types[index]], device=model.device)
            with torch.inference_mode():
                outs.append(_flat(model(**batch), Rows([row]), task))
    finally:
        model.train(training)
    if live is None:
        del model
        gc.collect()
    return torch.cat(outs)


def _flat(outputs: Any, rows: Rows, task: Task) -> Tensor:
    """The outputs that count, [T or B, outputs] in fp32 on the CPU, without padding."""
    if task == "sequence_classification":
        return _cpu(outputs.logits)
    if task == "question_answering":
        padded = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
    else:
        padded = outputs.last_hidden_state if task == "embedding" else outputs.logits
    return torch.cat([_cpu(padded[i, : len(row)]) for i, row in enumerate(rows.ids)])


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
