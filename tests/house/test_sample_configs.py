"""Every sample config is valid, names a model that `make models` fetches, and points editors to the schema."""

from __future__ import annotations

import json

import pytest

from config_schema import SCHEMA_PATH, load_config, schema_problems
from scripts.fetch_demo_models import MODELS
from tests.conftest import ROOT

FOLDER = ROOT / "sample_configs"
SAMPLES = sorted(FOLDER.glob("*.json"))


def test_there_are_samples():
    assert {"smollm2_generate.json", "smollm2_chat.json", "minilm_embed.json"} <= {path.name for path in SAMPLES}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_is_valid(path):
    assert load_config(path).job is not None
    assert list(schema_problems(json.loads(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_names_a_fetched_model_and_the_schema(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["model"]["path"] in {f"build/models/{model.directory}" for model in MODELS}
    assert (FOLDER / document["$schema"]).resolve() == SCHEMA_PATH.resolve()
