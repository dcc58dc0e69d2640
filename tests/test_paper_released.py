"""The released AV's own numbers beside the published ones: which runs, which rows, and what counts as a difference."""

import copy
import math

import pytest

from nla_utils import rows
from nla_utils.report.pages import tables_of_run
from nla_utils.report.results import RunResults, find_results, published
from nla_utils.report.tables import (
    COLUMNS,
    RELEASED,
    published_column,
    published_null_table,
    released_runs,
    released_table,
)

RUN = max(find_results(), key=lambda r: r.data["targets"]["sizes"]["N"])
GEMMA = published("gemma2_2b")


def run_of(released, backbone="gemma2-2b"):
    """A committed run as if it were one of a released AV."""
    data = copy.deepcopy(RUN.data)
    data["training"]["released"] = released
    return RunResults(backbone, "full-av-released-targets-released", data, RUN.folder)


@pytest.mark.parametrize(
    "released, backbone, found",
    [
        ("released", "gemma2-2b", True),
        ("hub:RiverRider/srt-nla-av-gemma2-2b-v1@abc", "gemma2-2b", True),
        ("hub:RiverRider/srt-nla-av-v1", "gemma2-2b", False),
        ("released", "smollm2-135m", False),
        (None, "gemma2-2b", False),
    ],
)
def test_a_run_counts_where_the_av_is_the_one_released_for_its_backbone(released, backbone, found):
    assert released_runs([run_of(released, backbone)]).keys() == ({"gemma2_2b"} if found else set())


def test_no_committed_run_is_taken_for_one():
    assert not released_runs(find_results())


@pytest.mark.parametrize("off, differs", [(1.3, False), (-1.3, False), (1.5, True), (-1.5, True)])
def test_a_difference_counts_beyond_the_interval_of_two_samples(off, differs):
    run, key = run_of("released"), rows.GREEDY.cen
    column, theirs = run.column(rows.GREEDY.file, "published"), GEMMA["centred_eval"]["greedy"]["cen"]
    assert column["n"] == GEMMA["centred_eval"]["M"] and math.isclose(math.sqrt(2), 1.41, abs_tol=0.01)
    column[key] = theirs + off * 0.01
    column["ci95"][key] = [column[key] - 0.01, column[key] + 0.01]
    shown = released_table("gemma2_2b", run).loc["greedy, centred"]
    assert shown[COLUMNS[0]] == f"{theirs:.3f}" and shown[COLUMNS[1]].startswith(f"{column[key]:.3f} [")
    assert shown[COLUMNS[2]] == f"{off * 0.01:+.3f}" + (", differs" if differs else "")


def test_rows_of_another_k_are_shown_and_not_compared():
    table = released_table("gemma2_2b", run_of("released"))
    assert GEMMA["k_curve"]["K"] == 32 and RUN.column("rerank_eval", "published")["K"] == 64
    assert table.loc["logp-rerank"][COLUMNS[2]] == "not compared: K 32 and 64"


def test_what_a_run_of_vectors_alone_lacks_is_a_dash():
    run = run_of("released")
    column = run.column(rows.CEILING_FILE, "published")
    column[rows.REPLAY.cen], column["ci95"][rows.REPLAY.cen] = None, [None, None]
    shown = released_table("gemma2_2b", run).loc["replay, centred"]
    assert list(shown[list(COLUMNS[1:])]) == ["–", "–"]


def test_tables_one_to_five_have_the_released_av_right_of_what_is_published():
    # Of the same family, another run than the one that the released one is made of.
    released, other = run_of("released"), next(r for r in find_results() if r.title == "gemma3-270m · laptop")
    released.column(rows.GREEDY.file, "published")[rows.GREEDY.cen] = 0.123
    made, plain = tables_of_run(other, released), tables_of_run(other)
    for key in ("ceilings", "evaluation", "rho", "k-curve", "reranks"):
        table, before = made[key].frame, plain[key].frame
        added = [c for c in table.columns if c.startswith(RELEASED)]
        assert [c for c in table.columns if c not in added] == list(before.columns) and len(
            made[key].widths
        ) == 1 + len(table.columns)
        for column in added:
            here = table.columns.get_loc(column)
            assert table.columns[here - 1] in (published_column(other), f"published{column.removeprefix(RELEASED)}")
        assert table[list(before.columns)].equals(before)
    assert made["evaluation"].frame.loc["greedy", f"{RELEASED}, centred"].startswith("0.123 [")
    assert not [
        c for t in tables_of_run(released, released).values() for c in t.frame.columns if c.startswith(RELEASED)
    ]


def test_the_readmes_published_nulls_have_the_released_av_and_its_measured_null():
    run = run_of("released")
    column = run.column(rows.BEST.file, "published")
    table = published_null_table({"gemma2_2b": run})
    said = table.loc["Gemma-2-2B", RELEASED]
    assert said.startswith(f"{column[rows.BEST.cen]:.3f} [") and f" against {column[rows.UNRELATED.cen]:.3f} [" in said
    assert table.loc["Qwen2.5-7B", RELEASED] == "–" and RELEASED not in published_null_table({})
