"""The report in a real browser: Debian's chromium, driven by Selenium."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drlora_core.recording import Recording
from drlora_core.report import render, write_report
from drlora_core.report.serving import LivePage, make_server
from drlora_core.runs import Run, open_run
from tests.core import recorded
from tests.report.runs import write_run
from tests.report.test_report import HOSTILE

pytest.importorskip("plotly")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
PATIENCE = 120  # seconds


class Browser:
    """A headless browser with the requests and errors of the page that it shows."""

    def __init__(self) -> None:
        webdriver = pytest.importorskip("selenium.webdriver")
        service = pytest.importorskip("selenium.webdriver.chrome.service")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=service.Service(DRIVER))

    def open(self, address: str, width: int = 1000, scheme: str = "light") -> None:
        self.look(width, scheme)
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(address)
        self.wait("document.body.dataset.drawn === 'yes'")

    def look(self, width: int, scheme: str) -> None:
        """Change the width of the window and the color scheme of the system."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def wait(self, script: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < deadline, f"never true: {script}; {self.errors()}"
            time.sleep(0.1)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    made = Browser()
    yield made
    made.driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("browser")
    other = open_run(write_run(folder / "other", gamma=0.0))
    write_report(open_run(write_run(folder / "run")), against=other)
    return open_run(folder / "run")


@pytest.fixture
def page(run: Run) -> str:
    assert run.path is not None
    return (run.path / "report.html").as_uri()


def plot(key: str) -> str:
    return f"document.querySelector('[data-figure={key}]')"


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, 0 to 1."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, two: str) -> float:
    dark, bright = sorted((luminance(one), luminance(two)))
    return (bright + 0.05) / (dark + 0.05)


def test_figures_render_without_an_error_or_a_request(browser: Browser, page: str) -> None:
    browser.open(page)
    assert browser.run("document.getElementById('failed').hidden")
    drawn = browser.run(
        "[...document.querySelectorAll('[data-figure]')].map((each) => [each.dataset.figure, "
        "each.querySelectorAll('.main-svg').length, each.querySelectorAll('.trace, .hm').length, "
        "each.querySelector('.main-svg').getBoundingClientRect().width])"
    )
    keys = {"loss", "map", "total", "trajectories", "signals", "histogram", "routing", "lorenz"}
    assert {key for key, *_ in drawn} == keys | {"spread", "difference", "overlap"}
    for key, layers, traces, width in drawn:
        assert layers > 0, key
        assert traces > 0, key
        assert width > 300, key
    assert browser.run("document.querySelectorAll('.modebar-btn').length") == 2 * len(drawn)
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page]
    assert browser.errors() == []


def test_nothing_outside_can_be_asked(browser: Browser, page: str) -> None:
    browser.open(page)
    script = (
        "const end = arguments[0]; fetch('https://example.com/').then(() => end(), () => end())"
    )
    browser.driver.set_script_timeout(PATIENCE)
    browser.driver.execute_async_script(script)
    assert any("Content Security Policy" in error for error in browser.errors())


def test_the_slider_moves_the_ranks(browser: Browser, page: str, run: Run) -> None:
    browser.open(page)
    shown = f"{plot('map')}.data.findIndex((trace) => trace.visible === true)"
    image = f"{plot('map')}.querySelector('.hm image').href.baseVal"
    assert browser.run(shown) == len(run.events)
    before = browser.run(image)
    actions = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains
    browser.driver.execute_script(f"{plot('map')}.scrollIntoView({{block: 'center'}})")
    rail = browser.driver.find_element("css selector", "[data-figure=map] .slider-rail-touch-rect")
    left = 4 - int(rail.size["width"] / 2)
    deadline = time.monotonic() + PATIENCE
    while browser.run(shown) != 0 and time.monotonic() < deadline:  # a page that moves is missed
        actions(browser.driver).move_to_element_with_offset(rail, left, 0).click().perform()
        time.sleep(0.5)
    browser.wait(f"{shown} === 0")
    browser.wait(f"{image} !== {json.dumps(before)}")
    cells = browser.run(
        f"[0, 1].map((row) => Array.from({plot('map')}._fullData[0].z[row])"
        ".filter((rank) => !Number.isNaN(rank)))"
    )
    assert np.concatenate(cells).tolist() == run.ranks[0].tolist()
    label = browser.run(f"{plot('map')}.querySelector('.slider-label').textContent")
    assert label == "after step 0"
    browser.look(1000, "dark")  # drawn anew, it shows the same
    browser.wait(f"{shown} === 0")
    assert browser.errors() == []


CHOOSE = (
    "const list = document.querySelector('select[data-for=signals]'); list.value = '1';"
    "list.dispatchEvent(new Event('change'))"
)
NAMES = f"{plot('signals')}.data.map((trace) => trace.name).join()"


def test_a_layer_can_be_chosen(browser: Browser, page: str) -> None:
    browser.open(page)
    before = browser.run(NAMES)
    browser.driver.execute_script(CHOOSE)
    browser.wait(f"{NAMES} !== {json.dumps(before)}")


@pytest.mark.parametrize("width", [400, 1000, 1400])
def test_nothing_is_cut_off(width: int, browser: Browser, page: str) -> None:
    browser.open(page, width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = browser.run(
        "[...document.querySelectorAll('.plot')].filter((each) => "
        "each.querySelector('.main-svg').getBoundingClientRect().width > each.clientWidth + 1)"
        ".map((each) => each.dataset.figure)"
    )
    assert wide == []
    browser.look(1000 if width == 400 else 400, "light")  # a window that changes
    browser.wait(f"{plot('map')}.querySelector('.main-svg').clientWidth <= innerWidth - 20")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark_are_readable(browser: Browser, page: str) -> None:
    for scheme in ("light", "dark"):
        browser.open(page, 1000, scheme)
        back = browser.run("getComputedStyle(document.querySelector('.card')).backgroundColor")
        body = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (luminance(back) < 0.1) == (scheme == "dark")
        for part in (".xtick text", ".legendtext", ".ytitle"):
            color = browser.run(f"getComputedStyle(document.querySelector('{part}')).fill")
            assert contrast(color, back) > 4.5, (scheme, part)
        for part in ("body", ".lead", "figcaption", "nav a", "summary", ".good li"):
            color = browser.run(f"getComputedStyle(document.querySelector('{part}')).color")
            assert contrast(color, body) > 4.5, (scheme, part)
    browser.look(1000, "light")  # the system changes its mind while the page is open
    fill = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = "rgb(87, 96, 106)"
    browser.wait(f"{fill} === '{light}'")


def test_it_prints_in_black_on_white(browser: Browser, page: str) -> None:
    browser.open(page, 1000, "dark")
    made = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(base64.b64decode(made["data"])) > 30_000
    browser.wait(f"{plot('map')}.style.width === ''")
    assert browser.errors() == []


def test_hostile_names_are_shown_as_they_are(browser: Browser, tmp_path: Path) -> None:
    names = [HOSTILE, "<b>bold</b>", "<img src=x onerror=alert(1)>"]
    rng = np.random.default_rng(0)
    recorded_run = Recording.from_arrays({name: rng.random((20, 4)) for name in names})
    config = recorded.config(use_importance=False)
    (tmp_path / "page.html").write_text(render(recorded_run, config, title=HOSTILE))
    browser.open((tmp_path / "page.html").as_uri())
    assert browser.run("document.querySelector('h1').textContent") == HOSTILE
    ticks = browser.run(
        f"[...{plot('map')}.querySelectorAll('.ytick text')].map((each) => each.textContent)"
    )
    assert "<b>bold</b>" in ticks
    choices = browser.run("[...document.querySelectorAll('option')].map((e) => e.textContent)")
    assert set(names) <= set(choices)
    assert browser.run("document.querySelectorAll('svg b, svg img, h1 b').length") == 0
    assert browser.errors() == []


def test_a_watched_page_follows_the_run(browser: Browser, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "result.json").unlink()
    with make_server(LivePage(path, pause=0.0)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        assert "the training loss is 1.000" in browser.run("document.body.innerText")
        first = browser.run(NAMES)
        browser.driver.execute_script(CHOOSE)
        browser.wait(f"{NAMES} !== {json.dumps(first)}")
        chosen = browser.run(NAMES)
        browser.driver.execute_script(f"Plotly.relayout({plot('map')}, 'sliders[0].active', 1)")
        with (path / "metrics.jsonl").open("a") as file:
            file.write('\n{"step": 22, "loss": 0.75}\n')
        browser.wait("document.body.innerText.includes('the training loss is 0.750')")
        browser.wait("document.body.dataset.drawn === 'yes'")
        assert browser.run(NAMES) == chosen  # what the reader looked at is kept
        shown = f"{plot('map')}.data.map((trace) => trace.visible)"
        assert browser.run(shown) == [False, True, False, False]
        assert browser.run(f"{plot('map')}.layout.sliders[0].active") == 1
        server.shutdown()
        thread.join()
    assert all("127.0.0.1" in url or url.startswith("data:") for url in browser.requests())
