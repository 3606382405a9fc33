"""The documentation as a site: it builds without a warning, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lola_vllm.command import cli
from lola_vllm.core.lola_config import LolaConfig
from tests.support.axe import findings
from tests.support.browser import chromium

for name in ("material", "mkdocstrings"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[docs]'")
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.mark.slow
def test_pages_load_nothing_from_other_sites(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loads = (
        r"<(?:script|link|img|iframe|source|object)\b[^>]*?(?:src|href|srcset|data)=\"?(\w+:)?//"
    )
    for page in pages:
        assert not re.search(loads, page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.slow
def test_the_reference_has_every_command_route_and_field(site):
    commands = (site / "reference/cli.html").read_text()
    assert not [name for name in cli.COMMANDS if f'id="lola-vllm-{name}"' not in commands]
    assert {"lola-vllm-eval-recall", "lola-vllm-sessions-export"} <= set(
        re.findall(r'id="([\w-]+)"', commands)
    )
    routes = (site / "reference/http.html").read_text()
    for route in ("GET /v1/lola/info", "POST /v1/lola/memory", "PATCH /v1/lola/sessions/{session}"):
        assert route in routes
    assert "<code>add_generation_prompt</code>" in routes and "restored_tokens" in routes
    fields = (site / "configuration.html").read_text()
    assert not [name for name in LolaConfig.model_fields if f"<code>{name}</code>" not in fields]
    python = (site / "reference/python.html").read_text()
    for name in ("lola_vllm.engine.hf.LolaCache.load", "lola_vllm.engine.estimate.estimate"):
        assert f'id="{name}"' in python


@pytest.mark.slow
def test_no_list_or_table_is_left_as_text(site):
    """GitHub sees a list right below a sentence, and MkDocs does not."""
    for page in site.rglob("*.html"):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        prose = re.sub(r"<pre.*?</pre>", "", article, flags=re.S)
        left = re.search(r"\n(- |\d\. |\|.*\|\n)", prose)
        assert left is None, (page.name, prose[left.start() - 80 : left.end() + 80])


# --- in a browser, from the directory


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


SIZES = [(1280, 800), (390, 844)]
# The page has followed a new size and scheme: two frames later, when no colour changes any more.
SETTLED = """
  const frame = () => new Promise(requestAnimationFrame);
  return frame().then(frame)
    .then(() => Promise.all(document.getAnimations().map((change) => change.finished)))
    .then(() => true);
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "index",
        "configuration",
        "reference/http",
    ],
)
def test_axe_finds_nothing(site, browser, page):
    browser.errors()  # axe-core's, which may not read style sheets of files
    browser.resize(*SIZES[0])
    browser.open(f"file://{site}/{page}.html")
    assert browser.errors() == []
    # Colours follow the scheme and the layout the size: two views have both of each.
    for dark, size in zip((False, True), SIZES, strict=True):
        browser.resize(*size, dark=dark)
        assert browser.run(SETTLED)
        scheme = browser.run("return document.body.dataset.mdColorScheme")
        assert scheme == ("slate" if dark else "default")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert findings(browser) == [], (size, scheme)


# --- parts
