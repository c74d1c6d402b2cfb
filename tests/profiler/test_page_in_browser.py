"""The page in headless Chromium, opened as a file: what it draws, what clicks and keys do, what it never does."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from profiler.counts import Counts, ModuleCounts
from profiler.judge import Judged
from profiler.page import page
from profiler.report import Report, Workload
from tests.profiler.reports import LIMITS, branch, elementwise, hand_made, leaf, product, timing_of
from tests.profiler.test_page import REPORTS, hostile, on_gpu

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-device-scale-factor=1"
)
WIDE, NARROW = 1280, 390


class Browser:
    """Chromium, driven: pages by their text, elements by CSS."""

    def __init__(self, driver, folder: Path) -> None:
        self.driver, self._folder, self._pages = driver, folder, 0

    def open(self, text: str, width: int = WIDE, scheme: str = "light") -> None:
        self._pages += 1
        file = self._folder / f"{self._pages}.html"
        file.write_text(text, encoding="utf-8")
        self.driver.get("about:blank")
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.resize(width)
        self.scheme(scheme)
        self.driver.get(file.as_uri())

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def scheme(self, name: str) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 60).until(lambda _: self.run(script))

    def all(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", css)

    def click(self, css: str, text: str | None = None) -> None:
        (element,) = (each for each in self.all(css) if text is None or each.text.strip("↓↑ \n") == text)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def hover(self, css: str) -> str:
        """Move the pointer to the first such element; what plotly then says."""
        from selenium.webdriver import ActionChains

        element = self.all(css)[0]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        plot = "document.querySelector(arguments[0]).closest('.plot')"
        ActionChains(self.driver).move_to_element(element).perform()
        from selenium.webdriver.support.wait import WebDriverWait

        said = f"return {plot}.querySelector('.hoverlayer').textContent"
        return WebDriverWait(self.driver, 30).until(lambda _: self.run(said, css))

    def column(self, table: str, heading: str) -> list[str]:
        headings = [text.strip() for text in self.texts(f"#{table} thead th")]
        return self.texts(f"#{table} tbody tr > :nth-child({headings.index(heading) + 1})")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    for flag in [*FLAGS.split(), *root, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()


def large(layers: int = 48) -> Report:
    """Some 1,100 modules."""

    def block(number: int) -> ModuleCounts:
        name = f"layers.{number}"
        parts = [
            branch(
                f"{name}.{part}",
                "Part",
                *(
                    leaf(f"{name}.{part}.{index}", "Linear", 4096, forward={"aten.mm": product(256, 64, 64)})
                    for index in range(10)
                ),
            )
            for part in ("attention", "mlp")
        ]
        return branch(name, "Block", *parts)

    model = branch("Decoder", "Decoder", branch("layers", "ModuleList", *map(block, range(layers))))
    counts = Counts(ModuleCounts("", "", own={"forward": {"aten.add": elementwise(10)}}, children=(model,)))
    return Report("Decoder", Workload(), counts, timing_of(counts), LIMITS)


def seconds(text: str) -> float:
    """What a cell says, as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(s|ms|µs|ns)", text).groups()
    return float(number) * {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]


@pytest.mark.parametrize("kind", REPORTS)
def test_draws_everything_without_a_request_or_an_error(browser, kind):
    report = REPORTS[kind]()
    browser.open(page(report))
    drawn = browser.texts(".plot svg.main-svg:first-child")
    assert len(drawn) == (3 if report.limits else 2)
    assert browser.texts("#table tbody tr")
    assert browser.driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("kind", ["gpu", "counts"])
def test_fits_the_screen_and_stays_where_it_is(browser, kind, width):
    browser.open(page(REPORTS[kind]()), width)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    shift = browser.run(
        "return new Promise(done => { let sum = 0; new PerformanceObserver(list => list.getEntries()"
        ".forEach(entry => sum += entry.value)).observe({type: 'layout-shift', buffered: true});"
        "requestAnimationFrame(() => setTimeout(() => done(sum), 300)) })"
    )
    assert shift < 0.1  # web.dev/cls: "good"


def test_names_never_run(browser):
    browser.open(page(hostile()))
    name = hostile().name
    assert browser.run("return window.ran") is None
    assert browser.texts("h1") == [name]
    assert browser.texts("#module-table tbody th")[1].endswith(name * 2)  # its label, and its class
    assert browser.all("img") == []
    marked = "<img src=x onerror='window.ran=1'>&lt;"
    assert any(marked in text for text in browser.texts("#plot-flame .slice text"))
    assert marked in browser.hover("#plot-flame .slice path.surface")
    assert marked in browser.hover("#plot-roofline .trace .point")
    assert browser.run("return window.ran") is None
    assert browser.driver.get_log("browser") == []


def test_a_heading_sorts_and_says_so(browser):
    browser.open(page(hand_made()))
    browser.click("#module-view button", "List")
    before = browser.texts("#module-table tbody th")
    heading = "#module-table thead th:nth-child(2)"
    orders = []
    for _ in range(3):
        browser.click(f"{heading} button")
        times = [seconds(text) for text in browser.column("module-table", "Time") if text[0].isdigit()]
        orders.append((browser.all(heading)[0].get_attribute("aria-sort"), times))
    assert [order for order, _ in orders] == ["descending", "ascending", None]
    assert orders[0][1] == sorted(orders[0][1], reverse=True)
    assert orders[1][1] == sorted(orders[1][1])
    assert len(set(orders[0][1])) > 3
    assert browser.texts("#module-table tbody th") == before
    assert browser.texts("thead th:not([scope=col])") == browser.texts("tbody th:not([scope=row])") == []


def test_a_tree_sorts_among_siblings(browser):
    browser.open(page(hand_made()))
    browser.click("#module-table thead button", "Module")
    names = [text for text in browser.texts("#module-table tbody th") if re.match(r"\d", text)]
    assert names == ["0Layer", "1Layer", "2Layer"]
    browser.click("#module-table thead button", "Module")
    names = [text for text in browser.texts("#module-table tbody th") if re.match(r"\d", text)]
    assert names == ["2Layer", "1Layer", "0Layer"]
    assert browser.texts("#module-table tbody th")[0] == "Netwhole step"


def test_modules_fold_by_mouse_and_by_key(browser):
    from selenium.webdriver import Keys

    browser.open(page(hand_made()))
    everything = browser.texts("#module-table tbody th")
    (fold,) = (each for each in browser.all("#module-table .fold") if each.get_attribute("aria-label") == "layers.1")
    assert fold.get_attribute("aria-expanded") == "true"
    fold.send_keys(Keys.ENTER)
    folded = browser.texts("#module-table tbody th")
    assert len(folded) == len(everything) - 2
    focused = browser.driver.switch_to.active_element
    assert focused.get_attribute("aria-label") == "layers.1"
    assert focused.get_attribute("aria-expanded") == "false"
    focused.click()
    assert browser.texts("#module-table tbody th") == everything


def test_the_filter_finds_names_and_classes(browser):
    browser.open(page(hand_made()))
    field = browser.all("#module-filter")[0]
    field.send_keys("newgelu")
    assert browser.texts("#module-table tbody th") == [f"layers.{index}.actNewGELU" for index in range(3)]
    assert browser.texts("#module-count") == ["3 rows"]
    field.clear()
    field.send_keys("no such module")
    assert browser.texts("#module-table tbody tr") == ["Nothing here."]
    browser.all("#operator-filter")[0].send_keys("tanh")
    assert browser.texts("#operator-table tbody th") == ["aten.tanh"]


def test_a_phase_changes_plots_and_tables(browser):
    report = hand_made()
    judged = Judged(report)
    browser.open(page(report))
    widths = "return document.getElementById('plot-flame').data[0].values"
    dots = "return document.getElementById('plot-roofline').data.flatMap(t => t.customdata || []).filter(Boolean)"
    whole = sum(browser.run(widths))
    assert whole == pytest.approx(report.timing.step_seconds)
    for label, phase in (("Forward", "forward"), ("Backward", "backward"), ("Optimizer", "step")):
        browser.click("#phases button", label)
        taken = judged.total("", phase).seconds
        assert seconds(browser.column("module-table", "Time")[0]) == pytest.approx(taken, rel=0.01)
        assert sum(browser.run(widths)) == pytest.approx(taken)
        listed = browser.texts("#operator-table tbody th")
        assert sorted(listed) == sorted(report.counts.root.operators(phase))
        pressed = [each.text for each in browser.all("#phases button[aria-pressed=true]")]
        assert pressed == [label]
        assert len(browser.run(dots)) == {"forward": 8, "backward": 6, "step": 1}[phase]


def test_a_dot_says_what_it_is(browser):
    report = hand_made()
    browser.open(page(report))
    own = Judged(report).own("head")
    dot = browser.run(
        "const plot = document.getElementById('plot-roofline');"
        "const at = plot.data.findIndex(t => (t.customdata || []).some(text => text.includes('<b>head</b>')));"
        "const index = plot.data[at].customdata.findIndex(text => text.includes('<b>head</b>'));"
        "return {x: plot.data[at].x[index], y: plot.data[at].y[index], text: plot.data[at].customdata[index]}"
    )
    assert dot["x"] == pytest.approx(own.intensity)
    assert dot["y"] == pytest.approx(own.flops_rate)
    assert f"{100 * own.efficiency:.0f}% of the roofline, bound by memory" in dot["text"]
    assert "operations a byte" in browser.hover("#plot-roofline .trace .point")


def test_a_click_enters_a_module_of_the_flame_graph(browser):
    browser.open(page(hand_made()))
    said = browser.hover("#plot-flame .slice path.surface")
    assert "of the step" in said
    (slice_,) = (each for each in browser.all("#plot-flame g.slice") if each.text == "layers")
    slice_.click()
    browser.wait("return document.querySelectorAll('#plot-flame .pathbar').length > 1")
    assert browser.run("return document.getElementById('plot-flame')._fullData[0].level") != "0"


@pytest.mark.parametrize(("group", "label"), [("flame-by", "Traffic"), ("memory-by", "Parameters")])
def test_what_a_plot_shows_can_be_chosen(browser, group, label):
    report = hand_made()
    browser.open(page(report))
    browser.click(f"#{group} button", label)
    plot = {"flame-by": "plot-flame", "memory-by": "plot-memory"}[group]
    total = report.counts.total()
    expected = {
        "flame-by": total.bytes_read + total.bytes_written,
        "memory-by": report.counts.root.total_parameter_bytes,
    }[group]
    assert sum(browser.run("return document.getElementById(arguments[0]).data[0].values", plot)) == expected


def test_no_button_sends_anything(browser):
    browser.open(page(hand_made()))
    titles = browser.run("return [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert titles
    assert not [title for title in titles if re.search("share|cloud|chart studio", title, re.IGNORECASE)]


CONTRAST = """
const luminance = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
  return "rgb(255, 255, 255)";
};
const found = {};
for (const element of document.querySelectorAll("body *")) {
  const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!text || element.closest("script, noscript, svg, .js-plotly-plot") || !element.offsetParent) continue;
  const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((x, y) => y - x);
  const name = `${element.tagName}.${element.className} in ${element.parentElement.className}`;
  found[name] = Math.min(found[name] || 99, (a + 0.05) / (b + 0.05));
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, scheme):
    browser.open(page(replace(on_gpu(), notes=("A note.",))), scheme=scheme)
    found = browser.run(CONTRAST)
    assert len(found) > 20
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}  # WCAG 2.2, 1.4.3


def test_plots_follow_the_scheme(browser):
    browser.open(page(hand_made()))
    ink = "return document.getElementById('plot-roofline').layout.annotations[0].font.color"
    slices = "return getComputedStyle(document.querySelector('#plot-flame .slice path.surface')).fill"
    light = browser.run(ink), browser.run(slices), browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.scheme("dark")
    browser.wait(f"return (() => {{ {ink} }})() !== '{light[0]}'")
    dark = browser.run(ink), browser.run(slices), browser.run("return getComputedStyle(document.body).backgroundColor")
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert "var(" not in browser.run("return JSON.stringify(document.getElementById('plot-roofline').layout)")


def test_a_thousand_modules_stay_usable(browser):
    report = large()
    count = sum(1 for _ in report.counts.root.walk()) + 1  # and what lies between modules
    assert count > 1000
    browser.open(page(report))
    assert len(browser.texts("#module-table tbody tr")) < 100
    browser.click("#module-fold button", "Unfold all")
    assert len(browser.texts("#module-table tbody tr")) == 300
    browser.click("#module-more")
    assert len(browser.texts("#module-table tbody tr")) == count
    assert browser.texts("#module-count") == [f"{count:,} rows"]
    browser.click("#module-fold button", "Fold")
    assert len(browser.texts("#module-table tbody tr")) < 20
    browser.all("#module-filter")[0].send_keys("layers.47.mlp.9")
    assert browser.texts("#module-table tbody th") == ["layers.47.mlp.9Linear"]
    assert len(browser.run("return document.getElementById('plot-flame').data[0].values")) == count


def test_a_narrow_screen_has_the_labels_that_count(browser):
    browser.open(page(hand_made()), NARROW)
    labels = "return document.getElementById('plot-roofline').layout.annotations.map(label => label.text)"
    assert not [text for text in browser.run(labels) if "bf16" in text]
    browser.resize(WIDE)
    browser.wait("return document.getElementById('plot-roofline').layout.annotations.length > 3")
    assert [text for text in browser.run(labels) if "bf16" in text]
