"""The report in a real browser. Skipped where there is no Chromium (Debian: apt install chromium)."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import kdcache
from kdcache.archive import moment_histogram
from kdcache.report import Experiment, write_report
from tests.reports import RunFolders

ARTEFACTS = Path(__file__).parents[1] / ".artefacts"
# Of every element with text of its own: the WCAG contrast of that text with what is painted behind it.
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r / 255, g / 255, b / 255, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((c) => top[3] * top[c] + (1 - top[3]) * below[c]);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(channels(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1]);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), ground = behind(element);
    const text = over(channels(element.ownerSVGElement ? style.fill : style.color), ground);
    const [low, high] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), element.tagName, element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods and two controls at three taus with three seeds, of an archive that is there."""
    base = tmp_path_factory.mktemp("report")
    drawn = np.random.default_rng(0)
    logits = drawn.normal(1.0, 2.0, size=(2, 300, 10)).astype(np.float32)
    archive = kdcache.write_archive(base / "archives/demo", logits, [f"class {c}" for c in range(10)])
    where = {"archive": str(archive.path), "archive_digest": archive.manifest.digest}
    make_run = RunFolders(base / "runs" / "demo")
    for method, control, gain in (("kd", "none", 0.0), ("kd", "ls-global", -2.0), ("zkd", "none", 1.0)):
        for tau, top in ((1.0, 85.0), (4.0, 88.0), (20.0, 87.0)):
            for seed in range(3):
                end = top + gain + float(drawn.normal(scale=0.3))
                curves = {"logit_mean": [0.0, 0.5], "logit_std": [1.0, 1.5], "divergence": [1.0, 0.1], "agreement": [40.0, 80.0]}
                run = make_run([60.0, end], method_spec=method, control_spec=control, tau=tau, seed=seed, curves=curves, **where)
                rows = drawn.normal([[0.5], [1.5]], 0.2, size=(2, 300))
                (run / "logit_moments.json").write_text(moment_histogram(*rows).model_dump_json())
    asked = Experiment("How hot?", "a paper, Fig. 1", "Which tau is best?", "tau, method and control", "A large one.")
    return write_report([base / "runs"], base / "out", experiment=asked).html


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The report, opened by day or by night. When it is closed it has had no errors, and has asked for nothing but itself."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme=request.param)
    opened = context.new_page()
    troubles: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("request", lambda made: asked.append(made.url))
    opened.goto(report.as_uri())
    ARTEFACTS.mkdir(exist_ok=True)
    opened.screenshot(path=ARTEFACTS / f"report-{request.param}.png", full_page=True)
    yield opened
    context.close()
    assert troubles == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]


def test_every_figure_is_seen(page: Page, report: Path) -> None:
    files = sorted((report.parent / "figures").glob("*.svg"))
    shown = page.locator("figure svg")
    assert shown.count() == len(files) > 5
    for number in range(shown.count()):
        box = shown.nth(number).bounding_box()
        assert box is not None
        assert box["width"] > 400
        assert box["height"] > 150
        assert shown.nth(number).get_attribute("aria-label")
        lines = shown.nth(number).locator("path").evaluate_all("paths => paths.filter(p => p.getTotalLength() > 0).length")
        assert lines > 10


def test_all_text_can_be_read(page: Page) -> None:
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [line for line in found if line[0] < 4.5] == []


def test_tables_sort_at_a_click(page: Page) -> None:
    table = page.locator("table:has(td.heat)").first
    tau = table.get_by_role("button", name="20", exact=True)

    def means() -> list[float]:
        column = [head.inner_text().rstrip(" ↑↓") for head in table.locator("thead th").all()].index("20")
        return [
            float(row.locator("td").nth(column).get_attribute("data-value") or "nan") for row in table.locator("tbody tr").all()
        ]

    before = means()
    tau.click()
    assert means() == sorted(before, reverse=True)
    tau.click()
    assert means() == sorted(before)
    assert table.locator("thead th[aria-sort=ascending]").inner_text().startswith("20")


def test_a_score_leads_to_its_run(page: Page) -> None:
    page.locator("td.heat a").first.click()
    target = page.locator("tr:target")
    assert target.count() == 1
    assert target.is_visible()
    assert "run-" in target.locator("td").first.inner_text()


@pytest.mark.parametrize("width", [390, 800, 1600])
def test_nothing_sticks_out(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints(page: Page, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert [line for line in page.evaluate(CONTRASTS) if line[0] < 4.5] == []
    paper = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert paper.startswith(b"%PDF-")
    assert 3 <= paper.count(b"/Type /Page\n") <= 30
