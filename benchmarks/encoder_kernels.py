"""The launches of the encoder path, cut in many ways, and whole encoders made of them: random weights, one GPU.

Each product of a layer runs in a CUDA graph with dependent launch over more weights than L2 holds; the best tile of
each shape goes into ``ops/specialized/tile_table.py``. Whole forwards follow: norms fused, folded and in launches of
their own; in one persistent kernel; and the generic set in one graph.

    python -m benchmarks.encoder_kernels --models base large --tokens 128 384 --json encoder.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ops import reference
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.generic.attention import sequence_attention
from ops.generic.kernel_set import GenericKernels
from ops.macro_ops import walk
from ops.plan import Bucket, StepInputs, StepPlan
from ops.spec import LearnedPositions, ModelSpec
from ops.specialized.encoder import EncoderPlan
from ops.specialized.encoder_forward import Norms
from ops.specialized.persistent_encoder import PersistentEncoder, unsupported
from ops.specialized.tile_gemm import FoldedNorm, RowNorm, Statistics, Workspace, fold, tile_gemm
from ops.specialized.tile_table import Tile, candidates, estimate, tile_for
from ops.triton_support import dependent_launch
from ops.weights import ModelWeights, Packer, WeightSource

#: hidden, layers, heads
MODELS = {"base": (768, 12, 12), "large": (1024, 24, 16)}
KINDS = ("qkv", "out", "up", "down")
#: Weights of a chain, so that the next replay does not find them in L2.
CHAIN_BYTES = 160e6
#: Part of the time that compiling may take.
COMPILING = 0.55
HALF = torch.float16
ALL_NORMS: tuple[Norms, ...] = get_args(Norms)


def sizes(model: str, kind: str) -> tuple[int, int]:
    """[N, K] of a product."""
    h = MODELS[model][0]
    return {"qkv": (3 * h, h), "out": (h, h), "up": (4 * h, h), "down": (h, 4 * h)}[kind]


@dataclass
class Case:
    """One product over enough copies of its weight, with what stands before and behind it."""

    kind: str
    tokens: int
    n: int
    k: int
    norms: Norms
    copies: int
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(HALF)

        width = self.k if self.kind in ("qkv", "up") else self.n
        self.tensors = {
            "x": random(self.tokens, self.k), "weight": random(self.copies, self.n, self.k, scale=self.k**-0.5),
            "bias": random(self.n), "stream": random(self.tokens, self.n), "out": random(self.tokens, self.n),
            "gain": random(width) * 0.1 + 1, "shift": random(width),
        }  # fmt: skip

    def _arguments(self, tile: Tile) -> dict[str, Any]:
        """What every launch of the chain has in common."""
        own = self.tensors
        reads = self.kind in ("qkv", "up")
        device = own["x"].device
        arguments: dict[str, Any] = {"tile": tile, "out": own["out"], "pdl": dependent_launch(device)}
        arguments["workspace"] = Workspace.of(tile, self.tokens, self.n, device)
        if self.kind == "up":
            arguments["activation"] = "gelu"
        if not reads:
            arguments["residual"] = own["stream"]
        if self.norms == "separate":
            return arguments
        source = own["x"] if reads else own["stream"]
        known = Statistics(reference.partial_statistics(source.float(), 64).contiguous(), 64)
        norm = RowNorm("layernorm", 1e-12, own["gain"], own["shift"], known)
        if not reads:
            left = Statistics.empty(self.tokens, self.n, tile.columns, own["x"].device)
            return {**arguments, "residual_norm": norm, "statistics": left}
        return {**arguments, "norm": norm}

    def chain(self, tile: Tile) -> Callable[[], None]:
        """One launch for each copy of the weight."""
        own, arguments = self.tensors, self._arguments(tile)
        weights, biases = list(own["weight"]), [own["bias"]] * self.copies
        each = [arguments] * self.copies
        if self.norms == "folded" and "norm" in arguments:
            norm = arguments["norm"]
            folded = [fold(weight, own["bias"], norm.weight, norm.bias) for weight in weights]
            weights, biases = [f[0] for f in folded], [f[1] for f in folded]
            each = [{**arguments, "norm": FoldedNorm(norm.kind, norm.eps, f[2], norm.statistics)} for f in folded]

        def run() -> None:
            for weight, bias, more in zip(weights, biases, each, strict=True):
                tile_gemm(own["x"], weight, bias, **more)

        return run

    def error(self) -> float:
        """Of what the chain's last launch left, relative to fp32."""
        own = {
            name: tensor[-1].float() if name == "weight" else tensor.float() for name, tensor in self.tensors.items()
        }
        x, stream = own["x"], None if self.kind in ("qkv", "up") else own["stream"]
        if self.norms != "separate":
            source = x if stream is None else stream
            normed = reference.norm(source, "layernorm", own["gain"], own["shift"], 1e-12)
            x, stream = (normed, None) if stream is None else (x, normed)
        exact = reference.fused_product(x, own["weight"], own["bias"], "gelu" if self.kind == "up" else None, stream)
        return float((own["out"] - exact).norm() / exact.norm())


def graph_us(run: Callable[[], object], replays: int = 15) -> float:
    """Median microseconds of ``run`` in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return events_us(graph.replay, replays)


def compile_one(task: tuple[str, int, int, Norms, Tile]) -> str | None:
    """In a process of its own: the kernel goes to Triton's cache on disk. Gives what went wrong, or None."""
    kind, n, k, norms, tile = task
    try:
        Case(kind, 128, n, k, norms, 1).chain(tile)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def compiled(tasks: list[tuple[str, int, int, Norms, Tile]], workers: int, seconds: float) -> set[Any]:
    """The tasks that compile within the time."""
    done = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(compile_one, task): task for task in tasks}
        try:
            for future in as_completed(futures, timeout=seconds):
                task, failure = futures[future], future.result()
                if failure is None:
                    done.add(task)
                else:
                    print(f"  {task[0]} {task[4]}: {failure}"[:80])
        except OutOfTime:
            print(f"  time is up: {len(done)} of {len(tasks)} compiled")
        pool.shutdown(cancel_futures=True)
    return done


def best_guesses(tokens: int, n: int, k: int, count: int) -> list[Tile]:
    """The tiles that the model of the GPU likes best, what is shipped in front."""
    ranked = sorted(candidates(tokens, n, k, 2), key=lambda tile: estimate(tile, tokens, n, k, 2))
    return list(dict.fromkeys([tile_for(tokens, n, k, HALF), *ranked]))[:count]


def sweep(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Every product of every model at every number of tokens: what each tile takes, the best one first."""
    shapes = [(m, kind, t, *sizes(m, kind)) for m in options.models for kind in KINDS for t in options.tokens]
    guesses = {shape: best_guesses(shape[2], shape[3], shape[4], options.candidates) for shape in shapes}
    order = [(rank, (s[1], s[3], s[4], options.norms, tile)) for s in shapes for rank, tile in enumerate(guesses[s])]
    tasks = list(dict.fromkeys(task for _, task in sorted(order, key=lambda one: one[0])))
    print(f"compiling {len(tasks)} kernels in {options.workers} processes")
    known = compiled(tasks, options.workers, (until - time.monotonic()) * COMPILING)
    rows: list[dict[str, Any]] = []
    for model, kind, tokens, n, k in shapes:
        case = Case(kind, tokens, n, k, options.norms, max(2, round(CHAIN_BYTES / (2 * n * k))))
        found: list[dict[str, Any]] = []
        for tile in guesses[model, kind, tokens, n, k]:
            if (kind, n, k, options.norms, tile) in known and time.monotonic() < until:
                us = graph_us(case.chain(tile)) / case.copies
                found.append({"us": round(us, 3), "error": case.error(), "tile": asdict(tile)})
        right = sorted((one for one in found if one["error"] < 3e-3), key=lambda one: one["us"])
        wrong = [one for one in found if one["error"] >= 3e-3]
        rows.append({"model": model, "kind": kind, "tokens": tokens, "n": n, "k": k, "tiles": right, "wrong": wrong})
        _print_best(rows[-1], case)
    return rows


def _print_best(row: Mapping[str, Any], case: Case) -> None:
    """The best two, cuBLAS' plain product, and the line for the table."""
    x, weights, out = (case.tensors[name] for name in ("x", "weight", "out"))
    cublas = graph_us(lambda: [torch.mm(x, weight.T, out=out) for weight in weights]) / case.copies
    times = " ".join(f"{one['us']:.2f}" for one in row["tiles"][:3]) or "none"
    wrong = f" WRONG: {len(row['wrong'])}" if row["wrong"] else ""
    print(f"{row['model']:5} {row['tokens']:4} {row['kind']:4} us: {times} | cuBLAS {cublas:.2f}{wrong}", flush=True)
    if row["tiles"]:
        tile = ", ".join(map(str, row["tiles"][0]["tile"].values()))
        print(f"    ({row['tokens']}, {row['n']}, {row['k']}): Tile({tile}),")


class RandomWeights:
    """A source of weights of the right shapes, made on the GPU: the same numbers in every dtype."""

    version = 0

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = spec.weight_shapes()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Small normal numbers; about one where a norm multiplies."""
        generator = torch.Generator("cuda").manual_seed(list(self._shapes).index(name))
        values = torch.randn(*self._shapes[name], device="cuda", generator=generator) * 0.03
        return (values + (1.0 if name.endswith("norm.weight") else 0.0)).to(HALF)


def bert(model: str) -> ModelSpec:
    """BERT's shape without a head."""
    hidden, layers, heads = MODELS[model]
    return ModelSpec(
        family="bert", vocab_size=30522, hidden=hidden, layers=layers, heads=heads, kv_heads=heads, head_dim=64,
        ffn=4 * hidden, activation="gelu", norm="layernorm", norm_eps=1e-12, placement="post",
        positions=LearnedPositions(512), max_positions=512, attention_scale=0.125, causal=False, qkv_bias=True,
        out_bias=True, ffn_bias=True, token_types=2, embedding_norm=True,
    )  # fmt: skip


def packed(spec: ModelSpec, dtype: torch.dtype) -> ModelWeights:
    """The random model in ``dtype``."""
    return Packer(spec, cast(WeightSource, RandomWeights(spec)), torch.device("cuda"), dtype).pack()


def whole(model: str, tokens: int, chosen: Mapping[tuple[int, int, int], Tile]) -> list[dict[str, Any]]:
    """Forwards at batch 1: launches alone (``gpu``), and from ids to hidden states, synchronized (``wall``)."""
    spec = bert(model)
    ids = torch.randint(0, spec.vocab_size, (tokens,), device="cuda")
    inputs = StepInputs(ids, torch.arange(tokens, device="cuda"), (tokens,))
    bucket, alone = Bucket("encode"), SingleProcess()
    exact = EagerKernels().plan(spec, packed(spec, torch.float32), bucket, alone).run(inputs).hidden
    weights = packed(spec, HALF)
    generic = StepPlan(bucket, walk(spec, weights, GenericKernels(), alone))
    us = graph_us(lambda: generic.run(inputs))  # its plan replays a graph, which cannot be part of another
    rows = [_row(model, tokens, "generic", generic.run(inputs).hidden, exact, us, None)]

    def tiles(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
        return chosen.get((m, n, k)) or tile_for(m, n, k, dtype)

    for norms in ALL_NORMS:
        plan = EncoderPlan(spec, weights, norms=norms, tiles=tiles)

        def step(plan: EncoderPlan = plan) -> Tensor:
            return plan.run(ids, None, (tokens,))

        rows.append(_row(model, tokens, norms, step(), exact, events_us(plan.again), wall_us(step)))
    if unsupported(spec, weights, HALF, ids.device) is None and tokens <= 512:
        persistent = PersistentEncoder(spec, weights)

        def one_kernel() -> Tensor:
            return persistent.run(ids, None, (tokens,))

        hidden = one_kernel()
        gpu, wall = events_us(persistent.again), wall_us(one_kernel)
        rows.append(_row(model, tokens, "persistent", hidden, exact, gpu, wall))
    us = attention_us(spec, tokens)
    print(f"{model:5} {tokens:4} attention alone {us / 1e3:.4f} ms, {us / spec.layers:.2f} us a layer")
    return [*rows, {"model": model, "tokens": tokens, "how": "attention alone", "gpu_us": us}]


def attention_us(spec: ModelSpec, tokens: int) -> float:
    """Microseconds of the attention of all layers over one sequence, in a graph."""
    q, k, v = torch.randn(tokens, 3, spec.heads, 64, device="cuda", dtype=HALF).unbind(1)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    pdl = dependent_launch(q.device)

    def attend() -> None:
        for _ in range(spec.layers):
            sequence_attention(
                q, k, v, starts, longest=tokens, causal=False, scale=0.125, window=None, softcap=None, slopes=None,
                pdl=pdl,
            )  # fmt: skip

    return graph_us(attend)


def _row(
    model: str, tokens: int, how: str, hidden: Tensor, exact: Tensor, gpu: float, wall: float | None
) -> dict[str, Any]:
    error = float((hidden.float() - exact).norm() / exact.norm())
    on_the_wall = "" if wall is None else f"  wall {wall / 1e3:.4f} ms"
    print(f"{model:5} {tokens:4} {how:10} gpu {gpu / 1e3:.4f} ms{on_the_wall}  error {error:.1e}", flush=True)
    return {"model": model, "tokens": tokens, "how": how, "gpu_us": gpu, "wall_us": wall, "error": error}


def events_us(run: Callable[[], object], times: int = 20) -> float:
    """Median microseconds of ``run`` on the device."""
    found: list[float] = []
    for _ in range(times + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found[3:])


def wall_us(run: Callable[[], object], times: int = 20) -> float:
    """Median microseconds of ``run`` until the device is done."""
    found: list[float] = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(found[3:])


def main() -> None:
    """Sweeps, prints, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 384])
    parser.add_argument("--norms", choices=ALL_NORMS, default="fused", help="where norms are while tiles are swept")
    parser.add_argument("--candidates", type=int, default=24, help="tiles a shape, likeliest first; 0: no sweep")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--limit-seconds", type=float, default=480, help="for compiling and sweeping")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    swept = sweep(options, time.monotonic() + options.limit_seconds) if options.candidates else []
    best = {(r["tokens"], r["n"], r["k"]): Tile(**r["tiles"][0]["tile"]) for r in swept if r["tiles"]}
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "norms": options.norms,
        "products": swept,
        "forwards": [],
    }
    with torch.inference_mode():
        for model in options.models:
            for tokens in options.tokens:
                found["forwards"] += whole(model, tokens, best)
                if options.json is not None:
                    options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
