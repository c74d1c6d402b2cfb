"""A report in a few lines: what was run on what, the whole step's numbers, its phases, what profiling cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from profiler.ceilings import BANDWIDTH
from profiler.grid import fill, grid
from profiler.judge import Judged, Judgement
from profiler.times import Spent
from profiler.units import NOTHING, joules, many, percentage, quantity, seconds

if TYPE_CHECKING:
    from profiler.report import Report


def summary(judged: Judged) -> str:
    """The whole step, a line for each thing that is known."""
    found = [*_setting(judged.report), *_size(judged.report), *_speed(judged)]
    wide = max(len(name) for name, _ in found)
    indent = " " * (wide + 2)
    return "\n".join(fill(value, f"{name:<{wide}}  ", indent) for name, value in found)


def _setting(report: Report) -> Iterator[tuple[str, str]]:
    workload, limits, machine = report.workload, report.limits, report.machine
    amounts = [
        many(amount, name)
        for name, amount in (("sample", workload.samples), ("token", workload.tokens))
        if amount is not None
    ]
    if workload.micro_batches > 1:
        amounts.append(f"{workload.micro_batches} micro-batches")
    yield "workload", ", ".join([workload.mode, workload.precision, *amounts])
    if workload.world_size > 1:
        parallel = f"data parallel {workload.data_parallel}, tensor parallel {workload.tensor_parallel}"
        yield "process", f"rank {workload.rank} of {workload.world_size}: {parallel}"
    if limits is not None:
        peak = f"{quantity(limits.peak(workload.precision), 'FLOP/s')} {workload.precision}"
        sources = " and ".join(dict.fromkeys([limits.sources[workload.precision], limits.sources[BANDWIDTH]]))
        clock = f", held to {limits.clock} MHz" if limits.clock else ""
        yield "device", f"{limits.device}: {peak}, {quantity(limits.bandwidth, 'B/s')} ({sources}){clock}"
    elif "device" in machine:
        yield "device", machine["device"]
    software = [f"{name} {version}" for name, version in machine.items() if name != "device"]
    if software:
        yield "software", ", ".join(software)


def _size(report: Report) -> Iterator[tuple[str, str]]:
    root, parallel = report.counts.root, report.workload.tensor_parallel
    size = f"{quantity(root.total_parameters)} ({quantity(root.total_parameter_bytes, 'B')})"
    whole = f"; of the model {quantity(root.total_parameters * parallel)}" if parallel > 1 else ""
    yield "parameters", size + whole
    yield "activations", f"{quantity(root.total_activation_bytes, 'B')} alive when the forward pass ends"


def _speed(judged: Judged) -> Iterator[tuple[str, str]]:
    report, timing = judged.report, judged.report.timing
    if timing is None or judged.seconds is None:
        return
    detail = judged.detail_seconds
    also = "" if detail is None else f"; {seconds(detail)} while it was timed, of which are the times of its parts"
    yield "step", seconds(judged.seconds) + also
    rates = [(judged.samples_per_second, "samples/s"), (judged.tokens_per_second, "tokens/s")]
    known = [(rate, unit) for rate, unit in rates if rate is not None]
    if known:
        text = ", ".join(f"{quantity(rate)} {unit}" for rate, unit in known)
        parallel = report.workload.data_parallel
        whole = ", ".join(f"{quantity(rate * parallel)} {unit}" for rate, unit in known)
        yield "throughput", text + (f"; of all processes {whole}" if parallel > 1 else "")
    if judged.mfu is not None:
        rate = f"{quantity(judged.model_flops / judged.seconds, 'FLOP/s')} of products"
        again = f"; HFU {percentage(judged.hfu)} with what is recomputed" if judged.hfu != judged.mfu else ""
        yield "utilization", f"MFU {percentage(judged.mfu)} ({rate}){again}"
        yield "roofline", f"the step as a whole reaches {percentage(judged.efficiency)} of it"
    if report.energy is not None:
        each = [(judged.joules_per_sample, "sample"), (judged.joules_per_token, "token")]
        text = ", ".join(f"{joules(each_one)} a {what}" for each_one, what in each if each_one is not None)
        power = f"{joules(report.energy.joules)} a step" + (f", {text}" if text else "")
        yield "energy", f"{power}; {quantity(judged.watts, 'W')} (NVML, {report.energy.source})"


def phases(judged: Judged) -> str:
    """A row for each phase, collectives, idle time, and the sum."""
    timing = judged.report.timing
    rows = [_row(phase, judged.total("", phase), judged) for phase in judged.phases]
    if timing is not None and judged.communication.calls:
        rows.append(_row("collectives", Judgement(spent=judged.communication), judged))
    if timing is not None and timing.idle_seconds:
        rows.append(_row("idle", Judgement(spent=Spent(timing.idle_seconds)), judged))
    if len(rows) > 1:
        whole = judged.total("")
        rows.append(_row("all", whole if timing is None else replace(whole, spent=Spent(timing.step_seconds)), judged))
    headers = ["phase", "calls", "MACs", "FLOPs", "FLOPs\nexec.", "bytes", "time", "share", "FLOP/s", "bytes/s"]
    headers += ["roof-\nline", "bound"]
    # A column without a number is left out.
    used = [at for at in range(len(headers)) if at == 0 or any(row[at] != NOTHING for row in rows)]
    if not executed_differs(judged):
        used = [at for at in used if headers[at] != "FLOPs\nexec."]
    return grid([headers[at] for at in used], [[row[at] for at in used] for row in rows])


def executed_differs(judged: Judged) -> bool:
    """Whether executed FLOPs are worth a column: the sums of biases alone are not."""
    work = judged.report.counts.total()
    return abs(work.executed_flops - work.flops) > 0.01 * work.flops


def _row(name: str, judgement: Judgement, judged: Judged) -> list[str]:
    work = judgement.work
    counted = [work.operators, work.macs, work.flops, work.executed_flops, judgement.bytes]
    return [
        name,
        *(quantity(number) if number else NOTHING for number in counted),
        seconds(judgement.seconds),
        _share(judgement.seconds, judged),
        quantity(judgement.flops_rate or None),
        quantity(judgement.bytes_rate or None),
        percentage(judgement.efficiency or None),
        judgement.bound or NOTHING,
    ]


def _share(spent: float | None, judged: Judged) -> str:
    timing = judged.report.timing
    if spent is None or timing is None or not timing.step_seconds:
        return NOTHING
    return percentage(spent / timing.step_seconds)


def cost(report: Report) -> str:
    """What profiling took, and how much slower a step is while it is timed."""
    parts = [f"counting {seconds(report.counting_seconds)}"]
    timing = report.timing
    if timing is not None:
        parts.append(
            f"timing {seconds(report.timing_seconds)} ({timing.steps} steps after {timing.warm_up} of warm-up)"
        )
        if timing.plain_seconds:
            slower = timing.step_seconds / timing.plain_seconds
            parts.append(
                f"a timed step takes {seconds(timing.step_seconds)}, {slower:.2f} times the plain one "
                f"({seconds(timing.plain_seconds)})"
            )
    return fill("; ".join(parts))
