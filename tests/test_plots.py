"""What the notebooks show of texts."""

from nla_utils.paper.plots import WIDTH, texts_table


class Words:
    """A backbone whose tokens are words by themselves."""

    @staticmethod
    def decode_text(ids):
        return " ".join(f"w{i}" for i in ids)


def test_a_long_text_is_shown_by_its_end_where_v_is_taken():
    lines = texts_table(Words, {"source": range(1000), "greedy": [1, 2]}).split("\n")
    assert lines[1] == "greedy  w1 w2"
    label, shown = lines[0].split("  ", 1)
    assert label == "source" and shown.startswith("…") and shown.endswith(" w998 w999") and len(shown) == WIDTH
