"""The report in a real browser: drawn without errors, on a wide and a narrow screen, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from savant_ray.reporting.page import write_page
from tests.reporting.chromium import Page, browser, open_browser
from tests.reporting.events import attempt, checkpoint, idle, prepared, sample, step_done, validation, write

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")

STEPS = range(1, 301)
SCREENS = {"wide": (1280, 900), "phone": (390, 844)}
PIXELS = """(async () => {
  const image = new Image();
  image.src = "data:image/png;base64,%s";
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const colours = new Map();
  for (const colour of new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer))
    colours.set(colour, (colours.get(colour) || 0) + 1);
  return [image.width, image.height, colours.size, Math.max(...colours.values()) / (image.width * image.height)];
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, factor in (("one", 1.0), ("a_run_with_a_very_long_name_that_would_widen_a_phone", 1.1)):
        steps = (step_done(step, train_loss=factor * (2 + 6 / step), share_of_peak=0.3) for step in STEPS)
        results = (validation(0), validation(100), sample(100, text=f"{'long ' * 200}{'x' * 300}"), checkpoint(100))
        write(folder / name, prepared(), attempt(max_steps=300), *steps, *results)
    write_page(sorted(folder.iterdir(), key=lambda path: len(path.name)), folder / "report.html", idle)
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_is_drawn_without_a_network_and_without_errors(
    page: Page, report: Path, screen: str, dark: bool
) -> None:
    page.complaints.clear(), page.requests.clear()
    page.open(report, *SCREENS[screen], dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
    charts = page.evaluate("figures.map((figure) => figure.querySelector('canvas').getBoundingClientRect().width)")
    assert len(charts) >= 7 and min(charts) > 250
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert light is not dark


@pytest.mark.parametrize(("screen", "dark"), [("wide", False), ("phone", False), ("wide", True)])
def test_a_screenshot_shows_letters_and_curves(
    page: Page, report: Path, tmp_path: Path, screen: str, dark: bool
) -> None:
    page.open(report, *SCREENS[screen], dark=dark)
    page.screenshot(tmp_path / "page.png")
    picture = base64.b64encode((tmp_path / "page.png").read_bytes()).decode()
    width, height, colours, of_the_commonest = page.evaluate(PIXELS % picture)
    assert (width, height) == SCREENS[screen]
    assert colours > 100 and of_the_commonest < 0.95, "letters and curves"


def test_the_drawn_curves_have_the_numbers_of_the_record(page: Page, report: Path) -> None:
    page.open(report)
    steps, loss, _smooth, _other, _other_smooth, validated, _other_validated = page.evaluate("plots[0].data")
    assert steps == [0, *STEPS] and loss == [None, *(float(f"{2 + 6 / step:.5g}") for step in STEPS)]
    assert [(step, value) for step, value in zip(steps, validated, strict=True) if value] == [
        (0, 5.1234),
        (100, 5.1234),
    ]


def test_the_switch_makes_steps_logarithmic(page: Page, report: Path) -> None:
    page.open(report)
    assert page.evaluate("plots.every((plot) => plot.scales.x.distr === 1)")
    page.evaluate("logX.click()")
    assert page.evaluate("plots.every((plot) => plot.scales.x.distr === 3 && plot.data[0][0] > 0)")
    assert page.complaints == []


def test_colors_change_when_the_reader_switches_to_a_dark_scheme(page: Page, report: Path) -> None:
    page.open(report, dark=False)
    light = page.evaluate("plots[0].series[1].stroke()")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.wait_for(f"plots[0].series[1].stroke() !== {light!r}")
    assert page.evaluate("plots[0].series[1].stroke()") != light and page.complaints == []
