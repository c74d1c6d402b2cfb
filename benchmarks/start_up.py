"""How long a user waits before anything happens, and what loading costs in memory. Each figure is a process of its own.

python -m benchmarks.start_up build/models/SmolLM2-135M-Instruct sample_configs/smollm2_generate.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from benchmarks.measure import interleaved, parser, report, seconds, spread

#: Private memory above what the process had after its imports, sampled while loading; mapped file pages are left out.
LOAD = """
import json, sys, threading, time
import torch, engine.engine, transformers, safetensors
from engine import Engine
model = {"path": sys.argv[1]}
if sys.argv[3]:
    import gguf, transformers.modeling_gguf_pytorch_utils, transformers.models.llama.modeling_llama
    model["gguf_file"] = sys.argv[3]
def private():
    total = 0
    mapped = False
    for line in open("/proc/self/smaps"):
        head = line.split()
        if "-" in head[0] and len(head) >= 5:
            mapped = len(head) > 5 and head[5].startswith("/")
        elif head[0] == "Private_Dirty:" or (head[0] == "Private_Clean:" and not mapped):
            total += int(head[1]) * 1024
    return total
base = private(); peak = base; done = False
def watch():
    global peak
    while not done:
        peak = max(peak, private()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
start = time.perf_counter()
engine = Engine({"model": model, "precision": sys.argv[2], "device": "cpu"})
took = time.perf_counter() - start
done = True; thread.join()
weights = engine.spec.parameters() * engine.plan.dtype.itemsize
print(json.dumps({"seconds": took, "peak": peak - base, "after": private() - base, "weights": weights}))
"""


def main() -> None:
    """Measures and prints."""
    arguments = parser("start-up times and loading memory")
    arguments.add_argument("model", help="directory of a checkpoint, best of 500 MB or more")
    arguments.add_argument("config", help="a config to validate")
    arguments.add_argument("--gguf", default="", help="name of a GGUF file in the directory, to load instead")
    options = arguments.parse_args()
    commands = {
        "import engine; Engine": [sys.executable, "-c", "from engine import Engine"],
        "slipstream validate": [sys.executable, "-m", "engine", "validate", options.config],
        "import torch (for comparison)": [sys.executable, "-c", "import torch"],
    }

    def timed(command: list[str]) -> float:
        return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

    found = interleaved({name: (lambda c=c: timed(c)) for name, c in commands.items()}, options.rounds)
    report("start-up", [{"": name, "seconds": spread(values)} for name, values in found.items()], options.json)
    rows = []
    for precision in ("fp32", "bf16"):
        runs = [
            json.loads(
                subprocess.check_output(
                    [sys.executable, "-c", LOAD, options.model, precision, options.gguf], text=True
                ).splitlines()[-1]
            )
            for _ in range(3)
        ]
        one = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        megabytes = {f"{key} MB": one[key] / 1e6 for key in ("weights", "peak", "after")}
        rows.append(
            {
                "precision": precision,
                "seconds": one["seconds"],
                **megabytes,
                "peak / weights": one["peak"] / one["weights"],
            }
        )
    print()
    report(f"loading {options.model}", rows, None)


if __name__ == "__main__":
    main()
