"""§11's model card: its tables are whole in the section, and what is said of its own slips follows from its numbers."""

import re

import pytest

from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.report.pages import section_page
from nla_utils.report.results import SECTION_11, card, find_results, largest, published, published_curves
from nla_utils.report.tables import facts_table, null_mismatch, slips_table

PAGE = section_page()
RUNS = largest(find_results())
# The card prints .713 where its evaluation file has .7125 less a little.
MISPRINT = ("ceilings", "replay", "cen")


def printed():
    """Every number of the card's tables: (table, row, kind), as printed."""
    for table in ("ceilings", "centred_eval"):
        for row, kinds in card()[table].items():
            for kind, text in kinds.items():
                yield (table, row, kind), text
    for k, text in card()["k_curve"]["cen"].items():
        yield ("k_curve", "cen", k), text


def test_the_cards_tables_are_its_evaluation_files_rounded():
    stated = published(SECTION_11)
    for (table, row, kind), text in printed():
        digits = len(text.split(".")[1])
        rounded = f"{stated[table][row][kind]:.{digits}f}"
        assert (rounded == text) == ((table, row, kind) != MISPRINT), (table, row, kind)


@pytest.mark.parametrize("run", [r.label for r in RUNS if r.counterpart == SECTION_11])
def test_the_cards_tables_are_whole_in_the_tables_of_its_family(run):
    of_run = PAGE.values["of_runs"][run]
    shown = {"ceilings": of_run["ceilings"].frame, "centred_eval": of_run["evaluation"].frame}
    labels = {row.published_path.split(".")[1]: row.title for row in rows.CEILINGS if row.published_path}
    evaluated = {row.published_path.split(".")[1]: row.title for row in rows.EVALUATION if row.published_path}
    for (table, row, kind), text in printed():
        if (table, row, kind) == MISPRINT:
            assert text in PAGE.text()
        elif table == "k_curve":
            frame = of_run["k-curve"].frame
            assert frame.loc[int(kind)].iloc[0] == text
        elif kind == "rho_cen":
            (line,) = [r.title for r in rows.RHO if r.published_path == f"centred_eval.{row}.rho_cen"]
            assert of_run["rho"].frame.loc[line].iloc[0] == text
        else:
            label = (labels if table == "ceilings" else evaluated)[row]
            word = "raw" if kind == "raw" else "centred"
            assert shown[table].loc[label, f"published, {word}"] == text


def test_what_the_card_states_beside_its_tables_is_in_the_section_and_its_print():
    text = PAGE.text()
    tables_tex = "".join(t.files["tex"] for t in PAGE.tables)
    in_print = (PAGE.text(form="tex") + tables_tex).replace("$-$", "-")
    for name, value in card()["statements"].items():
        # ‖μ‖ is printed with one digit more than the card has.
        number = value.split(".")[0] if name.startswith("mu_norm") else value.lstrip("-")
        for where in (text, in_print):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", where), (name, value)


def test_the_cards_slips_follow_from_published_numbers():
    table = slips_table(RUNS)["what is wrong"]
    loading, gap, validation, floor, norm = table
    assert "untrained" in loading
    llama = published("llama32_3b")["ceilings"]
    assert (
        f"{llama['nn_in_pool']['cen'] - llama['random_floor']['cen']:.3f}" in gap and f"{llama['gap_cen']:.3f}" in gap
    )
    assert f"{(1 + 0.3334) / 2:.3f}" in validation
    assert "0.668 (-0.004)" in floor and "0.675 (-0.010)" in floor
    assert all(r.name in norm for r in RUNS)


def test_the_facts_of_a_run_are_those_of_its_files():
    table = facts_table(RUNS)
    for r in RUNS:
        assert table.loc["step that was kept", r.label] == str(r.data["training"]["best_step"])
        assert table.loc["training pairs", r.label].replace(",", "") == str(r.data["training"]["train_pairs"])
    gemma = table.iloc[:, 0]
    assert gemma["its validation score, plain cosine"] == "0.3334" and gemma["paraphrase − floor, centred"] == "0.100"


def test_the_author_on_bos_is_quoted_with_both_numbers():
    bos = published("gemma4_31b")["bos"]
    assert all(str(bos[f"replay_cen_{way}"]) in PAGE.text() for way in ("without", "with"))


def test_every_work_that_is_cited_is_in_the_list_and_every_listed_one_is_cited():
    cited = set(re.findall(r"\\cite\{(\w+)\}", PAGE.text(form="tex")))
    assert cited == set(PAGE.values["references"])
    for work in PAGE.values["references"].values():
        assert PAGE.text().count(f"]({work['url']})") == 2


def test_the_protocols_paragraph_on_the_audit_has_the_runs_numbers():
    text = (ROOT / "paper" / "PROTOCOL.md").read_text(encoding="utf-8").split("## 11.")[1].replace("−", "-")
    for r in (r for r in RUNS if r.profile == "full"):
        steps, column = r.data["centered_eval"]["ablation"], r.column(rows.EVALUATION_FILE, "corrected")
        order = list(steps["in_order"])
        both, in_order = ("alone", "in_order"), ("in_order",)
        for slip, key, ways in (("eos_text", "replay", both), ("in_sample", "paraphrase_bestof8", in_order)):
            for way in ways:
                before = "published" if way == "alone" else order[order.index(slip) - 1]
                pair = (f"{steps[way][step][key]:.3f}".lstrip("0") for step in (before, slip))
                assert " → ".join(pair) in text, (r.title, slip, way)
        for value in (column[rows.IN_SAMPLE_GREEDY.key], *column["ci95"][rows.IN_SAMPLE_GREEDY.key]):
            assert f"{value:+.3f}".replace("0.", ".") in text
        for value in (column[rows.OTHERS_GREEDY.cen], column[rows.POOL_FLOOR.cen], null_mismatch(r)):
            assert f"{value:.3f}".lstrip("0") in text
    for curve in published_curves():
        if curve.at_least:
            assert f"{curve.margin:.3f}".replace("0.", ".") in text, curve.title
