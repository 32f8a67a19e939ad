"""A real Chromium without a window, for pages of reports."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


def _found(*names: str) -> str:
    """The first program of these; without one the test is skipped, but never in CI."""
    for name in names:
        if path := shutil.which(name):
            return path
    reason = f"no {names[0]}; Debian: apt-get install chromium chromium-driver"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser that logs its console and its requests."""
    program = _found("chromium", "chromium-browser", "google-chrome")
    driver = _found("chromedriver")  # named, or selenium would look for one on the network
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def opened(browser: Any, page: Path, dark: bool = False) -> None:
    value = "dark" if dark else "light"
    feature = {"name": "prefers-color-scheme", "value": value}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # of earlier pages
    browser.get(page.as_uri())


def requests(browser: Any) -> list[str]:
    """Every address that was asked for since the page was opened."""
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def point_at(browser: Any, number: int, row: int, column: int) -> None:
    """Moves the mouse over a cell of a heat map, rows from the bottom."""
    place = browser.execute_script(
        """const cells = document.querySelectorAll(".cells")[arguments[0]];
        cells.scrollIntoView({block: "center"});
        const box = cells.getBoundingClientRect();
        return [box.left, box.top];""",
        number,
    )
    words = browser.execute_script("return document.getElementById('words').checked")
    rows = browser.execute_script(
        "return JSON.parse(document.getElementById('data').textContent)"
        ".models[arguments[0]].maps[0].layers.length",
        number,
    )
    w, h = (64, 18) if words else (20, max(8, min(18, 560 // rows)))
    at = {"x": place[0] + (column + 0.5) * w, "y": place[1] + (rows - 1 - row + 0.5) * h}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})


def shown(browser: Any) -> dict[str, str] | None:
    """What the box beside the mouse says, by field; None while it is hidden."""
    found: dict[str, str] | None = browser.execute_script(
        """const tip = document.getElementById("tip");
        if (tip.hidden) return null;
        const fields = {top: [...tip.querySelectorAll(".top")].map((row) => row.innerText)};
        for (const field of tip.querySelectorAll("[data-field]"))
          fields[field.dataset.field] = field.textContent;
        return fields;"""
    )
    return found


def pictures(browser: Any) -> list[str]:
    """The heat maps as they are drawn."""
    found: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('.cells')].map((c) => c.toDataURL())"
    )
    return found


CLIPPED = """
const found = [];
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim());
  const boxes = texts.map((t) => t.getBoundingClientRect());
  boxes.forEach((b, i) => {
    if (b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2 ||
        b.bottom > box.bottom + 2)
      found.push(`${figure.id}: "${texts[i].textContent}" is cut`);
    if (b.height < 9 && b.width < 9)
      found.push(`${figure.id}: "${texts[i].textContent}" is tiny`);
    boxes.slice(i + 1).forEach((o, j) => {
      const x = Math.min(b.right, o.right) - Math.max(b.left, o.left);
      const y = Math.min(b.bottom, o.bottom) - Math.max(b.top, o.top);
      const smaller = Math.min(b.width * b.height, o.width * o.height);
      if (x > 0 && y > 0 && x * y > 0.2 * smaller)
        found.push(`${figure.id}: ${texts[i].textContent} on ${texts[i + 1 + j].textContent}`);
    });
  });
}
return found;
"""


def illegible(browser: Any) -> list[str]:
    """Labels of figures that are cut, tiny or on one another."""
    found: list[str] = browser.execute_script(CLIPPED)
    return found


def choose(browser: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_value(value)
