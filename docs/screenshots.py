"""Writes docs/report_light.png and docs/report_dark.png: the report of video_unet/small after slice-groups, as a browser shows it.

python docs/screenshots.py [--size tiny|small] [--output FOLDER]

It needs Debian's chromium and chromium-driver, selenium (`pip install 'graphwright[browser]'`) and pillow.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import graphwright as gw

WIDTH, HEIGHT = 1280, 800
LIGHT = (
    "document.querySelector('#tab-memory').click()",
    "document.querySelectorAll('#memory-side .row')[0].click()",
    "document.querySelector('#tab-source').click()",
)
DARK = (
    "document.querySelector('[data-mode=previous]').click()",
    "document.querySelector('#tab-kernels').click()",
    "document.querySelectorAll('#panel-kernels .row')[0].click()",
    "const c = document.querySelector('#colour'); c.value = 'time'; c.dispatchEvent(new Event('change'))",
)


def browser() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-lcd-text", "--force-device-scale-factor=1"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    )
    return driver


def shoot(driver: Any, page: Path, scheme: str, steps: tuple[str, ...], output: Path) -> None:
    """The page in the colours of `scheme` after `steps`, as a PNG of 256 colours."""
    from PIL import Image

    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    driver.get(page.as_uri())
    while not driver.execute_script("return document.body.dataset.ready"):
        time.sleep(0.05)
    for step in steps:
        time.sleep(0.3)
        driver.execute_script(step)
    time.sleep(0.5)
    driver.save_screenshot(str(output))
    Image.open(output).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(output, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    options = parser.parse_args()
    module, args, kwargs = gw.models.load("video_unet", options.size)
    passes = [gw.SliceGroups(memory_budget="25%")]
    compiled = gw.compile(module, passes, example_inputs=args, example_kwargs=kwargs, backend="aten")
    compiled.profile(*args, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        compiled.report().html(page)
        driver = browser()
        try:
            shoot(driver, page, "light", LIGHT, options.output / "report_light.png")
            shoot(driver, page, "dark", DARK, options.output / "report_dark.png")
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
