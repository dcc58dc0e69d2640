"""Pages, tables and figures: from JSON alone, quickly, and equal to what is committed."""

import json
import re
import subprocess
import sys
import time

import pytest

from nla_utils.config import ROOT
from nla_utils.extensions.depth.page import depth_page
from nla_utils.extensions.tail_reader.page import reader_page
from nla_utils.paper import tables
from nla_utils.paper.published import BACKBONES, k_curve, published
from nla_utils.paper.results import COMMITTED, NAMES, find_results
from nla_utils.paper.section import section_page

EVERYTHING = find_results()
PAGES = {"section11": section_page(), "tail_reader": reader_page(), "depth": depth_page()}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_both_offline_backbones_are_committed():
    assert {("gemma3-270m", "laptop"), ("smollm2-135m", "laptop")} <= {(r.backbone, r.profile) for r in EVERYTHING}


@pytest.mark.parametrize("name", PAGES)
def test_committed_pages_are_what_the_results_give(name):
    assert (ROOT / "paper" / f"{name}.md").read_text(encoding="utf-8") == PAGES[name].text()


def test_committed_tables_are_what_the_results_give():
    made = {t.stem: t for page in PAGES.values() for t in page.tables}
    for stem, table in made.items():
        assert (ROOT / "paper" / "tables" / f"{stem}.md").read_text(encoding="utf-8") == table.markdown
    assert {p.stem for p in (ROOT / "paper" / "tables").glob("*.md")} == set(made)


def test_the_readmes_tables_are_those_of_the_paper():
    for stem in ("findings", "reader-findings"):
        assert (ROOT / "paper" / "tables" / f"{stem}.md").read_text(encoding="utf-8") in README


def test_every_committed_number_traces_to_a_run():
    text = "".join((ROOT / "paper" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES)
    for results in EVERYTHING:
        names = [p.stem for p in sorted(results.folder.glob("*.json"))]
        for name in names:
            record = results.optional(name)
            assert re.fullmatch("[0-9a-f]{40}", record["code"]["git_commit"]) and record["code"]["dirty"] is False
            assert all(re.fullmatch("[0-9a-f]{64}", v) for v in record["made_from"].values())
            assert record["identity"]["weight_hash"] == results.data["targets"]["identity"]["weight_hash"]
            assert f"{results.backbone}/{results.profile}/{name}.json" in text
            if "migrated" in record:
                assert (ROOT / record["migrated"]["by"]).exists()
        shared = {k: v for n in NAMES for k, v in results.data[n]["made_from"].items()}
        for name in NAMES:
            assert results.data[name]["identity"] == results.data["targets"]["identity"]
            assert results.data[name]["made_from"].items() <= shared.items()


def test_no_decimal_is_typed_into_the_prose():
    sources = [ROOT / "nla_utils" / "paper" / name for name in ("section.py", "audit.py", "pages.py")]
    sources += (ROOT / "nla_utils" / "paper" / "templates").glob("*.j2")
    for path in sources:
        assert not re.findall(r"(?<![\w:.])\d+\.\d+", path.read_text(encoding="utf-8")), path


def test_published_figures_appear_in_the_table():
    row = tables.headline_table(EVERYTHING[0]).iloc[:, 0]
    assert row["replay, centred"] == "0.712" and row["best-of-K, centred"] == "0.631"
    assert published("qwen25_7b")["num_layers"] == 28
    assert k_curve("qwen25_7b")[1] == pytest.approx(0.5765, abs=1e-3)
    for name in BACKBONES:
        assert published(name)["ceilings"]["replay"]["cen"] > 0.7


def test_pages_are_made_without_torch_in_seconds(tmp_path):
    program = (
        "import sys, pathlib; from nla_utils.runner import cli; from nla_utils.paper.section import section_page; "
        "from nla_utils.extensions.tail_reader.page import reader_page; "
        "from nla_utils.extensions.depth.page import depth_page; "
        f"p = pathlib.Path({str(tmp_path)!r}); "
        "[page().write(p / f'{i}.md', p / 'f') for i, page in enumerate((section_page, reader_page, depth_page))]; "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.monotonic() - started < 30
    assert {p.suffix for p in (tmp_path / "f").iterdir()} == {".png", ".pdf"}
    tex = next((tmp_path / "tables").glob("*headline.tex")).read_text()
    assert r"\toprule" in tex


def test_the_section_stands_on_published_numbers_alone(tmp_path):
    section_page([tmp_path / "none"]).write(tmp_path / "s.md", tmp_path / "f")
    text = (tmp_path / "s.md").read_text(encoding="utf-8")
    assert "Gemma-2-2B, published" in text and (tmp_path / "f" / "fig1_k_curves.png").exists()


def test_latex_tables_need_nothing_but_booktabs():
    for path in (ROOT / "paper" / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path.name


def test_committed_figures_exist_in_both_formats():
    stems = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert stems == {p.stem for p in (ROOT / "figures").glob("*.pdf")} == {s.stem for p in PAGES.values() for s in p.figures}


def test_results_are_plain_json():
    for path in COMMITTED.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda c: pytest.fail(f"{path} holds {c}"))
