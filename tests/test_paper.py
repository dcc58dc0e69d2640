"""Pages, tables and figures: from JSON alone, quickly, and equal to what is committed."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from nla_extensions.comparison.page import comparison_page
from nla_extensions.depth.page import depth_page
from nla_extensions.release.publish import dataset_card, model_card
from nla_extensions.requantize.page import requantized_page
from nla_extensions.scoring.page import scores_page
from nla_extensions.tail_reader.page import reader_page
from nla_utils import metrics, notebooks, rows
from nla_utils.config import ROOT, RunConfig
from nla_utils.lm.weights import REGISTRY
from nla_utils.report import claims as findings
from nla_utils.report import tables
from nla_utils.report.pages import appendix_page, section_page
from nla_utils.report.results import BACKBONES, COMMITTED, NAMES, RunResults, find_results, k_curve, published
from nla_utils.store import RunFolder, atomic_write, json_hash, read_record
from nla_utils.targets import read_texts

EVERYTHING = find_results()
PAGES = {
    "section11": section_page(),
    "appendix": appendix_page(),
    "tail_reader": reader_page(),
    "depth": depth_page(),
    "comparison": comparison_page(),
    "requantized": requantized_page(),
    "scores": scores_page(),
}
TEX_ENGINE = next((name for name in ("latexmk", "tectonic") if shutil.which(name)), None)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_both_offline_backbones_are_committed():
    assert {("gemma3-270m", "laptop"), ("smollm2-135m", "laptop")} <= {(r.backbone, r.profile) for r in EVERYTHING}


@pytest.mark.parametrize("name", PAGES)
def test_committed_pages_are_what_the_results_give(name):
    assert (ROOT / "paper" / f"{name}.md").read_text(encoding="utf-8") == PAGES[name].text()


def test_committed_tables_are_what_the_results_give():
    made = {t.stem: t for page in PAGES.values() for t in page.tables}
    for stem, table in made.items():
        for end, text in table.files.items():
            assert (ROOT / "paper" / "tables" / f"{stem}.{end}").read_text(encoding="utf-8") == text
    assert {p.stem for p in (ROOT / "paper" / "tables").glob("*.md")} == set(made)


def test_the_readmes_tables_are_those_of_the_paper():
    for stem in ("findings", "reader-findings", "reader-trained", "published-null"):
        assert (ROOT / "paper" / "tables" / f"{stem}.md").read_text(encoding="utf-8") in README


def _names_weights(text, spec):
    return spec.weights in " ".join(text.split())


def test_what_names_a_backbone_names_its_weights():
    """Pages, README, NOTICE, cards and the bundles' records say what the registry says of the weights."""
    texts = {name: page.text() for name, page in PAGES.items()}
    texts["tex"] = PAGES["section11"].text(form="tex")
    texts |= {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "NOTICE")}
    texts |= {r.title: model_card(r) + dataset_card(r, ROOT) for r in EVERYTHING}
    texts |= {str(p): p.read_text(encoding="utf-8") for p in (ROOT / "bundles").glob("*/bundle.json")}
    described = [spec for spec in REGISTRY.values() if spec.weights]
    assert {spec.name for spec in described} >= {r.backbone for r in EVERYTHING}
    for where, text in texts.items():
        named = [spec for spec in described if spec.name in text or spec.title in text]
        assert named, where
        assert all(_names_weights(text.replace(r"\_", "_"), spec) for spec in named), where


def test_a_table_of_one_run_names_its_backbone_with_the_variant():
    for results in EVERYTHING:
        of_run = [t for page in PAGES.values() for t in page.tables if t.stem.startswith(f"{results.stem}-") and t.of]
        assert all(results.spec.variant in text for t in of_run for text in t.files.values())
    assert sum(bool(t.of) for page in PAGES.values() for t in page.tables) > 50


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
        shared = {k: v for n in NAMES for k, v in results.data[n]["made_from"].items()}
        for name in NAMES:
            assert results.data[name]["identity"] == results.data["targets"]["identity"]
            assert results.data[name]["made_from"].items() <= shared.items()


def test_no_decimal_is_typed_into_the_prose():
    sources = [p for package in ("nla_utils", "nla_extensions") for p in (ROOT / package).rglob("*.j2")]
    for path in (p for p in sources if p.suffixes != [".html", ".j2"]):
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
        "import sys, pathlib; from nla_utils import cli; from nla_utils.report.pages import section_page; "
        "from nla_extensions.tail_reader.page import reader_page; "
        "from nla_extensions.depth.page import depth_page; from nla_utils.report.pages import appendix_page; "
        "from nla_extensions.comparison.page import comparison_page; "
        "from nla_extensions.requantize.page import requantized_page; "
        f"p = pathlib.Path({str(tmp_path)!r}); "
        "pages = section_page, appendix_page, reader_page, depth_page, comparison_page, requantized_page; "
        "[page().write(p / f'{i}.md', p / 'f') for i, page in enumerate(pages)]; "
        "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad; "
        "import time; assert time.process_time() < 30"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert {p.suffix for p in (tmp_path / "f").iterdir()} == {".png", ".pdf"}
    tex = next((tmp_path / "tables").glob("*headline.tex")).read_text()
    assert r"\toprule" in tex


def test_the_section_stands_on_published_numbers_alone(tmp_path):
    section_page([tmp_path / "none"]).write(tmp_path / "s.md", tmp_path / "f")
    text = appendix_page([tmp_path / "none"]).text()
    assert (
        "published, Gemma-2-2B" in text
        and "Qwen2.5-7B" in (tmp_path / "s.md").read_text(encoding="utf-8")
        and (tmp_path / "f" / "fig1_k_curves.png").exists()
    )


def test_the_section_is_one_to_print():
    assert PAGES["section11"].text(form="tex") == (ROOT / "paper" / "section11.tex").read_text()


@pytest.mark.skipif(not TEX_ENGINE, reason="no TeX engine is installed")
def test_the_section_compiles_and_its_tables_fit(tmp_path):
    folder = shutil.copytree(ROOT / "paper", tmp_path / "paper", ignore=shutil.ignore_patterns("results", "sequences"))
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    way = {"latexmk": ["-pdf", "-interaction=nonstopmode", "-halt-on-error"], "tectonic": ["--keep-logs"]}[TEX_ENGINE]
    done = subprocess.run([TEX_ENGINE, *way, "section11.tex"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (folder / "section11.pdf").stat().st_size > 100_000
    too_wide = re.findall(r"Overfull .hbox .([\d.]+)pt", (folder / "section11.log").read_text(errors="replace"))
    assert all(float(points) < 2 for points in too_wide), too_wide


def test_variance_explained_of_the_table_is_that_of_the_arrays():
    """From the three inner products that results hold, against the definition."""
    rng = np.random.default_rng(0)
    v, h, pool = rng.normal(1, 1, (40, 8)), rng.normal(1, 1, (40, 8)), rng.normal(1, 1, (300, 8))
    m = metrics.mean_direction(pool)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    expected = 1 - ((unit(h) - unit(v)) ** 2).sum() / ((unit(v) - m) ** 2).sum()
    raw = {rows.GREEDY.raw: metrics.fve(h, v).mean(), rows.FLOOR.raw: metrics.fve_matrix(v, pool).mean()}
    within = (unit(pool) @ unit(pool).T).mean()
    held = RunResults(
        "",
        "",
        {
            rows.EVALUATION_FILE: {"protocols": {"corrected": raw}},
            rows.CEILING_FILE: {"protocols": {"corrected": raw}},
            "targets": {"unrelated_cosine_raw_mean": within},
        },
        ROOT,
    )
    assert findings.variance_explained(held, rows.GREEDY) == pytest.approx(expected)


def test_the_first_table_says_no_where_an_interval_says_no():
    table = findings.findings_table(EVERYTHING)
    nearest = table.loc["Is greedy text closer than the nearest stored text?"]
    assert all(nearest.iloc[1:-1:2].str.startswith("no: -")) and all(nearest.iloc[:-1:2].str.startswith("-"))


def test_latex_tables_are_ascii():
    for path in (ROOT / "paper" / "tables").glob("*.tex"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path.name


def test_committed_figures_exist_in_both_formats():
    stems = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert (
        stems
        == {p.stem for p in (ROOT / "figures").glob("*.pdf")}
        == {s.stem for p in PAGES.values() for s in p.figures}
    )


def test_results_are_plain_json():
    for path in COMMITTED.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda c: pytest.fail(f"{path} holds {c}"))


def test_executed_notebooks_are_labelled_with_the_commit_that_they_ran_at():
    lines = (ROOT / "notebooks" / "executed" / "README.md").read_text(encoding="utf-8").splitlines()
    for folder in (ROOT / "notebooks" / "executed").glob("*/*"):
        results = next(r for r in EVERYTHING if (r.backbone, r.profile) == (folder.parent.name, folder.name))
        (line,) = [line for line in lines if f"`{folder.parent.name}/{folder.name}`" in line]
        records = [*results.data.values(), results.optional("tail_reader") or results.data["targets"]]
        assert all(record["code"]["git_commit"][:12] in line for record in records)


def test_an_adopted_run_keeps_the_name_of_what_it_was_given_and_no_path(tmp_path, monkeypatch):
    given = tmp_path / "elsewhere" / "own-av"
    config = RunConfig(av=str(given))
    folder = RunFolder(
        tmp_path / "runs" / "gemma3-270m" / config.folder_name, {"backbone": "gemma3-270m"}, config, "cpu"
    )
    for name, text in (("results/training.json", "{}"), ("executed/02_train_av.ipynb", f'av = "{given}"')):
        atomic_write(folder.file(name), text.encode())
    monkeypatch.setattr(notebooks, "COMMITTED", tmp_path / "kept")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    notebooks.adopt(folder)
    assert (tmp_path / "kept" / "gemma3-270m" / "quick-av-own-av" / "training.json").exists()
    adopted = tmp_path / "notebooks" / "executed" / "gemma3-270m" / "quick-av-own-av" / "02_train_av.ipynb"
    assert adopted.read_text() == 'av = "own-av"'


def test_a_committed_run_of_a_corpus_names_the_corpus_that_is_here():
    runs = [r for r in EVERYTHING if r.corpus]
    assert runs
    for r in runs:
        path = ROOT / "paper" / "corpora" / f"{r.corpus}.jsonl"
        assert r.data["targets"]["corpus_sha256"] == json_hash(read_texts(path))


def test_a_caption_says_where_a_table_is_of_other_targets_than_the_run(tmp_path):
    shutil.copytree(COMMITTED / "smollm2-135m" / "laptop", tmp_path / "smollm2-135m" / "laptop")
    path = tmp_path / "smollm2-135m" / "laptop" / "reader_seeds.json"
    record = read_record(path)
    assert not any("other targets" in t.caption for t in reader_page([tmp_path]).tables)
    record["made_from"]["targets of seed 1"] = "0" * 64
    path.write_text(json.dumps(record), encoding="utf-8")
    (marked,) = [t for t in reader_page([tmp_path]).tables if "other targets" in t.caption]
    assert marked.stem == "smollm2-135m-laptop-reader-seeds"
