"""The suite's own report: run on small suites in a process of their own, with and without xdist."""

from __future__ import annotations

import os

import pytest

from tests.conftest import ROOT
from tests.plugins.house_report import package_of

SUITE = """
    import pytest

    def test_plain():
        pass

    @pytest.mark.{marker}
    @pytest.mark.parametrize("n", range(3))
    def test_marked(n):
        assert n >= 0
"""

STAND_IN = """
    from tests.plugins import house_report

    house_report.REQUIREMENTS["gpu"] = lambda: {reason!r}
"""

PLUGINS = ("-p", "tests.plugins.house_report", "-p", "xdist", "-p", "no:cacheprovider")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Run pytest on ``tests/area/test_x.py`` with our plugin, outside of this process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the inner runs start twice as fast
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST", "COV_CORE"))]:
        monkeypatch.delenv(name)

    def go(suite: str, *arguments: str, reason: str | None = None) -> pytest.RunResult:
        area = pytester.mkpydir("area_suite")
        (area / "inner").mkdir()
        pytester.makepyfile(**{"area_suite/inner/test_x": suite})
        pytester.makeconftest(STAND_IN.format(reason=reason))
        return pytester.runpytest_subprocess(*PLUGINS, *arguments)

    return go


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_unmet_marker_is_skipped_and_counted_once(run, workers):
    result = run(SUITE.format(marker="gpu"), "--max-minutes=5", *workers, reason="no such card")
    result.assert_outcomes(passed=1, skipped=3)
    assert result.ret == pytest.ExitCode.OK
    lines = result.outlines
    assert "gpu: 3 of 3 tests not run: no such card" in lines
    assert "netns: no tests in this run" in lines
    table = next(line for line in lines if line.startswith("area_suite/inner ") and " min " in line)
    assert table.split()[-2:] == ["4", "tests"]
    assert "passed" in lines[-1]


def test_met_marker_runs(run):
    result = run(SUITE.format(marker="gpu"), "--max-minutes=5", reason=None)
    result.assert_outcomes(passed=4)
    assert "gpu: all 3 tests run" in result.outlines


def test_a_folder_named_like_a_marker_marks_nothing(run, pytester):
    pytester.mkpydir("gpu").joinpath("test_y.py").write_text("def test_unmarked():\n    pass\n", encoding="utf-8")
    result = run(SUITE.format(marker="netns"), "--max-minutes=5", "gpu")
    assert "gpu: no tests in this run" in result.outlines


def test_own_skip_of_a_marked_test_is_reported_with_its_reason(run):
    suite = """
        import pytest

        @pytest.mark.gpu
        def test_needs_more():
            pytest.skip("needs 80 GB")

        @pytest.mark.gpu
        def test_needs_less():
            pass
    """
    result = run(suite, "--max-minutes=5")
    assert "gpu: 1 of 2 tests not run: needs 80 GB" in result.outlines


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_run_over_the_limit_fails_though_every_test_passed(run, workers):
    result = run(SUITE.format(marker="gpu"), "--max-minutes=0", *workers)
    result.assert_outcomes(passed=4)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["on the clock * min of 0: TOO SLOW"])


def test_a_failing_test_still_fails_within_the_limit(run):
    result = run("def test_wrong():\n        assert 1 == 2", "--max-minutes=5")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["on the clock * min of 5: within the limit"])


def test_without_a_limit_only_what_was_not_run_is_printed(run):
    quiet = run("def test_right():\n        pass")
    assert "minutes per package" not in quiet.stdout.str()
    assert "not run on this machine" not in quiet.stdout.str()


@pytest.mark.parametrize(
    ("nodeid", "package"),
    [
        ("tests/ops/eager/test_x.py::TestY::test_z[a::b/c]", "tests/ops"),
        ("tests/ops/test_x.py::test_z", "tests/ops"),
        ("tests/test_x.py::test_z", "tests"),
        ("test_x.py::test_z", "."),
    ],
)
def test_package_of_a_node_id(nodeid, package):
    assert package_of(nodeid) == package
