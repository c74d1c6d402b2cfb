"""What tells a near tie from a wrong token, and a wrong set from an exact one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.accuracy import Errors, Findings, Followed, divergence, errors, follow, step_logits
from benchmarks.prompts import PROMPTS
from engine import Engine, build
from ops.collective import Collective
from ops.eager.kernel_set import EagerKernels
from ops.plan import Bucket, Launch, StepPlan, StepState
from ops.spec import ModelSpec
from ops.weights import ModelWeights
from tests.engine.tiny_text import save_decoder

needs_interpreter = pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') != '1'", reason="kernels are compiled here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has a tokenizer, with room for the longest prompt."""
    return save_decoder(tmp_path_factory.mktemp("accuracy") / "llama", "llama", max_position_embeddings=640)


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict]]:
    """Calls the script, and gives its exit code and what it wrote."""

    def call(*arguments: str) -> tuple[int, dict]:
        path = tmp_path / "found.json"
        given = ["--device", "cpu", "--new", "6", "--prompts", "3", "--json", str(path), *arguments]
        monkeypatch.setattr("sys.argv", ["accuracy", str(checkpoint), *given])
        return accuracy.main(), json.loads(path.read_text("utf-8"))

    return call


def test_twenty_prompts_all_different() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 20


def test_the_first_place_counts() -> None:
    assert divergence([1, 2, 3], [1, 2, 3]) is None
    assert divergence([1, 9, 3], [1, 2, 3]) == 1


def judged(took: int, error: float) -> Followed:
    """Eager took token 0 of logits 5.0, 4.9, 4.0; ours another one. fp32 is off by ``error`` at one other token."""
    logits = torch.tensor([5.0, 4.9, 4.0, -3.0])
    exact = logits + torch.tensor([0, 0, 0, error])
    return follow("ours", "x", [7, took, 7], [7, 0, 8], logits, exact)


@pytest.mark.parametrize(
    ("took", "error", "verdict"),
    [(1, 0.2, "near tie"), (1, -0.2, "near tie"), (1, 0.05, "WRONG"), (2, 0.2, "WRONG"), (2, 1.5, "near tie"),
     (1, float("nan"), "WRONG")],
)  # fmt: skip
def test_what_a_near_tie_is(took: int, error: float, verdict: str) -> None:
    found = judged(took, error)
    assert (found.equal, found.new, found.first) == (1, 3, 1)
    assert found.gap == pytest.approx(0.1)
    assert found.behind == pytest.approx(0.1 if took == 1 else 1.0)
    assert found.verdict == verdict
    assert Findings("here", [found]).ok is (verdict != "WRONG")


def test_errors_are_judged_by_hugging_face_s_own() -> None:
    exact = [torch.zeros(5), torch.full((5,), 8.0)]
    theirs = [one + 0.1 for one in exact]
    spike = [exact[0] + torch.tensor([0, 0, 0, 0, 0.25]), exact[1]]
    found = {one.run: one for one in errors("decode", {"near": [one + 0.14 for one in exact], "far": [one + 0.16 for one
             in exact], "spike": spike, accuracy.THEIRS: theirs}, exact, "fp16")}  # fmt: skip
    assert {name: one.ok for name, one in found.items()} == {"near": True, "far": False, "spike": False, "hf": True}
    assert found["spike"].median == 0
    assert found["spike"].largest == pytest.approx(0.25)
    in_fp32 = errors("decode", {"ours": [one + 7e-4 for one in exact], accuracy.THEIRS: exact}, exact, "fp32")
    assert [one.ok for one in in_fp32] == [True, True]
    assert not errors("decode", {"ours": [one + 9e-4 for one in exact], accuracy.THEIRS: exact}, exact, "fp32")[0].ok


@needs_interpreter
@pytest.mark.parametrize("kernels", ["eager", "generic"])
def test_the_logits_are_those_of_generation(checkpoint: Path, kernels: str) -> None:
    """Behind the prompt and each token of its continuation: the largest of each is the next token, and Hugging Face
    says the same."""
    from transformers import AutoModelForCausalLM

    engine = Engine.from_pretrained(checkpoint, precision="fp32", kernels=kernels, device="cpu")
    row = [5, 6, 7, 8, 9]
    (tokens,) = accuracy.continuations(engine, [row], 5)
    found = step_logits(engine, row, tokens[:-1])
    assert found.argmax(-1).tolist() == tokens
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    exact = accuracy.whole_logits(model, [*row, *tokens[:-1]], 5)
    assert torch.allclose(found, exact, atol=1e-4 * float(exact.abs().max()))
    assert torch.allclose(accuracy.cached_logits(model, row, tokens[0]), exact[:2], atol=1e-4)
    assert step_logits(engine, row, []).shape == (1, engine.spec.vocab_size)
    assert engine._cache.free_pages == engine._cache.scratch, "every page is given back"


@needs_interpreter
def test_a_right_set_passes_and_one_that_cannot_run_is_told(
    run: Callable[..., tuple[int, dict]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run("--kernels", "generic", "--precision", "bf16")
    assert (code, found["ok"], found["refused"]) == (0, True, {})
    assert [(one["run"], one["new"]) for one in found["followed"]] == [("generic", 6)] * 3
    assert [(one["step"], one["run"]) for one in found["errors"]] == [
        (step, name) for step in ("prefill", "decode") for name in ("eager", "generic", "hf")
    ]
    assert all(0 < one["median"] < one["largest"] for one in found["errors"])
    capsys.readouterr()
    code, found = run("--kernels", "specialized", "--precision", "bf16")
    assert (code, found["ok"], found["followed"]) == (1, False, [])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert 'specialized: not measured: kernels "specialized" do not run' in shown


class Wrong(EagerKernels):
    """Takes the likeliest token of 0 for one that nobody would take, once the context has nine tokens."""

    name = "generic"

    def plan(self, spec: ModelSpec, weights: ModelWeights, bucket: Bucket, collective: Collective) -> StepPlan:
        """Eager's plan, and a launch that spoils what it gives."""

        def spoil(state: StepState) -> None:
            assert state.outputs is not None
            if int(state.inputs.positions[-1]) >= 8:
                state.outputs = spoilt(state.outputs)

        plan = super().plan(spec, weights, bucket, collective)
        return replace(plan, launches=[*plan.launches, Launch("wrong", spoil)])


def spoilt(logits: Tensor) -> Tensor:
    """The least likely token is the likeliest."""
    return logits.scatter(-1, logits.argmin(-1, keepdim=True), logits.amax(-1, keepdim=True) + 1)


def test_a_wrong_set_is_found_out(
    run: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build.KERNEL_SETS, "generic", (__name__, "Wrong"))
    code, found = run("--kernels", "generic", "--precision", "bf16")
    assert (code, found["ok"]) == (1, False)
    assert {one["verdict"] for one in found["followed"]} == {"WRONG"}
    for one in found["followed"]:
        assert one["equal"] < 6
        assert one["behind"] > one["gap"] >= 0
        assert 0 < one["error"] < one["behind"]
    assert not any(one["ok"] for one in found["errors"] if one["run"] == "generic")
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "3 WRONG" in shown


def test_the_tables_fit_80_columns() -> None:
    many = [Followed("specialized", "a prompt " * 9, 60, 64, 60, 0.012345, 0.012345, 0.06789) for _ in range(20)]
    own = [Errors(step, name, 0.0123, 0.4567, True) for step in ("prefill", "decode") for name in ("specialized", "hf")]
    text = accuracy.text_of(Findings("here", many, own, {"generic": "it is " + "too long " * 20}))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("60/64", "1.23e-02", "6.79e-02", "near tie", "specialized: 20 prompts, 0 same, 20 near tie, 0 WRONG"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere: no such directory: `make models`"), (["--json", "none/x.json"], "there is no directory")],
)
def test_bad_input_is_told_before_the_work(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["accuracy", *arguments])
    with pytest.raises(SystemExit, match="2"):
        accuracy.main()
    assert message in capsys.readouterr().err
