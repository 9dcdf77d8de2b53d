"""The report page in a real Chromium: nothing is fetched, nothing complains, and sorting, filtering and copying work.

A Chromium is found by its usual names, or named by `CHROMIUM`. Where there is none these tests are skipped, but not in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import CONFIG, bench_sample, sample

from kernelwise._evidence import Tuning
from kernelwise._reporting._page import save

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the development packages")
Page = sync_api.Page

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        why = "no Chromium here: install one (Debian: apt-get install chromium-headless-shell), or name it in CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with sync_api.sync_playwright() as playwright:
        # Root has no sandbox; the page is our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens the page of a tuning. Afterwards nothing was fetched, and the console is empty."""
    said: list[str] = []
    fetched: list[str] = []
    contexts = []

    def open_(tuning: Tuning, *, size: dict[str, int] = DESK, anchor: str = "", **options: Any) -> Any:
        file = tmp_path / "report.html"
        save(tuning, file)
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(file.as_uri() + anchor)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []
    assert {url.split("#")[0] for url in fetched} <= {(tmp_path / "report.html").as_uri(), "data:,"}


def shown(page: Any, rows: str) -> list[str]:
    """Return the first cell of each row that can be seen."""
    found = page.locator(f"{rows} tbody tr").filter(visible=True)
    return [text.strip() for text in found.locator("th").all_inner_texts()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize(
    "tuning", [replace(sample(), best="torch.compile"), bench_sample()], ids=["tune", "bench"]
)  # fmt: skip
def test_it_fits_and_can_be_read_by_everyone(
    open_page: Open, tuning: Tuning, size: dict[str, int], scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(tuning, size=size, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((group) => (group.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    if size == PHONE:  # and no part of it scrolls sideways either
        wide = (
            "[...document.querySelectorAll('.scroll')].filter((part) => part.scrollWidth > part.clientWidth + 1).length"
        )
        assert page.evaluate(wide) == 0
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 19, 23)"}[scheme]


def test_long_names_do_not_make_it_wide(open_page: Open) -> None:
    tuning = sample()
    name = "kernels-community/" + "a_very_long_name_of_a_kernel" * 8
    choices = tuple(
        replace(choice, name=name, chosen=name, candidates=(replace(choice.candidates[0], kernel=name),), paths=(name,))
        for choice in tuning.choices
    )
    runs = tuple(replace(run, contender=name) for run in tuning.runs)
    page = open_page(replace(tuning, model=name, choices=choices, runs=runs, config=f"{name}\n"), size=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("document.querySelectorAll('details').forEach((group) => (group.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_headers_sort_both_ways_and_what_has_no_figure_stays_last(open_page: Open) -> None:
    page = open_page(sample())
    table = page.locator("#kind-1 table")
    prefill = table.get_by_role("columnheader", name="prefill")
    prefill.get_by_role("button").click()
    assert prefill.get_attribute("aria-sort") == "descending"
    order = ["builtin:RMSNorm", "builtin:inductor:RMSNorm", "builtin:torch:RMSNorm", "own code"]
    last = ["/opt/kernels/fast-norm:RMSNorm", "package:spin_norm:RMSNorm"]
    assert shown(page, "#kind-1") == order + last
    prefill.get_by_role("button").press("Enter")
    assert prefill.get_attribute("aria-sort") == "ascending"
    assert shown(page, "#kind-1") == order[::-1] + last
    table.get_by_role("columnheader", name="Kernel").get_by_role("button").click()
    assert prefill.get_attribute("aria-sort") is None
    assert shown(page, "#kind-1") == sorted(order + last, key=str.casefold)
    page.locator("#runs").get_by_role("columnheader", name="One run").get_by_role("button").click()
    assert shown(page, "#runs")[:2] == ["tuned", "builtin"]
    assert shown(page, "#runs")[-1] == "transformers kernels"


def test_filters_show_what_fits_and_say_how_much(open_page: Open) -> None:
    page = open_page(sample())
    bar = page.locator("[data-filters=kinds]")
    words = bar.get_by_label("Filter")
    words.fill("inductor slower")
    assert shown(page, "#kinds") == [f"builtin:inductor:{name}" for name in ("RMSNorm", "RotaryEmb", "Linear")]
    assert bar.locator("output").inner_text() == "3 of 24 shown"
    assert [page.locator(f"#kind-{number}").is_visible() for number in (1, 2, 3, 4)] == [True, False, True, True]
    words.fill("swiglumlp 30")
    assert len(shown(page, "#kinds")) == 6
    words.fill("")
    bar.get_by_label("Show").select_option("out")
    assert len(shown(page, "#kinds")) == 7
    bar.get_by_label("Show").select_option("chosen")
    assert shown(page, "#kinds") == [choice.chosen for choice in sample().choices]
    bar.get_by_label("Show").select_option("")
    assert len(shown(page, "#kinds")) == 24
    page.locator("[data-filters=runs]").get_by_label("Filter").fill("tuned decode")
    assert shown(page, "#runs") == ["tuned"]


def test_on_a_phone_kinds_are_folded_until_somebody_looks(open_page: Open) -> None:
    page = open_page(sample(), size=PHONE)
    assert shown(page, "#kinds") == []
    page.locator("#kind-2 > summary").click()
    assert len(shown(page, "#kinds")) == 6
    page.locator("[data-filters=kinds]").get_by_label("Filter").fill("spin_norm")
    assert shown(page, "#kinds") == ["package:spin_norm:RMSNorm"]


def test_a_link_to_a_folded_kind_opens_it(open_page: Open) -> None:
    page = open_page(sample(), size=PHONE, anchor="#kind-3")
    assert len(shown(page, "#kinds")) == 6
    page.locator("#summary").get_by_role("link", name="Linear").click()
    page.locator("#kind-4[open]").wait_for()


def test_the_config_is_copied_as_it_is(open_page: Open) -> None:
    page = open_page(sample())
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == CONFIG


def test_a_browser_that_gives_no_clipboard_selects_the_config(open_page: Open) -> None:
    page = open_page(sample())
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").or_(page.get_by_text("Selected")).wait_for()
    assert page.evaluate("getSelection().toString()").strip() == CONFIG.strip()


def test_names_from_a_model_do_nothing(open_page: Open) -> None:
    tuning = sample()
    choices = tuple(replace(choice, name=HOSTILE, chosen=HOSTILE, paths=(HOSTILE,)) for choice in tuning.choices)
    runs = tuple(replace(run, contender=HOSTILE) for run in tuning.runs)
    page = open_page(replace(tuning, choices=choices, runs=runs, notes=(HOSTILE,), config=HOSTILE, workloads=()))
    page.wait_for_timeout(100)
    assert page.title().startswith(tuning.model)
    assert page.locator("img").count() == 0
    assert page.locator("#config-text").inner_text() == HOSTILE


def test_everything_is_printed_in_light_colours_without_controls(open_page: Open) -> None:
    page = open_page(sample(), size=PHONE, color_scheme="dark")
    assert len(page.pdf()) > 20_000
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(shown(page, "#kinds")) == 24
    assert not page.get_by_label("Filter").first.is_visible()
    assert not page.get_by_role("button", name="Copy").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert shown(page, "#kinds") == []


def test_without_script_everything_is_there_but_the_controls(open_page: Open) -> None:
    page = open_page(sample(), java_script_enabled=False)
    assert len(shown(page, "#kinds")) == 24
    assert not page.locator(".filters").first.is_visible()
