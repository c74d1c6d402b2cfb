"""A report as JSON: there and back, as its schema says, and what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from profiler import ProfilerError, Report, profile
from profiler.report import schema
from tests.profiler.reports import LIMITS, hand_made, random_reports


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(random_reports())
def test_there_and_back(report):
    assert Report.from_dict(report.to_dict()) == report
    assert Report.from_dict(json.loads(report.to_json())) == report


def test_a_real_report_is_as_the_schema_says():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()

    data = json.loads(profile(step, model, samples=4, limits=LIMITS, repeats=1).to_json())
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(data, schema())
    assert data["judged"]["hot_spots"]
    assert data["judged"]["modules"]["0"]["own"]["bound"] in ("memory", "compute", "latency")


def test_everything_in_the_schema_is_described():
    def visit(node, path):
        for name, value in node.get("properties", {}).items():
            assert value.get("description"), f"{path}/{name}"
            visit(value, f"{path}/{name}")
        for name, value in node.get("$defs", {}).items():
            assert value.get("description"), name
            visit(value, name)

    visit(schema(), "")
    # Nothing may slip in that is not described.
    assert all(not one["additionalProperties"] for one in schema()["$defs"].values())


def test_what_is_judged_is_not_read_but_found_anew():
    data = hand_made().to_dict()
    judged = data.pop("judged")
    assert judged["mfu"] == pytest.approx(0.2993, rel=1e-3)
    assert Report.from_dict(data) == hand_made()


def broken(change):
    data = copy.deepcopy(json.loads(hand_made().to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("schema"), "not a profile: it has no schema. Give the JSON"),
        (lambda data: data.update(schema=2), "a profile of schema 2, and this version reads 1: profile again"),
        (lambda data: data.pop("counts"), r"a damaged profile: \$: 'counts' is a required property"),
        (lambda data: data["counts"]["root"].update(parameters="12"), r"\$\.counts\.root\.parameters: '12' is not"),
        (lambda data: data["timing"].update(step_seconds=-1), r"\$\.timing\.step_seconds: -1 is less than"),
        (lambda data: data["workload"].update(colour="red"), r"\$\.workload: Additional properties are not allowed"),
        (lambda data: data["workload"].update(precision="fp8"), "Test device has no ceiling for fp8"),
        (lambda data: data["limits"]["sources"].pop("fp32"), "a rate has no source"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(change, message):
    with pytest.raises(ProfilerError, match=message) as caught:
        Report.from_dict(broken(change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_other_json_is_refused(data):
    with pytest.raises(ProfilerError, match="not a profile"):
        Report.from_dict(data)


def test_save_and_load(tmp_path):
    path = tmp_path / "deep" / "report.json"
    hand_made().save(path)
    assert Report.load(path) == hand_made()
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["", "{", '{"schema": NaN}', "[" * 100_000, "\udcff"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ProfilerError, match=r"report\.json: not a profile, as it is no JSON: "):
        Report.load(path)
    with pytest.raises(ProfilerError, match=r"none\.json: cannot be read: No such file"):
        Report.load(tmp_path / "none.json")
    path.write_text('{"schema": 7}')
    with pytest.raises(ProfilerError, match=r"report\.json: a profile of schema 7"):
        Report.load(path)


def test_one_format_has_the_name_that_was_given(tmp_path):
    report = hand_made()
    assert report.write(("table",), tmp_path / "a.out") == (tmp_path / "a.out",)
    assert (tmp_path / "a.out").read_text().startswith("Profile of Net\n")
    report.write(("json",), tmp_path / "b")
    assert Report.load(tmp_path / "b") == report


def test_several_formats_have_endings_of_their_own(tmp_path):
    found = hand_made().write(("table", "json"), tmp_path / "profile.out", detailed=False)
    assert found == (tmp_path / "profile.txt", tmp_path / "profile.json")
    assert "(3 alike)" in found[0].read_text()


def test_a_table_without_a_file_is_printed(capsys):
    assert hand_made().write(module_depth=0) == ()
    printed = capsys.readouterr().out
    assert printed.startswith("Profile of Net\n")
    assert "layers.1" not in printed


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    report = hand_made()
    with pytest.raises(ProfilerError, match="no format 'xml': there are table, json, html, chrome_trace"):
        report.write(("json", "xml"), tmp_path / "a")
    with pytest.raises(ProfilerError, match="the format json needs a file"):
        report.write(("table", "json"))
    with pytest.raises(ProfilerError, match="has no events for a timeline: profile with events=True"):
        report.write(("json", "chrome_trace"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ProfilerError, match="the profile cannot be written"):
        report.save(tmp_path / "file" / "report.json")


def test_printing_a_report_prints_its_tables():
    assert str(replace(hand_made(), name="Other")).startswith("Profile of Other\n")
