"""What a model costs: counting, timing and judging of any ``nn.Module`` and of slipstream's own plans.

Reads the costs that ``ops`` registers beside its kernels; knows nothing of ``engine``.
"""

from ops.costs import Cost, register_cost
from profiler.counter import Counter, count
from profiler.counts import PHASES, Counts, ModuleCounts, Phase, Work
from profiler.errors import ProfilerError
from profiler.judge import Judged, Judgement
from profiler.model_profile import get_model_profile
from profiler.profile import Profiler, profile
from profiler.report import Energy, Report, Workload
from profiler.timer import Timer, timed
from profiler.times import Event, Spent, Timing

__all__ = [
    "PHASES",
    "Cost",
    "Counter",
    "Counts",
    "Energy",
    "Event",
    "Judged",
    "Judgement",
    "ModuleCounts",
    "Phase",
    "Profiler",
    "ProfilerError",
    "Report",
    "Spent",
    "Timer",
    "Timing",
    "Work",
    "Workload",
    "count",
    "get_model_profile",
    "profile",
    "register_cost",
    "timed",
]
