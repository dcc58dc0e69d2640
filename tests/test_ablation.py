"""Slip by slip: the ends are the two protocols, and each correction moves only what it may."""

import numpy as np
import pytest

from nla_utils import rows
from nla_utils.encoding import read
from nla_utils.errors import ConfigError
from nla_utils.protocol import ABLATED, CORRECTED, PUBLISHED, READINGS, SLIPS, ablation_steps
from nla_utils.report.results import find_results
from nla_utils.report.tables import moves
from nla_utils.scores import score, score_ablation


@pytest.fixture(scope="module")
def steps(evidence):
    return score_ablation(evidence, with_rollouts=True)


def test_the_audit_has_a_row_for_each_slip():
    assert list(moves(find_results()[0])) == list(SLIPS)
    assert PUBLISHED.slips < set(SLIPS) and not CORRECTED.slips


def test_fixing_every_slip_gives_the_corrected_protocol():
    fixed = PUBLISHED.fix(*PUBLISHED.slips)
    assert fixed.slips == CORRECTED.slips and fixed.reading == CORRECTED.reading
    assert PUBLISHED.fix("bos").slips == PUBLISHED.slips - {"bos"}
    with pytest.raises(ConfigError, match="did you mean 'left_pad'"):
        PUBLISHED.fix("leftpad")


def test_every_slip_is_corrected_once_in_order_and_once_alone():
    in_order, alone = (ablation_steps()[way] for way in ("in_order", "alone"))
    assert list(in_order) == list(alone) == ["published", *ABLATED]
    assert not in_order[ABLATED[-1]].slips & set(ABLATED)
    for slip in ABLATED:
        assert PUBLISHED.slips - alone[slip].slips == {slip}
    assert PUBLISHED.reading == "published" and CORRECTED.reading == "corrected"


def test_every_step_reads_texts_that_are_there(scored_run, monkeypatch):
    """Of each kind the same texts are written once, and what was read is not read again."""
    run, targets, ceilings, _ = scored_run
    monkeypatch.setattr(type(run.backbone), "encode_layers", None)
    for kind, protocols in READINGS.items():
        for protocol in protocols.values():
            texts = ceilings[protocol.texts(kind)]
            np.testing.assert_array_equal(texts.rows, targets.eval_rows(protocol))
            assert read(run.backbone, texts, protocol).read_as(protocol).shape == (*texts.lengths.shape, run.backbone.d)
    kinds = [name.split(".")[0] for name in ceilings]
    assert {kind: kinds.count(kind) for kind in kinds} == {"pool": 1, "source": 2, "paraphrase": 4, "tail": 2}


@pytest.mark.parametrize("end", [PUBLISHED, CORRECTED], ids=lambda p: p.name)
def test_the_ends_are_the_two_protocols(steps, evidence, end):
    step = steps["in_order"]["published" if end == PUBLISHED else ABLATED[-1]]
    scale = score(evidence, end, rows.OF_CEILINGS).values
    column = score(evidence, end, rows.OF_ROLLOUTS).values
    expected = {
        "replay": scale["replay_cen_fve_mean"],
        "paraphrase_bestof8": scale["paraphrase_bestof8_cen_fve_mean"],
        "random_floor": scale["random_floor_cen_fve_mean"],
        "greedy": column["adapter_cen_greedy_mean"],
        "bestofK": column["adapter_cen_bestofK_mean"],
        "rho_greedy": column["rho_cen_greedy"],
        "rho_bestofK": column["rho_cen_bestofK" if end == PUBLISHED else "rho_cen_bestof8"],
    }
    for key, value in expected.items():
        assert step[key] == pytest.approx(value, abs=2e-5), key


def test_replay_of_ids_behind_bos_is_exact(steps):
    assert steps["in_order"]["eos_text"]["replay"] == pytest.approx(1.0, abs=1e-5)


def test_scoring_slips_leave_the_rollouts_alone(steps):
    paper = steps["alone"]["published"]
    for slip in ("left_pad", "eos_text", "pad_generate", "self_mu", "k_mismatch"):
        assert steps["alone"][slip]["greedy"] == paper["greedy"]
        assert steps["alone"][slip]["bestofK"] == paper["bestofK"]
    assert steps["alone"]["bos"]["greedy"] != paper["greedy"]
    assert steps["alone"]["k_mismatch"]["replay"] == paper["replay"]


def test_left_padding_matters_only_where_the_tokenizer_pads_left(steps, scored_run):
    run = scored_run[0]
    moved = not np.isclose(steps["alone"]["left_pad"]["replay"], steps["alone"]["published"]["replay"], atol=1e-6)
    assert moved == (run.backbone.padding_side == "left")
