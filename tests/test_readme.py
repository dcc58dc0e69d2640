"""What the README tells a reader to type is a command with options that it has; what it says of numbers is what they are."""

import re
import shlex

import pytest
from safetensors import safe_open

from nla_extensions.cli import app
from nla_extensions.requantize import page as requantized
from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.metrics import chance_of_rank
from nla_utils.report import claims
from nla_utils.report.claims import QUESTIONS, findings_table
from nla_utils.report.results import find_results, look_up, published

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())
FENCED = TEXT.split("```")[1::2]
RUNS = {(r.backbone, r.profile): r for r in find_results()}
LINES = [line.split(" #")[0].strip() for block in FENCED if block[0] == "\n" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("nla ")]
SCORING = (ROOT / "docs" / "score.md").read_text(encoding="utf-8").split("```")[1::2]
OF_SCORING = [line.split(" #")[0] for block in SCORING for line in block.splitlines() if line.startswith("nla ")]
TARGETS = [line for line in LINES if line.startswith("make ")]
# For who starts several processes by hand, who has something to release, and who maintains the committed results.
ELSEWHERE = {"distribute", "bundle", "publish", "spread"}


@pytest.mark.parametrize("line", COMMANDS + OF_SCORING)
def test_a_command_of_the_readme_has_the_options_that_it_is_given(line):
    _, name, *options = shlex.split(line)
    assert app.commands[name].make_context(name, options).info_name == name


@pytest.mark.parametrize("line", TARGETS)
def test_a_target_of_the_readme_is_in_the_makefile(line):
    assert re.search(rf"^{shlex.split(line)[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


def test_the_readme_shows_every_command():
    assert {shlex.split(line)[1] for line in COMMANDS} | ELSEWHERE == set(app.commands)


def test_the_caption_says_whose_texts_beat_retrieval():
    pairs = {}
    for name in ("gemma2_2b", "qwen25_7b", "llama32_3b"):
        best, nearest = (look_up(published(name), f"centred_eval.{row}.cen") for row in ("best_of_k", "nn_retrieval"))
        pairs[name] = best > nearest
        assert re.search(rf"\({best:.3f} against {nearest:.3f}\)", PROSE), name
    assert pairs == {"gemma2_2b": False, "qwen25_7b": True, "llama32_3b": True}
    for backbone in ("gemma3-270m", "smollm2-135m"):
        column = RUNS[backbone, "full"].column(rows.BEST.file, "corrected")
        assert column[rows.BEST.cen] < column[rows.RETRIEVAL.cen]


def test_what_reading_the_null_behind_bos_moves_is_that_of_the_results():
    held = RUNS["gemma3-270m", "full"].data[rows.EVALUATION_FILE]["protocols"]
    behind, without = (held[p][rows.UNRELATED.cen] for p in ("corrected", "published_on_held_out"))
    said = (
        f"{behind - without:.3f} on the same targets ({behind:.3f} behind BOS, {without:.3f} as the paper reads them)"
    )
    assert said in PROSE


def test_the_p_value_of_the_example_is_the_smallest_that_the_stored_texts_can_give():
    k, stored, k_again, p = re.search(r"p = (\d+) / \((\d+) \+ (\d+)\) = ([\d.]+)", PROSE).groups()
    assert k == k_again and p == f"{chance_of_rank(0, int(stored), int(k)):.3f}"
    with safe_open(ROOT / "bundles" / "gemma3-270m" / "reference.safetensors", "np") as kept:
        assert kept.get_slice("ids").get_shape()[0] == int(stored)
    assert f"0 of {stored} stored texts are as close; p = {p} for the best of {k}" in PROSE


def test_what_runs_with_less_training_show_is_counted():
    assert claims.small_runs(find_results()) in PROSE


def test_the_readers_scores_on_a_corpus_and_on_samples_are_the_runs():
    for profile in ("quick-corpus-kjv", "quick"):
        column = RUNS["gemma3-270m", profile].optional("tail_reader")["reader"]["corrected"]
        low, high = column["ci95"][rows.GREEDY.cen]
        assert f"{column[rows.GREEDY.cen]:.3f} [{low:.3f}, {high:.3f}]" in PROSE


def test_two_runs_spread_as_far_as_is_said():
    column = RUNS["smollm2-135m", "laptop"].column(rows.EVALUATION_FILE, "corrected")
    now = column[rows.GREEDY_MINUS_OTHERS.cen]
    before = float(re.search(r"the run committed before it had \+([\d.]+)", PROSE)[1])
    assert f"margin over others' of {now:+.3f}" in PROSE
    assert f"|Δ|/√2 = {abs(before - now) / 2**0.5:.3f}" in PROSE


def test_the_margin_that_the_text_calls_unsettled_is_yes_in_one_table_and_not_decided_in_the_other():
    run = RUNS["smollm2-135m", "full"]
    (asked,) = [q for q in QUESTIONS if q.row is rows.GREEDY_MINUS_OTHERS]
    assert findings_table(list(RUNS.values())).loc[asked.sentence, run.label].startswith("yes: +0.019")
    assert claims.verdicts(run)["greedy_beats_other_greedy", "corrected"] == "not decided"
    assert "+0.019 is *yes* among the verdicts of this table and *not decided* among" in PROSE


def test_what_requantizing_moves_is_that_of_the_results():
    held = [r for r in RUNS.values() if r.optional(requantized.RESULTS)]
    assert len(held) == 3 and {r.sizes["N"] for r in held} == {640}

    def each(kind, value):
        return [value(r.optional(requantized.RESULTS)["kinds"][kind]) for r in held]

    def most(kind, chosen):
        return max(each(kind, lambda found: max(abs(found[f"{row.cen}_change"]) for row in chosen)))

    weights, v = each("Q4_0", lambda f: 100 * f["weights"]["all"]), each("Q4_0", lambda f: f["v"]["mu_mean"])
    assert f"change by {min(weights):.0f} to {max(weights):.0f} % of their norm" in PROSE
    worst = min(each("Q4_0", lambda f: f["v"]["mu_worst"]))
    assert f"{min(v):.2f} to {max(v):.2f} against itself, the worst of 640 targets {worst:.2f}" in PROSE
    scores, margins = [r for r in requantized.ROWS if r not in requantized.MARGINS], requantized.MARGINS

    def reach(chosen):
        return max(each("Q4_0", lambda f: max(abs(x) for row in chosen for x in f["ci95"][f"{row.cen}_change"])))

    assert f"moved by at most {most('Q4_0', scores):.3f}, margins by at most {most('Q4_0', margins):.3f}" in PROSE
    assert f"(intervals reach {reach(requantized.ROWS):.3f})" in PROSE
    assert (
        f"bits by at most {most('Q4_0', requantized.BITS):.1f} (intervals reach {reach(requantized.BITS):.1f})" in PROSE
    )
    assert f"To 8 bits, scores and margins moved by at most {most('Q8_0', requantized.ROWS):.3f}" in PROSE
    assert sum(len(requantized.changed_sides(r, "Q4_0")) for r in held) == 2 and len(held) * len(margins) == 15
