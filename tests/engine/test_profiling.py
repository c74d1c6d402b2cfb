"""``engine.profile()`` and ``slipstream profile``: of training and of inference, and nothing is changed by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from engine import Engine, cli
from engine.errors import EngineError
from engine.profiling import path_of
from profiler.report import Report, Workload
from tests.engine.tiny import tiny
from tests.engine.tiny_text import bpe_tokenizer
from tests.engine.training.trained import Stack, bert, config, masked, write_labelled
from tests.profiler.reports import LIMITS, hand_made

CPU: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring those of this machine would take seconds."""
    monkeypatch.setattr("engine.profiling.ceilings", lambda device: LIMITS)


def test_generation_prompts_and_single_tokens_apart() -> None:
    """Products: 2 N for each token, N the parameters of the layers; logits of the last token of each prompt alone."""
    engine = Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, **CPU)
    report = engine.profile(prompt=[[5, 6, 7], [8, 9, 10]], max_new_tokens=4, repeats=1)
    spec, workload = engine.spec, report.workload
    assert (report.name, report.machine["kernels"]) == ("gpt2", "eager")
    assert (workload.mode, workload.precision, workload.samples, workload.tokens) == ("inference", "fp32", 2, 6 + 8)
    assert report.counts.root.total_parameters == spec.parameters()
    layer = 4 * spec.hidden * spec.hidden + 2 * spec.hidden * spec.ffn
    for kind, tokens, logits in (("prefill", 6, 2), ("decode", 2 * 3, 2 * 3)):
        assert report.counts.module(f"gpt2.{kind}.head").total().macs == logits * spec.vocab_size * spec.hidden
        products = [f"gpt2.{kind}.layers.0.{part}" for part in ("qkv", "attention_out", "ffn_up", "ffn_down")]
        assert sum(report.counts.module(name).total().macs for name in products) == tokens * layer
    assert report.counts.module("sampling").calls == {"forward": 4}
    assert not report.counts.unknown
    assert report.timing is not None
    assert report.timing.own("gpt2.decode.layers.0.qkv").seconds > 0
    assert "gpt2" in str(report)


def test_generation_goes_on_behind_an_end_of_sequence() -> None:
    """Else steps would be of different lengths."""
    engine = Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, **CPU)
    every = list(range(engine.spec.vocab_size))
    report = engine.profile(prompt=[5, 6], max_new_tokens=3, eos_token_id=every, repeats=0)
    assert report.counts.module("gpt2.decode").calls == {"forward": 2}
    assert report.timing is None


def test_whole_sequences() -> None:
    engine = Engine.from_pretrained(tiny("bert", "embedding").directory, **CPU)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    report = engine.profile(ids, attention_mask=(ids > 0).long(), repeats=1, events=True)
    assert (report.workload.samples, report.workload.tokens) == (2, 6)
    assert report.counts.root.total_parameters == engine.spec.parameters()
    assert report.timing is not None
    assert {event.module for event in report.timing.events} >= {"bert.layers.0.qkv", "bert.embed"}


def test_one_of_batch_and_prompt() -> None:
    engine = Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, **CPU)
    for given in ({}, {"batch": [5], "prompt": [5]}):
        with pytest.raises(EngineError, match="profile: give a batch or a prompt, one of the two"):
            engine.profile(**given)


class Normed(nn.Module):
    """Has buffers that a forward pass changes, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.norm, self.drop = Stack(), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x @ torch.ones(x.shape[-1], 8))).square().mean()


def state(engine: Engine) -> list[Any]:
    model = engine.model
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    modes = [module.training for module in model.modules()]
    return [[t.detach().clone() for t in tensors], modes, torch.get_rng_state(), engine.global_step]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(map(torch.equal, one[0], other[0])) and one[1] == other[1] and torch.equal(one[2], other[2])


def test_training_is_left_as_it_was_found() -> None:
    engine = Engine(config(), model=bert())
    engine.train_batch(masked(4, 0))
    engine.model.bert.eval()  # a part in evaluation mode, which stays so
    before = state(engine)
    report = engine.profile(masked(4, 1), repeats=1)
    assert same(before, state(engine))
    assert (report.workload.mode, report.workload.samples, report.workload.micro_batches) == ("training", 4, 2)
    assert report.counts.total("backward").macs > report.counts.total("forward").macs
    assert not report.counts.total("step").operators
    assert any("forward and backward passes" in note for note in report.notes)
    other = Engine(config(), model=bert())
    other.train_batch(masked(4, 0))
    other.model.bert.eval()
    torch.set_rng_state(before[2])
    wanted = other.train_batch(masked(4, 2)).loss
    torch.set_rng_state(before[2])
    assert engine.train_batch(masked(4, 2)).loss == wanted


def test_training_is_left_as_it_was_found_also_where_it_fails() -> None:
    engine = Engine(config(), model=Normed())
    before = state(engine)
    with pytest.raises(ValueError, match="got 4D input"):
        engine.profile([(torch.ones(2, 3),), (torch.ones(2, 3, 3, 3),)])
    assert same(before, state(engine))
    engine.profile([(torch.eye(3),), (torch.eye(3) * 2,)], repeats=0)
    assert same(before, state(engine))


def test_an_engine_that_has_trained_profiles_inference_too() -> None:
    engine = Engine(config(model={"path": "m", "task": "masked_lm"}), model=bert())
    engine.eval()
    report = engine.profile([[5, 6, 7]], repeats=0)
    assert report.workload.mode == "inference"
    assert "bert.layers.0.qkv" in {module.name for module in report.counts.root.walk()}


def test_each_process_has_a_file() -> None:
    report = hand_made()
    assert path_of("a/p.trace.json", report) == Path("a/p.trace.json")
    several = Report(report.name, Workload(rank=1, world_size=2), report.counts)
    assert path_of("a/p.json", several) == Path("a/p.rank1.json")


# ---- the command ----


@pytest.fixture
def generates(tmp_path: Path) -> Path:
    document = {
        "model": {"path": str(tiny("gpt2", "causal_lm").directory)}, **CPU,
        "flops_profiler": {"module_depth": 1, "detailed": False},
    }  # fmt: skip
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_inference(generates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"p.{name}" for name in ("json", "trace")}
    arguments = [f"--{name}={path}" for name, path in files.items()]
    assert cli.main(["profile", str(generates), "--batch", "2", "--tokens", "5", "--new", "3", *arguments]) == 0
    shown = capsys.readouterr()
    assert "Profile of gpt2" in shown.out
    assert "Longest operators" not in shown.out
    for line in ("profiling 2 sequences of 5 tokens each", "counting a step", "timing a step, 3 of 3", "wrote "):
        assert f"slipstream.profiler: {line}" in shown.err
    report = Report.load(files["json"])
    assert (report.workload.samples, report.workload.tokens) == (2, 2 * (5 + 3))
    assert json.loads(files["trace"].read_text("utf-8"))["traceEvents"]
    assert cli.main(["profile", "--diff", str(files["json"]), str(files["json"])]) == 0
    assert capsys.readouterr().out == "Nothing changed.\n"


def test_the_texts_of_the_job_or_any_tokens(
    generates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of tokens to generate goes with both; by default sequences are no longer than the model takes."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(Engine, "profile", lambda self, **given: found.append(given) or hand_made())
    job = ["--set", 'job={"type": "generate", "prompts": ["a", "b"]}']
    for more in ([], ["--new", "3"], ["--batch", "3"], ["--tokens", "5", "--new", "2"]):
        assert cli.main(["profile", str(generates), *job, *more]) == 0
    given = [(one["prompt"], one.get("max_new_tokens")) for one in found]
    assert given[:2] == [(["a", "b"], None), (["a", "b"], 3)]
    assert [(len(prompt), len(prompt[0]), new) for prompt, new in given[2:]] == [(3, 112, 16), (1, 5, 2)]
    assert capsys.readouterr().err.count("profiling 2 texts of the job") == 2


def test_what_would_fail_behind_the_work_fails_before_it(
    generates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without plotly there is no page."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(Engine, "profile", lambda *_, **__: pytest.fail("it was run"))
    page = str(tmp_path / "p.html")
    section = ["--set", 'flops_profiler.formats=["html"]', "--set", f"flops_profiler.output_file={page}"]
    for arguments in (["--html", page], section):
        assert cli.main(["profile", str(generates), *arguments]) == 2
        assert capsys.readouterr().err == (
            "slipstream: error: the HTML page needs plotly and jinja2: pip install 'slipstream-runtime[report]'\n"
        )


def test_a_timeline_by_the_config_alone(generates: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    section = ["--set", 'flops_profiler.formats=["chrome_trace"]', "--set", f"flops_profiler.output_file={path}"]
    assert cli.main(["profile", str(generates), "--tokens", "3", "--new", "2", *section]) == 0
    assert json.loads(path.read_text("utf-8"))["traceEvents"]


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real steps on the config's data; nothing is written but what was asked for."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.BertConfig(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / "model")
    write_labelled(tmp_path / "train.jsonl", 16, 0)
    document = {
        "model": {"path": str(tmp_path / "model"), "task": "sequence_classification", "weights": "random"},
        "device": "cpu",
        "training": {"micro_batch_size": 2, "accumulation_steps": 2, "max_steps": 3, "output": str(tmp_path / "out")},
        "data": {"train": str(tmp_path / "train.jsonl"), "length": 16},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    code = cli.main(["profile", str(path), "--json", str(tmp_path / "p.json")])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "Profile of BertForSequenceClassification" in shown.out
    report = Report.load(tmp_path / "p.json")
    assert report.workload.samples == 4
    assert report.counts.total("step").operators
    assert not (tmp_path / "out").exists()
    assert cli.main(["profile", str(path), "--batch", "3"]) == 2
    assert '--batch: of no use with a section "training"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "profile: give a CONFIG, or --diff with two profiles (see `slipstream profile --help`)"),
        (["CONFIG", "--diff", "a", "b"], "--diff compares two files: give it neither a CONFIG nor options beside it"),
        (
            ["--diff", "a", "b", "--new", "3"],
            "--diff compares two files: give it neither a CONFIG nor options beside it",
        ),
        (["--diff", "a.json", "b.json"], "a.json: cannot be read: No such file or directory"),
        (["CONFIG", "--json", "none/p.json"], "--json none/p.json: there is no directory "),
        (["CONFIG", "--html", "."], "--html .: is not a file"),
        (
            ["CONFIG", "--set", 'flops_profiler.output_file="/dev/null/p"'],
            "$.flops_profiler.output_file: /dev/null/p: there is no directory /dev/null",
        ),
        (["CONFIG", "--tokens", "4000"], "--tokens: 4000, but this model takes "),
        (["CONFIG", "--batch", "0"], 'argument --batch: got "0", wanted a whole number from 1'),
    ],
)
def test_a_wrong_command_line_is_one_line(
    generates: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["profile", *(str(generates) if one == "CONFIG" else one for one in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"slipstream: error: {message}")
    assert shown.err.count("\n") == 1
