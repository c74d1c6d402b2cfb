"""What jobs print and write: golden tables, files of results, texts in the order of their prompts."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config_schema import load_config
from engine import Engine, jobs
from engine.errors import EngineError
from engine.inference.generation import Piece
from engine.inference.tasks import Answer, Fill, Label, TokenLabel
from engine.jobs.console import Console, display_width, fit
from engine.jobs.files import read_lines, results
from engine.jobs.tables import table
from tests.engine.tiny_text import save_decoder, save_encoder


class Terminal(io.StringIO):
    """A StringIO that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), "llama", chat=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), minilm_dir, "bert", "embedding")


def _run(model: Path, job: Mapping[str, Any], **sections: Any) -> tuple[str, str]:
    """What a job leaves on stdout and stderr."""
    config = load_config({"model": {"path": str(model)}, "device": "cpu", "precision": "fp32", "job": job, **sections})
    out, err = io.StringIO(), io.StringIO()
    jobs.run(Engine(config), jobs.prepare(config), out, err)
    return out.getvalue(), err.getvalue()


def _masked(text: str) -> str:
    return re.sub(r"\d+\.\d+ s|\d+(\.\d+)? (tokens|texts)/s", "#", text)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- generate ----


def test_one_prompt_gives_its_text_alone(decoder: Path) -> None:
    wanted = Engine.from_pretrained(decoder, precision="fp32", device="cpu").generate("The moon", max_new_tokens=7)
    job = {"type": "generate", "prompts": ["The moon"]}
    out, err = _run(decoder, job, generation={"max_new_tokens": 7, "ignore_eos": True})
    assert out == f"{wanted}\n"
    assert _masked(err) == "2 prompt tokens, 7 new tokens, # to the first, #\n"


@pytest.mark.parametrize("stream", [True, False])
def test_several_prompts_come_in_order_under_headings(decoder: Path, tmp_path: Path, stream: bool) -> None:
    prompts = ["The moon is", "A boat", "Nobody knew " + "where " * 20]
    engine = Engine.from_pretrained(decoder, precision="fp32", device="cpu")
    texts = [str(found) for found in engine.generate(prompts, max_new_tokens=5, ignore_eos=True)]
    output = tmp_path / "out.jsonl"
    job = {"type": "generate", "prompts": prompts, "output": str(output), "stream": stream}
    sections = {"generation": {"max_new_tokens": 5, "ignore_eos": True}, "inference": {"max_batch": 2}}
    out, _ = _run(decoder, job, **sections)
    heading = f"[3/3] {prompts[2]}"[:77] + "..."
    assert out == f"[1/3] The moon is\n{texts[0]}\n\n[2/3] A boat\n{texts[1]}\n\n{heading}\n{texts[2]}\n"
    found = _records(output)
    assert [(x["prompt"], x["text"], len(x["token_ids"])) for x in found] == [
        (prompt, text, 5) for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert {x["finish_reason"] for x in found} == {"length"}


def test_a_chat_goes_through_the_template_and_logprobs_are_written(decoder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Where is the moon?"}]
    output = tmp_path / "out.jsonl"
    job = {"type": "generate", "messages": messages, "output": str(output)}
    _run(decoder, job, generation={"max_new_tokens": 3, "logprobs": 2, "ignore_eos": True})
    engine = Engine.from_pretrained(decoder, precision="fp32", device="cpu")
    wanted = engine.generate(messages=messages, max_new_tokens=3, ignore_eos=True)
    (found,) = _records(output)
    assert found["messages"] == messages
    assert found["token_ids"] == wanted.token_ids
    assert [len(x["top"]) for x in found["logprobs"]] == [2, 2, 2]
    assert all(math.isclose(x["logprob"], x["top"][0][1], abs_tol=1e-5) for x in found["logprobs"])


class Scripted:
    """Stands where an engine stands and generates pieces in the order that a test wants, with a clock that it moves."""

    def __init__(self, pieces: Sequence[tuple[float, Piece]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces, self.now = pieces, 100.0
        self.text = SimpleNamespace(encode=lambda prompt: [1] * len(prompt))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def generate(self, prompts: Sequence[Sequence[int]], *, stream: bool) -> Iterator[Piece]:
        assert stream
        for seconds, piece in self.pieces:
            self.now += seconds
            yield piece


def test_rows_that_end_early_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the summary counts what comes behind each prompt's first token."""
    pieces = [
        (2.0, Piece(0, 5, "a")),
        (0.0, Piece(1, 5, "x\n", finish_reason="stop")),
        (0.0, Piece(2, 5, "u")),
        (0.5, Piece(0, 5, "")),
        (0.0, Piece(2, 5, "v", finish_reason="length")),
        (0.5, Piece(0, 5, "b", finish_reason="length")),
        (1.0, Piece(3, 5, "z", finish_reason="length")),
    ]
    config = load_config({"model": {"path": "x"}, "job": {"type": "generate", "prompts": ["p", "qq", "r", "s"]}})
    out, err = io.StringIO(), io.StringIO()
    jobs.run(Scripted(pieces, monkeypatch), jobs.prepare(config), out, err)  # type: ignore[arg-type]
    assert out.getvalue() == "[1/4] p\nab\n\n[2/4] qq\nx\n\n[3/4] r\nuv\n\n[4/4] s\nz\n"
    assert err.getvalue() == "5 prompt tokens, 7 new tokens, 2.00 s to the first, 1.5 tokens/s\n"


def test_one_token_alone_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config({"model": {"path": "x"}, "job": {"type": "generate", "prompts": ["p"]}})
    out, err = io.StringIO(), io.StringIO()
    engine = Scripted([(0.5, Piece(0, 5, "a", finish_reason="stop"))], monkeypatch)
    jobs.run(engine, jobs.prepare(config), out, err)  # type: ignore[arg-type]
    assert err.getvalue() == "1 prompt token, 1 new token, 0.50 s to the first, 2.0 tokens/s\n"


def test_an_interrupt_leaves_the_cursor_on_a_new_line_and_no_file(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        {
            "model": {"path": str(decoder)},
            "device": "cpu",
            "generation": {"max_new_tokens": 20, "ignore_eos": True},
            "job": {"type": "generate", "prompts": ["The moon"], "output": str(tmp_path / "out.jsonl")},
        }
    )
    engine = Engine(config)
    whole = engine.generate

    def interrupted(*args: Any, **options: Any) -> Any:
        for count, piece in enumerate(whole(*args, **options)):
            if count == 5:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(engine, "generate", interrupted)
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        jobs.run(engine, jobs.prepare(config), out, err)
    assert out.getvalue().endswith("\n")
    assert len(out.getvalue().strip()) > 0
    assert list(tmp_path.iterdir()) == []


# ---- encode ----


def test_a_few_texts_come_with_the_matrix_of_their_similarities(encoder: Path, tmp_path: Path) -> None:
    texts = ["The cat sat on the mat.", "A\ttext on\ntwo lines", "very long " * 20]
    output = tmp_path / "out.jsonl"
    job = {"type": "encode", "texts": texts, "output": str(output)}
    out, err = _run(encoder, job, embedding={"batch_size": 2})
    vectors = torch.tensor([record["vector"] for record in _records(output)])
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    a, b, c = (f"{float(unit[i] @ unit[j]):>5.2f}" for i, j in ((0, 1), (0, 2), (1, 2)))
    assert out == (
        "    text\n"
        "--  ----------------------------------------------------------------------------\n"
        " 1  The cat sat on the mat.\n"
        " 2  A text on two lines\n"
        " 3  very long very long very long very long very long very long very long ver...\n"
        "\n"
        "Cosine similarity\n"
        + table(["", "1", "2", "3"], [["1", "1.00", a, b], ["2", a, "1.00", c], ["3", b, c, "1.00"]], [])
        + "\n"
    )
    assert _masked(err) == "3 texts, 58 tokens, #, #\n"
    assert [record["text"] for record in _records(output)] == texts
    engine = Engine.from_pretrained(encoder, precision="fp32", device="cpu")
    torch.testing.assert_close(vectors, engine.encode(texts))


@pytest.mark.parametrize("count", [11, 12])
def test_many_texts_come_with_their_nearest_one(encoder: Path, count: int) -> None:
    texts = [f"{'a river' if n % 2 else 'an unlikely bank'} number {n} " + "flows on " * n for n in range(count)]
    out, _ = _run(encoder, {"type": "encode", "texts": texts})
    assert max(map(len, out.splitlines())) <= 80
    assert ("nearest" in out) == (count == 12)
    if count == 12:
        vectors = Engine.from_pretrained(encoder, precision="fp32", device="cpu").encode(texts)
        alike = (vectors @ vectors.T).fill_diagonal_(-2)
        nearest = [int(line.split()[1]) - 1 for line in out.splitlines()[2:]]
        assert nearest == alike.argmax(-1).tolist()


@pytest.mark.parametrize(("texts", "similarity"), [(["one"], True), (["one", "two"], False)])
def test_without_similarities_the_vectors_begin(encoder: Path, texts: list[str], similarity: bool) -> None:
    out, _ = _run(encoder, {"type": "encode", "texts": texts, "similarity": similarity})
    assert re.fullmatch(r" +vector of 32  text\n[- ]+\n( \d(  |) ?([+-]\d\.\d{3} ){4}\.\.\.  (one|two)\n)+", out), out


# ---- heads: a model of fixed answers, so that the tables are golden ----


class Answers:
    """Stands where an engine stands and gives what a test wants printed."""

    class plan:
        max_batch = 2

    def __init__(self) -> None:
        self.calls: list[Sequence[Any]] = []

    def classify(self, texts: Sequence[Any], *, top_k: int) -> list[list[Label]]:
        self.calls.append(texts)
        return [[Label("glad", 0.75), Label("sad", 0.25)][:top_k] for _ in texts]

    def classify_tokens(self, texts: Sequence[str]) -> list[list[TokenLabel]]:
        return [[TokenLabel("ada", "B-PER", 0.99, 0, 3), TokenLabel("##lyn", "I-PER", 0.5, 3, 6)] for _ in texts]

    def answer(self, question: str, context: str) -> Answer:
        return Answer("on the mat", 0.123456, 12, 22)

    def fill_mask(self, texts: Sequence[str], *, top_k: int) -> list[list[list[Fill]]]:
        return [[[Fill(3, "cat", 0.5), Fill(4, "dog", 0.25)][:top_k]] * text.count("[MASK]") for text in texts]


LONG = "a text that goes on and on and never comes to its end, whatever one does about it, on and on"

GOLDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "classify": (
        {"type": "classify", "texts": ["short", ["a pair", "of texts"], LONG], "top_k": 2},
        "text                                                            label      score\n"
        "--------------------------------------------------------------  -------  -------\n"
        "short                                                           glad      0.7500\n"
        "                                                                sad       0.2500\n"
        "a pair | of texts                                               glad      0.7500\n"
        "                                                                sad       0.2500\n"
        "a text that goes on and on and never comes to its end, what...  glad      0.7500\n"
        "                                                                sad       0.2500\n",
        "3 texts\n",
    ),
    "classify_tokens": (
        {"type": "classify_tokens", "texts": ["adalyn", "adalyn"]},
        "  text    characters  token    label      score\n"
        "------  ------------  -------  -------  -------\n"
        "     1           0-3  ada      B-PER     0.9900\n"
        "                 3-6  ##lyn    I-PER     0.5000\n"
        "     2           0-3  ada      B-PER     0.9900\n"
        "                 3-6  ##lyn    I-PER     0.5000\n",
        "2 texts\n",
    ),
    "answer": (
        {"type": "answer", "questions": [{"question": LONG, "context": "The cat sat on the mat."}]},
        "question                                       answer        score    characters\n"
        "---------------------------------------------  ----------  -------  ------------\n"
        "a text that goes on and on and never comes...  on the mat   0.1235         12-22\n",
        "1 question\n",
    ),
    "fill_mask": (
        {"type": "fill_mask", "texts": ["a [MASK] or a [MASK]", "the [MASK]"], "top_k": 2},
        "text                    mask  token      score\n"
        "--------------------  ------  -------  -------\n"
        "a [MASK] or a [MASK]       1  cat       0.5000\n"
        "                              dog       0.2500\n"
        "                           2  cat       0.5000\n"
        "                              dog       0.2500\n"
        "the [MASK]                 1  cat       0.5000\n"
        "                              dog       0.2500\n",
        "2 texts\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_tables_are_golden_and_fit_80_columns(name: str, tmp_path: Path) -> None:
    job, table, summary = GOLDEN[name]
    output = tmp_path / "out.jsonl"
    config = load_config({"model": {"path": "x"}, "job": {**job, "output": str(output)}})
    out, err = io.StringIO(), io.StringIO()
    jobs.run(Answers(), jobs.prepare(config), out, err)  # type: ignore[arg-type]
    assert out.getvalue() == table
    assert max(map(len, table.splitlines())) <= 80
    assert err.getvalue() == summary
    assert len(_records(output)) == int(summary.split()[0])


def test_heads_run_on_real_checkpoints(tmp_path: Path, minilm_dir: Path) -> None:
    """The same path without a stand-in: the JSON that is written is what the engine gives."""
    model = save_encoder(tmp_path / "model", minilm_dir, "bert", "sequence_classification", num_labels=3)
    output = tmp_path / "out.jsonl"
    texts = ["one", ["two", "three"], "four"]
    job = {"type": "classify", "texts": texts, "top_k": 2, "output": str(output)}
    _run(model, job, inference={"max_batch": 2})
    engine = Engine.from_pretrained(model, precision="fp32", device="cpu")
    wanted = engine.classify(["one", ("two", "three"), "four"], top_k=2)
    found = _records(output)
    assert [record["text"] for record in found] == texts
    for record, labels in zip(found, wanted, strict=True):
        assert [label["label"] for label in record["labels"]] == [label.label for label in labels]
        assert [x["score"] for x in record["labels"]] == pytest.approx([x.score for x in labels], abs=1e-5)


# ---- tables and the console ----


def test_columns_of_text_share_what_numbers_leave() -> None:
    drawn = table(["a", "n", "b"], [["x" * 200, "7", "y" * 200], ["x", "8", "y"]], [0, 2])
    widths = [len(line) for line in drawn.splitlines()]
    assert max(widths) == 80
    assert [len(part) for part in drawn.splitlines()[1].split()] == [36, 3, 37]


@pytest.mark.parametrize(
    ("text", "width", "wanted"),
    [
        ("short", 10, "short"),
        ("exactly ten", 11, "exactly ten"),
        ("one too many", 11, "one too..."),
        ("日本語の文章", 12, "日本語の文章"),
        ("日本語の文章", 11, "日本語の..."),
        ("a\x1b[31m\n\tb", 20, "a [31m b"),
        ("abc", 2, ".."),
    ],
)
def test_fit_counts_columns(text: str, width: int, wanted: str) -> None:
    assert fit(text, width) == wanted
    assert display_width(fit(text, width)) <= width


def test_a_terminal_is_not_steered_by_a_text_but_a_pipe_gets_it_as_it_is() -> None:
    for out, wanted in ((Terminal(), "a\ufffd[2Jb\n"), (io.StringIO(), "a\x1b[2Jb\n")):
        Console(out, io.StringIO()).write("a\x1b[2Jb\n")
        assert out.getvalue() == wanted


class Screen:
    """The few rows of a terminal that the console's sequences need; refuses what it does not know."""

    def __init__(self, rows: int, columns: int) -> None:
        self.cells = [[" "] * columns for _ in range(rows)]
        self.y = self.x = 0
        self.saved = (0, 0)

    def feed(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[[0-9]*[A-Za-z]|\x1b.|[\s\S]", text):
            sequence = found[0]
            if sequence == "\n":
                self._down()
                self.x = 0
            elif sequence == "\r":
                self.x = 0
            elif sequence == "\x1bD":
                self._down()
            elif sequence == "\x1b[A":
                self.y = max(self.y - 1, 0)
            elif sequence == "\x1b[B":
                self.y = min(self.y + 1, len(self.cells) - 1)
            elif sequence == "\x1b[K":
                self.cells[self.y][self.x :] = " " * (len(self.cells[0]) - self.x)
            elif sequence == "\x1b7":
                self.saved = (self.y, self.x)
            elif sequence == "\x1b8":
                self.y, self.x = self.saved
            else:
                assert sequence.isprintable(), repr(sequence)
                if self.x == len(self.cells[0]):
                    self._down()
                    self.x = 0
                self.cells[self.y][self.x] = sequence
                self.x += 1

    def _down(self) -> None:
        if self.y == len(self.cells) - 1:
            self.cells = [*self.cells[1:], [" "] * len(self.cells[0])]
        else:
            self.y += 1

    @property
    def text(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]


@pytest.mark.parametrize("rows", [3, 6])
def test_progress_stands_below_the_unfinished_line_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Also where the terminal scrolls and where the text wraps."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    screen, both = Screen(rows, 20), Terminal()
    console = Console(both, both)
    at = 0

    def seen() -> list[str]:
        nonlocal at
        screen.feed(both.getvalue()[at:])
        at = len(both.getvalue())
        return screen.text

    text = "The quick brown fox jumps over the lazy dog and\nthen sleeps all day in the warm sun"
    for start in range(0, len(text), 3):
        console.write(text[start : start + 3])
        console.status(f"{start} tokens")
        shown = [line for line in seen() if line]
        if not console._column or console._column % 20 not in (0, 19):
            assert shown[-1] == f"{start} tokens"
            shown.pop()
        plain = Screen(rows, 20)
        plain.feed(text[: start + 3])
        wanted = [line for line in plain.text if line]
        assert shown == wanted[len(wanted) - len(shown) :]
    console.note("done")
    assert seen()[-3:] == ["then sleeps all day", "in the warm sun", "done"] or "done" in seen()
    assert not any("tokens" in line for line in screen.text)


def test_there_is_no_progress_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    for err, term in ((io.StringIO(), "xterm"), (Terminal(), "dumb")):
        monkeypatch.setenv("TERM", term)
        console = Console(io.StringIO(), err)
        console.status("7 tokens")
        console.close()
        assert err.getvalue() == ""


# ---- files ----


def test_lines_are_read_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffone\r\n\r\n  \ntwo \u2028 parts\nthree".encode())
    assert read_lines(str(path), "$.job.texts_file") == ("one", "two \u2028 parts", "three")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "holds no text: write one a line"),
        (b" \n\n", "holds no text: write one a line"),
        (b"one\ntw\xff", r"line 2 is not UTF-8 \(byte 0xff\)"),
    ],
)
def test_a_bad_file_of_texts_is_one_clear_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "texts.txt"
    if content is not None:
        path.write_bytes(content)
    config = load_config({"model": {"path": "x"}, "job": {"type": "encode", "texts_file": str(path)}})
    with pytest.raises(EngineError, match=rf"\$\.job\.texts_file: {re.escape(str(path))}: {message}") as caught:
        jobs.prepare(config)
    assert "\n" not in str(caught.value)


def test_texts_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n\ntwo\n", "utf-8")
    config = load_config({"model": {"path": "x"}, "job": {"type": "generate", "prompts_file": str(path)}})
    job = jobs.prepare(config)
    assert job.prompts == ("one", "two")  # type: ignore[union-attr]


def test_results_replace_the_old_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")

    def write_two(fail: Callable[[], None]) -> None:
        with results(str(path)) as write:
            write({"a": "é"})
            fail()
            write({"b": 2})

    def give_up() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_two(give_up)
    assert path.read_text() == "old\n"
    write_two(lambda: None)
    assert path.read_text("utf-8") == '{"a": "é"}\n{"b": 2}\n'
    assert os.listdir(tmp_path) == ["out.jsonl"]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there" / "out.jsonl")
    with results(str(tmp_path / "link.jsonl")) as write:
        write({})
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "there" / "out.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(("name", "message"), [("no/out.jsonl", "there is no directory"), (".", "is not a file")])
def test_an_unusable_output_is_refused_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    job = {"type": "encode", "texts": ["x"], "output": str(tmp_path / name)}
    with pytest.raises(EngineError, match=rf"\$\.job\.output: .*{message}"):
        jobs.prepare(load_config({"model": {"path": "x"}, "job": job}))


def test_a_job_that_the_model_cannot_do_is_refused_by_its_plan(decoder: Path, encoder: Path) -> None:
    from engine import build

    def refusal(model: Path, job: dict[str, Any]) -> str:
        config = load_config({"model": {"path": str(model)}, "device": "cpu", "job": job})
        with pytest.raises(EngineError) as caught:
            jobs.check(jobs.prepare(config), build.plan(config))
        return str(caught.value)

    assert refusal(decoder, {"type": "encode", "texts": ["x"]}) == (
        '$.job.type: "encode" needs $.model.task "embedding", but this Llama checkpoint is "causal_lm": '
        'a Llama model can do "generate"'
    )
    assert refusal(encoder, {"type": "fill_mask", "texts": ["x"]}) == (
        '$.job.type: "fill_mask" needs $.model.task "masked_lm", but this BERT checkpoint is "embedding": '
        'set $.model.task to "masked_lm" if it has such a head, or change the job'
    )
    with pytest.raises(EngineError, match=r"\$\.job: missing, so there is nothing to run"):
        jobs.prepare(load_config({"model": {"path": str(encoder)}}))
