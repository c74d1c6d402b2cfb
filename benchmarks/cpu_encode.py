"""Sentence embeddings on a CPU beside Hugging Face and sentence-transformers: sentences of mixed length, fp32.

Batches of 32 in the given order (sentence-transformers sorts by length). Tokenizing is part of the time.

    python -m benchmarks.cpu_encode build/models/all-MiniLM-L6-v2 sentences.txt
"""

from __future__ import annotations

import gzip
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import interleaved, parser, report, seconds, spread
from engine import Engine


def read_sentences(path: Path, count: int) -> list[str]:
    """Evenly spread sentences of 20 to 400 characters from a text file (``.gz`` too)."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    found = [s.strip() for s in data.decode("utf-8").replace("\n", " ").split(" . ") if 20 <= len(s.strip()) <= 400]
    if len(found) < count:
        raise SystemExit(f"{path}: {len(found)} sentences of 20 to 400 characters, {count} are needed")
    return found[:: len(found) // count][:count]


def hugging_face(directory: str, batch: int) -> Callable[[list[str]], torch.Tensor]:
    """Mean pooling and normalization over ``AutoModel``, padded to the longest of each batch."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()

    def encode(texts: list[str]) -> torch.Tensor:
        out = []
        with torch.inference_mode():
            for start in range(0, len(texts), batch):
                inputs = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
                mask = inputs["attention_mask"][..., None]
                hidden = model(**inputs).last_hidden_state
                out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(out)

    return encode


def main() -> None:
    """Measures and prints; the vectors are compared first."""
    arguments = parser("sentence embeddings on a CPU, beside peers")
    arguments.add_argument("model", help="directory of an encoder")
    arguments.add_argument("text", type=Path, help="a text file to take sentences from")
    arguments.add_argument("--sentences", type=int, default=256)
    arguments.add_argument("--batch", type=int, default=32)
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    texts = read_sentences(options.text, options.sentences)
    engine = Engine.from_pretrained(options.model, device="cpu", precision="fp32")
    runs: dict[str, Callable[[list[str]], torch.Tensor]] = {
        "slipstream": lambda t: engine.encode(t, batch_size=options.batch),
        "Hugging Face": hugging_face(options.model, options.batch),
    }
    if importlib.util.find_spec("sentence_transformers") is None:
        print("sentence-transformers is not installed: not measured")
    else:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(options.model, device="cpu")
        runs["sentence-transformers"] = lambda t: torch.as_tensor(
            peer.encode(t, batch_size=options.batch, normalize_embeddings=True, show_progress_bar=False)
        )
    exact = runs["Hugging Face"](texts)
    differences = {name: float((run(texts) - exact).abs().max()) for name, run in runs.items()}
    found = interleaved(
        {name: (lambda run=run: seconds(lambda: run(texts))) for name, run in runs.items()}, options.rounds
    )
    base = statistics.median(found["Hugging Face"])
    rows = [
        {
            "": name,
            "seconds": spread(values),
            "sentences/s": len(texts) / statistics.median(values),
            "x Hugging Face": base / statistics.median(values),
            "largest difference": differences[name],
        }
        for name, values in found.items()
    ]
    lengths = [len(ids) for ids in engine.text.tokenizer(texts)["input_ids"]]
    facts = {
        "sentences": len(texts),
        "batch": options.batch,
        "mean_tokens": statistics.mean(lengths),
        "longest": max(lengths),
    }
    report(f"{len(texts)} sentences, batch {options.batch}, {options.model}", rows, options.json, **facts)


if __name__ == "__main__":
    main()
