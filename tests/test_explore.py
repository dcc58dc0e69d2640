"""The page of a text's activations: what its cells say, and that a browser shows it and follows a keyboard."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from nla_extensions.release import bundle as bundles
from nla_extensions.release.explore import MOST_TOKENS, _discoveries, explore, nla_at_layers, write_page
from nla_utils import NLA
from nla_utils.errors import ConfigError
from nla_utils.metrics import chance_of_rank, exact_k_curve, fve_matrix
from nla_utils.targets import describe

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=8000",
]
TEXT = "the lighthouse keeper </script> wound the clock"
# Pressed in the page: right, then up; what is then chosen, focused and said is left in an attribute.
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const cells = [...document.querySelectorAll('td button')], press = key => document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', {key, bubbles: true}));
  cells[cells.length - 2].click(); cells[cells.length - 2].focus(); press('ArrowRight'); press('ArrowUp');
  const chosen = document.querySelectorAll('[aria-pressed=true]');
  document.body.dataset.seen = JSON.stringify({cells: cells.length, chosen: chosen.length,
    focused: chosen[0] === document.activeElement,
    named: cells.every(c => c.ariaLabel.includes('layer')), tabbable: cells.filter(c => c.tabIndex === 0).length,
    heading: document.querySelector('.cell h2').textContent,
    readings: document.querySelectorAll('ol li').length, over: document.documentElement.scrollWidth - innerWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length});
}, 200));</script></body>"""


@pytest.fixture(scope="module")
def nla(gemma_with_reader, tmp_path_factory):
    run = gemma_with_reader
    return NLA(run.backbone, bundles.load_bundle(run.backbone, run.folder.path))


@pytest.fixture(scope="module")
def gemma_with_reader(gemma_run):
    from nla_extensions.tail_reader.reader import fit_reader
    from nla_utils.training import train_av

    run, targets = gemma_run
    train_av(run, targets)
    fit_reader(run, targets)
    run.write_results("targets", describe(run, targets), {"targets": targets.sha256})
    return run


@pytest.fixture(scope="module")
def found(nla, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield explore(nla, TEXT, [1, 2, 3], k=4)


def test_every_token_has_a_cell_at_every_layer(nla, found):
    assert [len(row) for row in found["cells"]] == [len(found["tokens"])] * 3
    for cell in (c for row in found["cells"] for c in row):
        scores = [score for _, score in cell["candidates"]]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True) and scores[0] == cell["score"]


def test_a_cell_is_compared_with_the_stored_texts_at_its_layer(nla, found):
    v = nla.backbone.encode_layers([nla.token_ids(TEXT)], True, [nla.backbone.layer])[0]
    null = fve_matrix(v, nla.bundle.pool_v, nla.bundle.mu)
    own = found["cells"][found["layers"].index(nla.backbone.layer)][-1]
    assert own["above"] == pytest.approx(own["score"] - exact_k_curve(null, [4])[0, 0])
    assert own["retrieved_score"] == pytest.approx(null.max())
    assert own["p"] == chance_of_rank(int((null >= own["score"]).sum()), null.shape[1], 4)
    assert own["percentile"] == pytest.approx((null < own["score"]).mean() ** 4)


def test_cells_that_are_no_chance_are_counted_with_their_clusters():
    """Two neighbours and one apart are planted among cells that are chance."""
    p_LT = np.full((3, 6), 0.6)
    p_LT[0, 0] = p_LT[1, 0] = p_LT[2, 4] = 1e-6
    assert _discoveries(p_LT, 8) == {"cells": 18, "bh": 3, "by": 3, "clusters": 2, "stored_for_one": 2872}
    assert _discoveries(np.full((3, 6), 0.01), 8)["clusters"] == 1
    assert _discoveries(np.full((3, 6), 0.06), 8)["bh"] == 0


def test_readers_of_other_layers_are_fitted_once(nla, tmp_path, monkeypatch):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    first = nla_at_layers(nla, [1, 3])
    monkeypatch.setattr("nla_extensions.release.explore.solve_reader", None)
    again = nla_at_layers(nla, [1, 3])
    assert np.array_equal(first[1].bundle.reader.weights_nad, again[1].bundle.reader.weights_nad)
    assert again[3].bundle.reader is nla.bundle.reader


def test_what_cannot_be_shown_is_refused(nla):
    with pytest.raises(ConfigError, match=f"at most {MOST_TOKENS}"):
        explore(nla, "the clock " * 60, [3])


def test_the_page_stands_alone(found, tmp_path):
    page = write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.(?!data:)", page) and "url(" not in page
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.S)
    assert json.loads(data)["text"] == TEXT


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width, dark", [(1300, False), (400, True)])
def test_a_browser_shows_it_and_follows_the_keyboard(found, tmp_path, width, dark):
    page = write_page(found, tmp_path / "page.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    scheme = ["--force-dark-mode"] if dark else []
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            *scheme,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (said,) = re.findall(r'data-seen="([^"]*)"', done.stdout)
    seen = json.loads(html.unescape(said))
    n = len(found["tokens"])
    assert seen["cells"] == 3 * n and seen["chosen"] == seen["tabbable"] == 1 and seen["focused"] and seen["named"]
    assert f"token {n}:" in seen["heading"] and "Layer 2" in seen["heading"] and seen["readings"] == 4
    assert seen["requests"] == 0 and seen["over"] <= 0
    assert (seen["ground"] == "rgb(255, 255, 255)") != dark
