"""The report of an analysis in a real browser: what it shows is what the tables hold."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as chrome
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from analyze_samples import tiny_model

from bupo.analyze import main

SENTENCES = [
    "The quick brown fox jumps",
    "x = (y + 2) / 3;",
    "A <b>bold</b> claim </script> & co",
    "tabs\tand spaces  here",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chrome.chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("\n".join(SENTENCES))
    return file


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    model = tiny_model(folder, layers=12)
    out = folder / "out"
    command = ["--model", model, "--data", str(data), "stride=3", "top_k=4"]
    assert main(["--out", str(out), *command]) == 0
    return out


@pytest.fixture(scope="module")
def compared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    models = [tiny_model(folder, layers=5), tiny_model(folder, layers=4, family="llama", seed=1)]
    out = folder / "out"
    command = ["--model", models[0], "--data", str(data), f"compare={models[1]}"]
    assert main(["--out", str(out), *command]) == 0
    return out


def cell(out: Path, text: int, column: int, layer: int, model: str | None = None) -> dict[str, Any]:
    """The row of tokens.parquet for a token of a text, counted from the first measured one."""
    table = pq.read_table(out / "tokens.parquet")
    mine = table.filter(
        (pc.field("text") == text)
        & (pc.field("policy") == "layer")
        & (pc.field("layer") == layer)
        & (pc.field("model") == (model or table["model"][0].as_py()))
    )
    row: dict[str, Any] = mine.to_pylist()[column]
    return row


def check_cell(said: dict[str, str] | None, row: dict[str, Any]) -> None:
    assert said is not None, "nothing is shown"
    assert said["token"].replace("␣", " ").replace("⇥", "\t") == row["token"]
    assert said["layer"] == str(row["layer"])
    for name in ("entropy", "logprob", "kl"):
        for key in (name, f"{name}_normed"):
            assert float(said[key]) == pytest.approx(row[key], abs=1.01e-3), key
    assert said["rank"] == str(row["rank"] + 1)
    assert said["rank_normed"] == str(row["rank_normed"] + 1)


@pytest.mark.parametrize("kind", ["alone", "compared"])
def test_nothing_goes_wrong_and_nothing_is_asked_for(
    kind: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(kind)
    page = out / "report.html"
    chrome.opened(browser, page)
    chrome.point_at(browser, 0, 0, 0)
    chrome.choose(browser, "quantity", "kl")
    assert browser.get_log("browser") == []
    asked = chrome.requests(browser)
    assert page.as_uri() in asked
    assert [u for u in asked if u != page.as_uri() and not u.startswith("data:")] == []
    assert page.stat().st_size < 2_000_000
    text = page.read_text()
    assert "</script> & co" not in text, "data cannot end the script"


@pytest.mark.parametrize("kind", ["alone", "compared"])
def test_figures_are_there_and_legible(
    kind: str, browser: Any, request: pytest.FixtureRequest
) -> None:
    """Every figure is drawn, has a name for those who cannot see it, and no label is cut or lies
    on another."""
    chrome.opened(browser, request.getfixturevalue(kind) / "report.html")
    names = ["entropy_flow", "entropy_change", "scale", "to_model", "residual_cosines"]
    found = browser.execute_script(
        """return [...document.querySelectorAll("figure")].map((f) => {
          const svg = f.querySelector("svg"), box = svg.getBoundingClientRect();
          return [f.id, svg.getAttribute("aria-label"), box.width, box.height,
                  svg.querySelectorAll("path").length, f.querySelector("figcaption").innerText];
        })"""
    )
    assert [f[0] for f in found] == [*names, "layer_cosines"]
    for _, label, width, height, paths, caption in found:
        assert label and width > 600 and height > 200 and paths > 5 and len(caption) > 60
    assert chrome.illegible(browser) == []
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids)), "identifiers of figures do not collide"


def test_hovering_says_what_the_table_holds(alone: Path, browser: Any) -> None:
    chrome.opened(browser, alone / "report.html")
    kept = [1, 4, 7, 10, 12]
    for row, column in ((0, 0), (2, 5), (4, 3), (4, 14)):
        chrome.point_at(browser, 0, row, column)
        text = 0
        check_cell(chrome.shown(browser), cell(alone, text, column, kept[row]))
    tops = pq.read_table(alone / "top_tokens.parquet")
    for quantity, normed in (("entropy", False), ("entropy_normed", True)):
        chrome.choose(browser, "quantity", quantity)
        assert chrome.shown(browser) is None, "another picture, nothing pointed at"
        chrome.point_at(browser, 0, 2, 5)
        said = chrome.shown(browser)
        where = cell(alone, 0, 5, 7)
        mine = tops.filter(
            (pc.field("text") == 0)
            & (pc.field("position") == where["position"])
            & (pc.field("layer") == 7)
            & (pc.field("normed") == normed)
        ).to_pylist()
        assert said is not None and len(mine) == len(said["top"]) == 4
        for shown, row in zip(said["top"], mine):
            assert f"{100 * math.exp(row['logprob']):.2f}"[:3] in shown, (shown, row)
            if row["top_token"].isalnum() and row["top_token"].isascii():
                assert shown.startswith(row["top_token"])


def test_text_and_quantity_change_the_picture(alone: Path, browser: Any) -> None:
    chrome.opened(browser, alone / "report.html")
    seen = chrome.pictures(browser)
    for name in ("entropy", "logprob", "logprob_normed", "kl", "kl_normed", "rank"):
        chrome.choose(browser, "quantity", name)
        seen += chrome.pictures(browser)
    chrome.choose(browser, "text", "1")
    seen += chrome.pictures(browser)
    chrome.point_at(browser, 0, 4, 2)
    check_cell(chrome.shown(browser), cell(alone, 1, 2, 12))
    chrome.choose(browser, "text", "2")
    seen += chrome.pictures(browser)
    browser.find_element("id", "words").click()
    seen += chrome.pictures(browser)
    assert len(set(seen)) == len(seen) == 10
    chrome.point_at(browser, 0, 4, 2)
    check_cell(chrome.shown(browser), cell(alone, 2, 2, 12))


def test_keys_move_and_are_spoken(alone: Path, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    chrome.opened(browser, alone / "report.html")
    cells = browser.find_element("css selector", ".cells")
    browser.execute_script("arguments[0].focus()", cells)
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP):
        cells.send_keys(key)
    check_cell(chrome.shown(browser), cell(alone, 0, 1, 4))
    spoken = browser.find_element("id", "spoken").get_attribute("textContent")
    row = cell(alone, 0, 1, 4)
    assert f"layer 4, token {row['token']}, entropy {row['entropy_normed']:.2f}" in spoken
    cells.send_keys(Keys.ESCAPE)
    assert chrome.shown(browser) is None


def test_two_models_each_have_their_map(compared: Path, browser: Any) -> None:
    chrome.opened(browser, compared / "report.html")
    models = pc.unique(pq.read_table(compared / "tokens.parquet")["model"]).to_pylist()
    assert len(chrome.pictures(browser)) == 2
    for number, depth in ((0, 5), (1, 4)):
        chrome.point_at(browser, number, depth - 1, 6)
        row = cell(compared, 0, 6, depth, models[number])
        check_cell(chrome.shown(browser), row)
        assert row["agrees_normed"] and row["kl_normed"] < 1e-3
    text = browser.find_element("tag name", "body").text
    assert all(name in text for name in models) and f"Dashed: {models[1]}" in text


LUMINANCE = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
  return (0.3 * r + 0.59 * g + 0.11 * b) / 255;
};
const text = document.querySelector("figure svg text");
return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill].map(light);
"""


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(dark: bool, alone: Path, browser: Any) -> None:
    chrome.opened(browser, alone / "report.html", dark)
    page, ink = browser.execute_script(LUMINANCE)
    assert (page < 0.2 and ink > 0.8) if dark else (page > 0.9 and ink < 0.3), (page, ink)
