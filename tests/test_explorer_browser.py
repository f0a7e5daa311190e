"""The page in a real browser, headless: it draws, leads from one part to another, is quick at 10,000 calls, and logs no error."""

import importlib.util
import json
import re
import shutil
import time
from importlib import resources

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.explorer import Story, document, page
from graphwright.ir.liveness import format_bytes
from graphwright.passes import Contract

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HAS_SELENIUM = importlib.util.find_spec("selenium") is not None
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER and HAS_SELENIUM),
    reason="needs a browser: apt-get install chromium chromium-driver, pip install 'graphwright[browser]'",
)

USABLE = 3.0  # seconds until a program of 10,000 calls can be used


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800", "--force-device-scale-factor=1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """An open page; `log` is empty as long as no script and no policy complained."""

    def __init__(self, browser, path):
        self.browser = browser
        self.start = time.perf_counter()
        browser.get(path.as_uri())
        self.wait("document.body.dataset.ready === 'true'")
        self.seconds = time.perf_counter() - self.start

    def js(self, script):
        return self.browser.execute_script(script)

    def wait(self, condition, seconds=20):
        end = time.perf_counter() + seconds
        while not self.js(f"return Boolean({condition})"):
            assert time.perf_counter() < end, f"never came: {condition}; {self.log}"
            time.sleep(0.02)

    def click(self, selector):
        self.browser.find_element("css selector", selector).click()

    def keys(self, text):
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(text).perform()

    def text(self, selector):
        return self.js(f"return document.querySelector({json.dumps(selector)})?.innerText")

    @property
    def selected(self):
        """The text of the selected line, where it is in sight."""
        return self.js(
            "const row = document.querySelector('#text .row.now'); if (!row) return null;"
            "const box = row.getBoundingClientRect(), list = document.querySelector('#text').getBoundingClientRect();"
            "return box.top >= list.top && box.bottom <= list.bottom ? row.innerText : null"
        )

    @property
    def ink(self):
        """How many colours there are on the graph's canvas, on a grid of its pixels."""
        return self.js(
            "const c = document.querySelector('#canvas'), p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();"
            "for (let i = 0; i < p.length; i += 28) seen.add(p[i] * 65536 + p[i + 1] * 256 + p[i + 2]); return seen.size"
        )

    @property
    def boxes(self):
        """How many boxes the graph has."""
        return int(
            re.search(r"in ([\d,]+) box", self.js("return document.querySelector('#canvas').getAttribute('aria-label')"))[1].replace(
                ",", ""
            )
        )

    @property
    def log(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["source"] != "rendering"]  # advice on speed


def script(name):
    """What a script of the page defines, in front of a script that asks it."""
    return (resources.files("graphwright.explorer") / "page" / name).read_text() + "\n"


@pytest.fixture(scope="module")
def unet(browser, tmp_path_factory):
    module, args, kwargs = gw.models.load("video_unet", "tiny", frames=16, height=16, width=16)
    passes = "slice-groups{memory_budget=25%}"
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten", cache=False)
    compiled.profile(*args, **kwargs)
    path = tmp_path_factory.mktemp("unet") / "report.html"
    compiled.report().html(path)
    return path, compiled.report().data()


@pytest.fixture
def page_of_unet(browser, unet):
    opened = Page(browser, unet[0])
    yield opened
    assert opened.log == []


def test_a_sliced_network_is_drawn(page_of_unet, unet):
    opened, found = page_of_unet, unet[1]
    assert "VideoUNet" in opened.text("#title") and opened.text("#contract") == "exact"
    assert opened.js("return document.querySelectorAll('#stages button').length") == len(found["stages"])
    opened.wait("document.querySelector('#panel-memory canvas')")
    assert opened.ink > 20  # boxes, edges and words; an empty canvas has one colour
    assert "…" in opened.text("#text") and "weights" in opened.text("#text")
    assert opened.js("return document.querySelectorAll('#text .row').length") < 80  # only what is in sight exists


def test_a_click_on_a_tensor_at_the_peak_leads_to_its_line(page_of_unet, unet):
    opened = page_of_unet
    memory = unet[1]["programs"][-1]["functions"][0]["memory"]
    held = [s for s in memory["storages"] if s["born"] <= memory["peak_at"] <= s["dies"]]
    second = sorted(held, key=lambda s: (-s["bytes"], s["born"]))[1]
    opened.wait("document.querySelectorAll('#memory-side .row').length > 1")
    opened.click("#memory-side .row:nth-child(2)")
    line = unet[1]["programs"][-1]["lines"][second["line"]]["text"]
    assert line.strip() in opened.selected
    opened.click("#tab-source")
    where = unet[1]["wheres"][unet[1]["programs"][-1]["lines"][second["line"]]["where"]]
    assert opened.text("#source .row.now .gutter") == str(where["line"]) and where["file"] in opened.text("#file")


def test_a_line_of_the_users_leads_to_the_lines_that_came_from_it(page_of_unet):
    opened = page_of_unet
    opened.wait("document.querySelectorAll('#memory-side .row').length > 1")
    opened.click("#memory-side .row:nth-child(2)")
    opened.click("#tab-source")
    opened.click("#source .row.near")
    assert opened.selected is not None
    assert opened.js("return document.querySelectorAll('#text .row.lit').length") > 0


def test_stages_show_what_changed(page_of_unet, unet):
    opened = page_of_unet
    opened.click("[data-mode=previous]")
    assert opened.text("#said") == unet[1]["differences"][-2]["said"]
    opened.wait("document.querySelectorAll('#text .row.add').length > 0")
    opened.click("#stages button:first-child")
    assert opened.js("return document.querySelector('[data-mode=text]').getAttribute('aria-checked')") == "true"
    assert opened.js("return document.querySelectorAll('#text .row.add').length") == 0


def test_a_stage_without_a_difference_to_the_captured_program_shows_that_to_the_stage_before(page_of_unet):
    page_of_unet.click('[data-mode="captured"]')
    page_of_unet.keys("[")
    page_of_unet.wait("document.querySelector('[data-mode=captured]').hidden")
    assert page_of_unet.js("return document.querySelector('[data-mode=previous]').getAttribute('aria-checked')") == "true"


def test_the_captured_curve_keeps_all_its_calls_over_the_width_of_the_other(page_of_unet):
    axis, captured, live = page_of_unet.js(script("memory.js") + "return curves([5, 7], [1, 9, 2, 3, 4, 8])")
    assert axis == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert captured == [1, 9, 2, 3, 4, 8, 8] and live == [5, 5, 5, 7, 7, 7, 7]


def test_bytes_are_rounded_as_the_report_in_words_rounds_them(page_of_unet):
    counts = [0, 1023, 1024, 1152, 1408, 1664, 1920, 9 * 2**17, 11 * 2**17, 13 * 2**17, 5 * 2**30 + 2**27]
    assert page_of_unet.js(f"{script('report.js')} return {counts}.map(bytes)") == [format_bytes(count) for count in counts]


def test_keys_are_the_pages_again_once_a_colour_is_chosen_with_the_pointer(page_of_unet):
    page_of_unet.js(
        "const c = document.querySelector('#colour'); c.focus(); c.dispatchEvent(new Event('pointerdown'));"
        "c.value = 'bytes'; c.dispatchEvent(new Event('change'))"
    )
    page_of_unet.keys("4")
    assert page_of_unet.js("return document.querySelector('#tab-left').getAttribute('aria-selected')") == "true"


def test_a_line_stays_selected_from_stage_to_stage(page_of_unet):
    opened = page_of_unet
    opened.click("#stages button:first-child")
    opened.click("#query")
    opened.keys("conv_in.bias, \n")
    opened.wait("document.querySelector('#text .row.now')")
    assert "aten.conv2d" in opened.selected
    opened.click("#stages button:last-child")
    assert "aten.conv2d" in opened.selected  # in a region there


def test_tables_lead_to_lines(page_of_unet):
    opened = page_of_unet
    for name in ("kernels", "error", "rewrites", "left"):
        opened.click(f"#tab-{name}")
        opened.wait(f"document.querySelectorAll('#panel-{name} .row').length > 0")
        opened.click(f"#panel-{name} .row")
        assert opened.js("return document.querySelector('#line .full') !== null"), name


def test_a_kernel_shows_what_was_emitted_for_it(browser, tmp_path):
    pytest.importorskip("torch._inductor")
    compiled = gw.compile(Hostile(), example_inputs=(torch.ones(64),), backend="inductor", cleanups=False, cache=False)
    compiled.report().html(tmp_path / "emitted.html")
    opened = Page(browser, tmp_path / "emitted.html")
    opened.keys("5")
    opened.click("#panel-kernels .row")
    shown = opened.text(".source-of")
    assert "aten.relu.default" in shown and "void  kernel(" in shown and len(shown.splitlines()) > 10
    assert opened.log == []


def test_everything_is_reached_by_keys(page_of_unet):
    opened = page_of_unet
    opened.keys("?")
    assert opened.js("return document.querySelector('#keys').open") and "search" in opened.text("#keys")
    assert "products and convolutions" in opened.text("#keys .kinds")
    opened.keys("\ue00c")  # Escape
    assert not opened.js("return document.querySelector('#keys').open")
    opened.keys("p")
    assert opened.selected is not None
    before = opened.selected
    opened.keys("j")
    assert opened.selected not in (None, before)
    opened.keys("5")
    assert opened.js("return document.querySelector('#tab-kernels').getAttribute('aria-selected')") == "true"
    opened.keys("[[")
    assert (
        opened.js("return [...document.querySelectorAll('#stages button')].findIndex((b) => b.getAttribute('aria-current') === 'true')")
        == 5
    )
    opened.keys("/group_norm\n")
    assert "group_norm" in opened.selected and opened.text("#matches").startswith("1 of ")


def test_dark_and_light(page_of_unet):
    opened = page_of_unet
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = opened.js(colour)
    opened.click("#theme")
    assert opened.js(colour) != before
    opened.click("#theme")
    assert opened.js(colour) == before


def test_nothing_is_out_of_reach_in_a_narrow_window(browser, unet):
    size = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 420})
    try:
        opened = Page(browser, unet[0])
        outside = opened.js(
            "return [...document.querySelectorAll('#head > *, #graph .bar > *, #program, #side, #dock, #canvas, #memory-side, #memory-plot')]"
            ".filter((e) => !e.matches('.grow') && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.id || e.tagName)"
        )
        assert outside == []
        last = "document.querySelector('#stages button:last-child').getBoundingClientRect()"
        assert opened.js(f"return {last}.left >= 0 && {last}.left < innerWidth")
        assert opened.js("return document.querySelector('#memory-plot').clientWidth") > 300
        opened.click("#help")
        assert opened.js("return document.querySelector('#keys').open") and opened.log == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_passes_that_ran_before_a_file_was_saved_are_not_said_to_be_idle(browser, tmp_path):
    module, args, _ = gw.models.load("vit", "tiny")
    gw.compile(module, "slice-groups{memory_budget=80%}", example_inputs=args, backend="aten", cache=False).save(tmp_path / "vit.gw")
    compiled = gw.compile(tmp_path / "vit.gw", "slice-groups{memory_budget=1%}", backend="aten", cleanups=False, cache=False)
    compiled.report().html(tmp_path / "vit.html")
    opened = Page(browser, tmp_path / "vit.html")
    said = opened.js("return [...document.querySelectorAll('#stages .what')].map((e) => e.innerText)")
    assert set(said[1:-1]) == {"before it was saved"} and said[-1].startswith("changed nothing · ") and said[-1].endswith(" left")
    assert opened.log == []


def test_sizes_that_a_call_decides_are_said_beside_the_peak(browser, tmp_path):
    batch = torch.export.Dim("rows", min=2, max=512)
    compiled = gw.compile(
        Hostile(), example_inputs=(torch.ones(3, 4),), dynamic_shapes={"x": {0: batch}}, backend="aten", cleanups=False, cache=False
    )
    compiled.report().html(tmp_path / "rows.html")
    opened = Page(browser, tmp_path / "rows.html")
    assert opened.text("#peaks").endswith(" at rows=3")
    opened.wait("document.querySelector('#memory-side .said')")
    assert " at rows=3: " in opened.text("#memory-side .said")


def test_a_program_without_a_source_says_so(browser, tmp_path):
    program = gw.parse("graphwright 1\n\nfunction main {\n  takes ((*), {})\n  gives *\n  input %x : f32[4]\n  return %x\n}\n")
    (tmp_path / "bare.html").write_text(page(document(Story([program], [], Contract.EXACT))))
    opened = Page(browser, tmp_path / "bare.html")
    opened.keys("s")
    assert "No line of your source is known" in opened.text("#source")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_systems_choice_of_colours_is_kept(browser, unet, scheme):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    opened = Page(browser, unet[0])
    assert opened.js("return document.documentElement.dataset.theme") == scheme and opened.log == []


def test_groups_open_and_fold(page_of_unet):
    opened = page_of_unet
    opened.click("#fold")
    folded = opened.boxes
    opened.keys("p")
    opened.click("#unfold")
    assert opened.boxes > folded
    opened.click("#fold")
    assert opened.boxes == folded


def test_what_is_focused_and_named_can_be_found_by_a_screen_reader(page_of_unet):
    unnamed = page_of_unet.js(
        "return [...document.querySelectorAll('button, select, input, [role=listbox], [role=tabpanel], [role=separator], canvas#canvas')]"
        ".filter((e) => e.offsetParent && !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && !e.labels?.length)"
        ".map((e) => e.outerHTML.slice(0, 120))"
    )
    assert unnamed == []
    lost = page_of_unet.js(
        "return [...document.querySelectorAll('[aria-controls]')].filter((e) => !document.getElementById(e.getAttribute('aria-controls'))).map((e) => e.id)"
    )
    assert lost == []


def test_ten_thousand_calls_are_usable_within_three_seconds(browser, tmp_path):
    """From the opening of the file to a search, a jump to the last call, a diff and an opened group."""
    count = 10_000
    lines = ["graphwright 1", "", "function main {", "  takes ((*), {})", "  gives *", "  input %x : f32[4, 8]"]
    operands = ["%x", *(f"%{n}" for n in range(count))]
    lines += [
        f"  %{n} = aten.{'relu' if n % 3 else 'sigmoid'}.default({operands[n]}) : f32[4, 8]  # [{n}] net.py:{n % 50 + 10} layers.{n // 100}.{n % 4}"
        for n in range(count)
    ]
    program = gw.parse("\n".join([*lines, f"  return {operands[-1]}", "}", ""]))
    path = tmp_path / "big.html"
    path.write_text(page(document(Story([program], [], Contract.EXACT, title="big"))))
    opened = Page(browser, path)
    opened.keys("/%9999 =\n")
    opened.wait("document.querySelector('#text .row.now')")
    assert "%9999" in opened.selected
    opened.keys("\ue00c")
    opened.click("#unfold")
    opened.click("#fit")
    opened.js("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    taken = time.perf_counter() - opened.start
    assert opened.ink > 5 and opened.log == []
    assert taken < USABLE, f"{taken:.1f} s, of which {opened.seconds:.1f} s until it was there"


class Hostile(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


@pytest.mark.parametrize("kind", ["markup", "prototype"])
def test_hostile_names_are_shown_and_do_nothing(browser, tmp_path, kind):
    name = "</script><img src=x onerror=document.title='taken'>\u2028\u202egpj" if kind == "markup" else "__proto__"
    program = gw.compile(Hostile(), example_inputs=(torch.ones(2),), backend="aten", cleanups=False, cache=False).program
    found = document(Story([program], [], Contract.EXACT, title=name))
    found["wheres"] = [{"file": name, "line": 1, "module": name}]
    found["sources"] = {name: [{"first": 1, "lines": [name]}]} if kind == "markup" else {}
    found["programs"][0]["lines"][-2]["text"] += name * 10_000
    found["schedules"] = [{"name": name, "data": {name: name}}]
    path = tmp_path / "hostile.html"
    path.write_text(page(found))
    opened = Page(browser, path)
    opened.keys("7p")
    opened.click("#tab-source")
    opened.keys("]jjjjo")
    assert (
        opened.js("return document.title") == f"graphwright: {name}".replace("\u2028\u202e", "\\u{2028}\\u{202e}")
        and opened.js("return document.images.length") == 0
    )
    assert ("\\u{202e}" in opened.text("#title")) == (kind == "markup") and "\u202e" not in opened.js(
        "return document.querySelector('#app').innerText"
    )
    assert opened.log == []


def test_a_page_connects_to_nothing(page_of_unet):
    refused = page_of_unet.js(
        "const done = arguments[arguments.length - 1]; return fetch('https://example.invalid/').then(() => 'sent', () => 'refused')"
    )
    assert refused == "refused"
    assert any("Content Security Policy" in line for line in page_of_unet.log)  # and not by a name that nobody knows


def test_a_page_that_is_damaged_says_so(browser, unet, tmp_path):
    text = unet[0].read_text()
    at = text.index('type="application/octet-stream">') + 1000
    (tmp_path / "damaged.html").write_text(text[:at] + "AAAA" + text[at + 4 :])
    browser.get((tmp_path / "damaged.html").as_uri())
    time.sleep(0.5)
    assert "cannot be shown" in browser.execute_script("return document.querySelector('#failure').innerText")
    browser.get_log("browser")
