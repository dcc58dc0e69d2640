"""Anyone's texts for anyone's vectors: the same numbers as notebook 04's from files alone, and against loops."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from nla_extensions.cli import app
from nla_extensions.scoring import files
from nla_extensions.scoring.found import RECORD
from nla_extensions.scoring.pool import Pool, load_pool, make_pool
from nla_extensions.scoring.reading import Reading, warnings_of
from nla_extensions.scoring.scores import LAST, score
from nla_utils import metrics
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.metrics import fve
from nla_utils.scores import centered_eval, oracle_ceiling
from nla_utils.targets import describe


@pytest.fixture(scope="module")
def given(scored_run):
    """A run's held-out targets and rollouts as somebody would bring them: (backbone, pool, v, texts, greedy)."""
    run, targets, _, rollouts = scored_run
    run.write_results("targets", describe(run, targets), {"targets": targets.sha256})
    own = rollouts.at(targets.held_out)
    texts = [[own.sequence(m, 1 + j) for j in range(own.k)] for m in range(len(own.rows))]
    greedy = [[own.sequence(m)] for m in range(len(own.rows))]
    return run.backbone, load_pool(run.folder.path, run.backbone), targets.v[targets.held_out], texts, greedy


def values(found):
    return {row.key: row.record() for row in found.rows}


@pytest.mark.parametrize("protocol", ["corrected", "published"])
def test_a_runs_own_texts_score_as_in_notebook_04(given, scored_run, evidence, protocol):
    backbone, pool, v_Md, texts, greedy = given
    targets = scored_run[1]
    if protocol == "published":
        rows, rollouts = targets.in_sample, scored_run[3].at(targets.in_sample)
        v_Md, texts = (
            targets.v[rows],
            [[rollouts.sequence(m, 1 + j) for j in range(rollouts.k)] for m in range(len(rows))],
        )
        greedy = [[rollouts.sequence(m)] for m in range(len(rows))]
        # As published, the null is the pool's texts alone.
        pool = Pool(pool.ids[: pool.size], pool.v[: pool.size], pool.size, None, {})
    many = score(texts, v_Md, backbone, pool=pool, protocol=protocol)
    one = values(score(greedy, v_Md, backbone, pool=pool, protocol=protocol))
    own, found = centered_eval(evidence)["protocols"][protocol], values(many)
    expected = {
        "adapter_cen_bestofK_mean": found["best"]["value"],
        "adapter_cen_sampled_mean": found["mean"]["value"],
        "adapter_cen_greedy_mean": one["best"]["value"],
        "unrelated_text_cen_bestofK_mean": found["best"]["null"],
        "unrelated_text_cen_bestof1_mean": one["best"]["null"],
        "adapter_cen_bestofK_mean_minus_unrelated_text_cen_bestofK_mean": found["best"]["difference"],
        "nn_retrieval_cen_mean": found["best_beside_retrieval"]["null"],
        "shuffled_v_cen_bestofK_mean": found["best_beside_others"]["null"],
        "shuffled_v_cen_greedy_mean": one["best_beside_others"]["null"],
        "greedy_identification_top1": one["identified"]["value"],
        "greedy_identification_mrr": one["reciprocal_rank"]["value"],
        "adapter_raw_bestofK_mean": None,
    }
    if protocol == "corrected":
        expected["adapter_cen1_bestofK_mean"] = None
        expected["bits_cen_bestofK"] = many.bits["value"]
        expected["bits_by_rank_bestofK"] = many.bits["by_rank"]
        assert many.bits["ci95"] == pytest.approx(own["ci95"]["bits_cen_bestofK"], abs=1e-6)
        assert found["best"]["value_ci95"] == pytest.approx(own["ci95"]["adapter_cen_bestofK_mean"], abs=1e-6)
    for key, value in expected.items():
        if value is not None:
            assert value == pytest.approx(own[key], abs=1e-6), key


def test_the_sources_own_last_tokens_are_notebook_03s(given, scored_run, evidence):
    backbone, pool, v_Md, texts, _ = given
    targets = scored_run[1]
    sources = targets.sequences(targets.held_out)
    found = values(score(texts, v_Md, backbone, pool=pool, sources=sources))
    own = oracle_ceiling(evidence)["protocols"]["corrected"]
    for n in LAST:
        if f"tail_oracle_{n}_cen_fve_mean" in own:
            assert found[f"best_beside_last_{n}"]["null"] == pytest.approx(
                own[f"tail_oracle_{n}_cen_fve_mean"], abs=1e-6
            )


def test_against_loops_with_uneven_numbers_of_texts(given):
    backbone, pool, v_Md, texts, _ = given
    texts = [own[: 2 + m % 3] for m, own in enumerate(texts)]
    scores = score(texts, v_Md, backbone, pool=pool)
    best, null, first, others = [], [], [], []
    for v_d, own in zip(v_Md, texts):
        score_K = fve(backbone.encode(own, start=True), v_d, pool.mu)
        best.append(score_K.max())
        null.append(metrics.exact_k_curve(fve(pool.v, v_d, pool.mu)[None], [len(own)])[0, 0])
        first.append(score_K[:2].max())
        rest = [fve(backbone.encode(other[:2], start=True), v_d, pool.mu).max() for other in texts if other is not own]
        others.append(rest)
    found = values(scores)
    assert scores.k == 2 and found["best"]["value"] == pytest.approx(np.mean(best), abs=1e-6)
    assert found["best"]["null"] == pytest.approx(np.mean(null), abs=1e-6)
    assert found["best_beside_others"]["value"] == pytest.approx(np.mean(first), abs=1e-6)
    assert found["best_beside_others"]["null"] == pytest.approx(np.mean(others), abs=1e-6)
    p = [(1 + sum(x >= own - 1e-9 for x in rest)) / (1 + len(rest)) for own, rest in zip(first, others)]
    assert scores.vectors["p_writer"].to_numpy() == pytest.approx(p)
    assert len(scores.texts) == sum(map(len, texts)) and scores.texts["best"].sum() == len(texts)
    assert scores.bits["by_rank"] is None and scores.record()["uneven"]


def test_variance_explained_is_that_of_the_best_text(given):
    backbone, pool, v_Md, texts, _ = given
    scores = score(texts, v_Md, backbone, pool=pool)
    predictor, found = metrics.mean_direction(pool.v[: pool.size]), []
    for v_d, own in zip(v_Md, texts):
        h_Kd = backbone.encode(own, start=True)
        found.append(metrics.variance_explained(h_Kd[fve(h_Kd, v_d, pool.mu).argmax()], v_d, predictor))
    assert values(scores)["variance_explained"]["value"] == pytest.approx(np.mean(found), abs=1e-5)


def test_blocks_and_order_of_texts_change_nothing(given, monkeypatch):
    backbone, pool, v_Md, texts, _ = given
    whole = score(texts, v_Md, backbone, pool=pool).record()["rows"]
    monkeypatch.setattr("nla_extensions.scoring.scores.BLOCK", 3)
    parts = score(texts, v_Md, backbone, pool=pool).record()["rows"]
    for key, row in whole.items():
        for name, value in row.items():
            if isinstance(value, float):
                assert parts[key][name] == pytest.approx(value, abs=1e-6), (key, name)


def test_the_source_as_text_scores_one_and_is_identified(given, scored_run):
    backbone, pool, v_Md, _, _ = given
    targets = scored_run[1]
    scores = score(targets.sequences(targets.held_out), v_Md, backbone, pool=pool)
    found = values(scores)
    assert found["best"]["value"] == pytest.approx(1, abs=1e-5) and found["identified"]["value"] == 1
    assert scores.bits["value"] == pytest.approx(scores.bits["limits"][1])
    assert scores.bits_line().startswith("bits at 1, ") and "> " in scores.bits_line()


def test_at_every_token_against_a_loop(given):
    backbone, pool, v_Md, texts, _ = given
    scores = score(texts, v_Md, backbone, pool=pool, max_over_tokens=True)
    assert not any("too weak" in note for note in scores.notes)
    longer = [*texts[:-1], [[5] * (1 + max(map(len, pool.ids)))]]
    said = score(longer, v_Md, backbone, pool=pool, max_over_tokens=True).notes
    assert any(note.startswith("1 texts are longer than any of the pool") for note in said)
    m, own = 1, texts[1]
    n = max(1, round(np.mean([len(text) for text in own])))

    def best(text, most=None):
        prefixes = [text[: t + 1] for t in range(min(len(text), most or len(text)))]
        return fve(backbone.encode(prefixes, start=True), v_Md[m], pool.mu).max()

    assert scores.texts[scores.texts["id"] == "1"]["score"].max() == pytest.approx(max(map(best, own)), abs=1e-5)
    null = np.array([[best(text, n) for text in pool.ids]])
    (per_vector,) = [row.other_M for row in scores.rows if row.key == "best"]
    assert per_vector[m] == pytest.approx(metrics.exact_k_curve(null, [len(own)])[0, 0], abs=1e-5)


def test_an_encoder_takes_the_models_place_for_the_null_too(given):
    backbone, pool, v_Md, texts, _ = given
    plain = values(score(texts, v_Md, backbone, pool=pool))
    same = values(score(texts, v_Md, backbone, pool=pool, encoder=lambda ids: backbone.encode(ids, start=True)))
    assert same["variance_explained"]["value"] == pytest.approx(plain["variance_explained"]["value"], abs=1e-6)
    away = values(score(texts, v_Md, backbone, pool=pool, encoder=lambda ids: np.ones((len(ids), backbone.d))))
    assert away["best"]["difference"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="an encoder reads a text as a whole"):
        score(texts, v_Md, backbone, pool=pool, encoder=len, max_over_tokens=True)
    with pytest.raises(ConfigError, match="the encoder gave"):
        score(texts, v_Md, backbone, pool=pool, encoder=lambda ids: np.ones((len(ids), 3)))


def test_directions_are_measured_from_mu_and_said_to_be_none(given):
    backbone, pool, v_Md, texts, _ = given
    plain = values(score(texts, v_Md, backbone, pool=pool))
    scores = score(texts, 7 * (v_Md - pool.mu), backbone, pool=pool, directions=True)
    assert values(scores)["best"]["value"] == pytest.approx(plain["best"]["value"], abs=1e-5)
    assert "best_beside_shuffled" in values(scores) and any("directions" in note for note in scores.notes)


def test_one_vector_has_no_interval_and_no_others(given):
    backbone, pool, v_Md, texts, _ = given
    scores = score(texts[:1], v_Md[:1], backbone, pool=pool)
    assert values(scores)["best"]["value_ci95"] is None and "best_beside_others" not in values(scores)
    assert list(scores.discoveries) == ["law"] and any(note.startswith("one vector") for note in scores.notes)
    json.dumps(scores.record(), allow_nan=False)


def test_a_writer_that_looked_at_v_has_no_p_value(given):
    backbone, pool, v_Md, texts, _ = given
    scores = score(texts, v_Md, backbone, pool=pool, searched=True)
    assert scores.discoveries == {} and list(scores.vectors) == ["id"] and scores.p_lines() == []
    assert scores.bits is None and scores.bits_line() == "the texts were searched for: no bits, no p-values"
    json.dumps(scores.record(), allow_nan=False)


def test_sources_that_are_in_the_pool_leave_it(given, scored_run):
    backbone, pool, _, texts, _ = given
    targets = scored_run[1]
    scores = score(texts, targets.v[targets.pool[: len(texts)]], backbone, pool=pool)
    assert scores.about["P"] == len(pool.v) - len(texts)
    assert any("left out" in note for note in scores.notes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v[:, :5], "vectors have shape"),
        (lambda v: v * np.nan, "vector '0' holds NaN"),
        (lambda v: v * 0, "vector '0' is zero"),
        (lambda v: v[:3], "texts for 8 vectors, and 3 vectors"),
    ],
)
def test_bad_vectors_are_named(given, change, message):
    backbone, pool, v_Md, texts, _ = given
    with pytest.raises(ConfigError, match=message):
        score(texts, change(v_Md), backbone, pool=pool)


def test_bad_texts_are_named(given):
    backbone, pool, v_Md, texts, _ = given
    for own, message in (
        ([], "texts of vector '0': there is none"),
        ("<bos>x" if backbone.start_id == 2 else "<eos>x", "spells the special token"),
        ([10**6], "is no token id"),
        ([texts[0][0]] * (1 + len(pool.v)), "the pool holds"),
    ):
        with pytest.raises(ConfigError, match=message):
            score([own, *texts[1:]], v_Md, backbone, pool=pool)
    with pytest.raises(ConfigError, match="every text begins with the start token"):
        score([[[backbone.start_id, *text] for text in own] for own in texts], v_Md, backbone, pool=pool)
    assert any("empty" in note for note in score([[""], *texts[1:]], v_Md, backbone, pool=pool).notes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, mu: v / np.linalg.norm(v, axis=1, keepdims=True), "norm 1"),
        (lambda v, mu: 40 * v, "norms are unlike"),
        (lambda v, mu: v, None),
    ],
)
def test_vectors_of_another_kind_are_warned_of(given, change, message):
    _, pool, v_Md, _, _ = given
    found = warnings_of(change(v_Md, pool.mu), pool)
    assert found == [] if message is None else message in found[0]


def test_vectors_without_mu_are_taken_for_directions():
    rng, mu = np.random.default_rng(0), np.zeros(32)
    mu[0] = 20
    v_Pd = (mu + rng.normal(size=(50, 32))).astype(np.float32)
    pool = Pool([[i] for i in range(50)], v_Pd, 50, None, {})
    assert "--directions" in " ".join(warnings_of(v_Pd[:9] - mu, pool)) and warnings_of(v_Pd[:9], pool) == []


# Files


@pytest.mark.parametrize("end", ["safetensors", "pt", "npy"])
def test_vectors_of_each_kind_of_file(tmp_path, end):
    v_Md, path = torch.randn(3, 4), tmp_path / f"v.{end}"
    named = {"npy": [], "pt": [{"v": v_Md, "names": ["a", "b", "c"]}], "safetensors": [{"v": v_Md}]}[end]
    if end == "npy":
        np.save(path, v_Md.numpy())
    elif end == "pt":
        torch.save(named[0], path)
    else:
        save_file(named[0], path, metadata={"names": json.dumps(["a", "b", "c"])})
    names, found = files.read_vectors(path)
    np.testing.assert_array_equal(found, v_Md.numpy())
    assert names == (["0", "1", "2"] if end == "npy" else ["a", "b", "c"])


def test_vectors_that_have_a_tensor_each(tmp_path):
    save_file({"x": torch.ones(4), "y": torch.zeros(4)}, tmp_path / "v.safetensors")
    names, v_Md = files.read_vectors(tmp_path / "v.safetensors")
    assert names == ["x", "y"] and v_Md.tolist() == [[1] * 4, [0] * 4]


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(2, 3), "b": torch.ones(2, 3)},
        {"a": torch.ones(2), "b": torch.ones(3)},
        {"a": torch.ones(2, 3, 4)},
    ],
)
def test_vectors_of_another_shape_are_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match="v.safetensors holds a"):
        files.read_vectors(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    "line, message",
    [
        ("[]", "line 2: it needs an 'id'"),
        ('{"id": "0"}', "line 2: it needs an 'id'"),
        ('{"id": "7", "text": "x"}', "line 2: id '7' is no vector's name"),
        ('{"id": "0", "texts": ["x", 3]}', "line 2: 'text' is a string"),
        ('{"id": "0", "ids": 3}', "line 2: 'ids' is a list"),
        ('{"id": "0", "ids": [1.5]}', "line 2: 1.5 is no token id"),
        ('{"id": "0", "ids": [[5], [6]], "text": "x"}', "line 2: 1 texts and the ids of 2"),
        ("{", "line 2 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, given, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"id": 0, "text": "a"}\n' + line + "\n")
    with pytest.raises((ConfigError, ArtefactError), match=message):
        files.read_texts(path, ["0"], given[0])


def test_lines_of_one_vector_are_taken_together_and_other_ids_are_counted(tmp_path, given):
    backbone, path = given[0], tmp_path / "texts.jsonl"
    ids = backbone.tokenize_text("a text")
    lines = [
        {"id": 1, "text": "a text"},
        {"id": "0", "texts": ["a text", "b"], "ids": [ids, [9, 9]]},
        {"id": "1", "ids": [7, 8]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found, notes = files.read_texts(path, ["0", "1"], backbone)
    assert found == [[ids, [9, 9]], [ids, [7, 8]]] and notes[0].startswith("1 of 2 texts")
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(ConfigError, match="no text for 1 of 2 vectors, the first is '0'"):
        files.read_texts(path, ["0", "1"], backbone)


# Pools


def test_a_pool_is_drawn_once_and_kept(given, monkeypatch, tmp_path):
    backbone = given[0]
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    pool, path = make_pool(backbone, 20)
    again, _ = make_pool(backbone, 20)
    np.testing.assert_array_equal(pool.v, again.v)
    assert len(pool.v) + pool.about["duplicates left out"] == 20 and len(set(map(tuple, pool.ids))) == len(pool.ids)
    np.testing.assert_allclose(pool.v, backbone.encode(pool.ids, start=True), atol=1e-5)
    assert np.isfinite(pool.nats).all() and path.is_relative_to(tmp_path)
    with pytest.raises(ArtefactError, match="layer = "):
        import dataclasses

        load_pool(path, dataclasses.replace(backbone, layer=1))
    with pytest.raises(ArtefactError, match="holds no pool"):
        load_pool(tmp_path, backbone)
    with pytest.raises(ConfigError, match="n is 1"):
        make_pool(backbone, 1)


def test_a_pool_of_ones_own_texts(given, monkeypatch, tmp_path):
    backbone = given[0]
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    corpus = tmp_path / "own.jsonl"
    corpus.write_text(
        "\n".join(json.dumps({"text": f"the keeper of light number {i} wound clocks"}) for i in range(12))
    )
    pool, _ = make_pool(backbone, 10, corpus)
    assert len(pool.v) == 10 and pool.about["pool"] == "own.jsonl"


# p-values


@pytest.mark.parametrize("k", [1, 8, 64])
def test_p_values_hold_their_level_where_nothing_is_read(k):
    """Best of k of exchangeable draws, with a direction that all texts of a vector share."""
    rng, m, p = np.random.default_rng(k), 3000, 640
    shared = rng.normal(size=(m, 1))
    null_MP, own_MK = (shared + rng.normal(size=(m, n)) for n in (p, k))
    closer_M = (null_MP >= own_MK.max(axis=1, keepdims=True)).sum(axis=1)
    law_M = np.array([metrics.chance_of_rank(int(r), p, k) for r in closer_M])
    others_MJ = shared + rng.normal(size=(m, 39, k)).max(axis=2)
    writer_M = np.array([metrics.p_of_null(own, null) for own, null in zip(own_MK.max(axis=1), others_MJ)], dtype=float)
    for p_M in (law_M, writer_M):
        for level in (0.01, 0.05, 0.2, 0.5):
            assert (p_M <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / m)
    assert law_M.min() >= k / (p + k) - 1e-12 and writer_M.min() >= 1 / 40


def test_p_values_find_what_was_planted(given, scored_run):
    backbone, pool, v_Md, texts, _ = given
    targets = scored_run[1]
    planted = [[*own, source] for own, source in zip(texts, targets.sequences(targets.held_out))]
    scores = score([own[::-1] for own in planted], v_Md, backbone, pool=pool)
    assert scores.vectors["p_writer"].max() == pytest.approx(1 / len(v_Md))
    assert scores.vectors["p_law"].max() == pytest.approx(len(planted[0]) / (len(pool.v) + len(planted[0])))


def test_discoveries_against_their_definitions():
    p = np.array([0.001, 0.008, 0.039, 0.041, 0.2, np.nan])
    harmonic = sum(1 / i for i in range(1, 6))
    ranked = np.sort(p[:5]) * 5 / np.arange(1, 6)
    bh = max((i + 1 for i in range(5) if ranked[i] <= 0.05), default=0)
    by = max((i + 1 for i in range(5) if ranked[i] * harmonic <= 0.05), default=0)
    assert metrics.discoveries(p) == (bh, by)


# The command


def test_the_command_writes_table_json_page_and_a_row_a_text(given, scored_run, tmp_path, monkeypatch):
    backbone, _, v_Md, texts, _ = given
    run, targets, *_ = scored_run
    save_file({"v": torch.from_numpy(v_Md)}, tmp_path / "v.safetensors")
    lines = [{"id": i, "ids": own} for i, own in enumerate(texts)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "sources.jsonl").write_text(
        "\n".join(json.dumps({"id": i, "ids": s}) for i, s in enumerate(targets.sequences(targets.held_out)))
    )
    monkeypatch.chdir(tmp_path)
    words = f"score --vectors v.safetensors --texts mine.jsonl --sources sources.jsonl --backbone {backbone.folder}"
    words += f" --dtype float32 --device cpu --pool {run.folder.path} --parquet out.parquet --html out.html"
    found = CliRunner().invoke(app, words.split())
    assert found.exit_code == 0, found.output
    assert "best of K" in found.stdout and "bits at" in found.stdout and "p by" in found.stdout
    found = CliRunner().invoke(app, [*words.split(), "--json"])
    assert found.exit_code == 0, (found.output, found.exception)
    (record,) = json.loads(found.stdout)["methods"]
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert len(table) == sum(map(len, texts)) and record["rows"]["best"]["value"] == pytest.approx(
        table.groupby("id")["score"].max().mean()
    )
    assert (
        table["id"].is_monotonic_increasing
        and table.groupby("id")["p_law"].first().tolist() == record["vectors"]["p_law"]
    )
    assert json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[RECORD])["rows"] == record["rows"]
    page = (tmp_path / "out.html").read_text()
    assert "the worst" in page and "at random" in page and "<svg" in page and "NaN" not in page


def test_reading_is_once_for_equal_texts(given, monkeypatch):
    backbone = given[0]
    calls = []
    monkeypatch.setattr(
        type(backbone), "encode", lambda self, rows, start: calls.append(rows) or np.ones((len(rows), self.d))
    )
    Reading(backbone, True).states([[5], [6], [5]])
    assert calls == [[[5], [6]]]
