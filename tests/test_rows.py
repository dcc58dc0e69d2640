"""The registry: every need is known, no key is made twice, and a new statistic is one row."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from nla_utils import metrics, rows
from nla_utils.protocol import CORRECTED, PROTOCOLS
from nla_utils.rows import Row
from nla_utils.scores import FACTS, KEPT, RowValues, score

PC = ("target", "held_out", "corrected", "pc")
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
    scores = RowValues(evidence, CORRECTED)
    margin = rows.GREEDY_MINUS_OTHERS
    assert margin.needs == (rows.GREEDY, rows.OTHERS_GREEDY)
    np.testing.assert_array_equal(scores[margin], scores[rows.GREEDY] - scores[rows.OTHERS_GREEDY])


def test_a_new_statistic_is_one_row(evidence):
    worst = Row("worst of K", "worst_{kind}", (rows.DRAWS,), lambda scores_MK: scores_MK.min(axis=1))
    column = score(evidence, CORRECTED, (worst, rows.minus(worst, rows.BEST))).to_json()
    assert column["worst_cen_minus_adapter_cen_bestofK_mean"] <= 0
    low, high = column["ci95"]["worst_raw"]
    assert low <= column["worst_raw"] <= high


def best_of_random(scores):
    return max(scores) - sum(scores) / len(scores)


def test_signed_reranks_against_loops(evidence):
    """Column s of ``others`` has a rollout's score against the target s + 1 places after its own."""
    scores = RowValues(evidence, CORRECTED)
    logp, own = scores[rows.LOGP], scores[rows.DRAWS]
    others, pc = (evidence.texts(*of) for of in (("rollout", "held_out", "corrected", "others"), PC))
    m, rho = len(own), [spearmanr(a, b).statistic for a, b in zip(logp, own)]
    gains = {"own": [], "others": [], "constant": [], "oracle": []}
    for i in range(m):
        agree = sum(np.sign(pc[j, 0]) * rho[j] for j in range(m) if j != i)
        sign = np.sign(pc[i, 0]) * (1 if agree > -1e-9 else -1)
        one = 1 if sum(rho[j] for j in range(m) if j != i) > -1e-9 else -1

        def gain(sign, logp, scored):
            return scored[np.argmax(sign * logp)] - scored.mean()

        gains["own"].append(gain(sign, logp[i], own[i]))
        gains["constant"].append(gain(one, logp[i], own[i]))
        gains["oracle"].append(max(gain(s, logp[i], own[i]) for s in (1, -1)))
        written = [((i - s) % m, s) for s in range(1, others.shape[2] + 1)]
        gains["others"].append(np.mean([gain(sign, logp[j], others[j, 1:, s - 1]) for j, s in written]))
    column = score(evidence, CORRECTED, (rows.GREEDY, *rows.GAINS)).values
    for name, expected in gains.items():
        assert column[f"signed_rerank_{name}_gain"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert column["signed_rerank_reads_h_gain"] <= np.mean([best_of_random(x) for x in own]) + 1e-12


def test_a_sign_that_v_gives_is_found_and_one_that_all_share_is_not_the_avs(evidence):
    rng, m, k = np.random.default_rng(0), 60, 16
    v = rng.normal(size=m)
    logp = rng.normal(size=(m, k))
    sign = metrics.signs_of_others(v, np.sign(v) * 0.5)
    own = np.sign(v)[:, None] * logp + rng.normal(size=(m, k))
    shared = np.stack([np.sign(np.roll(v, -s))[:, None] * logp for s in (1, 2)], axis=-1)
    shared = np.concatenate([np.zeros((m, 1, 2)), shared + rng.normal(size=(m, k, 2))], axis=1)
    gained = rows.GAIN_OWN.value(sign, logp, own).mean()
    assert gained > 0.8 and abs(gained - rows.GAIN_OTHERS.value(sign, logp, shared).mean()) < 0.25
    unrelated = np.concatenate([np.zeros((m, 1, 2)), rng.normal(size=(m, k, 2))], axis=1)
    assert abs(rows.GAIN_OTHERS.value(sign, logp, unrelated).mean()) < 0.25


def test_one_direction_out_is_measured_of_corrected_alone(evidence):
    columns = {p.name: score(evidence, p, rows.OF_ROLLOUTS).values for p in PROTOCOLS}
    key = rows.GREEDY_MINUS_OTHERS.at("cen1")
    assert key in columns["corrected"] and key not in columns["published"]


def test_nats_at_the_ends_are_those_of_the_first_and_last_token(evidence):
    column = score(evidence, CORRECTED, (*rows.OF_LOSSES, *rows.OF_ENDS)).values
    own, other, alike = (
        evidence.texts("source_loss", "held_out", "corrected", f"nats_{name}")
        for name in ("own", "other", "ends_alike")
    )
    last = [np.flatnonzero(np.isfinite(row))[-1] for row in own]
    expected = np.mean([b[i] - a[i] for a, b, i in zip(own, other, last)])
    assert column["nats_at_last_other_minus_own"] == pytest.approx(expected, abs=1e-6)
    assert column["nats_at_first_other_minus_own"] == pytest.approx((other - own)[:, 0].mean(), abs=1e-6)
    differences = [b[i] - a[i] for a, b, i in zip(own, alike, last)]
    assert column["nats_at_last_alike_minus_own"] == pytest.approx(np.nanmean(differences), abs=1e-6, nan_ok=True)
