"""Tables, figures and section: from JSON alone, quickly, and equal to what is committed."""

import json
import re
import subprocess
import sys
import time

import pytest

from nla_utils import tables
from nla_utils.config import ROOT
from nla_utils.paper import README, all_tables, build_paper, readme_with, section_text
from nla_utils.published import BACKBONES, k_curve, published
from nla_utils.results import NAMES, committed_results, find_runs

RUNS = find_runs([committed_results()])


def test_both_offline_backbones_are_committed():
    assert {("gemma3-270m", "laptop"), ("smollm2-135m", "laptop")} <= {(r.backbone, r.profile) for r in RUNS}


def test_committed_section_and_tables_are_what_the_results_give():
    section = ROOT / "paper" / "section11.md"
    assert section.read_text() == section_text(RUNS, section.parent, ROOT / "figures")
    assert README.read_text() == readme_with(README.read_text(), RUNS)
    made = {t.stem: t for t in all_tables(RUNS)}
    for stem, table in made.items():
        assert (ROOT / "paper" / "tables" / f"{stem}.md").read_text() == tables.markdown(table.frame)
    on_disk = {p.stem for p in (ROOT / "paper" / "tables").glob("*.md")}
    assert on_disk == set(made)


def test_every_committed_number_traces_to_a_run():
    section = (ROOT / "paper" / "section11.md").read_text()
    for run in RUNS:
        for name in NAMES:
            record = run.data[name]
            assert re.fullmatch("[0-9a-f]{40}", record["code"]["git_commit"]) and record["code"]["dirty"] is False
            assert all(re.fullmatch("[0-9a-f]{64}", v) for v in record["made_from"].values())
            assert record["identity"] == run.data["targets"]["identity"]
        for name in run.everything.keys() - set(NAMES):
            record = run.everything[name]
            assert re.fullmatch("[0-9a-f]{40}", record["code"]["git_commit"]) and record["code"]["dirty"] is False
            assert all(re.fullmatch("[0-9a-f]{64}", v) for v in record["made_from"].values())
            assert record["identity"]["weight_hash"] == run.data["targets"]["identity"]["weight_hash"]
            assert f"{run.backbone}/{run.profile}/{name}.json" in section
        shared = {k: v for n in NAMES for k, v in run.data[n]["made_from"].items()}
        for name in NAMES:
            assert run.data[name]["made_from"].items() <= shared.items()


def test_no_decimal_is_typed_into_the_prose():
    source = "".join((ROOT / "nla_utils" / name).read_text() for name in ("paper.py", "paper_text.py", "audit.py"))
    assert not re.findall(r"(?<![\w:.])\d+\.\d+", source)


def test_published_figures_appear_in_the_table():
    row = tables.headline_table(RUNS[0], "gemma2_2b").iloc[:, 0]
    assert row["replay, centred"] == "0.712" and row["best-of-K, centred"] == "0.631"
    assert published("qwen25_7b")["num_layers"] == 28
    assert k_curve("qwen25_7b")[1] == pytest.approx(0.5765, abs=1e-3)
    for name in BACKBONES:
        assert published(name)["ceilings"]["replay"]["cen"] > 0.7


def test_paper_is_made_without_torch_in_seconds(tmp_path):
    program = (
        "import sys, pathlib; from nla_utils.paper import build_paper; from nla_utils import cli; "
        f"p = pathlib.Path({str(tmp_path)!r}); build_paper(section=p / 's.md', figure_folder=p / 'f'); "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    assert time.monotonic() - started < 30
    assert {p.suffix for p in (tmp_path / "f").iterdir()} == {".png", ".pdf"}
    tex = next((tmp_path / "tables").glob("*headline.tex")).read_text()
    assert r"\toprule" in tex


def test_paper_stands_on_published_numbers_alone(tmp_path):
    build_paper((tmp_path / "none",), tmp_path / "s.md", tmp_path / "f")
    text = (tmp_path / "s.md").read_text()
    assert "Gemma-2-2B, published" in text and (tmp_path / "f" / "fig1_k_curves.png").exists()


def test_latex_tables_need_nothing_but_booktabs():
    for path in (ROOT / "paper" / "tables").glob("*.tex"):
        text = path.read_text()
        assert text.isascii(), path.name
        assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1


def test_committed_figures_exist_in_both_formats():
    stems = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert stems == {p.stem for p in (ROOT / "figures").glob("*.pdf")} and len(stems) >= 3


def test_results_are_plain_json():
    for path in committed_results().rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{path} holds {c}"))
