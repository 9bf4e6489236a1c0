"""The built site in a real browser, wide and narrow: `make docs`, then `make slow-browser`."""

import functools
import http.server
import pathlib
import shutil
import threading

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "out" / "site"
SCREENSHOTS = ROOT / "out" / "screenshots"
FILES = [page.relative_to(SITE) for page in sorted(SITE.rglob("*.html"))]
PAGES = [str(page) for page in FILES if not {"_modules", "_static"} & set(page.parts)]
WIDTHS = {"wide": 1300, "narrow": 420}
LONGEST = 12_000  # pixels of a screenshot
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
]
# Elements that stick out to the right of the window, where nothing around them scrolls.
OVERFLOWING = """
const scrolls = e => e && (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
                           || scrolls(e.parentElement));
return [...document.querySelectorAll('article *')].filter(
    e => e.getBoundingClientRect().right > window.innerWidth + 1 && !scrolls(e.parentElement)
).map(e => e.outerHTML.slice(0, 80))
"""
LOADED = """
const done = arguments[arguments.length - 1];
const math = window.MathJax && window.MathJax.startup ? window.MathJax.startup.promise : Promise.resolve();
math.then(() => done(performance.getEntriesByType('resource').map(entry => entry.name)));
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing."""

    def log_message(self, format, *args):
        del format, args


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def opened(browser, url: str, width: int) -> list[str]:
    """Open a page and wait for its mathematics; return what it loaded."""
    browser.set_window_size(width, 1000)
    browser.get(url)
    return browser.execute_async_script(LOADED)


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_whole_from_the_site_alone_and_fits_the_window(browser, address, page, kind):
    loaded = opened(browser, f"{address}/{page}", WIDTHS[kind])
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.set_window_size(WIDTHS[kind], min(height + 200, LONGEST))
    picture = SCREENSHOTS / kind / page.replace("/", "-").replace(".html", ".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(picture))
    assert [name for name in loaded if not name.startswith(address)] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.execute_script(OVERFLOWING) == []
    assert browser.execute_script("return document.querySelectorAll('mjx-merror').length") == 0


@pytest.mark.parametrize("page", PAGES)
def test_anchors_lead_to_something(browser, address, page):
    opened(browser, f"{address}/{page}", WIDTHS["wide"])
    targets = browser.execute_script(
        "return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))"
        ".filter(name => name && !document.getElementById(decodeURIComponent(name)))"
    )
    assert targets == []


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("damping_share", "guides/diagnostics.html"),
        ("memory_estimate", "guides/memory.html"),
        ("adamw", "coming_from/adamw.html"),
        ("prune", "guides/pruning.html"),
    ],
)
def test_the_search_finds_the_page(browser, address, words, page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q={words}")
    WebDriverWait(browser, 20).until(lambda b: "finished" in b.find_element(By.TAG_NAME, "body").text)
    links = [a.get_attribute("href") for a in browser.find_elements(By.CSS_SELECTOR, "ul.search a")]
    assert any(page in link for link in links), links
