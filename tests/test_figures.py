"""Figures: what they contain, and that all of it can be read."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from nla_extensions.comparison.page import figure_9
from nla_extensions.depth.page import figure_7
from nla_extensions.tail_reader.page import figure_5, figure_6
from nla_utils import rows
from nla_utils.report import figures
from nla_utils.report.figures import COLOURS, SPARE_COLOUR, WIDTH, apart, training_curves
from nla_utils.report.pages import save_figure
from nla_utils.report.results import (
    BACKBONES,
    FAMILIES,
    TITLES,
    find_results,
    k_curve,
    largest,
    null_at,
    published,
    published_curves,
    without_variants,
)

EVERYTHING = find_results()
SHOWN = without_variants(EVERYTHING)
DRAWN = {
    "1": (figures.figure_1, SHOWN),
    "2": (figures.figure_2, EVERYTHING),
    "3": (figures.figure_3, SHOWN),
    "4": (figures.figure_4, SHOWN),
    "8": (figures.figure_reading, SHOWN),
    "A": (figures.figure_by_run, SHOWN),
    "bits": (figures.figure_bits, SHOWN),
    "5": (figure_5, [r for r in SHOWN if r.optional("tail_reader")]),
    "6": (figure_6, [r for r in SHOWN if r.optional("reader_ablation")]),
    "7": (figure_7, EVERYTHING),
    "9": (figure_9, [r for r in EVERYTHING if r.optional("comparison")]),
}


@pytest.fixture(scope="module")
def drawn():
    made = {name: draw(results) for name, (draw, results) in DRAWN.items()}
    yield made
    for fig in made.values():
        plt.close(fig)


def points(ax):
    """Every vertex of the lines of axes, as a set of rounded pairs."""
    return {(round(float(x), 6), round(float(y), 6)) for line in ax.lines for x, y in zip(*line.get_data())}


def words(fig):
    """Letters on the page: (text, box) of all that is shown, tick labels beyond an axis left out."""
    fig.draw_without_rendering()
    found = []
    for text in fig.findobj(
        lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text().strip()
    ):
        # Of a label its letters alone, without the line that leads to it.
        found.append((text.get_text(), Text.get_window_extent(text)))
    hidden = [
        label
        for ax in fig.axes
        for axis, at in ((ax.xaxis, 0), (ax.yaxis, 1))
        for label in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True))
        if not min(limits := axis.get_view_interval()) <= label.get_position()[at] <= max(limits)
        or not ax.axison
        or not axis.get_tick_params(which="major").get("labelbottom" if at == 0 else "labelleft", True)
    ]
    boxes = [(t.get_text(), t.get_window_extent().extents.tolist()) for t in hidden]
    return [(text, box) for text, box in found if (text, box.extents.tolist()) not in boxes]


@pytest.mark.parametrize("name", DRAWN)
def test_no_two_words_touch_and_none_leaves_the_page(drawn, name):
    fig = drawn[name]
    shown = words(fig)
    assert len(shown) > 5
    for (a, one), (b, other) in itertools.combinations(shown, 2):
        assert not one.padded(-1).overlaps(other.padded(-1)), (a, b)
    width, height = fig.get_size_inches() * fig.dpi
    for text, box in shown:
        assert -1 <= box.x0 and box.x1 <= width + 1 and -1 <= box.y0 and box.y1 <= height + 1, text


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_fits_a_printed_page_with_letters_of_at_least_seven_points(drawn, name):
    width, height = drawn[name].get_size_inches()
    assert width == WIDTH and height <= 9
    assert all(t.get_fontsize() >= 7 for t in drawn[name].findobj(Text))


def panels_of(fig):
    """The panels of figure 1 by the first line of their titles."""
    return {ax.get_title(loc="left").split("\n")[0]: ax for ax in fig.axes if ax.axison}


def test_figure_1_has_every_published_value_with_its_family(drawn):
    panels = panels_of(drawn["1"])
    for name in BACKBONES:
        found, record = points(panels[TITLES[name]]), published(name)["centred_eval"]
        assert {(k, round(y, 6)) for k, y in k_curve(name).items()} <= found, name
        assert (record["K"], round(record["best_of_k"]["cen"], 6)) in found, name
    found = points(panels[TITLES["gemma2_2b"]])
    assert {(k, round(y, 6)) for k, y in k_curve("gpt_oss_20b").items()} <= found
    for which in ("it", "base"):
        for k, y in published("gemma4_31b")[which]["k_curve"]["cen"].items():
            assert (int(k), y) in found


def test_figures_set_ours_beside_what_is_published_of_its_family_in_one_order(drawn):
    """Figure 1 row by row; the bits panel by panel."""
    left, right = drawn["1"].axes[::2], drawn["1"].axes[1::2]
    assert [ax.get_title(loc="left").split("\n")[0] for ax in left] == [TITLES[name] for name in FAMILIES.values()]
    assert [ax.get_title(loc="left").split("\n")[0] for ax in right] == [r.spec.shown for r in largest(SHOWN)]
    for ax, (family, name) in zip(drawn["bits"].axes, FAMILIES.items()):
        said = {text.get_text() for text in ax.texts}
        assert ax.get_title(loc="left") == family and TITLES[name] in said
        assert {f"{r.name}, {r.size}" for r in largest(SHOWN) if r.spec.family == family} <= said


def test_the_null_of_a_published_panel_is_the_one_of_the_table(drawn):
    for c in published_curves():
        if not c.at_least:
            assert (c.k, round(null_at(c.null, c.k), 6)) in points(panels_of(drawn["1"])[c.title])


def test_without_runs_figure_1_has_the_published_panels_alone():
    fig = figures.figure_1([])
    assert list(panels_of(fig)) == [TITLES[name] for name in FAMILIES.values()]
    plt.close(fig)


def test_a_headline_of_another_evaluation_is_joined_to_no_curve(drawn):
    for name in BACKBONES:
        headline, ax = published(name)["centred_eval"]["best_of_k"]["cen"], panels_of(drawn["1"])[TITLES[name]]
        (line,) = [x for x in ax.lines if headline in list(np.atleast_1d(x.get_ydata()))]
        assert len(line.get_xdata()) == 1


def test_both_nulls_of_figure_1_are_seen_where_they_coincide(drawn):
    """The one below is wider than the one drawn on it, which is broken."""
    for results in largest(SHOWN):
        ax = panels_of(drawn["1"])[results.spec.shown]
        column = results.column("rerank_eval", "corrected")
        by_values = {tuple(line.get_ydata()): line for line in ax.lines}
        unrelated, others = (
            by_values[tuple(column[row.cen].values())] for row in (rows.CURVE_UNRELATED, rows.CURVE_OTHERS)
        )
        assert ax.lines.index(unrelated) < ax.lines.index(others)
        assert unrelated.get_linewidth() > 2 * others.get_linewidth() and others.get_linestyle() == ":"


def test_figure_2_is_by_the_share_along_mu(drawn):
    found = points(drawn["2"].axes[0])
    for results in EVERYTHING:
        share = results.data["targets"]["mean_square_share_along_mu"]
        for kind in ("raw", "cen"):
            assert (
                round(share, 6),
                round(results.column("oracle_ceiling", "published")[rows.FLOOR.at(kind)], 6),
            ) in found


def test_figure_3_joins_no_two_ways_of_re_encoding(drawn):
    (ax,) = drawn["3"].axes
    ladders = [[r.column("oracle_ceiling", "ladder")[row.key] for row in rows.LADDER] for r in largest(SHOWN)]
    shown = [line for line in ax.lines if list(line.get_xdata()) in ladders]
    assert len(shown) == len(ladders) and all(line.get_linestyle() == "None" for line in shown)


def test_figure_4_breaks_rho_where_its_numerator_changes(drawn):
    replay, rho = drawn["4"].axes[0], drawn["4"].axes[-1]
    assert {len(line.get_xdata()) for line in replay.lines if line.get_linestyle() == "-"} == {8}
    assert {len(line.get_xdata()) for line in rho.lines if line.get_linestyle() == "-"} == {7, 1}
    labels = " ".join(t.get_text() for t in rho.get_xticklabels())
    assert "BOS" in labels and "_" not in labels


def test_figure_8_has_the_intervals_of_the_held_out_targets(drawn):
    for results in largest(SHOWN):
        low, high = results.source_loss["ci95"][rows.NATS_GAINED[0].key]
        ends = [path.vertices[:, 1] for c in drawn["8"].axes[0].collections for path in c.get_paths()]
        assert any(np.allclose(sorted(end), (low, high)) for end in ends)


def test_figure_a_has_every_run_and_one_legend(drawn):
    fig = drawn["A"]
    assert sum(ax.axison for ax in fig.axes) == 2 * len(SHOWN)
    assert len(fig.legends) == 1 and all(ax.get_legend() is None for ax in fig.axes)


def test_a_backbone_has_one_colour_and_no_other_has_it():
    assert len({*COLOURS.values(), SPARE_COLOUR}) == len(COLOURS) + 1


def test_labels_move_no_more_than_they_must():
    np.testing.assert_allclose(apart([0.0, 5.0], 1.0), [0, 5])
    np.testing.assert_allclose(apart([2.0, 2.0], 1.0), [1.5, 2.5])
    np.testing.assert_allclose(apart([1.0, 0.9, 7.0], 1.0), [1.45, 0.45, 7])
    assert np.diff(np.sort(apart(np.random.default_rng(0).normal(size=20), 0.5))).min() > 0.5 - 1e-9


def test_a_machines_own_style_changes_no_figure(tmp_path):
    with plt.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.facecolor": "red", "lines.linewidth": 9}):
        save_figure(figures.figure_3(SHOWN), tmp_path, "theirs")
    save_figure(figures.figure_3(SHOWN), tmp_path, "ours")
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "ours.png").read_bytes()


def test_the_loss_is_drawn_raw_and_smoothed_on_an_axis_that_one_spike_does_not_stretch():
    rng = np.random.default_rng(0)
    loss = 2 + 0.1 * rng.normal(size=1000)
    loss[0] = 50
    fig = training_curves(
        {"loss": list(loss), "validation": [{"step": 1, "fve_nrm": 0.8, "fve_nrm_cen": 0.5}]}, "gemma3-270m"
    )
    ax = fig.axes[0]
    raw, smooth = (line.get_ydata() for line in ax.lines)
    np.testing.assert_array_equal(raw, loss)
    assert smooth[500] == pytest.approx(loss[488:513].mean()) and np.std(smooth[100:]) < np.std(raw[100:]) / 3
    assert ax.get_ylim()[1] < 3
    plt.close(fig)
