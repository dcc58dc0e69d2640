"""Evidence: what it holds, that every results file is made of it alone, and that a damaged or stale one is refused."""

import dataclasses
import re
import shutil

import naive
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import TINY
from test_golden import TIGHT, differences

from nla_utils import evidence as module
from nla_utils import metrics
from nla_utils.config import ROOT
from nla_utils.errors import ArtefactError
from nla_utils.evidence import FILE, SCHEMA, Evidence, keep, load, null_texts, part_of
from nla_utils.metrics import fve_matrix
from nla_utils.notebooks import STAGES, is_cached
from nla_utils.protocol import LADDER, PROTOCOLS
from nla_utils.report.results import COMMITTED
from nla_utils.scores import FILES
from nla_utils.store import RunFolder, read_record

KEPT = sorted(COMMITTED.glob("*/*/evidence.parquet"))
LARGEST = 6_000_000


def made_again(results, path):
    """Where the results files in a folder differ from what the evidence at ``path`` gives."""
    evidence = Evidence.read(path)
    for name, make in FILES.items():
        kept, made = read_record(results / f"{name}.json"), make(evidence)
        assert evidence.made_from.get(name, kept["made_from"]) == kept["made_from"]
        yield from differences({k: kept[k] for k in made}, made, TIGHT, name)


@pytest.mark.parametrize("name", sorted(TINY))
def test_results_of_a_run_are_made_again(reproduced_tiny, name):
    folder = reproduced_tiny(name)[2]
    assert not list(made_again(folder / "results", folder / FILE))


@pytest.mark.parametrize("path", KEPT, ids=lambda p: f"{p.parts[-3]}-{p.parts[-2]}")
def test_committed_results_are_made_again(path):
    assert not list(made_again(path.parent, path))
    assert path.stat().st_size < LARGEST


def test_a_changed_score_is_a_changed_result(evidence):
    i = SCHEMA.get_field_index("cen")
    kinds = np.array(evidence.table["kind"].to_pylist())
    scores = evidence.table["cen"].to_numpy(zero_copy_only=False).copy()
    scores[np.flatnonzero(kinds == "rollout")[0]] += 1e-5
    changed = dataclasses.replace(evidence, table=evidence.table.set_column(i, SCHEMA.field(i), pa.array(scores)))
    found = list(differences(FILES["centered_eval"](changed), FILES["centered_eval"](evidence), TIGHT))
    assert any("adapter_cen_greedy_mean" in line for line in found)


def test_what_is_read_is_what_was_written(evidence, tmp_path):
    path = tmp_path / "evidence.parquet"
    path.write_bytes(evidence.to_bytes({}))
    read = Evidence.read(path)
    pd.testing.assert_frame_equal(read.table.to_pandas(), evidence.table.to_pandas())
    assert read.facts == evidence.facts
    assert {f.type for f in SCHEMA if pa.types.is_floating(f.type)} == {pa.float32()}


def test_texts_against_loops(evidence, scored_run):
    _, targets, ceilings, rollouts = scored_run
    pool = targets.v[targets.pool].astype(float)
    mu = naive.mean_vector(pool.tolist())
    eigenvalues, vectors = np.linalg.eigh(np.cov(pool.T))
    first = vectors[:, eigenvalues.argmax()]
    for p in PROTOCOLS:
        part, rows = part_of(p), targets.eval_rows(p)
        v, h = targets.v[rows].astype(float), rollouts.at(rows).read_as(p).astype(float)

        def kept(column):
            return evidence.texts("rollout", part, p.name, column)  # noqa: B023

        null = [naive.fve(x, v[2], mu) for x in null_texts(targets, ceilings, p).astype(float)]
        assert kept("raw")[2, 1] == pytest.approx(naive.fve(h[2, 1], v[2]), abs=1e-6)
        assert kept("cen")[2, 1] == pytest.approx(naive.fve(h[2, 1], v[2], mu), abs=1e-6)
        without = [x - mu - ((x - mu) @ first) * first for x in (h[2, 1], v[2])]
        assert kept("cen1")[2, 1] == pytest.approx(naive.fve(*without), abs=1e-5)
        assert kept("rank")[2, 1] == sum(s >= naive.fve(h[2, 1], v[2], mu) for s in null)
        assert kept("norm")[2, 1] == pytest.approx(np.linalg.norm(h[2, 1] - mu), rel=1e-5)
        assert abs(kept("pc")[2, 1, 0]) == pytest.approx(abs((h[2, 1] - mu) @ first), rel=1e-3)
        assert kept("others")[2, 1, 0] == pytest.approx(naive.fve(h[2, 1], v[3], mu), abs=1e-6)
        assert kept("others")[7, 1, 2] == pytest.approx(naive.fve(h[7, 1], v[2], mu), abs=1e-6)
        anchor = max(pool, key=lambda x: naive.fve(x, v[2], mu))  # noqa: B023
        assert kept("anchor")[2, 1] == pytest.approx(naive.fve(h[2, 1], anchor, mu), abs=1e-6)
        np.testing.assert_array_equal(kept("tokens"), rollouts.at(rows).lengths)
        assert kept("ids")[2, 1, :3].tolist() == rollouts.at(rows).sequence(2, 1)[:3]
        np.testing.assert_array_equal(kept("logp")[:, 1:], rollouts.at(rows).logp["sampled"][:, 1:])


def test_targets_against_the_arrays(evidence, scored_run):
    _, targets, ceilings, rollouts = scored_run
    for p in PROTOCOLS:
        part, v, pool_h = part_of(p), targets.v[targets.eval_rows(p)], null_texts(targets, ceilings, p)
        scores, ks = fve_matrix(v, pool_h, targets.mu), evidence.facts["null_k"][p.name]
        assert evidence.facts["null_pool"][p.name] == len(pool_h) and ks[0] == 1 and ks[-1] == len(pool_h)
        whole = evidence.texts("target", part, p.name, "null_cen")
        np.testing.assert_allclose(whole, metrics.exact_k_curve(scores, ks), atol=1e-6)
        np.testing.assert_allclose(whole[:, -1], scores.max(axis=1), atol=1e-6)
        left_out = evidence.texts("target", part, p.name, "null_left_out_cen").reshape(len(v), 10, len(ks))
        third = np.array_split(np.arange(len(pool_h)), 10)[2]
        expected = metrics.exact_k_curve(np.delete(scores, third, axis=1), ks[:3])
        np.testing.assert_allclose(left_out[:, 2, :3], expected, atol=1e-6)
        assert np.isnan(left_out[:, :, -1]).all()
        greedy = rollouts.at(targets.eval_rows(p)).read_as(p)[:, 0]
        own = fve_matrix(greedy, v, targets.mu)
        rank = [(row >= row[i]).sum() for i, row in enumerate(own)]
        assert evidence.texts("others", part, p.name, "greedy_rank").tolist() == rank
        against = evidence.texts("pool", part, p.name, "against")
        np.testing.assert_allclose(against[3], fve_matrix(v, pool_h[3:4], targets.mu)[:, 0], atol=1e-6)
        np.testing.assert_array_equal(
            evidence.texts("pool", part, p.name, "logp"), ceilings["pool"].logp["alone"][:, 0]
        )


def test_every_text_has_its_ids_once(evidence, scored_run):
    _, targets, ceilings, _ = scored_run
    m = targets.n_eval
    frame = evidence.table.to_pandas()
    texts = frame[frame["kind"].isin(["source", "paraphrase", "tail", "probe", "rollout", "pool"])]
    once = texts[texts["ids"].notna()].groupby("kind").size()
    k = evidence.facts["K"] + 1
    assert once.to_dict() == {
        "source": 2 * m,
        "paraphrase": 4 * 8 * m,
        "tail": 2 * 6 * m,
        "probe": 2 * 4 * m,
        "rollout": 2 * k * m,
        "pool": 2 * targets.pool_size,
    }
    # Behind BOS a source's replay is v itself, whatever it was read as before.
    assert evidence.texts("source", part_of(LADDER[-1]), LADDER[-1].reading, "cen").min() > 1 - 1e-5
    drawn = ceilings["paraphrase.corrected"]
    assert (
        evidence.texts("paraphrase", "held_out", "corrected", "tokens").ravel().tolist()
        == drawn.lengths.ravel().tolist()
    )


def apart(run, tmp_path):
    return dataclasses.replace(run, folder=RunFolder(tmp_path / "apart", run.folder.identity))


def halves(evidence):
    later = pa.compute.is_in(evidence.table["kind"], pa.array(["rollout", "probe", "others", "source_loss"]))
    tables = evidence.table.filter(pa.compute.invert(later)), evidence.table.filter(later)
    return [Evidence(table, evidence.facts) for table in tables]


def kinds(evidence):
    return set(evidence.table["kind"].to_pylist())


def test_notebooks_add_to_it_and_what_is_stale_goes(evidence, scored_run, tmp_path):
    run, (first, second) = apart(scored_run[0], tmp_path), halves(evidence)
    keep(run, "oracle_ceiling", first, {"targets": "a", "ceilings": "b"})
    both = keep(run, "centered_eval", second, {"targets": "a", "ceilings": "b", "rollouts": "c"})
    assert kinds(both) == kinds(evidence) and both.table.num_rows == evidence.table.num_rows
    again = keep(run, "centered_eval", second, {"targets": "a", "ceilings": "b", "rollouts": "d"})
    assert kinds(again) == kinds(evidence) and again.made_from["centered_eval"]["rollouts"] == "d"
    anew = keep(run, "oracle_ceiling", first, {"targets": "a", "ceilings": "other"})
    assert kinds(anew) == kinds(first) and list(anew.made_from) == ["oracle_ceiling"]
    with pytest.raises(ArtefactError, match="holds no rollout of in_sample targets read as published"):
        FILES["rerank_eval"](anew)


def test_a_damaged_missing_or_foreign_file_is_refused(evidence, scored_run, tmp_path, monkeypatch):
    run = apart(scored_run[0], tmp_path)
    path = run.folder.file(FILE)
    with pytest.raises(ArtefactError, match="does not exist"):
        load(run.folder)
    keep(run, "oracle_ceiling", evidence, {})
    load(run.folder)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:2000] + bytes([whole[2000] ^ 255]) + whole[2001:], b"no parquet"):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match="evidence.parquet is no evidence, or damaged"):
            load(run.folder)
    monkeypatch.setattr(module, "VERSION", 4)
    path.write_bytes(whole)
    with pytest.raises(ArtefactError, match="evidence of version 3; this code reads version 4"):
        load(run.folder)
    monkeypatch.undo()
    keep(run, "oracle_ceiling", evidence, {"targets": "of another run"})
    with pytest.raises(ArtefactError, match="of another targets than the run's"):
        load(run.folder)


def test_a_run_without_evidence_is_not_finished(reproduced_tiny, tmp_path):
    made = reproduced_tiny("tiny-gemma2")[2]
    shutil.copytree(made, tmp_path / "run")
    folder = RunFolder(tmp_path / "run", read_record(made / "results" / "targets.json")["identity"])
    assert all(is_cached(folder, stage) for stage in STAGES[2:5])
    folder.file(FILE).unlink()
    assert [is_cached(folder, stage) for stage in STAGES[2:5]] == [False, False, True]


def test_the_page_names_every_column_and_kind(evidence):
    page = (ROOT / "paper" / "EVIDENCE.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[\w` ]+`) \|", page.partition("## Columns")[2], flags=re.M)
    assert sorted(SCHEMA.names) == sorted(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert kinds(evidence) == set(re.findall(r"^\| `(\w+)` \|", page.partition("## Columns")[0], flags=re.M))
    assert f"version {module.VERSION}" in page


def test_coordinates_are_those_of_planted_directions():
    rng = np.random.default_rng(0)
    planted = np.linalg.qr(rng.normal(size=(12, 3)))[0].T
    x = 5 + rng.normal(size=(4000, 3)) * [9, 5, 2] @ planted + 0.01 * rng.normal(size=(4000, 12))
    found = metrics.principal_directions(x, 3)
    np.testing.assert_allclose(np.abs(found @ planted.T), np.eye(3), atol=0.05)
    assert (found[np.arange(3), np.abs(found).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("n", [23, 4])
def test_curves_without_blocks_against_deleting_them(n):
    scores = np.random.default_rng(1).random((5, n))
    found = metrics.curves_without_blocks(scores, [1, 2, n], 10).reshape(5, 10, 3)
    for b, block in enumerate(np.array_split(np.arange(n), 10)):
        left = np.delete(scores, block, axis=1)
        expected = [naive.expected_max(row, 2) for row in left]
        np.testing.assert_allclose(found[:, b, 0], left.mean(axis=1))
        np.testing.assert_allclose(found[:, b, 1], expected)
        assert np.isnan(found[:, b, 2]).all() == (len(block) > 0)
