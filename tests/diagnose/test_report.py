"""The report in a real browser: tokens move the overlay, the console stays silent, nothing is fetched, phones fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import chromium

from keepsight.diagnose import Sample, Settings, examine
from keepsight.diagnose.report import render_report

OVERLAY = "return [...document.querySelectorAll('canvas')].map(c => c.toDataURL()).join()"


@pytest.fixture(scope="module")
def page(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import keepsight
    from keepsight.lab.digits import draw_grids

    model, processor = keepsight.load(trained_folder, device="cpu")
    images, _ = draw_grids(2, "test", np.random.default_rng(0))
    sample = Sample("describe <b>&</b>", tuple(images))
    diagnosis = examine(model, processor, [sample], Settings(steps=80, causal_steps=48))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(diagnosis), encoding="utf-8")
    return path


def test_page_is_self_contained(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)[^\"'#]", text)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "describe &lt;b&gt;&amp;&lt;/b&gt;" in text
    assert text.count("<canvas") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as window:
        yield window


@pytest.fixture(params=[1200, 390])
def opened(request: pytest.FixtureRequest, browser: Any, page: Path) -> Any:
    metrics = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": request.param < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    return browser


def test_hovering_a_token_changes_the_overlay(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    tokens = opened.find_elements("css selector", ".tok")
    assert len(tokens) == 80
    seen = set()
    for index in (3, 40):
        ActionChains(opened).move_to_element(tokens[index]).perform()
        about = opened.find_element("id", "about").text
        assert f"token {index}:" in about
        assert "of its attention" in about
        assert "on the strongest spot" in about
        seen.add((opened.execute_script(OVERLAY), about))
    assert len({overlay for overlay, _ in seen}) == 2
    painted = (
        "return [...document.querySelectorAll('canvas')].some(c => c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.some(v => v > 0))"
    )
    assert opened.execute_script(painted)
    assert opened.get_log("browser") == []


def test_the_strongest_spot_stays_readable(opened: Any) -> None:
    """Outlined, and no more than tinted inside."""
    alphas = (  # of every picture: (columns, rows, alpha of every pixel)
        "return [...document.querySelectorAll('canvas')].map(c => { const copy = new OffscreenCanvas(c.width, c.height)"
        ".getContext('2d', {willReadFrequently: true}); copy.drawImage(c, 0, 0); return [c.dataset.columns, "
        "c.dataset.rows, c.width, [...copy.getImageData(0, 0, c.width, c.height).data].filter((v, i) => i % 4 == 3)] })"
    )
    inside, drawn = 0, 0
    for columns, rows, width, found in opened.execute_script(alphas):
        pixels, side = np.array(found).reshape(-1, width), width // int(columns)
        assert pixels.shape[0] == side * int(rows)
        inside = max(inside, int(pixels[side // 2 :: side, side // 2 :: side].max()))
        drawn = max(drawn, int(pixels.max()))
    assert 0 < inside <= 0.35 * 255
    assert drawn > 200, "an outline"


def test_keyboard_walks_through_the_text(opened: Any) -> None:
    from selenium.webdriver import Keys

    text = opened.find_element("id", "text")
    text.send_keys(Keys.END)
    assert text.get_attribute("aria-activedescendant") == "t79"
    last = opened.execute_script(OVERLAY)
    text.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert text.get_attribute("aria-activedescendant") == "t1"
    chosen = opened.find_elements("css selector", "[aria-selected=true]")
    assert [token.get_attribute("id") for token in chosen] == ["t1"]
    assert opened.execute_script(OVERLAY) != last
    assert opened.execute_script("return document.activeElement.id") == "text"


def test_views_change_the_overlay(opened: Any) -> None:
    before = opened.execute_script(OVERLAY)
    radios = opened.find_elements("css selector", "input[name=view]")
    assert len(radios) == 4  # the memory, its two layers, the model's own attention
    opened.execute_script("arguments[0].click()", radios[-1])
    assert opened.execute_script(OVERLAY) != before
    assert "its own attention" in opened.find_element("id", "about").text


def test_page_fits_and_fetches_nothing(opened: Any) -> None:
    width, inner = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    requests = [entry for entry in opened.get_log("performance") if '"Network.requestWillBeSent"' in entry["message"]]
    assert all("file:///" in entry["message"] or "data:" in entry["message"] for entry in requests)
    assert opened.get_log("browser") == []


def test_dark_and_light_differ(browser: Any, page: Path) -> None:
    found = set()
    for value in ("dark", "light"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": value}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        browser.get(page.as_uri())
        found.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(found) == 2


def test_memories_stand_in_the_text_and_show_where_they_looked(
    browser: Any, vismem_folder: Path, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains

    import keepsight
    from keepsight.lab.digits import draw_grids

    model, processor = keepsight.load(vismem_folder, device="cpu")
    images, _ = draw_grids(1, "test", np.random.default_rng(0))
    settings = Settings(steps=60, causal_steps=16, probe_images=64)
    diagnosis = examine(model, processor, [Sample("describe", tuple(images))], settings)
    count = len(diagnosis.written.memories)
    assert count
    path = tmp_path / "report.html"
    path.write_text(render_report(diagnosis), encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(path.as_uri())
    memories = browser.find_elements("css selector", ".tok.mem")
    assert len(memories) == count
    assert len(browser.find_elements("css selector", ".tok")) == 60 + count
    before = browser.execute_script(OVERLAY)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", memories[0])
    for _ in range(2):  # what is shown may grow on the way and move the text; a hand follows
        ActionChains(browser).move_to_element(memories[0]).perform()
    about = browser.find_element("id", "about").text
    assert f"{diagnosis.written.memories[0].kind}-term memory" in about
    assert "while formed it gave the image" in about
    assert browser.execute_script(OVERLAY) != before
    text = browser.find_element("tag name", "main").text
    for section in ("When memory is invoked", "What followed", "What the latents hold"):
        assert section in text
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner
    assert browser.get_log("browser") == []
