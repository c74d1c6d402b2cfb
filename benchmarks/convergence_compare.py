"""Reads the runs of compressed optimizers: each arm's last loss beside that of the optimizer it stands in for, what a
rank has sent, and a picture."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.convergence_ranks import ARMS, variant
from config_schema import SlipstreamError
from engine.bench.chart import check_installed
from engine.bench.report import write
from engine.jobs.tables import table

COLORS = {
    "adamw": "#8a929c",
    "onebit_adam": "#1f5fa8",
    "zero_one_adam": "#c98b2b",
    "lamb": "#444444",
    "onebit_lamb": "#c8442b",
}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Record:
    """A run's file: see ``convergence_loop`` and ``convergence_ranks``. label: the arm, and which options are not
    the benchmark's defaults, by their first letters."""

    arm: str
    label: str
    lr: float
    seed: int
    steps: int
    batch: int
    ranks: int
    status: str
    device: str
    points: list[dict[str, float]]

    @property
    def final(self) -> float:
        """The last loss; infinite for a run that did not reach its end."""
        return self.points[-1]["loss"] if self.status == "done" else float("inf")

    @property
    def ms(self) -> float:
        """Of a step."""
        return 1000 * self.points[-1]["seconds"] / self.points[-1]["step"]

    @property
    def sent(self) -> float:
        """Bytes of a rank in the whole run, as far as it came."""
        return self.points[-1]["sent"]


#: Label, ranks, batch, steps, rate.
Key = tuple[str, int, int, int, float]
Groups = dict[Key, list[Record]]


def read(directory: Path) -> Groups:
    """The runs of all files under ``directory``, by what they have in common but the seed, in the order of the arms."""
    records = []
    names = ("arm", "lr", "seed", "steps", "batch", "ranks")
    for path in sorted(directory.rglob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        run = found.get("run") if isinstance(found, dict) else None
        if isinstance(run, dict) and run.get("arm") in ARMS:
            options = [name[0] + value for name, value in map(str.split, variant(run))]
            given = {name: run[name] for name in names} | {"label": " ".join([run["arm"], *options])}
            records.append(Record(**given, status=found["status"], device=found["device"], points=found["points"]))
    if not records:
        raise SlipstreamError(f"--plot {directory}: holds no run of {', '.join(ARMS)}")
    found_groups: Groups = {}
    order = list(ARMS)
    for one in sorted(
        records, key=lambda one: (one.ranks, one.batch, one.steps, order.index(one.arm), one.label, one.lr)
    ):
        found_groups.setdefault((one.label, one.ranks, one.batch, one.steps, one.lr), []).append(one)
    for group in found_groups.values():
        group.sort(key=lambda one: one.seed)
    return found_groups


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the deviation of a sample (of n - 1); of one value that is no number."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def partner(groups: Groups, key: Key) -> list[Record] | None:
    """The runs of the arm's baseline with the same batch, steps and rate."""
    base = ARMS[groups[key][0].arm].baseline
    return None if base == key[0] else groups.get((base, *key[1:]))


def loss_table(groups: Groups) -> str:
    """The last losses. ``- base``: how much more than the baseline at the same rate; ``within``: whether that is no
    more than the baseline's deviation between seeds."""
    rows = []
    for key, group in groups.items():
        done = [one.final for one in group if one.status == "done"]
        row = [key[0], f"{key[-1]:g}", f"{len(done)}/{len(group)}"]
        if done:
            mean, deviation = mean_and_deviation(done)
            row += [f"{mean:.4f}", _number(deviation), *_against(partner(groups, key), mean)]
        rows.append([*row, *[""] * (7 - len(row))])
    return table(["arm", "lr", "done", "loss", "deviation", "- base", "within"], rows, texts=[0])


def _against(base: Sequence[Record] | None, mean: float) -> list[str]:
    """The difference and the verdict."""
    losses = [one.final for one in base or () if one.status == "done"]
    if not losses:
        return ["", ""]
    other, deviation = mean_and_deviation(losses)
    verdict = "?" if len(losses) < 2 else "yes" if mean - other <= deviation else "no"
    return [f"{mean - other:+.4f}", verdict]


def cost_table(groups: Groups) -> str:
    """What a rank sends in a run, how many times less that is than by full gradients, and the time of a step."""
    rows = []
    begun = {key: own for key, group in groups.items() if (own := [one for one in group if one.points])}
    for key, group in begun.items():
        sent = statistics.fmean(one.sent for one in group)
        base = partner(begun, key)
        less = "" if base is None else f"{statistics.fmean(one.sent for one in base) / sent:.2f}"
        update = statistics.fmean(point["update"] for one in group for point in one.points)
        ms = statistics.fmean(one.ms for one in group)
        rows.append([key[0], f"{key[-1]:g}", f"{sent / MEGABYTE:.1f}", less, f"{ms:.4g}", f"{1000 * update:.4g}"])
    return table(["arm", "lr", "MB sent", "x less", "ms/step", "ms/update"], rows, texts=[0]) if rows else ""


def unfinished(groups: Groups) -> list[str]:
    """A line for each run that is not done."""
    return [
        f"{one.label}, batch {one.batch}, {one.steps} steps, lr {one.lr:g}, seed {one.seed}: {one.status}"
        for group in groups.values()
        for one in group
        if one.status != "done"
    ]


def cases(groups: Groups) -> dict[tuple[int, int, int], Groups]:
    """The groups of each number of ranks, batch and number of steps."""
    found: dict[tuple[int, int, int], Groups] = {}
    for key, group in groups.items():
        found.setdefault((key[1], key[2], key[3]), {})[key] = group
    return found


def summary(directory: Path) -> str:
    """All tables."""
    groups, parts = read(directory), []
    for (ranks, batch, steps), own in cases(groups).items():
        parts += [
            f"{ranks} ranks, batch {batch}, {steps} steps: held-out loss at the end, mean of seeds",
            loss_table(own),
            "what a rank sends in the run; a step, and its update with the exchange",
            cost_table(own),
        ]
    letters = "f, o, e, v: --freeze, --one-scale, --exact, --var-update-scaler,\nwhere they are not the defaults"
    return "\n\n".join(part for part in [*parts, *unfinished(groups), letters, _devices(groups)] if part)


def draw(groups: Groups, path: Path) -> None:
    """Writes a PNG: held-out loss against samples, and against what a rank has sent. A row a batch; a line a run."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = cases(groups)
    figure = Figure(figsize=(11, 4.4 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), 2, sharey="row", squeeze=False)
    for row, ((ranks, batch, steps), own) in zip(grid, found.items(), strict=True):
        for axis, (key, unit, label) in zip(
            row, (("samples", 1.0, "samples"), ("sent", MEGABYTE, "MB that a rank has sent")), strict=True
        ):
            _panel(axis, own, key, unit)
            axis.set_xlabel(label)
        row[1].set_xscale("log")
        row[0].set_ylabel("held-out masked-LM loss, nats")
        row[0].set_title(f"{ranks} ranks, batch {batch}, {steps} steps", fontsize=10)
        row[0].legend(fontsize=8)
    figure.suptitle(f"BERT pre-training, compressed optimizers; {_devices(groups)}", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write(path, picture.getvalue())


def _panel(axis: object, groups: Groups, key: str, unit: float) -> None:
    """A line a run; each further variant or rate of an arm is fainter."""
    faint: dict[str, int] = {}
    for (label, *_, lr), group in groups.items():
        arm = group[0].arm
        faint[arm] = faint.get(arm, -1) + 1
        for at, one in enumerate(group):
            axis.plot(  # type: ignore[attr-defined]
                [point[key] / unit for point in one.points],
                [point["loss"] for point in one.points],
                color=COLORS[arm],
                alpha=max(1 - 0.35 * faint[arm], 0.2),
                linewidth=1.2,
                label=None if at else f"{label}, lr {lr:g}",
            )
    axis.grid(color="#e3e6ea", linewidth=0.7)  # type: ignore[attr-defined]
    axis.set_ylim(*_limits(point["loss"] for group in groups.values() for one in group for point in one.points))  # type: ignore[attr-defined]


def _limits(losses: Iterable[float]) -> tuple[float, float]:
    """Of the losses that are shown: without the fall from the first ones, which says nothing."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[int(0.95 * (len(ordered) - 1))]
    room = 0.05 * max(high - low, 1e-3)
    return low - room, high + room


def _devices(groups: Groups) -> str:
    return " / ".join(sorted({one.device.split(";")[0] for group in groups.values() for one in group}))


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"
