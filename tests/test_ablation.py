"""Slip by slip: the ends are the two protocols, and each correction moves only what it may."""

import numpy as np
import pytest

from nla_utils.ablation import SLIPS, alone, in_order, make_ablation, score_ablation
from nla_utils.evaluation import score_ceilings, score_rollouts
from nla_utils.rollouts import rollout_set


@pytest.fixture(scope="module")
def steps(scored_run):
    run, targets, ceilings, rollouts = scored_run
    ablation = make_ablation(run.config, run.backbone, targets, ceilings, run.folder)
    return score_ablation(targets, ablation, rollouts)


def test_every_slip_is_corrected_once_in_order_and_once_alone():
    assert list(in_order()) == list(alone()) == ["paper", *SLIPS]
    assert in_order()[SLIPS[-1]] == set(SLIPS)
    assert all(fixed == {slip} for slip, fixed in alone().items() if slip != "paper")


@pytest.mark.parametrize("end", ["paper", "corrected"])
def test_the_ends_are_the_two_protocols(steps, scored_run, readings, end):
    _, targets, ceilings, rollouts = scored_run
    step = steps["in_order"]["paper" if end == "paper" else SLIPS[-1]]
    scale = score_ceilings(targets, ceilings, end).values
    chosen = rollout_set(rollouts, targets, end)
    column = score_rollouts(targets, chosen, ceilings, readings, end, "paraphrase_bestof8").values
    expected = {
        "replay": scale["replay_cen_fve_mean"],
        "paraphrase_bestof8": scale["paraphrase_bestof8_cen_fve_mean"],
        "random_floor": scale["random_floor_cen_fve_mean"],
        "greedy": column["adapter_cen_greedy_mean"],
        "bestofK": column["adapter_cen_bestofK_mean"],
        "rho_greedy": column["rho_cen_greedy"],
        "rho_bestofK": column["rho_cen_bestofK" if end == "paper" else "rho_cen_bestof8"],
    }
    for key, value in expected.items():
        assert step[key] == pytest.approx(value, abs=2e-5), key


def test_replay_of_ids_behind_bos_is_exact(steps):
    assert steps["in_order"]["eos_text"]["replay"] == pytest.approx(1.0, abs=1e-5)


def test_scoring_slips_leave_the_rollouts_alone(steps):
    paper = steps["alone"]["paper"]
    for slip in ("left_pad", "eos_text", "pad_generate", "self_mu", "k_mismatch"):
        assert steps["alone"][slip]["greedy"] == paper["greedy"]
        assert steps["alone"][slip]["bestofK"] == paper["bestofK"]
    assert steps["alone"]["bos"]["greedy"] != paper["greedy"]
    assert steps["alone"]["k_mismatch"]["replay"] == paper["replay"]


def test_left_padding_matters_only_where_the_tokenizer_pads_left(steps, scored_run):
    run = scored_run[0]
    moved = not np.isclose(steps["alone"]["left_pad"]["replay"], steps["alone"]["paper"]["replay"], atol=1e-6)
    assert moved == (run.backbone.padding_side == "left")
