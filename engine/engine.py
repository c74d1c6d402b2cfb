"""Engine: one object that runs what a configuration describes. A facade; no feature's logic lives here."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from config_schema import Config, load_config
from engine import build, quantization
from engine.errors import EngineError
from engine.inference import encoder, params, tasks
from engine.inference.generation import Generation, Generator, Logprob, Piece
from engine.inference.inputs import Rows, flat_from, rows_from
from engine.inference.kv_cache import PagedCache
from engine.inference.runner import Runner
from engine.inference.text import Message, Text
from engine.training_engine import TrainingEngine
from engine.verify import Verification, verify
from ops.spec import ModelSpec

if TYPE_CHECKING:
    from profiler.report import Report


class Engine(TrainingEngine):
    """Runs a Transformer as a configuration says.

    ``config`` is a path, a dictionary, a loaded :class:`config_schema.Config` or a plan that :func:`engine.build.plan`
    has made of one; ``overrides`` are ``key.path=value`` texts (a plan takes none: it is decided).
    ``model`` is a live Hugging Face model to take the weights from instead of a checkpoint, ``tokenizer`` its
    tokenizer. With a section "training" the engine trains as well (:class:`engine.training_engine.TrainingEngine`);
    ``model`` may then be any ``nn.Module``, and ``loss_function(outputs, batch)`` gives the loss of one whose outputs
    hold none. Raises :class:`config_schema.SlipstreamError` (ConfigError, CheckpointError, KernelError, EngineError) in
    one clear line.
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | Mapping[str, Any] | Config | build.Plan,
        *,
        model: Any = None,
        tokenizer: Any = None,
        loss_function: Callable[[Any, Any], Tensor] | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        if model is not None and isinstance(config, Mapping) and "model" not in config:
            config = {
                **config,
                "model": {"path": getattr(getattr(model, "config", None), "_name_or_path", "") or "live model"},
            }
        self._packed: Runner | None = None
        self._packed_of = (0, 0)
        self._lock = threading.RLock()
        if isinstance(config, build.Plan):
            if overrides:
                raise EngineError("a plan takes no overrides: give them to load_config, before build.plan")
            self._decided, self._config = config, config.config
        else:
            self._config = load_config(config, overrides=overrides)
        self._live = model
        if self._config.training is not None and self._decided is None:  # a plan is one of inference
            self._begin_training(model, tokenizer, loss_function)
            return
        if loss_function is not None:
            raise EngineError('loss_function has no effect without a section "training"')
        self._decided = self._decided or build.plan(self._config, model=model)
        self.text = Text(self._plan.directory, self._plan.gguf_file, tokenizer)
        if model is None:
            self._runner()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        precision: str = "auto",
        kernels: str = "auto",
        device: str = "auto",
        task: str = "auto",
        **sections: Mapping[str, Any],
    ) -> Engine:
        """An engine in one line: a checkpoint directory or hub name; ``sections`` are further sections of the
        config."""
        model = {"path": os.fspath(directory), "task": task}
        return cls({"model": model, "precision": precision, "kernels": kernels, "device": device, **sections})

    # ---- what it is ----

    @property
    def config(self) -> Config:
        """The configuration as given."""
        return self._config

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self._plan.spec

    @property
    def plan(self) -> build.Plan:
        """What was decided: device, precision, kernel set, budgets, and the reason of each ``"auto"``."""
        return self._plan

    # ---- inference ----

    def __call__(self, batch: Any, *, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        """The model's outputs for whole sequences, in Hugging Face's output class for the task.

        ``batch``: a text, texts, (text, text) pairs, token ids, lists of them, a padded tensor [B, S] with its
        ``attention_mask``, or a tokenizer's BatchEncoding. Outputs follow the padding; padded places are zero.

        After :meth:`train` it is a micro-batch of training (a mapping of tensors), and the outputs' ``loss`` goes to
        :meth:`backward`.
        """
        beside = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if self._calls_model(batch):
            return self._call_model(batch)
        runner = self._runner()
        with torch.inference_mode():
            flat = flat_from(batch, runner.weights.embed.token.device, **beside)
            return encoder.forward(runner, rows_from(batch, self.text, **beside) if flat is None else flat)

    @overload
    def generate(self, prompt: Any = ..., *, stream: Literal[True], **options: Any) -> Iterator[Piece]: ...

    @overload
    def generate(
        self, prompt: Any = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> Generation | list[Generation]: ...

    def generate(
        self,
        prompt: Any = None,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        stream: bool = False,
        **options: Any,
    ) -> Generation | list[Generation] | Iterator[Piece]:
        """Generates after one prompt (gives a Generation, or an iterator of pieces) or several (a list of them).

        ``prompt``: a text, texts, token ids, lists of them, or a padded tensor [B, S] with its ``attention_mask``; or
        ``messages`` (a chat, or several). ``options`` have Hugging Face's names and meanings: max_new_tokens (20),
        min_new_tokens, do_sample, temperature (0 is greedy), top_k, top_p, repetition_penalty, stop (texts), seed,
        logprobs (how many alternatives beside each token's own), ignore_eos, eos_token_id. A temperature, top_k or
        top_p turns sampling on. What is not given comes from ``generation_config`` if there is one, else from the
        config's section ``generation`` and the checkpoint's generation_config.json. Prompt and new tokens are checked
        against ``inference.max_tokens`` before any work.
        """
        if self.spec.head is None or self.spec.head.task != "causal_lm":
            raise EngineError(f"generate needs a causal LM, this {self._plan.family.name} model is an encoder")
        rows = self._prompts(prompt, messages, attention_mask)
        chosen = self._sampling(options, generation_config, max(len(row) for row in rows.ids))
        self._check_budget(rows.ids, chosen.max_new_tokens)
        pieces = self._locked(self._generator().stream(rows.ids, chosen, texts=stream))
        if stream:
            return pieces
        found = self._collect(rows.ids, pieces, chosen)
        return found[0] if rows.single else found

    def encode(
        self,
        texts: Any,
        *,
        pooling: encoder.Pooling | None = None,
        normalize: bool | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Sentence embeddings: fp32 [hidden] for one text, [N, hidden] for several, on the CPU.

        Defaults come from the section ``embedding``, where ``"auto"`` follows the checkpoint.
        """
        rows = self.embedding_rows(texts)
        vectors = list(self.encode_stream(rows, pooling=pooling, normalize=normalize, batch_size=batch_size))
        return vectors[0][0] if rows.single else torch.cat(vectors)

    def encode_stream(
        self,
        texts: Any,
        *,
        pooling: encoder.Pooling | None = None,
        normalize: bool | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Tensor]:
        """As :meth:`encode`, batch by batch."""
        rows = texts if isinstance(texts, Rows) else self.embedding_rows(texts)
        size = self.config.embedding.batch_size if batch_size is None else batch_size
        chosen = pooling or self._plan.pooling
        if size < 1 or chosen not in ("mean", "cls"):
            raise EngineError(f'encode: got pooling={chosen!r}, batch_size={size}; wanted "mean" or "cls", at least 1')
        unit = self._plan.normalize if normalize is None else normalize
        with torch.inference_mode():
            yield from encoder.embed(self._runner(), rows, chosen, unit, size)

    def embedding_rows(self, texts: Any) -> Rows:
        """What :meth:`encode` reads of ``texts``: token ids, cut at the model's positions if ``embedding.truncate``."""
        task = self.spec.head.task if self.spec.head is not None else "embedding"
        if task != "embedding":
            raise EngineError(f'encode needs an encoder, but $.model.task is {task}: set it to "embedding"')
        limit = self.spec.max_positions if self.config.embedding.truncate else None
        return rows_from(texts, self.text, limit=limit)

    def classify(self, texts: Any, *, top_k: int = 1) -> list[list[tasks.Label]]:
        """The ``top_k`` likeliest labels of each text or (text, text) pair."""
        return tasks.classify(self, texts, top_k)

    def classify_tokens(self, texts: Sequence[str]) -> list[list[tasks.TokenLabel]]:
        """The label of each token of each text."""
        return tasks.classify_tokens(self, texts)

    def answer(self, question: str, context: str) -> tasks.Answer:
        """The stretch of ``context`` that answers ``question``."""
        return tasks.answer(self, question, context)

    def fill_mask(self, texts: Sequence[str], *, top_k: int = 5) -> list[list[list[tasks.Fill]]]:
        """The likeliest tokens of each mask of each text."""
        return tasks.fill_mask(self, texts, top_k)

    def profile(
        self,
        batch: Any = None,
        *,
        prompt: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        repeats: int = 3,
        events: bool = False,
        **options: Any,
    ) -> Report:
        """What a step costs and how far from the device's limits it runs, part by part; prints as tables.

        While training, ``batch`` is that of a step as :meth:`train_batch` takes it: its forward and backward passes are
        profiled, and the model is left exactly as it was. Else ``batch`` is what ``engine(batch)`` takes, with its
        ``attention_mask`` and ``token_type_ids``; or ``prompt`` and ``options`` are what :meth:`generate` takes, and no
        text ends before its ``max_new_tokens``. ``repeats``: steps that are timed, 0 to count alone; ``events``: keep
        what a timeline needs. Raises :class:`profiler.ProfilerError` where it cannot be measured.
        """
        from engine.profiling import Repeats, profile_inference

        how = Repeats(repeats=repeats, events=events)
        if (batch is None) == (prompt is None):
            raise EngineError("profile: give a batch or a prompt, one of the two")
        if self._in_training and prompt is None:
            return self._profile_training(batch, how)
        if prompt is None:
            beside = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            ids = rows_from(batch, self.text, **beside).ids
            return profile_inference(self._plan, lambda: self(batch, **beside), how, len(ids), sum(map(len, ids)))
        ids, options = self._prompts(prompt, None, attention_mask).ids, {"ignore_eos": True, **options}
        new = len(ids) * self._sampling(options, None, max(map(len, ids))).max_new_tokens
        step = partial(self.generate, ids, **options)
        return profile_inference(self._plan, step, how, len(ids), sum(map(len, ids)) + new)

    def verify(self, batch: Any = None) -> Verification:
        """Compares this engine with Hugging Face's implementation of the same weights, on ``batch`` or a default
        one."""
        return verify(self, batch, self._live)

    def save_quantized(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model with weights of 8 or 4 bits, as "precision" and the section "quantization" say, to
        ``directory``, which then loads as any checkpoint does and gives the same weights bit for bit."""
        plan = self._plan
        foreign = plan.directory is None or plan.gguf_file is not None
        quantization.save(plan, directory, self.text.saved_tokenizer() if foreign else None)

    # ---- parts ----

    def _runner(self) -> Runner:
        """The packed model; packed anew where the live model's weights have changed."""
        with self._lock:
            current = (self._updates(), self._plan.source.version)
            if self._packed is None or self._packed_of != current:
                self._packed, self._packed_of = build.runner(self._plan), current
            return self._packed

    @cached_property
    def _cache(self) -> PagedCache:
        plan = self._plan
        size = plan.config.inference.page_size
        widest = -(-plan.max_tokens // size)
        pages = plan.max_batch * widest
        return PagedCache(plan.spec, pages=pages, page_size=size, device=plan.device, dtype=plan.dtype, widest=widest)

    def _generator(self) -> Generator:
        plan = self._plan
        return Generator(
            self._runner(), self._cache, self.text, max_batch=plan.max_batch, prefill_chunk=plan.prefill_chunk
        )

    def _prompts(self, prompt: Any, messages: Any, attention_mask: Any) -> Rows:
        if (prompt is None) == (messages is None):
            raise EngineError("generate: give a prompt or messages, one of the two")
        if messages is None:
            rows = rows_from(prompt, self.text, attention_mask=attention_mask)
        elif messages and isinstance(messages[0], Mapping):
            rows = Rows([self.text.chat(messages)], single=True)
        else:
            rows = Rows([self.text.chat(chat) for chat in messages])
        self._runner().check_ids(rows.ids, "prompt")
        return rows

    def _sampling(self, options: Mapping[str, Any], generation_config: Any, longest: int) -> params.SamplingParams:
        params.option_names(tuple(options))
        own = params.from_generation_config(self._plan.generation_config)
        own["do_sample"] = bool(own.get("do_sample"))
        eos = {"eos_token_id": own.get("eos_token_id")}
        if generation_config is not None:
            given = params.from_generation_config(generation_config)
            given["do_sample"] = bool(given.get("do_sample"))
            values = generation_config if isinstance(generation_config, Mapping) else generation_config.to_dict()
            given["max_new_tokens"] = given.get("max_new_tokens") or params.length_limit(values, longest)
            layers: list[Mapping[str, Any]] = [given, eos]
        else:
            layers = [params.checked(self.config.generation.model_dump(exclude_defaults=True)), own]
        chosen = params.resolve(params.checked(options), *layers, fresh_seed=secrets.randbits(62))
        return params.within(chosen, self.spec.vocab_size)

    def _check_budget(self, rows: Sequence[Sequence[int]], new: int) -> None:
        limit = self._plan.max_tokens
        for index, row in enumerate(rows):
            if len(row) + new > limit:
                most = self.spec.max_positions
                need = len(row) + new
                advice = f"set inference.max_tokens to at least {need}" if need <= most else f"the model ends at {most}"
                raise EngineError(
                    f"prompt {index} has {len(row)} tokens and {new} new ones are asked for, {need} in all, but "
                    f"inference.max_tokens is {limit}: {advice}, or ask for fewer with max_new_tokens"
                )

    def _locked(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """One generation at a time: a second thread waits for the first to end or to drop its iterator."""
        with self._lock:
            yield from pieces

    def _collect(
        self, rows: Sequence[Sequence[int]], pieces: Iterator[Piece], chosen: params.SamplingParams
    ) -> list[Generation]:
        found = [Generation([], "length", len(row), [] if chosen.logprobs is not None else None) for row in rows]
        texts: list[list[str]] = [[] for _ in rows]
        for piece in pieces:
            one = found[piece.index]
            one.token_ids.append(piece.token)
            texts[piece.index].append(piece.text)
            if one.logprobs is not None and piece.logprob is not None:
                one.logprobs.append(piece.logprob)
            one.finish_reason = piece.finish_reason or one.finish_reason
        for one, parts in zip(found, texts, strict=True):
            one.attach(self.text, "".join(parts) if chosen.stop else None)
        return found


__all__ = ["Engine", "Generation", "Logprob", "Piece"]
