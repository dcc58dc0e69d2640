"""What the notebooks show of texts and arrays."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from nla_utils.report.figures import PLOT_WIDTH, lengths_and_norms, texts_table


class Words:
    """A backbone whose tokens are words by themselves."""

    @staticmethod
    def decode_text(ids):
        return " ".join(f"w{i}" for i in ids)


def test_a_long_text_is_shown_by_its_end_where_v_is_taken():
    lines = texts_table(Words, {"source": range(1000), "greedy": [1, 2]}).split("\n")
    assert lines[1] == "greedy  w1 w2"
    label, shown = lines[0].split("  ", 1)
    assert label == "source" and shown.startswith("…") and shown.endswith(" w998 w999") and len(shown) == PLOT_WIDTH


def test_a_few_huge_activations_do_not_stretch_the_axis_and_are_counted():
    v = np.random.default_rng(0).normal(10, 1, (1000, 4))
    v[:3] *= 1000
    targets = SimpleNamespace(lengths=np.full(1000, 5), ids=np.zeros((1000, 5)), v=v, mu=v[3:].mean(axis=0))
    fig = lengths_and_norms(targets, "gemma3-270m")
    norms = fig.axes[1]
    low, high = norms.get_xlim()
    assert high < 40, "the norms are about 20, three of them 20,000"
    inside = sum(bar.get_height() for bar in norms.patches)
    assert norms.get_title(loc="left") == f"{1000 - inside:.0f} of 1000 lie beyond the axis" and inside < 998
    plt.close(fig)
