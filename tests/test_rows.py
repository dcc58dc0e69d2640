"""The registry: every need is known, no key is made twice, and a new statistic is one row."""

import numpy as np
import pytest

from nla_utils import rows
from nla_utils.protocol import CORRECTED
from nla_utils.rows import Row
from nla_utils.scores import FACTS, KEPT, Scores, score

COLUMNS = {name: getattr(rows, name) for name in dir(rows) if name.startswith("OF_")}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_needs_are_known_and_keys_are_unique(name):
    keys = [row.at(kind) for row in COLUMNS[name] for kind in row.kinds]
    assert len(keys) == len(set(keys))
    waiting = [*COLUMNS[name]]
    while waiting:
        row = waiting.pop()
        for need in (*row.needs, *(row.under[1] if row.under else ())):
            if isinstance(need, Row):
                waiting.append(need)
            else:
                assert need in KEPT or need in FACTS, (row, need)


def test_a_difference_is_that_of_its_two_rows_target_by_target(evidence):
    scores = Scores(evidence, CORRECTED)
    margin = rows.GREEDY_MINUS_OTHERS
    assert margin.needs == (rows.GREEDY, rows.OTHERS_GREEDY)
    np.testing.assert_array_equal(scores[margin], scores[rows.GREEDY] - scores[rows.OTHERS_GREEDY])


def test_a_new_statistic_is_one_row(evidence):
    worst = Row("worst of K", "worst_{kind}", (rows.DRAWS,), lambda scores_MK: scores_MK.min(axis=1))
    column = score(evidence, CORRECTED, (worst, rows.minus(worst, rows.BEST))).to_json()
    assert column["worst_cen_minus_adapter_cen_bestofK_mean"] <= 0
    low, high = column["ci95"]["worst_raw"]
    assert low <= column["worst_raw"] <= high
