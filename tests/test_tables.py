"""Tables: ratios without a denominator, nulls read off a line, and intervals in print."""

import copy
import math

import numpy as np
import pytest

from nla_utils import metrics, rows
from nla_utils.config import source_name
from nla_utils.report import tables
from nla_utils.report.claims import families_table, findings_table, scorecard
from nla_utils.report.results import (
    FAMILIES,
    SECTION_11,
    TITLES,
    RunResults,
    by_family,
    find_results,
    k_curve,
    largest,
    null_at,
    of_equal_size,
    published,
    published_curves,
    section_runs,
    without_variants,
)
from nla_utils.report.tables import audit_of_all, audit_table

EVERYTHING = find_results()
RUNS = largest(EVERYTHING)


def test_a_run_stands_beside_what_is_published_of_its_own_family():
    """Registry, record and every table that prints published numbers; a dash where the record has no such row."""
    beside = {"gemma3-270m": "gemma2_2b", "smollm2-135m": "llama32_3b", "qwen25-coder-0.5b": "qwen25_7b"}
    assert {r.backbone: r.counterpart for r in RUNS} == beside
    for r in RUNS:
        record, headline = published(r.counterpart), tables.headline_table(r)
        assert headline.columns[0] == f"published, {TITLES[r.counterpart]}"
        assert headline.loc["replay, centred"].iloc[0] == f"{record['ceilings']['replay']['cen']:.3f}"
        assert tables.k_curve_table(r).iloc[0, 0] == f"{k_curve(r.counterpart)[1]:.3f}"
        assert tables.rho_table(r).iloc[2, 0] == f"{record['centred_eval']['best_of_k']['rho_cen']:.2f}"
        assert scorecard(r).columns[1] == f"published, {TITLES[r.counterpart]} (value only)"
    assert (
        tables.rho_table(RUNS[1]).loc["greedy"].iloc[0] == "–"
        and "rho_cen" not in published("llama32_3b")["centred_eval"]["greedy"]
    )


def test_a_backbone_of_no_family_stands_beside_section_11s():
    other = RunResults("org/own-model", "quick", RUNS[0].data, RUNS[0].folder)
    assert other.counterpart == SECTION_11 and by_family([other, *RUNS])[None] == [other]
    table = tables.facts_table([other, *RUNS])
    assert list(table.columns)[-1] == other.label and table.columns[0] == "published, Gemma-2-2B"


def test_families_are_set_side_by_side_in_one_order():
    """Published, then ours of the same family: the order is the same in each table, and on the bits' lines."""
    expected = [name for r in RUNS for name in (f"published, {TITLES[r.counterpart]}", r.label)]
    assert list(findings_table(EVERYTHING).columns) == [*expected, "notebook"]
    assert list(families_table(RUNS).columns)[:-1] == list(tables.facts_table(RUNS).columns) == expected
    shown = tables.backbones_table(RUNS)
    assert list(shown.columns) == [
        c for r in RUNS for c in (f"published, {TITLES[r.counterpart]}", f"{r.title}, as published")
    ]
    lines = list(tables.bits_table(RUNS).index)
    for r in RUNS:
        assert lines.index(f"{TITLES[r.counterpart]}, published") < lines.index(r.title)
    assert [line for line in lines if line in {r.title for r in RUNS}] == [r.title for r in RUNS]
    assert [r.spec.family for r in RUNS] == list(FAMILIES) == ["Gemma", "Llama", "Qwen"]


def test_longer_runs_take_the_place_of_quick_ones_without_more():
    quick = [r for r in EVERYTHING if r.profile == "quick"]
    assert [r.profile for r in largest(quick)] == ["quick"] * 3 and of_equal_size(quick) == largest(quick)
    assert [r.title for r in of_equal_size(EVERYTHING)] == [r.title for r in largest(quick)]
    longer = RunResults(
        "qwen25-coder-0.5b", "full", next(r for r in EVERYTHING if r.profile == "full").data, RUNS[0].folder
    )
    assert largest([*EVERYTHING, longer])[2] is longer
    assert [r.profile for r in of_equal_size([*EVERYTHING, longer])] == ["full"] * 3
    assert of_equal_size([]) == []


def test_a_run_that_was_given_an_av_is_called_after_it_and_is_never_the_run_of_its_backbone():
    (given,) = (r for r in EVERYTHING if r.av)
    plain = next(r for r in EVERYTHING if (r.backbone, r.profile) == (given.backbone, "quick"))
    assert given.av == "smollm2-135m-full" and given.label == f"{plain.label}, AV smollm2-135m-full"
    assert given.sizes == plain.sizes and given.training["av_sha256"] and "/" not in given.training["released"]
    labels = [r.label for r in without_variants(EVERYTHING)]
    assert len(set(labels)) == len(labels)
    # Nor where it is larger; but it is where there is no other.
    data = copy.deepcopy(given.data)
    data["targets"]["sizes"]["N"] = 10**6
    larger = RunResults(given.backbone, "full-av-other", data, given.folder)
    for runs in ([given, plain, larger], [larger, given, plain]):
        assert largest(runs) == [plain] and section_runs(runs) == [plain] and of_equal_size(runs) == [plain]
    assert largest([given]) == [given]
    assert not [c for c in findings_table(EVERYTHING) if "AV " in c]


def test_an_av_is_called_by_its_hub_id_or_its_folders_name():
    for said, name in (("hub:org/av@abc", "org/av"), ("released", "released"), ("/some/where/own-av", "own-av")):
        data = copy.deepcopy(RUNS[0].data)
        data["training"]["released"] = said
        assert RunResults(RUNS[0].backbone, "quick-av", data, RUNS[0].folder).av == name
    assert [source_name(x) for x in ("hub:org/av@abc", "/a/b/", "b", "released")] == [
        "hub:org/av@abc",
        "b",
        "b",
        "released",
    ]


def _with_interval_of(results, key, interval):
    data = copy.deepcopy(results.data)
    data[rows.CEILING_FILE]["protocols"]["corrected"]["ci95"][key] = interval
    return RunResults(results.backbone, results.profile, data, results.folder)


def test_a_ratio_is_a_dash_where_its_denominator_may_be_zero():
    for results in EVERYTHING:
        scale = results.column(rows.CEILING_FILE, "corrected")["ci95"]
        may_be_zero = scale[rows.PARAPHRASE_ALL.cen][0] <= scale[rows.FLOOR.cen][1]
        for row in rows.RHO_OF_ONE:
            assert (tables.rho(results, "corrected", row) == "–") == may_be_zero, results.title
    shown = {r.backbone: tables.rho(r, "corrected", rows.RHO[0]) for r in RUNS}
    assert {text == "–" for text in shown.values()} == {True, False}
    floor = RUNS[0].column(rows.CEILING_FILE, "corrected")["ci95"][rows.FLOOR.cen][1]
    for row, divisor in ((rows.RHO[0], rows.PARAPHRASE_ALL), (rows.RHO[3], rows.PARAPHRASE)):
        assert tables.rho(_with_interval_of(RUNS[0], divisor.cen, [floor - 1e-6, 1]), "corrected", row) == "–"
        assert tables.rho(_with_interval_of(RUNS[0], divisor.cen, [floor + 1e-6, 1]), "corrected", row) != "–"


def test_a_null_that_is_a_straight_line_is_read_off_exactly():
    line = lambda k: 0.5 + 0.02 * math.log2(k)  # noqa: E731
    assert null_at({199: line(199), 2000: line(2000)}, 64) == pytest.approx(line(64))


def test_the_null_of_the_later_ports_is_a_lower_bound_on_one_that_bends_down():
    """The expected maximum of k of a pool: read from its ends, it is below itself in between."""
    pool = np.random.default_rng(0).normal(0.5, 0.1, (40, 500))
    curve = dict(zip((1, 64, 500), metrics.exact_k_curve(pool, [1, 64, 500]).mean(axis=0)))
    assert null_at({1: curve[1], 500: curve[500]}, 64) < curve[64]
    found = [c for c in published_curves() if c.at_least]
    assert len(found) == 3 and all(c.margin < 0.02 and c.bits[c.k] < 1.1 for c in found)


def test_gemmas_margin_over_its_null_is_within_what_reading_the_null_costs():
    gemma, *_ = (c for c in published_curves() if c.title == "Gemma-2-2B")
    assert gemma.k == 64 and 0 < gemma.bits[64] < 1
    # Read off the same points as the published one.
    same = [r for r in RUNS if r.profile == "full"]
    assert len(same) == 2 and all(0 < gemma.margin < tables.null_mismatch(r) for r in same)


def test_what_the_pool_cannot_tell_is_a_bound():
    for c in published_curves():
        if c.title in ("Qwen2.5-7B", "Llama-3.2-3B"):
            assert tables.bits_cell(c.bits[64], None, 64, 2000) == "> 5.0"
    assert tables.bits_cell(0.5, [0.1, 3.2], 64, 576) == "0.5 [0.1, > 3.2]"
    assert tables.bits_cell(2.0, None, 64, 576) == "2.0°" and tables.bits_cell(-9, None, 8, 576) == "< -9.0"
    assert tables.bits_cell(None, None, 8, 576) == "–"
    table = tables.bits_table(RUNS)
    assert table.loc["gemma3-270m · full", "best-of-K"] == "≈ 3.0°"


def test_the_null_of_the_published_margin_is_read_off_as_ours_is():
    same = [r for r in RUNS if r.profile == "full"]
    for r in same:
        scale, column = (r.column(name, "published") for name in (rows.CEILING_FILE, rows.EVALUATION_FILE))
        a, b = scale[rows.NN_IN_POOL.cen], column[rows.RETRIEVAL.cen]
        slope = (b - a) / math.log2(2000 / 199)
        naive = a - slope * math.log2(199 / 64) - column[rows.UNRELATED.cen]
        assert tables.null_mismatch(r) == pytest.approx(naive)


def test_an_interval_stays_in_one_piece_in_print():
    assert tables.tex("+0.1 [-0.2, +0.3] a, b") == "+0.1 [-0.2,~+0.3] a, b"


def test_the_audit_says_what_the_published_rule_of_checkpoints_would_keep():
    for r in EVERYTHING:
        training = r.data["training"]
        if r.av:
            assert audit_table(r).loc["raw_select", "what it moves"] == "not trained here"
            continue
        interval = training["validation"][0]["step"]
        allowed = {v["step"]: v["fve_nrm"] for v in training["validation"] if v["step"] % interval == 0}
        moved = audit_table(r).loc["raw_select", "what it moves"]
        authors = max(allowed, key=allowed.get)
        assert (f"multiples of {interval} alone, would keep {authors}" in moved) == (authors != training["best_step"])


def test_the_audit_of_all_shows_the_floor_at_every_size():
    table = audit_of_all(RUNS, EVERYTHING)
    for r in RUNS:
        sizes = {o.size for o in EVERYTHING if o.backbone == r.backbone and not o.corpus and not o.av}
        assert len(sizes) >= (3 if r.profile == "full" else 1) and all(
            f"at {size}:" in table.loc["floor_kind", r.label] for size in sizes
        )
        column = r.column(rows.EVALUATION_FILE, "corrected")
        low, high = column["ci95"][rows.IN_SAMPLE_GREEDY.key]
        assert ("not decided" in table.loc["in_sample", r.label]) == (low <= 0 <= high)
