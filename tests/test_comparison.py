"""Ways of reading side by side: twins, ends, fluency, directions, and the page made from them."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from nla_extensions.comparison import measure as of
from nla_extensions.comparison.measure import KINDS, LEAST, PRICES, SHARED, compare, draw_cases, score, twins, vectors
from nla_extensions.comparison.page import comparison_page
from nla_extensions.release.verbalizers import VERBALIZERS
from nla_utils import NLA
from nla_utils.encoding import nats_per_token
from nla_utils.errors import ArtefactError
from nla_utils.metrics import fve
from nla_utils.report.claims import COMPARISON as RESULTS
from nla_utils.report.results import NAMES
from nla_utils.store import read_record

N = 5


@pytest.fixture(scope="module")
def long_nla(nla):
    """The verbalizers with an AV that writes long enough texts to have twins."""
    av = copy.copy(nla.bundle.av)
    av.config = dataclasses.replace(av.config, max_new_tokens=40)
    return NLA(nla.backbone, dataclasses.replace(nla.bundle, av=av))


@pytest.fixture(scope="module")
def cases(long_nla):
    return draw_cases(long_nla, N, seed=1)


@pytest.fixture(scope="module")
def record(long_nla, tmp_path_factory):
    return compare(long_nla, N, 2, 3, 1, tmp_path_factory.mktemp("compared") / "partial.json")


def by_method(record):
    return {row["method"]: row for row in record["rows"]}


def test_twins_end_alike_and_differ_before():
    sources = [list(range(i, i + 24)) for i in (0, 100, 200)]
    found = twins(sources)
    for i, twin in enumerate(found):
        assert twin[-SHARED:] == sources[i][-SHARED:]
        assert twin[:-SHARED] == sources[(i + 1) % 3][:-SHARED]


def test_cases_are_drawn_anew_for_each_seed_and_long_enough(long_nla, cases):
    assert cases.n == N and min(map(len, cases.sources[:N])) >= LEAST
    np.testing.assert_array_equal(cases.twin_v[:N], cases.v[N:])
    assert draw_cases(long_nla, N, seed=1).sources == cases.sources
    assert draw_cases(long_nla, N, seed=2).sources != cases.sources
    assert not set(map(tuple, cases.sources)) & set(map(tuple, long_nla.bundle.pool_texts))


def test_a_text_that_knows_only_the_shared_end_names_the_twin_by_chance(record):
    row = by_method(record)[f"the source's last {SHARED}"]
    assert row["best_names_twin"] == 0.5 and row["ci95"]["best_names_twin"] == [0.5, 0.5]
    assert row[f"best_minus_last_{SHARED}"] == pytest.approx(0, abs=1e-6)


def test_the_source_itself_is_right_about_everything(record):
    row = by_method(record)["the source"]
    assert row["best_cen"] == pytest.approx(1, abs=1e-5) and row["best_names_twin"] == 1.0
    assert all(row[f"best_minus_last_{n}"] == pytest.approx(0, abs=1e-6) for n in (1, 2, 4))


def test_naming_the_twin_is_counted_as_by_hand(long_nla, cases):
    texts = of.draw(long_nla, "av", cases.v, 3 * long_nla.verbalizer("av").cost, seed=1)
    mu, values = long_nla.bundle.mu, []
    for i in range(N):
        hits = 0.0
        for own, other in ((i, N + i), (N + i, i)):
            scores = [float(fve(h, cases.v[own], mu)) for h in texts.h["corrected"][own, 1:]]
            h = texts.h["corrected"][own, 1 + int(np.argmax(scores))]
            mine, theirs = float(fve(h, cases.v[own], mu)), float(fve(h, cases.v[other], mu))
            hits += 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0
        values.append(hits / 2)
    assert score(long_nla, cases, texts).per_target["best_names_twin"].tolist() == values


def test_every_way_has_a_row_with_intervals_and_the_best_is_no_worse_than_what_it_is_chosen_from(record):
    rows = by_method(record)
    assert set(VERBALIZERS) | {"guided", "retrieved", "the source"} <= set(rows)
    assert set(PRICES) <= set(rows)
    for row in record["rows"]:
        for key in ("best_cen", "best_nats", "best_minus_others"):
            low, high = row["ci95"][key]
            assert low <= row[key] <= high
    assert rows["guided"]["best_cen"] >= rows["reader"]["best_cen"] - 1e-9
    assert rows["lens"]["greedy_cen"] <= rows["lens"]["best_cen"]


def test_every_way_keeps_to_the_budget(long_nla, record):
    budget, rows = record["forward_tokens"], by_method(record)
    assert budget == 2 * (2 * 40 + 1) and rows["av"]["k"] == 2
    assert rows["reader"]["k"] == budget // (long_nla.bundle.reader.n + 1)
    assert rows["lens"]["k"] == min(budget // 2, len(long_nla.backbone.head_weight))


def test_nats_are_those_of_a_plain_forward_pass(nla):
    backbone = nla.backbone
    texts = [backbone.tokenize_text(t) for t in ("the lighthouse keeper", "wound", "the clock and the keeper and the")]
    for text, nats in zip(texts, nats_per_token(backbone, texts)):
        ids = torch.tensor([[backbone.start_id, *text]])
        with torch.inference_mode():
            logits = backbone.model(ids).logits[0, :-1].float()
        plain = -torch.log_softmax(logits, -1)[torch.arange(len(text)), torch.tensor(text)].mean()
        assert nats == pytest.approx(plain.item(), abs=1e-4)


def test_a_dearer_word_makes_the_search_more_fluent(long_nla, cases):
    v, budget = cases.v[:N], 20 * long_nla.verbalizer("av").cost
    start = of.draw(long_nla, "reader", v, budget, seed=1)
    nats = []
    for fluency in (0.0, 10.0):
        found = of.guided(long_nla, start, v, budget, fluency)
        nats.append(nats_per_token(long_nla.backbone, [found.sequence(m) for m in range(N)]).mean())
    assert nats[1] < nats[0]


def test_verbalize_pays_for_fluent_words(nla, monkeypatch):
    # Ids are chosen; the letters of random tokens are often tokenized into others.
    monkeypatch.setattr(type(nla), "_read_again", lambda _, ids: list(ids))
    v = nla.activation("the lighthouse keeper wound the clock and")
    plain, fluent = (nla.verbalize(v, k=16, fluency=x) for x in (0.0, 100.0))
    assert fluent.nats <= plain.nats and fluent.score <= plain.score


def test_each_kind_of_vector_is_what_it_is_called(nla):
    found = vectors(nla, 6)
    mu, own = nla.bundle.mu, nla.bundle.pool_v[-6:]
    np.testing.assert_allclose(found["an activation"], own, rtol=1e-5, atol=1e-5)
    norms = {kind: np.linalg.norm(v - mu, axis=1) for kind, v in found.items()}
    for kind in KINDS:
        assert norms[kind].mean() == pytest.approx(norms["an activation"].mean(), rel=1e-3)
    shuffled = np.sort(found["coordinates shuffled"] - mu, axis=1)
    straight = np.sort(own - mu, axis=1)
    scale = np.linalg.norm(shuffled, axis=1, keepdims=True) / np.linalg.norm(straight, axis=1, keepdims=True)
    np.testing.assert_allclose(shuffled, straight * scale, rtol=1e-3, atol=1e-4)


def test_what_vectors_are_made_from_is_not_what_they_are_compared_with(nla):
    kept = nla.without_last(6)
    assert len(kept.bundle.pool_texts) == len(kept.bundle.pool_v) == len(nla.bundle.pool_v) - 6
    assert kept.verbalize(nla.bundle.pool_v[-1], k=2).retrieved_score < 1 - 1e-6


def test_every_way_reads_every_kind(record):
    records = record["directions"]
    assert {(r["method"], r["kind"]) for r in records} == {(m, k) for m in (*VERBALIZERS, "guided") for k in KINDS}
    assert all(r["ci95"]["score"][0] <= r["score"] <= r["ci95"]["score"][1] for r in records)
    assert all(0 <= r["percentile"] <= 1 for r in records)


def test_a_comparison_that_was_cut_goes_on_where_it_was(long_nla, record, tmp_path, monkeypatch):
    path, drawn, draw = tmp_path / "partial.json", [], of.draw

    def cut_at_the_lens(nla, method, *args):
        drawn.append(method)
        if method == "lens" and drawn.count("lens") == 1:
            raise KeyboardInterrupt
        return draw(nla, method, *args)

    monkeypatch.setattr(of, "draw", cut_at_the_lens)
    with pytest.raises(KeyboardInterrupt):
        compare(long_nla, N, 2, 3, 1, path)
    with pytest.raises(ArtefactError, match="another comparison"):
        compare(long_nla, N, 2, 3, 2, path)
    assert compare(long_nla, N, 2, 3, 1, path) == record
    # Before the directions, which ask each way once a kind.
    assert drawn.count("av") == 1 + len(KINDS)


def test_the_command_writes_what_the_page_shows(long_nla, scored_run, tmp_path):
    from click.testing import CliRunner

    from nla_extensions.cli import app

    run = scored_run[0]
    to = tmp_path / "here" / run.backbone.name / "smoke" / f"{RESULTS}.json"
    said = CliRunner().invoke(
        app,
        [
            "compare",
            "--backbone",
            run.config.backbone,
            "--run",
            str(run.folder.path),
            "--n",
            "2",
            "--k",
            "1",
            "--directions",
            "2",
            "--to",
            str(to),
        ],
    )
    assert said.exit_code == 0, said.output
    record = read_record(to)
    assert [p.name for p in to.parent.iterdir()] == [to.name]
    assert set(record["made_from"]) == {"targets", "best_av", "reader"} and record["n"] == 2
    for name in NAMES:
        values = {
            "identity": {**record["identity"], "backbone": run.backbone.name, "seed": 1},
            "profile": "smoke",
            "sizes": {"N": 96},
            "made_from": {},
            "code": record["code"],
            "libraries": record["libraries"],
        }
        (to.parent / f"{name}.json").write_text(json.dumps(values))
    page = comparison_page([tmp_path / "here"])
    written = page.write(tmp_path / "page.md", tmp_path / "figures")
    text = written[0].read_text(encoding="utf-8")
    assert "Patchscope" in text and "coordinates shuffled" in text and f"the source's last {SHARED}" in text
