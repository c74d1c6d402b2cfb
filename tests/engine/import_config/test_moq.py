"""DeepSpeed's quantize_training as ours."""

from __future__ import annotations

import pytest

from config_schema import ConfigError
from engine.import_config import Fate, Imported, import_config
from tests.engine.import_config.files import Document


def fates(found: Imported) -> dict[str, Fate]:
    """What became of each key."""
    return {row.key: row.fate for row in found.rows}


def test_quantization_with_all_its_keys() -> None:
    source: Document = {
        "train_batch_size": 8,
        "quantize_training": {
            "enabled": True,
            "quantize_verbose": True,
            "quantize_bits": {"start_bits": 12, "target_bits": 6},
            "quantize_schedule": {"quantize_period": 10, "schedule_offset": 20},
            "quantize_algo": {"q_type": "asymmetric", "rounding": "stochastic"},
            "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.01},
            "eigenvalue": {
                "enabled": True,
                "max_iter": 50,
                "tol": 0.1,
                "layer_name": "bert.encoder.layer",
                "layer_num": 12,
            },
        },
    }
    found = import_config(source)
    section = found.document["quantize_training"]
    assert section == {
        "enabled": True,
        "start_bits": 12,
        "target_bits": 6,
        "quantize_period": 10,
        "schedule_offset": 20,
        "q_type": "asymmetric",
        "rounding": "stochastic",
        "quantize_change_ratio": 0.01,
        "eigenvalue": {"enabled": True, "max_iter": 50, "tol": 0.1, "layer_name": "bert.encoder.layer"},
    }
    fate = fates(found)
    assert fate["quantize_training.quantize_schedule.quantize_period"] is Fate.CHECK, "no steps in DeepSpeed"
    assert fate["quantize_training.quantize_groups"] is Fate.CHECK, "one scale a weight, here one a row"
    assert fate["quantize_training.eigenvalue.layer_num"] is Fate.DROPPED
    second = source["quantize_training"].pop("eigenvalue")
    assert import_config({**source, "eigenvalue": second}).document["quantize_training"] == section


def test_quantization_with_deepspeeds_defaults() -> None:
    mixed = {"enabled": True, "fp16_mixed_quantize": {"enabled": True}, "eigenvalue": {"enabled": False}}
    found = import_config({"train_batch_size": 8, "quantize_training": mixed, "eigenvalue": {"enabled": True}})
    assert found.document["quantize_training"] == {
        "enabled": True,
        "start_bits": 16,
        "quantize_period": 1000,
        "schedule_offset": 1000,
        "quantize_change_ratio": 0.001,
    }
    fate = fates(found)
    assert fate["quantize_training.quantize_bits.target_bits"] is Fate.CHECK
    assert (fate["quantize_training.eigenvalue"], fate["eigenvalue"]) == (Fate.OFF, Fate.DROPPED)
    alone = fates(import_config({"train_batch_size": 8, "eigenvalue": {"enabled": True}}))
    assert alone["eigenvalue"] is Fate.DROPPED


def test_bits_that_rise_are_told_at_deepspeeds_keys() -> None:
    bits = {"enabled": True, "quantize_bits": {"start_bits": 4, "target_bits": 17}}
    with pytest.raises(ConfigError, match=r"\$.quantize_training.quantize_bits.target_bits: as \$.quantize_training"):
        import_config({"train_batch_size": 8, "quantize_training": bits})
