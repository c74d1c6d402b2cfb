"""Reads the convergence benchmark's runs: which rate is best, how soon the baseline's loss is reached, a picture."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_schema import SlipstreamError
from engine.bench.chart import check_installed
from engine.bench.report import write
from engine.jobs.tables import table

BASELINE = "postln"
COLORS = {"postln": "#8a929c", "postln_pld": "#c98b2b", "preln": "#c8442b", "preln_pld": "#1f5fa8"}
#: The figure by which GLUE judges a task, where it is not the accuracy or the first one there is.
GLUE = {"cola": "matthews", "mrpc": "f1", "stsb": "pearson"}


@dataclass(frozen=True)
class Record:
    """A run's file: see ``convergence_run``."""

    arm: str
    lr: float
    seed: int
    steps: int
    status: str
    device: str
    points: list[dict[str, float]]

    @property
    def final(self) -> float:
        """The last loss; infinite for a run that did not reach its end."""
        return self.points[-1]["loss"] if self.status == "done" else float("inf")


#: Runs of an arm, with one rate and one length.
Group = list[Record]


def read(directory: Path) -> tuple[list[Record], list[dict[str, Any]]]:
    """The runs and the fine-tunings of all files under ``directory``."""
    records, tunings = [], []
    for path in sorted(directory.rglob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        if "tuning" in found:
            tunings.append(found)
        elif isinstance(found.get("run"), dict) and found.get("points"):
            run = {key: found["run"][key] for key in ("arm", "lr", "seed", "steps")}
            records.append(Record(**run, status=found["status"], device=found["device"], points=found["points"]))
    if not any(record.arm == BASELINE and record.status == "done" for record in records):
        raise SlipstreamError(f"--plot {directory}: holds no run of {BASELINE} that is done, to compare others with")
    return records, tunings


def groups(records: Iterable[Record]) -> dict[tuple[str, int, float], Group]:
    """By arm, steps and rate, sorted."""
    found: dict[tuple[str, int, float], Group] = {}
    for record in sorted(records, key=lambda one: (one.arm, one.steps, one.lr, one.seed)):
        found.setdefault((record.arm, record.steps, record.lr), []).append(record)
    return found


def mean_loss(group: Group) -> float:
    """The mean of the seeds' last losses; infinite where one did not get there."""
    return statistics.fmean(record.final for record in group)


def best(records: Iterable[Record]) -> dict[tuple[str, int], Group]:
    """Of each arm and length, the runs at the best rate: that of the lowest mean loss, over the seeds that all its
    rates have in common where there are any. So a rate that was run with more seeds has no other chance."""
    rates: dict[tuple[str, int], list[Group]] = {}
    for (arm, steps, _), group in groups(records).items():
        rates.setdefault((arm, steps), []).append(group)
    found = {}
    for key, own in rates.items():
        common = set.intersection(*({record.seed for record in group} for group in own))
        judged = [[record for record in group if not common or record.seed in common] for group in own]
        found[key] = min(zip(own, judged, strict=True), key=lambda pair: mean_loss(pair[1]))[0]
    return found


def crossing(points: Sequence[Mapping[str, float]], target: float, key: str) -> float | None:
    """The ``key`` (samples, seconds) at which the loss first was ``target``, on straight lines between the points."""
    for at, point in enumerate(points):
        if point["loss"] <= target:
            if not at:
                return point[key]
            before = points[at - 1]
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            return before[key] + share * (point[key] - before[key])
    return None


def baseline(found: Mapping[tuple[str, int], Group]) -> Group:
    """The runs of the baseline, of the longest schedule that was finished."""
    return max(
        (group for (arm, _), group in found.items() if arm == BASELINE and mean_loss(group) < float("inf")),
        key=lambda group: group[0].steps,
    )


def sweep_table(records: Sequence[Record]) -> str:
    """Every rate of every arm, the best one of each marked, and the runs that are not done."""
    chosen = {(group[0].arm, group[0].steps, group[0].lr) for group in best(records).values()}
    rows = []
    for key, group in groups(records).items():
        last = [record.points[-1] for record in group]
        losses = [point["loss"] for point in last]
        ms = statistics.fmean(1000 * point["seconds"] / point["step"] for point in last)
        layers = statistics.fmean(point["layers"] for record in group for point in record.points)
        lr = f"{key[2]:g} *" if key in chosen else f"{key[2]:g}"
        figures = [f"{statistics.fmean(losses):.4f}", f"{max(losses):.4f}", f"{ms:.4g}", f"{layers:.2f}"]
        rows.append([key[0], str(key[1]), lr, str(len(group)), *figures])
    headers = ["arm", "steps", "lr (*best)", "runs", "loss", "highest", "ms/step", "layers"]
    others = [
        f"{record.arm}, {record.steps} steps, lr {record.lr:g}, seed {record.seed}: {record.status}"
        for record in records
        if record.status != "done"
    ]
    return "\n".join([table(headers, rows, texts=[0]), *others])


def target_table(records: Sequence[Record]) -> str:
    """Samples and seconds of each arm, at its best rate, to the baseline's final loss."""
    found = best(records)
    base = baseline(found)
    target = mean_loss(base)
    whole = {key: statistics.fmean(record.points[-1][key] for record in base) for key in ("samples", "seconds")}
    rows = []
    for (arm, steps), group in found.items():
        row = [arm, str(steps), f"{group[0].lr:g}"]
        for key in ("samples", "seconds"):
            if group is base:
                row += [f"{whole[key]:.4g}", "1"]
                continue
            reached = [crossing(record.points, target, key) for record in group]
            there = [one for one in reached if one is not None]
            if len(there) < len(reached):
                row += [f"{len(there)} of {len(reached)}", "-"]
            else:
                row += [f"{statistics.fmean(there):.4g}", f"{whole[key] / statistics.fmean(there):.2f}"]
        rows.append(row)
    drawn = table(["arm", "steps", "lr", "samples", "x fewer", "seconds", "x less"], rows, texts=[0])
    return f"to {BASELINE}'s final loss, {target:.4f}; mean of the seeds\n{drawn}"


def tuning_table(tunings: Sequence[Mapping[str, Any]]) -> str:
    """The figure of each task, by arm, at the rate that is best for it."""
    found: dict[tuple[str, str, str, float], list[float]] = {}
    for one in tunings:
        task, run = one["tuning"]["task"], one["tuning"]["run"]
        wanted = GLUE.get(task, "accuracy")
        figure = wanted if wanted in one["seeds"][0] else next(iter(one["seeds"][0]))
        arm = run.split("-lr")[0]
        key = (task, figure, arm, one["tuning"]["lr"])
        found.setdefault(key, []).extend(100 * seed[figure] for seed in one["seeds"])
    chosen: dict[tuple[str, str, str], tuple[float, list[float]]] = {}
    for (task, figure, arm, lr), values in sorted(found.items()):
        other = chosen.get((task, figure, arm))
        if other is None or statistics.fmean(values) > statistics.fmean(other[1]):
            chosen[task, figure, arm] = (lr, values)
    rows = []
    for (task, figure, arm), (lr, values) in chosen.items():
        spread = f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        rows.append([f"{task}, {figure}", arm, f"{lr:g}", str(len(values)), spread])
    return table(["task", "arm", "lr", "runs", "percent"], rows, texts=[0, 1])


def draw(records: Sequence[Record], path: Path) -> None:
    """Writes a PNG: held-out loss against samples and against seconds. Best rates in full colour, others faint."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = best(records)
    chosen = {id(record) for group in found.values() for record in group}
    target = mean_loss(baseline(found))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(panels, ("samples", "seconds"), strict=True):
        named = set()
        for record in sorted(records, key=lambda one: id(one) in chosen):
            mine = id(record) in chosen
            label = f"{record.arm}, lr {record.lr:g}, {record.steps} steps" if mine else ""
            axis.plot(
                [point[key] for point in record.points],
                [point["loss"] for point in record.points],
                color=COLORS.get(record.arm, "#444444"),
                alpha=1 if mine else 0.2,
                linewidth=1.5 if mine else 0.8,
                label=None if label in named else label or None,
            )
            named.add(label)
        axis.axhline(target, color="#444444", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{key}{' of training' if key == 'seconds' else ''}")
        axis.grid(color="#e3e6ea", linewidth=0.7)
        axis.set_ylim(*_limits(records, target))
    panels[0].set_ylabel("held-out masked-LM loss, nats")
    panels[0].legend(fontsize=8)
    devices = sorted({record.device.split(";")[0] for record in records})
    figure.suptitle(f"BERT pre-training; {' / '.join(devices)}", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write(path, picture.getvalue())


def _limits(records: Sequence[Record], target: float) -> tuple[float, float]:
    """Of the losses that are shown: from the lowest to where the baseline's have fallen a tenth of the way."""
    lowest = min(point["loss"] for record in records for point in record.points)
    first = max(record.points[0]["loss"] for record in records if record.arm == BASELINE)
    top = target + 0.9 * max(first - target, 1e-3)
    return lowest - 0.03 * (top - lowest), top


def summary(directory: Path) -> str:
    """All tables, and a warning where seconds are not comparable."""
    records, tunings = read(directory)
    parts = [sweep_table(records), target_table(records)]
    devices = sorted({record.device.split(";")[0] for record in records})
    if len(devices) > 1:
        parts.append(f"seconds are of different machines, and do not compare: {', '.join(devices)}")
    if tunings:
        parts.append(tuning_table(tunings))
    return "\n\n".join(parts)
