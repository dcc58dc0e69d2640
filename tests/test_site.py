"""The static site: complete, self-contained, and readable in a real browser at desk and phone width."""

import json
import re
import shutil
import subprocess

import pytest

from nla_utils.errors import ArtefactError
from nla_utils.runner.site import build_site

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000"]  # fmt: skip
# Runs in the page once it is loaded, and leaves what it saw in an attribute.
PROBE = """<script>
window.seen = []; window.addEventListener('error', e => window.seen.push(String(e.message || e.target.src)), true);
window.addEventListener('load', () => setTimeout(() => {
  const images = [...document.images];
  document.body.dataset.seen = JSON.stringify({
    errors: window.seen, images: images.length,
    blank: images.filter(i => !i.complete || i.naturalWidth < 50 || i.getBoundingClientRect().width < 50).length,
    tables: document.querySelectorAll('table').length,
    loose: [...document.querySelectorAll('table')].filter(t => !t.closest('.table')).length,
    over: document.documentElement.scrollWidth - window.innerWidth,
    requests: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length});
}, 300));
</script></head>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site"))


def test_every_page_stands_alone_and_is_linked(pages):
    index = pages[0].read_text()
    for page in pages:
        text = page.read_text()
        assert f'href="{page.name}"' in index
        assert not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css|png|svg|woff2?)"', text), page.name
        assert "<script" not in text and 'src="figures' not in text
    appendix = next(page for page in pages if page.name == "appendix.html").read_text()
    assert index.count("data:image/png") >= 2 and appendix.count("data:image/png") >= 4


def test_without_a_section_it_says_what_to_run(tmp_path):
    with pytest.raises(ArtefactError, match="nla paper"):
        build_site(tmp_path / "site", root=tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(pages, width, tmp_path):
    for page in pages:
        probed = tmp_path / page.name
        probed.write_text(page.read_text().replace("</head>", PROBE, 1))
        where = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run([BROWSER, *FLAGS, *where, probed.as_uri()], capture_output=True, text=True, timeout=90)
        found = re.search(r'data-seen="([^"]*)"', done.stdout)
        assert found, done.stderr[-1000:]
        seen = json.loads(found[1].replace("&quot;", '"'))
        assert seen["errors"] == [] and seen["requests"] == 0, (page.name, seen)
        assert seen["blank"] == 0 and seen["loose"] == 0, (page.name, seen)
        assert seen["over"] <= 0, (page.name, seen)
    assert seen["images"] + seen["tables"] > 0
