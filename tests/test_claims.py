"""Verdicts: the rule by hand, that every claim finds its quantity, that no page prints a verdict against the rule."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from nla_extensions.comparison import page as comparison
from nla_extensions.tail_reader import page as reader
from nla_utils import metrics, rows
from nla_utils.config import ROOT
from nla_utils.report import claims as findings
from nla_utils.report.claims import (
    CLAIMS,
    LEVEL,
    NO,
    PROTOCOLS,
    UNDECIDED,
    UNMEASURED,
    VALUE_ONLY,
    YES,
    Claimed,
    claimed,
    decide,
    decided,
    holm,
    stated_value,
)
from nla_utils.report.results import (
    BACKBONES,
    TITLES,
    find_results,
    largest,
    null_at,
    published,
    published_curves,
    without_variants,
)
from nla_utils.report.tables import has_bits, seed_groups
from nla_utils.scores import Column

ABOVE = next(c for c in CLAIMS if c.id == "greedy_beats_other_greedy")
SHOWN = without_variants(find_results())
VERDICT = re.compile(rf"^({YES}|{NO}|{UNDECIDED}|{VALUE_ONLY}): ")


def above_zero(value, half):
    return Claimed(value, (value - half, value + half), 0.0)


def within(value, half, delta=0.02):
    return Claimed(value, (value - half, value + half), -delta, delta)


def alone(figure):
    return decide({"": figure})[""]


def test_holm_by_hand():
    # Sorted: .005 × 4, .01 × 3, .03 × 2, and .04 × 1, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_a_family_flips_a_verdict_that_an_interval_alone_would_give():
    close = above_zero(0.022, 0.02)
    assert alone(close) == YES and 0.01 < close.p < LEVEL
    others = {name: above_zero(0.0, 0.02) for name in "abc"}
    assert decide({"close": close, **others})["close"] == UNDECIDED
    certain = {name: above_zero(1.0, 0.02) for name in "abc"}
    assert decide({"close": close, **certain})["close"] == YES


@pytest.mark.parametrize(
    "figure, expected",
    [
        (above_zero(0.02, 0.01), YES),
        (above_zero(-0.02, 0.01), NO),
        (above_zero(0.005, 0.01), UNDECIDED),
        (within(0.005, 0.01), YES),
        (within(0.05, 0.01), NO),
        (within(-0.05, 0.01), NO),
        (within(0.015, 0.01), UNDECIDED),
        (within(0.025, 0.01), UNDECIDED),
        (within(0.0, 0.03), UNDECIDED),
        (Claimed(1.0, (1.0, 1.0), 0.98, 1.02), YES),
        (Claimed(0.0, (0.0, 0.0), 0.0), UNDECIDED),
    ],
)
def test_verdicts(figure, expected):
    assert alone(figure) == expected


@given(st.floats(-1, 1), st.floats(1e-3, 1), st.floats(1e-3, 1), st.floats(0, 0.5))
def test_alone_a_verdict_is_where_the_interval_is(value, below, above, delta):
    low, high = value - below, value + above
    for figure, yes, no in (
        (Claimed(value, (low, high), 0.0), low > 0, high < 0),
        (Claimed(value, (low, high), -delta, delta), -delta < low and high < delta, low > delta or high < -delta),
    ):
        if min(abs(end - bound) for end in (low, high) for bound in (figure.low, figure.high)) > 1e-9:
            assert alone(figure) == (YES if yes else NO if no else UNDECIDED)


def test_without_an_interval_there_is_no_verdict_and_no_member():
    close = above_zero(0.022, 0.02)
    family = {
        "close": close,
        "value": Claimed(0.5, None, 0.0),
        "null": Claimed(0.5, (None, None), 0.0),
        "none": Claimed(None, None),
    }
    assert decide(family) == {"close": YES, "value": VALUE_ONLY, "null": VALUE_ONLY, "none": UNMEASURED}


def test_a_planted_effect_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    column = Column("corrected", 100)
    for name, effect in (("planted", 0.03), ("none", 0.0)):
        column.add(name, rng.normal(effect, 0.05, size=100))
    record = column.to_json()
    assert decide({n: claimed(record, n, 0.0) for n in ("planted", "none")}) == {"planted": YES, "none": UNDECIDED}


def test_false_alarms_in_a_whole_table_are_as_rare_as_the_rule_says():
    rng = np.random.default_rng(1)
    single = table = 0
    for _ in range(150):
        values = rng.normal(0, 0.05, size=(8, 60))
        ends = [np.percentile(metrics.bootstrap_means(v, resamples=500), [2.5, 97.5]) for v in values]
        family = {i: Claimed(v.mean(), tuple(end), 0.0) for i, (v, end) in enumerate(zip(values, ends))}
        table += set(decide(family).values()) != {UNDECIDED}
        single += any(alone(figure) != UNDECIDED for figure in family.values())
    assert table <= 18 < 30 <= single


def test_every_claim_finds_its_quantity_in_every_committed_run():
    for run in find_results():
        for claim in CLAIMS:
            # What training on a target is worth is asked once, under one encoding; signed reranks need evidence.
            if claim.id == "log_probability_is_the_avs" and not has_bits(run):
                continue
            both = claim.id not in ("held_out_equals_in_sample", "log_probability_is_the_avs")
            for protocol in PROTOCOLS if both else ("corrected",):
                assert claim.row.cen in run.column(claim.row.file, protocol), (run.title, claim.id)


def test_what_a_notebook_decides_is_one_family_of_its_own_file():
    """Each closing table against the rule, read off the committed results one figure at a time."""
    for run in find_results():
        column = run.column("rerank_eval", "corrected")
        asked = [c for c in CLAIMS if c.row.file == "rerank_eval"]
        words = decide({c.id: claimed(column, c.row.cen, c.low, c.high) for c in asked})
        shown = decided(asked, column)["in this run"]
        assert [text.split(":")[0] for text in shown] == [words[c.id] for c in asked]
        gained = run.source_loss
        said = findings.answered(run.data["centered_eval"])["in this run"]
        assert len(said) == sum(q.where == "04" for q in findings.QUESTIONS)
        for q in (q for q in findings.QUESTIONS if q.row in rows.NATS_GAINED and gained):
            low, high = gained["ci95"][q.row.key]
            assert f"[{low:+.3f}, {high:+.3f}]" in said[q.sentence]
            # Holm only ever takes a verdict away.
            assert said[q.sentence].startswith("not decided") if low <= 0 <= high else True


def test_published_numbers_are_shown_where_they_suffice():
    stated = {c.id: stated_value(c, "gemma2_2b") for c in CLAIMS}
    assert stated["best_of_k_beats_paraphrase"] == pytest.approx(0.033, abs=5e-4)
    assert stated["best_of_8_beats_paraphrase"] == pytest.approx(-0.026, abs=5e-4)
    assert stated["greedy_beats_other_greedy"] is None
    for name in BACKBONES:
        for claim in CLAIMS:
            stated_value(claim, name)


def test_the_papers_own_null_line_passes_through_its_two_points():
    (null,) = (c.null for c in published_curves() if c.title == "Gemma-2-2B")
    assert null_at(null, 199) == pytest.approx(0.6533, abs=1e-3)
    assert null_at(null, 2000) == pytest.approx(0.7118, abs=1e-3)


def naive(figures):
    """The written rule once more: [(value, interval or None, low, high)] of one table to its words."""
    p = {}
    for i, (value, ends, low, high) in enumerate(figures):
        if ends is None:
            continue
        sides = []
        for bound in (b for b in (low, high) if abs(b) != math.inf):
            width = value - ends[0] if value > bound else ends[1] - value
            z = math.inf if width == 0 else 1.959963985 * abs(value - bound) / width
            sides.append(math.erfc(z / math.sqrt(2)))
        p[i] = max(sides)
    words, rejecting = [VALUE_ONLY if i not in p else UNDECIDED for i in range(len(figures))], True
    for rank, i in enumerate(sorted(p, key=p.get)):
        rejecting = rejecting and p[i] * (len(p) - rank) <= 0.05
        if rejecting:
            value, _, low, high = figures[i]
            words[i] = YES if low < value < high else NO
    return words


def figures_of(column, key, low, high):
    """The figure as ``naive`` takes it, none where it was not measured."""
    return [] if key not in column else [(column[key], column["ci95"].get(key), low, high)]


def scorecard_figures(run):
    return [
        f for c in CLAIMS for p in PROTOCOLS for f in figures_of(run.column(c.row.file, p), c.row.cen, c.low, c.high)
    ]


def findings_figures(runs):
    return [
        f
        for q in findings.QUESTIONS
        for r in runs
        for f in figures_of(r.of(q.row, q.protocol), q.row.cen, q.low, q.high)
    ]


def reader_figures(run):
    return [f for c in reader.CLAIMS for f in figures_of(reader.reader_column(run), c.row.cen, c.low, c.high)]


def families():
    """Every printed table with verdicts by its stem, and its figures in the order of its cells."""
    found = {"findings": findings_figures(largest(SHOWN))}
    for run in SHOWN:
        found[f"{run.stem}-scorecard"] = scorecard_figures(run)
    read = [r for r in SHOWN if r.optional(reader.RESULTS)]
    found |= {f"{r.stem}-reader-scorecard": reader_figures(r) for r in read}
    found["reader-findings"] = [
        f
        for q in reader.FOUND
        for r in largest(read)
        for f in figures_of(reader.reader_column(r), q.row.cen, q.low, q.high)
    ]
    compared = [r.optional(findings.COMPARISON) for r in SHOWN if r.optional(findings.COMPARISON)]
    found["comparison-findings"] = [
        f
        for _, method, key, low in comparison.QUESTIONS
        for record in compared
        for f in figures_of(next(r for r in record["rows"] if r["method"] == method), key, low, math.inf)
    ]
    return found


FAMILIES = families()


def words_of(text):
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    return [match[1] for cell in cells if (match := VERDICT.match(cell))]


def printed(stem):
    return words_of((ROOT / "paper" / "tables" / f"{stem}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stem", FAMILIES)
def test_a_table_prints_the_verdicts_that_the_rule_gives(stem):
    # What the first table shows beside its verdicts comes after them, as values only.
    expected, words = naive(FAMILIES[stem]), printed(stem)
    assert words[: len(expected)] == expected and set(words[len(expected) :]) <= {VALUE_ONLY}
    assert len(expected) >= 4


def test_what_is_left_at_the_last_token_is_the_ratio_of_two_figures_that_are_both_above_zero():
    (given,) = (r for r in SHOWN if r.av)
    said = findings.at_the_ends(SHOWN)
    found = given.data["centered_eval"]["source_loss"]
    left = found["nats_at_last_alike_minus_own"] / found["nats_at_last_other_minus_own"]
    assert said.startswith(f"{given.label}: about {1 - left:.0%} of the peak") and f" {left:.0%} is not. " in said
    assert "at the first token: not decided (against sources that begin alike: yes). " in said
    assert said.count("peak") == 1
    # The rule by hand, over the four figures of the run.
    keys = [row.key for row in rows.OF_ENDS]
    words = naive([(found[k], found["ci95"][k], 0.0, math.inf) for k in keys])
    assert words == [YES, YES, UNDECIDED, YES]
    for other in (r for r in SHOWN if r is not given and r.value(rows.OF_ENDS[1]) is not None):
        lost = other.data["centered_eval"]["source_loss"]
        of_run = naive([(lost[k], lost["ci95"][k], 0.0, math.inf) for k in keys])
        assert f"{other.label}: {of_run[0]} ({of_run[1]})" in said
    assert said in " ".join((ROOT / "paper" / "section11.md").read_text(encoding="utf-8").split())


ACROSS = "across these runs (yes in)"


def test_the_verdict_across_backbones_is_the_written_rules():
    for words, expected in (
        ([YES, YES, YES], YES),
        ([NO, NO, NO], NO),
        ([YES, NO, YES], findings.DIFFERS),
        ([YES, NO, UNDECIDED], findings.DIFFERS),
        ([YES, YES, UNDECIDED], UNDECIDED),
        ([NO, NO, UNDECIDED], UNDECIDED),
        ([YES, YES, UNMEASURED], UNDECIDED),
        ([YES, YES, VALUE_ONLY], UNDECIDED),
        ([VALUE_ONLY, UNMEASURED, VALUE_ONLY], VALUE_ONLY),
        ([UNMEASURED], UNMEASURED),
    ):
        assert findings.across(words) == expected, words


def test_the_scorecard_by_family_has_each_runs_own_verdicts_and_counts_them():
    """Against the committed scorecards of the runs, read as text."""
    runs = largest(SHOWN)
    table, own = findings.families_table(runs), []
    for r in runs:
        cards = (ROOT / "paper" / "tables" / f"{r.stem}-scorecard.md").read_text(encoding="utf-8").splitlines()
        own.append([line.split("|")[5].strip() for line in cards if line.startswith("| ")][1:])
        assert list(table[r.label]) == own[-1]
    words = [[cell.split(":")[0] for cell in cells] for cells in zip(*own)]
    for of, said in zip(words, table[ACROSS]):
        every = of[0] if len(set(of)) == 1 else findings.DIFFERS if {YES, NO} <= set(of) else UNDECIDED
        assert said == (f"{every} ({of.count(YES)} of 3)" if every != VALUE_ONLY else VALUE_ONLY)
    assert {said.split(" (")[0] for said in table[ACROSS]} == {YES, NO, UNDECIDED, findings.DIFFERS, VALUE_ONLY}
    held = [of.count(YES) for of, c in zip(words, CLAIMS) if c.where != "control"]
    counts = f"{held.count(3)} are yes in all runs, {held.count(1) + held.count(2)} in some and {held.count(0)} in none"
    assert findings.family_counts(runs).startswith(f"of §11's own claims {counts}; of the controls ")


def test_what_is_published_on_a_question_is_its_own_familys():
    table = findings.findings_table(SHOWN)
    margins = {c.title: f"{c.margin:+.3f}" for c in published_curves() if not c.at_least}
    for name in BACKBONES:
        shown, record = table[f"published, {TITLES[name]}"], published(name)
        assert (
            shown["Does the same text score 1 (within 0.02), as published?"]
            == f"{record['ceilings']['replay']['cen']:.3f}"
        )
        assert shown["Does it, corrected?"] == UNMEASURED
        assert shown["Is the best of K rollouts closer than the best of K unrelated texts?"] == margins[TITLES[name]]
        best, nearest = (record["centred_eval"][row]["cen"] for row in ("best_of_k", "nn_retrieval"))
        assert (
            shown["Is the best of K rollouts closer than the nearest stored text?"]
            == f"{best:.3f} against {nearest:.3f}"
        )
        assert not words_of("|" + "|".join(shown) + "|")


def test_verdicts_over_trainings_are_students_after_holm_and_need_one_sign():
    """Each training's mean is one observation; bounds as scipy tests them."""
    groups, seen = [g for g in seed_groups(find_results()) if len(g) > 2], set()
    for by_seed in groups:
        expected = over_trainings(by_seed)
        shown = findings.trainings_table(by_seed)["over trainings"]
        assert {sentence: text.split(":")[0] for sentence, text in shown.items()} == expected
        seen |= set(expected.values())
        two = dict(list(by_seed.items())[:2])
        assert set(findings.trainings_table(two)["over trainings"].str.split(":").str[0]) == {"not decided"}
    assert groups and len(seen) == 3


def over_trainings(by_seed):
    """The words that Student's test gives on each question, after Holm."""
    values = {q.sentence: [r.value(q.row, "cen", q.protocol) for r in by_seed.values()] for q in findings.QUESTIONS}
    p = {}
    for q in findings.QUESTIONS:
        bounds = [bound for bound in (q.low, q.high) if math.isfinite(bound)]
        p[q.sentence] = max(ttest_1samp(values[q.sentence], bound).pvalue for bound in bounds)
    expected, largest_so_far = {}, 0.0
    for i, sentence in enumerate(sorted(p, key=p.get)):
        largest_so_far = max(largest_so_far, min(1.0, (len(p) - i) * p[sentence]))
        q = next(q for q in findings.QUESTIONS if q.sentence == sentence)
        inside = [q.low < x < q.high for x in values[sentence]]
        decided_here = largest_so_far <= 0.05 and len(set(inside)) == 1
        expected[sentence] = ("yes" if all(inside) else "no") if decided_here else "not decided"
    return expected


def test_no_page_prints_a_verdict_that_is_in_none_of_these_tables():
    pages = [*(ROOT / "paper").glob("*.md"), ROOT / "README.md"]
    over_trainings = [p.stem for p in (ROOT / "paper" / "tables").glob("*-seeds-verdicts.md")]
    allowed = {tuple(printed(stem)) for stem in (*FAMILIES, *over_trainings, "scorecard")}
    seen = 0
    for page in pages:
        for block in re.split(r"\n(?!\|)", page.read_text(encoding="utf-8")):
            if words := tuple(words_of(block)):
                assert words in allowed, (page.name, words)
                seen += 1
    assert seen >= len(FAMILIES)


def test_the_bound_that_came_with_the_rule_is_what_leaves_the_claim_on_log_probability_open():
    """The section says what the verdict was before: yes, for both backbones under both protocols."""
    late = "logp_rerank_is_greedy"
    for results in (r for r in SHOWN if r.profile == "full"):
        words = decide(
            {
                (c.id, p): claimed(
                    results.column(c.row.file, p), c.row.cen, -math.inf if c.id == late else c.low, c.high
                )
                for c in CLAIMS
                for p in PROTOCOLS
            }
        )
        assert [words[late, p] for p in PROTOCOLS] == [YES, YES]
