"""DeepSpeed's 1-bit Adam, 1-bit LAMB and 0/1 Adam as slipstream's."""

from __future__ import annotations

import pytest

from engine.import_config import Fate, import_config
from tests.engine.import_config.test_import_config import fates, reason_of


def one_bit(kind: str, **params: object) -> dict[str, object]:
    """A file with a compressed optimizer."""
    return {"train_batch_size": 1, "optimizer": {"type": kind, "params": {"lr": 1e-3, **params}}}


def test_keys_of_compressed_optimizers() -> None:
    """Each has its own; what says how DeepSpeed exchanges means nothing here; what it does not do is written so."""
    own = {"var_freeze_step": 9, "var_update_scaler": 2, "local_step_scaler": 30, "local_step_clipper": 8}
    found = import_config(one_bit("ZeroOneAdam", **own, cuda_aware=True, comm_backend_name="mpi", freeze_step=4))
    base = {"lr": 1e-3, "weight_decay": 0.0, "bias_correction": False}
    assert found.document["optimizer"] == {"type": "ZeroOneAdam", **base, **own}
    told = fates(found)
    assert {told[f"optimizer.params.{key}"] for key in own} == {Fate.MAPPED}
    assert {told[f"optimizer.params.{key}"] for key in ("cuda_aware", "comm_backend_name", "freeze_step")} == {
        Fate.DROPPED
    }
    assert reason_of(found, "optimizer.params.comm_backend_name") == "torch exchanges: NCCL on GPUs, Gloo on CPUs"
    found = import_config(one_bit("OneBitAdam", freeze_step=400, bias_correction=True, weight_decay=0.1))
    assert found.document["optimizer"] == {
        "type": "OneBitAdam", **base, "weight_decay": 0.1, "decay_all": True, "freeze_step": 400
    }  # fmt: skip
    said = "false: DeepSpeed's OneBitAdam corrects no moments, whatever this key says"
    assert reason_of(found, "optimizer.params.bias_correction") == said
    assert fates(found)["optimizer.params.bias_correction"] is Fate.CHECK


@pytest.mark.parametrize(("kind", "stage"), [("OneBitAdam", 1), ("onebitadam", 3)])
def test_compressed_optimizers_are_not_sharded(kind: str, stage: int) -> None:
    found = import_config({**one_bit(kind), "zero_optimization": {"stage": stage}})
    assert found.document["training"]["data_parallel"] == "replicate"
    assert reason_of(found, "zero_optimization.stage").startswith("OneBitAdam exchanges momenta of whole weights")
