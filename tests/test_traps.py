"""Each slip of PROTOCOL.md §7: `published` falls into it on purpose, `corrected` does not."""

import dataclasses

import naive
import numpy as np
import pytest
import torch

from nla_utils import baselines as ceilings_module
from nla_utils import rows
from nla_utils.baselines import PROMPT, prompt_ids
from nla_utils.config import TAIL_LENGTHS
from nla_utils.encoding import re_encode
from nla_utils.evidence import null_texts
from nla_utils.lm.sampling import SamplingSettings
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED, PROTOCOLS, PUBLISHED
from nla_utils.scores import score
from nla_utils.store import RunFolder
from nla_utils.training import History, make_split
from nla_utils.verbalizer import load_av, published_pairs

BY_NAME = {p.name: p for p in PROTOCOLS}


@pytest.fixture
def columns(evidence):
    return {
        p.name: [score(evidence, p, chosen) for chosen in (rows.OF_CEILINGS, rows.OF_ROLLOUTS, rows.OF_RERANKS)]
        for p in PROTOCOLS
    }


def test_bos(scored_run):
    run, targets, ceilings, rollouts = scored_run
    model, layer = run.backbone.model, run.backbone.layer
    for protocol, head in ((PUBLISHED, []), (CORRECTED, [run.backbone.start_id])):
        chosen = rollouts.at(targets.eval_rows(protocol))
        for m, k in ((0, 0), (1, 2), (7, 4)):
            expected = naive.hidden(model, layer, head + chosen.sequence(m, k))
            np.testing.assert_allclose(chosen.read_as(protocol)[m, k], expected, rtol=1e-3, atol=1e-3)
    same = fve(ceilings["source.corrected"].read_as(CORRECTED)[:, 0], targets.v[targets.held_out], targets.mu)
    np.testing.assert_allclose(same, 1, atol=1e-5)
    assert (
        fve(ceilings["source.published"].h["left_pad+eos_text"][:, 0], targets.v[targets.in_sample], targets.mu).mean()
        < 0.999
    )


def test_left_pad(tiny_run):
    run, _ = tiny_run
    backbone = run.backbone
    texts = ["a text", "a much longer text that makes the first one padded", "b"]
    rows = [backbone.tokenize_text(t) for t in texts]
    ours = re_encode(backbone, rows, PUBLISHED)
    last = np.array([naive.hidden(backbone.model, backbone.layer, r) for r in rows])
    if backbone.padding_side == "right":
        np.testing.assert_allclose(ours, last, rtol=1e-3, atol=1e-3)
        return
    slipped = naive.left_padded_count_minus_one(backbone.model, backbone.layer, rows, backbone.pad_id)
    np.testing.assert_allclose(ours, slipped, rtol=1e-3, atol=1e-3)
    assert np.abs(ours[0] - last[0]).max() > 1e-2
    np.testing.assert_allclose(backbone.encode(rows, start=False), last, rtol=1e-3, atol=1e-3)


def test_in_sample(scored_run):
    run, targets, *_ = scored_run
    split = make_split(run, targets)
    trained = {split.pairs.rows[i] for i in split.train}
    paired = set(split.pairs.rows) & set(targets.eval_rows(PUBLISHED))
    assert len(trained & paired) > len(paired) / 2 > 0
    assert not trained & set(targets.eval_rows(CORRECTED))


def test_no_null(scored_run, columns):
    _, targets, ceilings, rollouts = scored_run
    for p, (_, evaluation, curve) in columns.items():
        v = targets.v[targets.eval_rows(BY_NAME[p])]
        scores = fve_matrix(v, null_texts(targets, ceilings, BY_NAME[p]), targets.mu)
        draws = np.random.default_rng(0).permuted(np.tile(scores, (300, 1, 1)), axis=2)[:, :, :4].max(axis=2)
        assert evaluation.values["unrelated_text_cen_bestofK_mean"] == pytest.approx(draws.mean(), abs=0.01)
        assert curve.values["kcurve_unrelated_text_cen"]["4"] == pytest.approx(draws.mean(), abs=0.01)


def test_null_texts_are_encoded_as_the_rollouts_are(scored_run):
    run, targets, ceilings, _ = scored_run
    i = int(targets.pool[3])
    model, layer, start = run.backbone.model, run.backbone.layer, run.backbone.start_id
    without = naive.hidden(model, layer, targets.sequence(i))
    behind = naive.hidden(model, layer, [start, *targets.sequence(i)])
    np.testing.assert_allclose(null_texts(targets, ceilings, PUBLISHED)[3], without, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(null_texts(targets, ceilings, CORRECTED)[3], behind, rtol=1e-3, atol=1e-3)


def test_self_mu(scored_run, columns):
    _, targets, ceilings, _ = scored_run
    for p in ("published", "corrected"):
        v = [list(map(float, x)) for x in targets.v[targets.eval_rows(BY_NAME[p])]]
        pool = [list(map(float, x)) for x in targets.v[targets.pool]]
        mu = naive.mean_vector(v if p == "published" else pool)
        ceiling = columns[p][0].values
        assert ceiling["mu_norm"] == pytest.approx(np.linalg.norm(mu), rel=1e-4)
        if p == "published":
            pairs = [naive.fve(a, b, mu) for i, a in enumerate(v) for j, b in enumerate(v) if i != j]
        else:
            pairs = [naive.fve(a, b, mu) for a in v for b in pool]
        assert ceiling["random_floor_cen_fve_mean"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_uncentred_anchor(scored_run, columns):
    _, targets, *_ = scored_run
    for p in ("published", "corrected"):
        v, pool = targets.v[targets.eval_rows(BY_NAME[p])], targets.v[targets.pool]
        best = fve_matrix(v, pool, None if p == "published" else targets.mu).max(axis=1).mean()
        assert columns[p][2].values["nn_anchor_baseline"] == pytest.approx(best)


def test_logp_embeds_and_top_k(scored_run):
    run, targets, _, rollouts = scored_run
    backbone = run.backbone
    av = load_av(run)
    assert np.isnan(rollouts.at(targets.held_out).logp["published"]).all()
    chosen = rollouts.at(targets.in_sample)
    with torch.no_grad():
        prompt = av(torch.from_numpy(targets.v[chosen.rows[:1]]), backbone.dtype)
    ids = chosen.sequence(0, 1)
    truncated = naive.token_logprobs(backbone.model, prompt, ids, top_k=50)
    assert chosen.logp["sampled"][0, 1] == pytest.approx(np.mean(truncated), abs=2e-3)
    module = backbone.model.get_input_embeddings()
    raw_table = torch.cat([prompt, module.weight[torch.tensor([ids])]], 1)
    with torch.no_grad():
        logits = backbone.model(inputs_embeds=raw_table).logits[0].float()
    n = prompt.shape[1]
    whole = [float(torch.log_softmax(logits[n - 1 + t], 0)[i]) for t, i in enumerate(ids)]
    assert chosen.logp["published"][0, 1] == pytest.approx(np.mean(whole), abs=2e-3)
    assert chosen.logp["sampled"][0, 1] > np.mean(naive.token_logprobs(backbone.model, prompt, ids, top_k=None))
    scaled = "gemma" in backbone.name
    proper = np.mean(naive.token_logprobs(backbone.model, prompt, ids, top_k=None))
    assert (abs(chosen.logp["published"][0, 1] - proper) > 1e-2) == scaled
    assert SamplingSettings().top_k == 50


def test_eos_text(tiny_run):
    """A text cannot hold the EOS that its target ended in; the ids can."""
    backbone = tiny_run[0].backbone
    ended = [*backbone.tokenize_text("a text that ends"), backbone.eos_ids[0]]
    v = naive.hidden(backbone.model, backbone.layer, [backbone.start_id, *ended])
    text_ids = backbone.tokenize_text(backbone.decode_text(ended))
    assert text_ids == ended[:-1]
    np.testing.assert_allclose(backbone.encode([ended], start=True)[0], v, rtol=1e-4, atol=1e-4)
    assert np.abs(backbone.encode([text_ids], start=True)[0] - v).max() > 1e-2


def test_pad_generate(tiny_run, monkeypatch, tmp_path):
    run, targets = tiny_run
    asked, draw = [], ceilings_module.continue_prompts
    monkeypatch.setattr(ceilings_module, "continue_prompts", lambda *args: asked.append(args) or draw(*args))
    rows, apart = targets.in_sample[:2], dataclasses.replace(run, folder=RunFolder(tmp_path / "run", {}))
    texts = [ceilings_module.paraphrases(apart, targets, rows, p).sequences for p in (CORRECTED, PUBLISHED)]
    # Where the tokenizer begins with the start token and pads on the left, both ways are one, drawn once.
    same = run.backbone.padding_side == "left" and run.backbone.tokenizer("a").input_ids[0] == run.backbone.start_id
    assert [side for *_, side in asked] == (["left"] if same else ["left", run.backbone.padding_side])
    assert (texts[0] == texts[1]) == same


def test_paraphrase_prompt_starts_from_the_start_token_when_corrected(tiny_run):
    backbone = tiny_run[0].backbone
    default = backbone.tokenizer(PROMPT.format(text="abc")).input_ids
    assert prompt_ids(backbone, "abc", PUBLISHED) == default
    corrected = prompt_ids(backbone, "abc", CORRECTED)
    assert corrected[0] == backbone.start_id and corrected[1] != backbone.start_id


def test_first_k(scored_run, columns):
    _, targets, _, rollouts = scored_run
    for p in ("published", "corrected"):
        chosen = rollouts.at(targets.eval_rows(BY_NAME[p]))
        scores = fve(chosen.read_as(BY_NAME[p])[:, 1:], targets.v[chosen.rows][:, None], targets.mu)
        first = np.mean([max(row[:2]) for row in scores])
        exact = np.mean([naive.expected_max(row, 2) for row in scores])
        own = columns[p][2].values["kcurve_oracle_top1_cen"]["2"]
        assert own == pytest.approx(first if p == "published" else exact, abs=1e-6)


def test_k_mismatch(columns):
    paper, corrected = columns["published"], columns["corrected"]
    ceiling, floor = (paper[0].values[f"{r}_cen_fve_mean"] for r in ("paraphrase_bestof8", "random_floor"))
    best = paper[1].values["adapter_cen_bestofK_mean"]
    assert paper[1].values["rho_cen_bestofK"] == pytest.approx((best - floor) / (ceiling - floor))
    one, floor = (corrected[0].values[f"{r}_cen_fve_mean"] for r in ("paraphrase_all", "random_floor"))
    greedy = corrected[1].values["adapter_cen_greedy_mean"]
    assert corrected[1].values["rho_cen_greedy"] == pytest.approx((greedy - floor) / (one - floor))
    assert "rho_cen_bestofK" not in corrected[1].values


def test_floor_kind(scored_run, columns):
    _, targets, _, rollouts = scored_run
    for p in ("published", "corrected"):
        chosen = rollouts.at(targets.eval_rows(BY_NAME[p]))
        v, h, mu = targets.v[chosen.rows], chosen.read_as(BY_NAME[p]), targets.mu
        m = len(v)
        greedy = [naive.fve(h[j, 0], v[i], mu) for i in range(m) for j in range(m) if i != j]
        best = [max(naive.fve(x, v[i], mu) for x in h[j, 1:]) for i in range(m) for j in range(m) if i != j]
        assert columns[p][1].values["shuffled_v_cen_greedy_mean"] == pytest.approx(np.mean(greedy), abs=1e-6)
        assert columns[p][1].values["shuffled_v_cen_bestofK_mean"] == pytest.approx(np.mean(best), abs=1e-6)
        assert columns[p][2].values["kcurve_shuffled_v_cen"]["4"] == pytest.approx(np.mean(best), abs=1e-6)


def test_raw_select(scored_run):
    """The best by the raw score at multiples of the validation interval, whatever the last step would give."""
    run = scored_run[0]
    sidecar, every = run.folder.load("best_av").sidecar, run.sizes.validate_every
    validated = {r["step"]: r for r in sidecar["validation"]}
    assert sidecar["steps"] in validated, "the last step was not validated"
    saved = {step: r for step, r in validated.items() if step % every == 0}
    assert sidecar["best_val_fve_nrm"] == max(r["fve_nrm"] for r in saved.values())
    assert sidecar["best_step_by_centred"] == max(saved.values(), key=lambda r: r["fve_nrm_cen"])["step"]


def test_raw_select_keeps_no_last_step_but_of_a_run_shorter_than_an_interval():
    scores = {2: 0.6, 4: 0.7, 5: 0.9}
    history = History([0.0] * 5, [{"step": step, "fve_nrm": x} for step, x in scores.items()])
    assert history.best("fve_nrm", 2)["step"] == 4 and history.best("fve_nrm", 20)["step"] == 5


def test_retokenize_and_no_stop(tiny_run):
    run, targets = tiny_run
    pairs, _ = published_pairs(run.backbone, targets, np.arange(90), 64)
    assert not any(set(ids) & set(run.backbone.eos_ids) for ids in pairs.sequences)
    assert any(ids != targets.sequence(r) for r, ids in zip(pairs.rows, pairs.sequences))


def test_one_span_tail_oracle(scored_run, columns):
    run, targets, ceilings, _ = scored_run
    i = int(targets.held_out[0])
    for j, n in enumerate(TAIL_LENGTHS[:3]):
        tail = [run.backbone.start_id, *targets.sequence(i)[-n:]]
        expected = naive.hidden(run.backbone.model, run.backbone.layer, tail)
        np.testing.assert_allclose(ceilings["tail.corrected"].read_as(CORRECTED)[0, j], expected, rtol=1e-3, atol=1e-3)
    assert columns["corrected"][0].values["tail_oracle_32_cen_fve_mean"] == pytest.approx(1, abs=1e-5)


def test_rows_against_loops(scored_run, columns):
    """The headline rows of both protocols, by an implementation that shares no code."""
    _, targets, ceilings, rollouts = scored_run
    for p in ("published", "corrected"):
        chosen = rollouts.at(targets.eval_rows(BY_NAME[p]))
        v, h = targets.v[chosen.rows], chosen.read_as(BY_NAME[p])
        pool = targets.v[targets.pool]
        for kind, mu in (("raw", None), ("cen", naive.mean_vector(pool.astype(float).tolist()))):
            scores = [[naive.fve(x, a, mu) for x in row] for a, row in zip(v, h)]
            expected = {
                f"adapter_{kind}_greedy_mean": [s[0] for s in scores],
                f"adapter_{kind}_sampled_mean": [sum(s[1:]) / len(s[1:]) for s in scores],
                f"adapter_{kind}_bestofK_mean": [max(s[1:]) for s in scores],
                f"nn_retrieval_{kind}_mean": [max(naive.fve(x, a, mu) for x in pool) for a in v],
            }
            for key, values in expected.items():
                assert columns[p][1].values[key] == pytest.approx(sum(values) / len(values), abs=1e-5)
            mu = naive.mean_vector(v.astype(float).tolist()) if p == "published" and mu is not None else mu
            paraphrase = ceilings[f"paraphrase.{p}"].read_as(BY_NAME[p])
            best = [max(naive.fve(x, a, mu) for x in row) for a, row in zip(v, paraphrase)]
            key = f"paraphrase_bestof8_{kind}_fve_mean"
            assert columns[p][0].values[key] == pytest.approx(sum(best) / len(best), abs=1e-5)


def test_intervals_hold_their_means(columns):
    for p in columns.values():
        for column in p:
            record = column.to_json()
            for key, interval in record["ci95"].items():
                pairs = (
                    [(interval, record[key])]
                    if isinstance(interval, list)
                    else [(interval[k], record[key][k]) for k in interval]
                )
                for (low, high), mean in pairs:
                    if key.startswith("rho") or low is None:
                        continue
                    assert low - 1e-9 <= mean <= high + 1e-9, key
