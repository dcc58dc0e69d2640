"""The real default backbone at the smallest profile, through the command that the README gives."""

import json

import pytest
from click.testing import CliRunner

from nla_extensions.cli import app
from nla_extensions.tail_reader import reader
from nla_utils import NLA
from nla_utils.config import ROOT
from nla_utils.lm.weights import REGISTRY, fetch, weight_hash

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def run_folder(out):
    return out / "gemma3-270m" / "smoke-n_eval4"


@pytest.fixture(scope="module")
def results(out, run_folder):
    """Of notebooks 01-05 as they are run by the command, and of 07 with a shorter reader and the one ridge that is
    chosen here."""
    options = ["--profile", "smoke", "--set", "n_eval=4", "--device", "cpu", "--until", "5"]
    result = CliRunner().invoke(app, ["reproduce", "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reader, "RIDGES", reader.RIDGES[-1:])
        patched.setattr(reader, "TAIL_TOKENS", 4)
        run_cells("extensions/07_tail_reader", {"profile": "smoke", "n_eval": 4, "out": str(out), "device": "cpu"})
    return {p.stem: json.loads(p.read_text()) for p in run_folder.glob("results/*.json")}


def run_cells(name, values):
    """Run a notebook's cells in this process."""
    namespace = {"__name__": "__main__", "display": lambda *_: None}
    for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(source, name, "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace |= values


def test_replay(results):
    protocols = results["oracle_ceiling"]["protocols"]
    assert protocols["corrected"]["replay_cen_fve_mean"] >= 0.99
    assert 0.6 < protocols["published"]["replay_cen_fve_mean"] < 0.85


def test_v_sits_in_its_tail(results):
    column = results["oracle_ceiling"]["protocols"]["corrected"]
    tails = [column[f"tail_oracle_{n}_cen_fve_mean"] for n in (1, 4, 16)]
    assert tails == sorted(tails) and tails[-1] > 0.9


def test_common_direction(results):
    assert results["targets"]["unrelated_cosine_raw_mean"] > 0.5
    assert abs(results["targets"]["unrelated_cosine_cen_mean"]) < 0.1
    assert results["centered_eval"]["protocols"]["corrected"]["constant_mu_raw_mean"] > 0.85


def test_gemma_scale_moves_the_papers_log_probabilities(results):
    protocols = results["rerank_eval"]["protocols"]
    assert protocols["published"]["mean_logp"] < protocols["corrected"]["mean_logp"] - 3


def test_the_tail_reader_beats_every_control_even_from_a_few_sequences(results):
    own, av = results["tail_reader"]["reader"]["corrected"], results["centered_eval"]["protocols"]["corrected"]
    assert own["adapter_cen_greedy_mean"] > own["shuffled_v_cen_greedy_mean"] + 0.05
    assert own["adapter_cen_greedy_mean"] > av["adapter_cen_greedy_mean"] + 0.05
    assert own["guided_cen_mean"] >= own["adapter_cen_bestofK_mean"]


def test_the_lines_at_the_top_of_the_readme():
    nla = NLA.load("gemma3-270m")
    found = nla.verbalize(nla.activation("The lighthouse keeper wound the clock and"), k=16)
    assert found.score > found.retrieved_score and found.percentile > 0.9
    assert found.text.endswith("and")


def test_the_second_offline_backbone_loads():
    folder = fetch(REGISTRY["smollm2-135m"])
    assert weight_hash(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 30


def test_the_example_of_texts_by_hand_is_told_from_unrelated_texts(results, run_folder):
    """docs/score.md: a text that ends as its source does is near, one that says what the source is about is not."""
    at = ROOT / "tests" / "score"
    given = f"--vectors {at}/v.safetensors --texts {at}/texts.jsonl --sources {at}/sources.jsonl --pool {run_folder}"
    found = CliRunner().invoke(app, ["score", *given.split(), "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    (record,) = json.loads(found.stdout)["methods"]
    assert record["K"] == 4 and record["M"] == 8 and record["notes"] == []
    assert record["rows"]["best"]["difference_ci95"][0] > 0 and record["rows"]["identified"]["value"] > 0.5
