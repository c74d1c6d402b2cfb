"""A training looked at before it begins: no weight is read, no text is tokenized."""

from __future__ import annotations

from torch import nn

from config_schema import Config
from engine.checkpoint.directory import model_directory, open_checkpoint
from engine.inference.text import Text
from engine.training.build import TrainingPlan
from engine.training.data.files import resolve
from engine.training.datasets import assert_fits
from engine.training.model import load_model, outputs_of, positions


def outline(config: Config) -> tuple[TrainingPlan, nn.Module]:
    """What was decided, and the model without values (on the meta device).

    Raises :class:`config_schema.SlipstreamError` for what can be seen so: a missing file, a model that does not fit the
    data, layers to drop where there is no stack.
    """
    plan, data = TrainingPlan(config), config.data
    directory = model_directory(config.model.path, config.model.revision)
    model = load_model(config, Text(directory).tokenizer if data is not None else None, blank=True)
    if config.model.weights == "pretrained":
        open_checkpoint(config.model.path, revision=config.model.revision)
    if data is not None:
        for files in (data.train, data.eval):
            if files is not None:
                resolve(list(files) if isinstance(files, tuple) else files)
        assert_fits(data, plan.data_task(model), outputs_of(model), positions(model.config))
    plan.describe(model)
    return plan, model
