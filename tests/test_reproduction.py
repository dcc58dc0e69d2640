"""A run compared with the committed one: the verdict, what it is judged by, that a run leaves the checkout clean."""

import os
import shutil
import statistics
import subprocess
import sys

import golden
import pytest
import warm
from click.testing import CliRunner

from nla_extensions.cli import app
from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.report import pages as reproduction
from nla_utils.report.pages import ALLOWED, columns, compare, verdict, write_reproduction, write_spread
from nla_utils.report.results import COMMITTED, load_results
from nla_utils.store import read_record, write_record

QUICK = COMMITTED / "gemma3-270m" / "quick"
GREEDY = rows.GREEDY.cen


def alter(folder, name, change):
    """Rewrite one results file, ``change`` applied to it."""
    record = read_record(folder / f"{name}.json")
    change(record)
    write_record(folder / f"{name}.json", record)


def shift(by):
    """Greedy text of the corrected protocol, moved."""

    def change(record):
        record["protocols"]["corrected"][GREEDY] += by

    return change


def even_spread(folder, path, deviation):
    """A file of the same deviation for every row of the run in ``folder``."""
    kept = load_results(folder)
    deviations = {p: {key: deviation for of, key in columns(kept) if of == p} for p in ("published", "corrected")}
    write_record(
        path, {"backbone": kept.backbone, "profile": kept.profile, "seeds": [{}] * 5, "deviations": deviations}
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the committed run as a run folder, with a deviation of 0.01 for every row."""
    folder = tmp_path / "runs" / "gemma3-270m" / "quick"
    shutil.copytree(QUICK, folder / "results")
    monkeypatch.setattr(reproduction, "SPREAD", tmp_path / "seed_spread.json")
    even_spread(QUICK, tmp_path / "seed_spread.json", 0.01)
    return folder


def test_every_row_of_the_sections_tables_is_compared():
    keys = {key for _, key in columns(load_results(QUICK))}
    tables = (
        *rows.CEILINGS,
        *rows.EVALUATION,
        *rows.DIFFERENCES,
        *rows.NATS,
        *rows.NATS_GAINED,
        rows.LOGP_RERANK,
        rows.ANCHOR_RERANK,
        rows.ANCHOR,
        rows.SPEARMAN,
        rows.SLOPE,
    )
    assert keys >= {row.cen for row in tables}
    labels = [label for label, _ in columns(load_results(QUICK)).values()]
    assert len(labels) == len(set(labels))


def test_every_row_of_the_default_run_has_a_measured_spread_of_five_seeds():
    record, kept = read_record(ROOT / "paper" / "seed_spread.json"), columns(load_results(QUICK))
    assert {(p, key) for p, of in record["deviations"].items() for key in of} >= set(kept)
    assert [s["identity"]["seed"] for s in record["seeds"]] == [1, 2, 3, 4, 5]
    own = load_results(QUICK)
    assert record["seeds"][0]["sha256"] == {name: own.sha256(name) for name in own.data}


def test_a_run_agrees_with_itself(run):
    n = len(columns(load_results(QUICK)))
    text = write_reproduction(run)
    assert text.endswith(f"\n\n{n} of {n} rows agree.\n") and (run / "reproduction.md").read_text("utf-8") == text
    assert text.count("| yes ") == n and "over 5 seeds" in text and "ikely reasons" not in text


@pytest.mark.parametrize("by, agrees", [(0.999, True), (1.001, False), (-0.999, True), (-1.001, False)])
def test_a_planted_difference_is_found_from_two_root_two_deviations_on(run, by, agrees):
    alter(run / "results", "centered_eval", shift(by * ALLOWED * 0.01))
    n, text = len(columns(load_results(QUICK))), write_reproduction(run)
    differs = f"{n - 1} of {n} rows agree; 1 differs: evaluation: greedy (corrected).\n"
    assert text.endswith(f"{n} of {n} rows agree.\n" if agrees else differs)
    (line,) = (line for line in text.splitlines() if line.startswith("| evaluation: greedy (corrected)"))
    kept, cells = load_results(QUICK).column("centered_eval", "corrected")[GREEDY], line.split("|")
    assert cells[2].split()[0] == f"{kept:.3f}" and cells[3].split()[0] == f"{kept + by * ALLOWED * 0.01:.3f}"
    assert float(cells[4]) == pytest.approx(by * ALLOWED * 0.01, rel=0.02) and float(cells[5]) == pytest.approx(0.028)
    assert "[" in cells[2] and "[" in cells[3] and cells[6].strip() == ("yes" if agrees else "no")


@pytest.mark.parametrize("by, agrees", [(0.0004, True), (0.0006, False)])
def test_what_is_alike_for_every_seed_may_differ_by_less_than_is_shown(run, by, agrees):
    own, kept = load_results(run), load_results(QUICK)
    own.data["centered_eval"]["protocols"]["corrected"][GREEDY] += by
    found = compare(own, kept, {"corrected": {GREEDY: 0.0}})["agrees"]
    assert list(found[found != "–"]) == ["yes" if agrees else "no"]


def test_two_that_differ_are_counted_as_two(run):
    alter(run / "results", "centered_eval", shift(1))
    alter(run / "results", "oracle_ceiling", lambda r: r["protocols"]["published"].update({rows.REPLAY.cen: 0.1}))
    n = len(columns(load_results(QUICK)))
    found = f"{n - 2} of {n} rows agree; 2 differ: ceilings: replay (published), evaluation: greedy (corrected).\n"
    assert write_reproduction(run).endswith(found)


def test_what_was_made_differently_is_named_as_the_reason_of_a_difference(run):
    def elsewhere(record):
        record["identity"]["dtype"], record["hardware"] = "float32", "another CPU"
        record["libraries"]["torch"] = "2.99"

    alter(run / "results", "centered_eval", elsewhere)
    assert "Made differently, committed → here: " in write_reproduction(run)
    alter(run / "results", "centered_eval", shift(1))
    (line,) = (line for line in write_reproduction(run).splitlines() if line.startswith("Likely reasons"))
    there = load_results(QUICK).data["centered_eval"]
    assert f"hardware {there.get('hardware', 'not recorded')} → another CPU; dtype bfloat16 → float32" in line
    assert f"torch {there['libraries']['torch']} → 2.99" in line and "numpy" not in line


def test_a_difference_between_runs_made_alike_is_left_unexplained(run):
    alter(run / "results", "centered_eval", shift(1))
    assert "nothing in them explains it" in write_reproduction(run)


def test_what_has_no_spread_or_no_counterpart_is_not_judged(run):
    own, kept = load_results(run), load_results(QUICK)
    del own.data["centered_eval"]["protocols"]["corrected"][GREEDY]
    compared = compare(own, kept, {"corrected": {GREEDY: 1.0, rows.BEST.cen: 1.0}})
    n = len(columns(kept)) - 1
    assert verdict(compared).startswith(f"1 of 1 rows agree; {n} not judged")
    lacking = compared.loc["evaluation: greedy (corrected)"]
    assert list(lacking[["here", "difference", "agrees"]]) == ["–"] * 3
    reproduction.SPREAD.unlink()
    assert write_reproduction(run).splitlines()[-1].startswith(f"{n + 1} not judged")


def test_a_spread_is_of_one_run_and_of_no_other(run):
    laptop = run.with_name("laptop")
    shutil.copytree(COMMITTED / "gemma3-270m" / "laptop", laptop / "results")
    assert " not judged" in write_reproduction(laptop).splitlines()[-1]


def test_without_a_committed_run_of_the_name_there_is_nothing_to_compare(run):
    for missing in (run.rename(run.with_name("quick-seed6")), run.with_name("nothing")):
        assert write_reproduction(missing) is None and not (missing / "reproduction.md").exists()


@pytest.fixture
def seeds(tmp_path):
    """Run folders that say that they are of seeds 1 to 5; greedy text moved by the seed's square."""
    folders = [tmp_path / f"seed{seed}" for seed in range(1, 6)]
    for seed, folder in enumerate(folders, 1):
        shutil.copytree(QUICK, folder)
        for name in ("targets", "centered_eval"):
            alter(folder, name, lambda record: record["identity"].update(seed=seed))
        alter(folder, "centered_eval", shift(0.001 * seed**2))
    return folders


def test_the_spread_is_the_standard_deviation_over_seeds(seeds, tmp_path):
    record = read_record(write_spread([load_results(f) for f in seeds], tmp_path / "spread.json"))
    found = record["deviations"]
    assert found["corrected"][GREEDY] == pytest.approx(statistics.stdev([0.001, 0.004, 0.009, 0.016, 0.025]))
    assert found["published"][GREEDY] == 0 and (record["backbone"], record["profile"]) == ("gemma3-270m", "quick")
    assert [s["identity"]["seed"] for s in record["seeds"]] == [1, 2, 3, 4, 5]
    assert all(len(s["code"]["git_commit"]) == 40 and len(s["sha256"]["centered_eval"]) == 64 for s in record["seeds"])


@pytest.mark.parametrize(
    "chosen", [[0, 1], [0, 1, 1], [0, 1, 2, 5], [0, 1, 6]], ids=["two", "twice", "dtype", "unfinished"]
)
def test_runs_that_make_no_spread_are_refused(seeds, chosen, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduction, "SPREAD", tmp_path / "spread.json")
    float32, unfinished = tmp_path / "float32", tmp_path / "unfinished"
    shutil.copytree(seeds[4], float32)
    alter(float32, "targets", lambda record: record["identity"].update(dtype="float32"))
    shutil.copytree(seeds[3], unfinished)
    (unfinished / "rerank_eval.json").unlink()
    folders = [*seeds, float32, unfinished]
    result = CliRunner().invoke(app, ["spread", *(str(folders[i]) for i in chosen)])
    said = "has not all results" if chosen[-1] == 6 else "alike but for the seed"
    assert result.exit_code == 2 and said in " ".join(result.output.split()) and not (tmp_path / "spread.json").exists()


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_run_leaves_the_checkout_clean_and_ends_in_the_verdict(reproduced_tiny, tiny_folders, tmp_path):
    """All notebooks in a checkout that keeps a run of the same name, in which one row was moved."""
    clone = tmp_path / "clone"
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        if not name.startswith(("notebooks/executed/", "bundles/", "tests/")) and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    kept = clone / "paper" / "results" / "tiny-gemma2" / "smoke"
    shutil.copytree(reproduced_tiny("tiny-gemma2")[2] / "results", kept)
    alter(kept, "centered_eval", shift(-0.5))
    even_spread(kept, clone / "paper" / "seed_spread.json", 0.01)
    git(clone, "init", "--quiet")
    git(clone, "add", "--all")
    git(clone, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "all")
    done = warm.run(
        [
            sys.executable,
            "-m",
            "nla_extensions.cli",
            "reproduce",
            "--backbone",
            str(tiny_folders["tiny-gemma2"]),
            *golden.OPTIONS,
        ],
        env={**os.environ, **warm.ENVIRONMENT, "PYTHONPATH": str(clone), warm.FEW: str(kept.parent.parent)},
        cwd=clone,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert git(clone, "status", "--porcelain") == ""
    ignored = {line[3:] for line in git(clone, "status", "--porcelain", "--ignored").splitlines()}
    assert {name for name in ignored if "__pycache__" not in name} == {"runs/"}
    n = len(columns(load_results(kept)))
    assert done.stdout.rstrip().endswith(f"\n{n - 1} of {n} rows agree; 1 differs: evaluation: greedy (corrected).")
    page = clone / "runs" / "tiny-gemma2" / "smoke" / "reproduction.md"
    assert page.read_text(encoding="utf-8").rstrip() in done.stdout
    for path in (page.parent / "results").glob("*.json"):
        assert read_record(path)["hardware"].endswith("bfloat16 instructions, 1 threads")


def test_make_reproduce_adopts_nothing():
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "$(NLA) reproduce" in line)
    assert "--adopt" not in line
