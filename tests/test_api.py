"""Reading one activation: from Python and from the command line, out of a run and out of a bundle."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from nla_extensions.cli import app
from nla_extensions.release import bundle as bundles
from nla_extensions.release.bundle import write_bundle
from nla_extensions.release.verbalizers import METHODS
from nla_utils import NLA
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.metrics import chance_of_rank, fve

TEXT = "the lighthouse keeper wound the clock and"


@pytest.mark.parametrize("method", METHODS)
def test_a_verbalization_scores_what_it_says(nla, method):
    v = nla.activation(TEXT)
    found = nla.verbalize(v, k=6, method=method)
    assert 0 <= found.percentile <= 1 and found.k == 6
    pool = fve(nla.bundle.pool_v, v, nla.bundle.mu)
    assert found.percentile == pytest.approx((pool < found.score).mean() ** 6)
    assert found.closer == (pool >= found.score).sum() and found.stored == len(pool)
    assert f"{found.closer} of {found.stored} stored texts" in str(found)
    if method == "guided":
        assert found.p_value is None and "no p-value" in str(found)
    else:
        assert found.p_value == chance_of_rank(found.closer, found.stored, 6)
    assert found.retrieved_score == pytest.approx(pool.max())
    assert found == nla.verbalize(v, k=6, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_the_score_is_that_of_the_text_read_again(nla, method):
    v = nla.activation(TEXT)
    for seed in range(4):
        found = nla.verbalize(v, k=5, method=method, seed=seed)
        for text, score in ((found.text, found.score), (found.greedy, found.greedy_score)):
            if nla.backbone.tokenize_text(text):
                assert score == fve(nla.activation(text), v, nla.bundle.mu).item()


def test_guided_is_never_worse_than_the_draws_it_starts_from(nla, monkeypatch):
    # The search compares ids; the letters of random tokens are often tokenized into others.
    monkeypatch.setattr(type(nla), "_read_again", lambda _, ids: list(ids))
    v = nla.activation(TEXT)
    assert nla.verbalize(v, k=4, method="guided", fluency=0).score >= nla.verbalize(v, k=4).score


def test_activation_is_that_of_the_text_up_to_the_token(nla):
    ids = nla.backbone.tokenize_text(TEXT)
    np.testing.assert_array_equal(nla.activation(TEXT, 2), nla.backbone.encode([ids[:3]], start=True)[0])
    np.testing.assert_array_equal(nla.activation(TEXT, -1), nla.activation(TEXT, len(ids) - 1))
    trace = nla.trace(TEXT)
    assert len(trace) == len(ids)
    np.testing.assert_allclose(trace[-1][1], nla.activation(TEXT), atol=2e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda n: n.activation(""), "has no tokens"),
        (lambda n: n.activation(TEXT, 999), "token 999 is out of range"),
        (lambda n: n.verbalize(np.zeros(3)), "has shape"),
        (lambda n: n.verbalize(np.full(n.backbone.d, np.nan)), "NaN"),
        (lambda n: n.verbalize(np.ones(n.backbone.d), method="readr"), "did you mean 'reader'"),
        (lambda n: n.verbalize(np.ones(n.backbone.d), k=0), "k is 0"),
        (lambda n: n.verbalize(np.ones(n.backbone.d), fluency=-1), "fluency is -1"),
    ],
)
def test_bad_input_is_named(nla, call, message):
    with pytest.raises(ConfigError, match=message):
        call(nla)


def test_a_bundle_reads_like_the_run_it_was_packed_from(nla, scored_run, tmp_path, monkeypatch):
    run = scored_run[0]
    monkeypatch.setattr(bundles, "BUNDLES", tmp_path)
    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "cache"))
    files = write_bundle(run, tmp_path / run.backbone.name)
    assert all(f.stat().st_size < 5e6 for f in files)
    first = bundles.load_bundle(run.backbone, None)
    with monkeypatch.context() as patched:
        # Encoding the stored texts is most of the time that loading takes.
        patched.setattr(type(run.backbone), "encode", lambda *_, **__: pytest.fail("encoded again"))
        shipped = NLA(run.backbone, bundles.load_bundle(run.backbone, None))
    np.testing.assert_array_equal(first.pool_v, shipped.bundle.pool_v)
    v = nla.activation(TEXT)
    assert shipped.verbalize(v, k=4, method="av").text == nla.verbalize(v, k=4, method="av").text
    assert shipped.bundle.reader.n == bundles.SHIPPED_TAIL
    mine, theirs = (n.bundle.reader.weights_nad[:4] for n in (shipped, nla))
    np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=1e-3)
    (tmp_path / run.backbone.name / "av.safetensors").write_bytes(b"x")
    with pytest.raises(ArtefactError, match="av.safetensors is not the file"):
        bundles.load_bundle(run.backbone, None)


class Words:
    """A verbalizer that needs no bundle."""

    def __init__(self, backbone, bundle):
        assert bundle is None

    def write(self, v_Md, k, streams_B):
        return [["the clock"] * (1 + k) for _ in v_Md]


def test_without_a_bundle_ones_own_verbalizer_writes(nla, tmp_path, monkeypatch):
    """On a backbone, or at a layer of it, that nothing ships for."""
    np.save(tmp_path / "v.npy", nla.activation(TEXT)[None])
    monkeypatch.chdir(tmp_path)
    where = ["--backbone", nla.backbone.spec.source, "--layer", "1"]
    options = ["verbalize", *where, "--vectors", "v.npy", "--to", "t.jsonl"]
    for method, status in (("reader", 2), ("test_api:Words", 0)):
        result = CliRunner().invoke(app, [*options, "--k", "2", "--method", method])
        assert result.exit_code == status, result.output
        assert ("nla reproduce --backbone" in result.stderr) == (method == "reader")
    (line,) = (tmp_path / "t.jsonl").read_text().splitlines()
    assert json.loads(line)["texts"] == ["the clock"] * 2
    with pytest.raises(ArtefactError, match="at layer 1; make them with `nla reproduce"):
        NLA.load(nla.backbone.spec.source, layer=1, bundled=False).verbalize(nla.activation(TEXT))
    monkeypatch.setattr("nla_extensions.release.api.load_backbone", lambda _: pytest.fail("weights were asked for"))
    with pytest.raises(ArtefactError, match="no verbalizers ship for org/large; make them"):
        NLA.load("org/large")


def test_command_line_reads_text_and_vectors_alike(nla, scored_run, tmp_path):
    run = scored_run[0]
    v = nla.activation(TEXT)
    np.save(tmp_path / "v.npy", v)
    save_file({"v": v[None]}, tmp_path / "v.safetensors")
    options = ["verbalize", "--backbone", run.config.backbone, "--run", str(run.folder.path), "--k", "4", "--json"]
    answers = []
    vectors = (["--vector", str(tmp_path / name)] for name in ("v.npy", "v.safetensors"))
    for given in (["--text", TEXT], *vectors):
        result = CliRunner().invoke(app, [*options, *given])
        assert result.exit_code == 0, result.output
        answers.append(json.loads(result.stdout.strip().splitlines()[-1]))
    assert set(answers[0]) >= {"text", "score", "percentile", "greedy", "retrieved", "method"}
    assert answers[1] == answers[2]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "give one of --text, --vector and --vectors"),
        (["--vector", "absent.npy"], "does not exist"),
        (["--text", "x", "--backbone", "gema3-270m"], "did you mean 'gemma3-270m'"),
    ],
)
def test_command_line_refuses_bad_input(given, message):
    result = CliRunner().invoke(app, ["verbalize", *given])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
