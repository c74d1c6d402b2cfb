"""The rules that JSON Schema cannot state, because they need several fields.

To add one: write a small function and give it one line in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from config_schema.errors import Problem
from config_schema.optimizer import Compressed

if TYPE_CHECKING:
    from config_schema.config import Config


@dataclass(frozen=True)
class Rule:
    """A check that needs several fields. It runs where all sections it reads are valid."""

    reads: frozenset[str]
    check: Callable[[Config], list[Problem]]


def _job_fits_task(config: Config) -> list[Problem]:
    if config.job is None or config.model.task in ("auto", _TASK_OF_JOB.get(config.job.type, config.model.task)):
        return []
    task = _TASK_OF_JOB[config.job.type]
    wanted = f'needs $.model.task to be "{task}" or "auto", which is "{config.model.task}"'
    return [Problem("$.job.type", f'"{config.job.type}" {wanted}')]


def _new_tokens_fit_budget(config: Config) -> list[Problem]:
    """A prompt has at least one token, so the budget must exceed the new tokens."""
    new, budget = config.generation.max_new_tokens, config.inference.max_tokens
    generates = config.job is None or config.job.type == "generate"
    if not generates or new is None or budget == "auto" or new < budget:
        return []
    reason = f"{new} new tokens and a prompt do not fit $.inference.max_tokens, which is {budget}"
    return [Problem("$.generation.max_new_tokens", f"{reason}; set that to more than {new}, or lower this")]


def _least_is_not_over_most(config: Config) -> list[Problem]:
    least, most = config.generation.min_new_tokens, config.generation.max_new_tokens
    if least is None or most is None or least <= most:
        return []
    return [
        Problem("$.generation.min_new_tokens", f"{least} is more than $.generation.max_new_tokens, which is {most}")
    ]


def _temperature_can_sample(config: Config) -> list[Problem]:
    if config.generation.do_sample is not True or config.generation.temperature != 0:
        return []
    wanted = "raise it, or set $.generation.do_sample to false"
    return [Problem("$.generation.temperature", f"0 is greedy, but $.generation.do_sample is true; {wanted}")]


def _sampling_options_apply(config: Config) -> list[Problem]:
    """An option that is switched on must have an effect: none of these has without sampling."""
    generation = config.generation
    if generation.do_sample is False:
        reason = "$.generation.do_sample is false"
    elif generation.temperature == 0 and generation.do_sample is None:
        reason = "$.generation.temperature is 0 (greedy)"
    else:
        return []
    on = {
        "temperature": bool(generation.temperature),
        "top_k": bool(generation.top_k),
        "top_p": generation.top_p is not None and generation.top_p < 1,
    }
    return [
        Problem(f"$.generation.{name}", f"has no effect because {reason}; remove one of the two")
        for name, is_on in on.items()
        if is_on
    ]


def _output_is_not_input(config: Config) -> list[Problem]:
    output = getattr(config.job, "output", None)
    return [
        Problem("$.job.output", f"would overwrite $.job.{name}; give it another name")
        for name in ("prompts_file", "texts_file")
        if output is not None and getattr(config.job, name, None) == output
    ]


def _training_sections_train(config: Config) -> list[Problem]:
    """A section that only training reads has no effect without it."""
    if config.training is not None:
        return []
    given = ["model.weights"] if config.model.weights == "random" else []
    given += [name for name in _OF_TRAINING if getattr(config, name) is not None]
    return [
        Problem(f"$.{name}", "has no effect without $.training; add that section, or remove this") for name in given
    ]


def _data_fit_task(config: Config) -> list[Problem]:
    data, task = config.data, config.model.task
    if data is None or "auto" in (data.task, task) or _TASK_OF_DATA[data.task] == task:
        return []
    wanted = f'"{data.task}" needs $.model.task to be "{_TASK_OF_DATA[data.task]}" or "auto", which is "{task}"'
    return [Problem("$.data.task", wanted)]


def _evaluations_have_data(config: Config) -> list[Problem]:
    """Where the data are files; fit() may be given others to evaluate on."""
    if config.training is None or config.data is None or config.data.train is None:
        return []
    if config.training.evaluate_every is None or config.data.eval is not None:
        return []
    return [Problem("$.training.evaluate_every", "has no effect without $.data.eval; name files, or remove this")]


def _train_job_is_complete(config: Config) -> list[Problem]:
    if config.job is None or config.job.type != "train":
        return []
    missing = [name for name in ("training", "data") if getattr(config, name) is None]
    problems = [Problem("$.job.type", f'"train" needs the section $.{name}; add it') for name in missing]
    if config.data is not None and config.data.train is None:
        problems.append(Problem("$.data.train", 'missing: the job "train" needs files to train on'))
    training = config.training
    if training is not None and training.output is None:
        problems.append(Problem("$.training.output", 'missing: the job "train" writes metrics and checkpoints there'))
    if training is not None and training.max_steps is None and training.epochs is None:
        problems.append(Problem("$.training", "has no end: give max_steps or epochs"))
    return problems


def _training_has_one_end(config: Config) -> list[Problem]:
    training = config.training
    if training is None or training.max_steps is None or training.epochs is None:
        return []
    return [Problem("$.training.epochs", f"contradicts $.training.max_steps, which is {training.max_steps}: give one")]


def _batch_sizes_agree(config: Config) -> list[Problem]:
    """Where the number of processes is not said, what can be said without it."""
    training = config.training
    if training is None:
        return []
    micro, accumulation, train = training.micro_batch_size, training.accumulation_steps, training.train_batch_size
    if micro is None and train is None:
        return [Problem("$.training", "has no batch size: give micro_batch_size or train_batch_size")]
    processes = training.processes if isinstance(training.processes, int) else None
    if train is None or train % ((micro or 1) * (accumulation or 1) * (processes or 1)) == 0:
        return []
    sizes = ((micro, "micro_batch_size"), (accumulation, "accumulation_steps"), (processes, "processes"))
    given = " x ".join(f"{value} ({name})" for value, name in sizes if value is not None)
    return [Problem("$.training.train_batch_size", f"{train} is no multiple of {given}: change one of them")]


def _loss_scale_needs_fp16(config: Config) -> list[Problem]:
    if config.training is None or config.training.loss_scale is None or config.precision == "fp16":
        return []
    reason = f'has no effect with $.precision "{config.precision}": set that to "fp16", or remove this'
    return [Problem("$.training.loss_scale", reason)]


def _quantization_has_bits(config: Config) -> list[Problem]:
    """ "auto" may find a checkpoint of 8 or 4 bits."""
    if config.quantization is None or config.precision in ("auto", "int8", "int4"):
        return []
    reason = f'has no effect with $.precision "{config.precision}": set that to "int8" or "int4", or remove this'
    return [Problem("$.quantization", reason)]


def _names_are_given_once(config: Config) -> list[Problem]:
    exclude = () if config.quantization is None else config.quantization.exclude
    if len(set(exclude)) == len(exclude):
        return []
    return [Problem("$.quantization.exclude", "gives a name twice; give each once")]


def _training_needs_floats(config: Config) -> list[Problem]:
    if config.training is None or config.precision not in ("int8", "int4"):
        return []
    reason = f'"{config.precision}" is for inference, but there is a section $.training: set this to "bf16" or "fp32"'
    return [Problem("$.precision", reason)]


def _one_clock_for_layer_drop(config: Config) -> list[Problem]:
    drop = config.progressive_layer_drop
    if drop is None or drop.gamma is None or drop.total_steps == "auto":
        return []
    return [
        Problem("$.progressive_layer_drop.total_steps", "contradicts gamma, which says how fast theta falls: give one")
    ]


def _bits_fall(config: Config) -> list[Problem]:
    chosen = config.quantize_training
    if chosen is None:
        return []
    problems, path = [], "$.quantize_training"
    places = [("", chosen.start_bits, chosen.target_bits)]
    for index, rule in enumerate(chosen.rules):
        start, target = rule.start_bits or chosen.start_bits, rule.target_bits or chosen.target_bits
        places.append((f".rules[{index}]", start, target))
        if rule.start_bits is None and rule.target_bits is None and rule.quantize_period is None:
            reason = "changes nothing: give start_bits, target_bits or quantize_period; $.quantize_training.exclude "
            problems.append(Problem(f"{path}.rules[{index}]", f"{reason}leaves modules out"))
    for place, start, target in places:
        if target > start:
            problems.append(Problem(f"{path}{place}", f"target_bits {target} is more than start_bits, {start}"))
    if chosen.group_size is not None and chosen.quantize_groups is not None:
        problems.append(Problem(f"{path}.quantize_groups", "contradicts group_size: give one of them"))
    return problems


def _weights_are_whole(config: Config) -> list[Problem]:
    """What rounding needs of the rest of training."""
    chosen, training = config.quantize_training, config.training
    if chosen is None or not chosen.enabled or training is None:
        return []
    problems = []
    if training.data_parallel == "shard":
        reason = "groups of $.quantize_training need whole weights"
        problems.append(Problem("$.training.data_parallel", f'"shard": {reason}; make it "replicate"'))
    if chosen.eigenvalue is not None and chosen.eigenvalue.enabled and training.compile:
        reason = "compiled models have no second derivatives: set $.training.compile to false, or remove this"
        problems.append(Problem("$.quantize_training.eigenvalue", reason))
    return problems


def _warm_up_fits(config: Config) -> list[Problem]:
    schedule, training = config.schedule, config.training
    if schedule is None:
        return []
    name, total = "$.schedule.total_steps", schedule.total_steps
    if total == "auto":
        if training is None or training.max_steps is None or schedule.type == "constant":
            return []
        name, total = "$.training.max_steps", training.max_steps
    if schedule.warmup_steps <= total:
        return []
    return [Problem("$.schedule.warmup_steps", f"{schedule.warmup_steps} is more than {name}, which is {total}")]


def _the_schedule_ends(config: Config) -> list[Problem]:
    schedule = config.schedule
    if schedule is None or schedule.type != "constant" or schedule.total_steps == "auto":
        return []
    reason = 'has no effect with $.schedule.type "constant", which does not end: choose another, or remove this'
    return [Problem("$.schedule.total_steps", reason)]


def _bounds_have_room(config: Config) -> list[Problem]:
    """Of LAMB's trust ratio, and of the factor of 1-bit LAMB."""
    problems = []
    for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
        least, most = getattr(config.optimizer, low, None), getattr(config.optimizer, high, None)
        if least is not None and most is not None and least > most:
            null = ", or set it to null" if config.optimizer and config.optimizer.type == "LAMB" else ""
            reason = f"{least} is more than $.optimizer.{high}, which is {most}: lower this{null}"
            problems.append(Problem(f"$.optimizer.{low}", reason))
    return problems


def _compressed_gradients_stay_apart(config: Config) -> list[Problem]:
    """An optimizer that exchanges signs needs each process's own gradients of whole weights, and clips them itself."""
    optimizer, training = config.optimizer, config.training
    if training is None or not isinstance(optimizer, Compressed):
        return []
    problems = []
    if training.data_parallel == "shard":
        wanted = f'"shard" and "{optimizer.type}" exclude each other: set this to "replicate", or choose AdamW or LAMB'
        problems.append(Problem("$.training.data_parallel", wanted))
    limit, norm = optimizer.max_grad_norm, training.clip_norm
    if norm is not None and limit not in (0, norm):
        reason = f"{limit} contradicts $.training.clip_norm, which is {norm}: give one of them"
        problems.append(Problem("$.optimizer.max_grad_norm", reason))
    return problems


def _gradients_are_exchanged_so(config: Config) -> list[Problem]:
    """What does not go through DistributedDataParallel has no hook for another exchange."""
    training, optimizer, drop = config.training, config.optimizer, config.progressive_layer_drop
    if training is None:
        return []
    how, problems, reasons = training.gradient_exchange, [], []
    if training.power_sgd is not None and how != "PowerSGD":
        reason = f'has no effect with $.training.gradient_exchange "{how}": set that to "PowerSGD", or remove this'
        problems.append(Problem("$.training.power_sgd", reason))
    if how == "full":
        return problems
    if isinstance(optimizer, Compressed):
        reasons.append(f'"{optimizer.type}" exchanges momenta by itself: leave this out, or choose AdamW or LAMB')
    if drop is not None and drop.enabled:
        reasons.append("with $.progressive_layer_drop gradients travel in full: leave one of the two out")
    if training.data_parallel == "shard":
        reasons.append('with $.training.data_parallel "shard" gradients travel in full: make that "replicate"')
    if how == "PowerSGD" and config.precision == "fp16":
        reasons.append('PowerSGD would carry overflows of "fp16" on: set $.precision to "bf16" or "fp32"')
    return problems + [Problem("$.training.gradient_exchange", reason) for reason in reasons]


def _profiles_are_written_somewhere(config: Config) -> list[Problem]:
    profiler = config.flops_profiler
    if profiler is None:
        return []
    problems = []
    if len(set(profiler.formats)) < len(profiler.formats):
        problems.append(Problem("$.flops_profiler.formats", "names a format twice; name each once"))
    files = [name for name in profiler.formats if name != "table"]
    if files and profiler.output_file is None:
        problems.append(Problem("$.flops_profiler.output_file", f'missing: the format "{files[0]}" is a file; name it'))
    return problems


def _profiled_step_comes(config: Config) -> list[Problem]:
    profiler, training = config.flops_profiler, config.training
    if profiler is None or not profiler.enabled:
        return []
    if training is None:
        reason = "has no effect without $.training: `slipstream profile` and engine.profile() need no switch; remove it"
        return [Problem("$.flops_profiler.enabled", reason)]
    if training.max_steps is None or profiler.profile_step < training.max_steps:
        return []
    reason = f"training ends behind step {training.max_steps} ($.training.max_steps): lower this below it"
    return [Problem("$.flops_profiler.profile_step", f"{profiler.profile_step} is too late, {reason}")]


RULES = (
    Rule(frozenset({"job", "model"}), _job_fits_task),
    Rule(frozenset({"job", "generation", "inference"}), _new_tokens_fit_budget),
    Rule(frozenset({"generation"}), _least_is_not_over_most),
    Rule(frozenset({"generation"}), _temperature_can_sample),
    Rule(frozenset({"generation"}), _sampling_options_apply),
    Rule(frozenset({"job"}), _output_is_not_input),
    Rule(
        frozenset(
            {"model", "training", "optimizer", "schedule", "progressive_layer_drop", "quantize_training", "data"}
        ),
        _training_sections_train,
    ),
    Rule(frozenset({"model", "data"}), _data_fit_task),
    Rule(frozenset({"training", "data"}), _evaluations_have_data),
    Rule(frozenset({"job", "training", "data"}), _train_job_is_complete),
    Rule(frozenset({"training"}), _training_has_one_end),
    Rule(frozenset({"training"}), _batch_sizes_agree),
    Rule(frozenset({"training", "precision"}), _loss_scale_needs_fp16),
    Rule(frozenset({"quantization", "precision"}), _quantization_has_bits),
    Rule(frozenset({"quantization"}), _names_are_given_once),
    Rule(frozenset({"training", "precision"}), _training_needs_floats),
    Rule(frozenset({"progressive_layer_drop"}), _one_clock_for_layer_drop),
    Rule(frozenset({"quantize_training"}), _bits_fall),
    Rule(frozenset({"quantize_training", "training"}), _weights_are_whole),
    Rule(frozenset({"schedule", "training"}), _warm_up_fits),
    Rule(frozenset({"schedule"}), _the_schedule_ends),
    Rule(frozenset({"optimizer"}), _bounds_have_room),
    Rule(frozenset({"optimizer", "training"}), _compressed_gradients_stay_apart),
    Rule(frozenset({"optimizer", "training", "progressive_layer_drop", "precision"}), _gradients_are_exchanged_so),
    Rule(frozenset({"flops_profiler"}), _profiles_are_written_somewhere),
    Rule(frozenset({"flops_profiler", "training"}), _profiled_step_comes),
)

_TASK_OF_JOB: Mapping[str, str] = {
    "generate": "causal_lm",
    "encode": "embedding",
    "classify": "sequence_classification",
    "classify_tokens": "token_classification",
    "answer": "question_answering",
    "fill_mask": "masked_lm",
}
_TASK_OF_DATA: Mapping[str, str] = {
    "masked_lm": "masked_lm",
    "causal_lm": "causal_lm",
    "classification": "sequence_classification",
    "regression": "sequence_classification",
    "question_answering": "question_answering",
}
_OF_TRAINING = ("optimizer", "schedule", "progressive_layer_drop", "quantize_training", "data")
