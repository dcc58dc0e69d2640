"""Whether a model's activations can be trusted: one list of checks, of which loading runs the quick ones and
``nla check`` all. Each has a name, says what would be wrong where it fails, and measures."""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Callable, Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nla_utils.errors import BackboneError
from nla_utils.lm.backbone import Backbone, pad
from nla_utils.lm.sampling import Decoder, SamplingSettings, row_streams, sample
from nla_utils.metrics import fve, principal_directions

# Largest relative difference that rounding alone explains, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.03}
# The least mean centred score of the same text read twice. Seen in bfloat16 against float32: .9997 (Qwen2.5-Coder-0.5B)
# and .9999 (Gemma-3-270M); margins between ways of reading are 0.02 and more.
SAME_TEXT = 0.995
# The samples of ``nla check``, and how many of them are decoded and sent through the head again.
N_SAMPLES, MAX_TOKENS, FEW = 64, 64, 4
# Coordinates that count as massive, if their share is large.
MASSIVE = 3


@dataclass(frozen=True)
class Finding:
    """What one check found. ``passed`` is ``None`` where nothing is judged; ``wrong`` is what would be wrong."""

    name: str
    measured: str
    wrong: str
    passed: Optional[bool]
    value: Optional[float] = None
    limit: Optional[float] = None

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        return f"  {verdict:<5} {self.name:<26} {self.measured:<69} {self.wrong}"

    def record(self) -> dict:
        """The same for JSON: a value that is not a number is none."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in vars(self).items()}


class Material:
    """Token ids, each row behind the start token, and what several checks need of them, computed once."""

    def __init__(self, backbone: Backbone, rows: Sequence[list[int]]):
        self.backbone, self.rows = backbone, list(rows)

    def tensor(self, row: list[int]) -> Tensor:
        return torch.tensor([row], device=self.backbone.device)

    @cached_property
    def whole(self) -> list[tuple[Tensor, Tensor]]:
        """hidden_states[ℓ] and the final hidden state (1, d) at the last token of each row, of a whole pass each."""
        base, layer = self.backbone.model.base_model, self.backbone.layer
        outs = (base(self.tensor(row), output_hidden_states=True, use_cache=False) for row in self.rows)
        return [
            (out.hidden_states[layer][:, -1], out.last_hidden_state[:, -1].to(self.backbone.device)) for out in outs
        ]

    @property
    def at_layer(self) -> np.ndarray:
        return np.concatenate([h_1d.float().cpu().numpy() for h_1d, _ in self.whole])

    @property
    def final(self) -> Tensor:
        """Of the first few rows."""
        return torch.cat([hidden_1d for _, hidden_1d in self.whole[:FEW]])

    @cached_property
    def alone(self) -> np.ndarray:
        """Activations (N, d) of each row in a batch of its own."""
        return np.concatenate([self.backbone.encode([row], start=False) for row in self.rows])

    @cached_property
    def together(self) -> np.ndarray:
        """The same of all rows together."""
        return self.backbone.encode(self.rows, start=False)

    @cached_property
    def unequal(self) -> "Material":
        """The rows at unequal lengths: as they are, else cut one after the other."""
        n = len(self.rows)
        if n < 2 * len({len(row) for row in self.rows}):
            return self
        return Material(self.backbone, [row[: 2 + i * (len(row) - 2) // n] for i, row in enumerate(self.rows)])

    @cached_property
    def exact(self) -> np.ndarray:
        """The same in float32, with the library's attention."""
        with library_attention(self.backbone):
            return float32_activations(self.backbone, self.rows)

    @cached_property
    def mu(self) -> np.ndarray:
        return self.together.mean(axis=0)

    def own_logits(self) -> Tensor:
        return self.backbone.logits(self.final)

    def model_logits(self) -> Tensor:
        few = map(self.tensor, self.rows[:FEW])
        return torch.stack([self.backbone.model(ids_1T, use_cache=False).logits[0, -1] for ids_1T in few])

    def left_padded(self) -> Tensor:
        """Activations (N, d) of the rows at unequal lengths, padded on the left."""
        ids_BT, mask_BT = (x.to(self.backbone.device) for x in pad(self.unequal.rows, self.backbone.pad_id, "left"))
        where = dict(attention_mask=mask_BT, position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0))
        return self.backbone.hidden_at_layer(input_ids=ids_BT, **where)[:, -1]

    def by_embeds(self, scale: float = 1.0) -> Tensor:
        """Activations (N, d) of the rows' embeddings, given in place of their ids."""
        embeds = (self.backbone.embed(self.tensor(row)) * scale for row in self.rows)
        return torch.cat([self.backbone.hidden_at_layer(inputs_embeds=e)[:, -1] for e in embeds])

    def stepped(self, prompt: int = 4) -> Tensor:
        """The last hidden state (n, d) of some rows, one token after another from a cache.

        Some hybrid and recurrent models keep a state of another kind, or see one token a step.
        """
        backbone, found = self.backbone, []
        try:
            for ids_1T in map(self.tensor, self.rows[:FEW]):
                decoder = Decoder(backbone, ids_1T.shape[1], None)
                hidden_1d = decoder.step(inputs_embeds=backbone.embed(ids_1T[:, :prompt]))
                for t in range(prompt, ids_1T.shape[1]):
                    hidden_1d = decoder.step(input_ids=ids_1T[:, t : t + 1])
                found.append(hidden_1d)
        except Exception as error:  # each kind of model that has no key-value cache fails in a way of its own
            said = f"{backbone.name}: decoding with a key-value cache fails ({error})"
            raise BackboneError(f"{said}; {type(backbone.model).__name__} is not supported") from None
        return torch.cat(found)

    def without_start(self, kept: slice | np.ndarray = slice(None)) -> float:
        """Mean centred score (over some coordinates) of the rows read without the start token."""
        some = [i for i, row in enumerate(self.rows) if len(row) > 1]
        h_Nd = self.backbone.encode([self.rows[i][1:] for i in some], start=False)
        return float(fve(h_Nd[:, kept], self.together[some][:, kept], self.mu[kept]).mean())


@dataclass(frozen=True)
class Check:
    """``measure`` gives a value, what is shown of it, and its limit, the smallest that passes if ``least``, else the
    largest. Without a limit the value is only told; one that is no number has passed: a fault raises."""

    name: str
    wrong: str
    measure: Callable[[Material], tuple[Optional[float], str, Optional[float]]]
    least: bool = False

    def run(self, material: Material) -> Finding:
        value, shown, limit = self.measure(material)
        if limit is None:
            return Finding(self.name, shown, self.wrong, None if value is not None else True, value)
        passed = value >= limit if self.least else value <= limit
        if limit:
            shown = f"{shown} ({'≥' if self.least else '≤'} {limit:.3g})"
        return Finding(self.name, shown, self.wrong, bool(passed), value, limit)


def _agree(ours: str, theirs: str) -> Callable[[Material], tuple[float, str, float]]:
    """A measure: the relative difference of two ways to the same states, which rounding alone may explain."""

    def measure(material: Material) -> tuple[float, str, float]:
        found = (attrgetter(name)(material) for name in (ours, theirs))
        value = differ(*(states() if callable(states) else states for states in found))
        return value, f"relative difference {value:.2g}", TOLERANCE[material.backbone.dtype]

    return measure


def differ(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    a, b = (x.float().cpu().numpy() if isinstance(x, Tensor) else x for x in (a, b))
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _frozen(material: Material) -> tuple[None, str, None]:
    return check_frozen(material.backbone), "no parameter asks for a gradient", None


def _library(_: Material) -> tuple[None, str, None]:
    version = importlib.metadata.version("transformers")
    return check_library(version), f"transformers {version}", None


def check_library(version: str) -> None:
    """Before transformers 5.5 Gemma scaled ``inputs_embeds`` by √d behind its embedding module, v among them."""
    if tuple(int(x) for x in version.split(".")[:2]) < (5, 5):
        raise BackboneError(f"transformers {version} is installed; verbalizers need 5.5 or newer (pip install -e .)")


def check_frozen(backbone: Backbone) -> None:
    """Raise ``BackboneError`` if a parameter asks for, or holds, a gradient."""
    for name, p in backbone.model.named_parameters():
        if p.requires_grad or p.grad is not None:
            raise BackboneError(f"{backbone.name}: parameter {name} is not frozen")


def _samples(material: Material) -> tuple[float, str, float]:
    distinct = len(np.unique(material.together, axis=0)) / len(material.rows)
    tokens = np.mean([len(row) - 1 for row in material.rows])
    ended = np.mean([row[-1] in material.backbone.eos_ids for row in material.rows])
    return distinct, f"{distinct:.0%} distinct; {tokens:.0f} tokens on average, {ended:.0%} ended", 0.5


def _replay(material: Material) -> tuple[float, str, float]:
    score_N = fve(material.together, material.at_layer, material.mu)
    said = f"{score_N.mean():.4f}, worst {score_N.min():.4f}; {material.without_start():.3f} without the start token"
    return float(score_N.mean()), said, SAME_TEXT


def _attention(material: Material) -> tuple[float, str, float]:
    """As it is chosen at load: as close to float32 as rounding allows, or as the library's is."""
    backbone, used = material.backbone, material.backbone.model.config._attn_implementation
    ours, theirs = differ(material.together, material.exact), 0.0
    said = f"relative difference {ours:.2g}, {used}"
    if used != backbone.library_attention:
        with library_attention(backbone):
            theirs = differ(backbone.encode(material.rows, start=False), material.exact)
        said += f"; {theirs:.2g}, {backbone.library_attention}"
    return ours, said, max(TOLERANCE[backbone.dtype], theirs)


def _floor(material: Material) -> tuple[float, str, float]:
    score_N = fve(material.together, material.exact, material.exact.mean(axis=0))
    return float(score_N.mean()), f"{score_N.mean():.4f}, worst {score_N.min():.4f}", SAME_TEXT


def _shares(material: Material) -> tuple[float, str, None]:
    h_Nd, mu_d = material.together.astype(np.float64), material.mu.astype(np.float64)
    along_mu = float(((h_Nd @ (mu_d / np.linalg.norm(mu_d))) ** 2).sum() / (h_Nd**2).sum())
    first_N = (h_Nd - mu_d) @ principal_directions(h_Nd, 1)[0]
    first = float((first_N**2).sum() / ((h_Nd - mu_d) ** 2).sum())
    return along_mu, f"{along_mu:.0%} of the mean square; first principal direction {first:.0%} of the variance", None


def _massive(material: Material) -> tuple[float, str, None]:
    power_d = (material.together.astype(np.float64) ** 2).mean(axis=0)
    order = np.argsort(-power_d)
    share = float(power_d[order[:MASSIVE]].sum() / power_d.sum())
    without = material.without_start(np.sort(order[MASSIVE:]))
    said = f"{share:.0%} of ‖v‖² in coordinates {', '.join(map(str, order[:MASSIVE]))}"
    return share, f"{said}; without them {without:.3f} without the start token", None


def _tokens(material: Material) -> tuple[float, str, float]:
    backbone, tokenizer = material.backbone, material.backbone.tokenizer
    plain, given = backbone.tokenize_text("a"), tokenizer("a").input_ids
    at = next((i for i in range(len(given)) if given[i : i + len(plain)] == plain), 0)
    before, after = given[:at], given[at + len(plain) :]
    said = f"start {backbone.start_id}, BOS {tokenizer.bos_token_id}, EOS {', '.join(map(str, backbone.eos_ids))}"
    added = f"adds {before or 'nothing'} before a text, {after or 'nothing'} after"
    return float(before not in ([], [backbone.start_id]) or after != []), f"{said}; {added}", 0


NOT_FLOAT32 = "rounding moves activations too far: --dtype float32"
QUICK = (
    Check("library", "inputs_embeds are scaled twice", _library),
    Check("frozen", "training would move the model", _frozen),
    Check("stopping at the layer", "stopping there does not give hidden_states[layer]", _agree("alone", "at_layer")),
    Check("head", "the head on the last hidden state does not give the logits", _agree("own_logits", "model_logits")),
    Check("batch", "a batch of all and batches of one disagree", _agree("unequal.together", "unequal.alone")),
    Check("padding", "left and right padding disagree", _agree("left_padded", "unequal.together")),
    Check(
        "inputs_embeds", "they and ids disagree (an embedding scale outside the module)", _agree("by_embeds", "alone")
    ),
    Check(
        "cached decoding", "decoding with a key-value cache and one forward pass disagree", _agree("stepped", "final")
    ),
)
CHECKS = QUICK + (
    Check("start and end tokens", "texts tokenized elsewhere begin or end otherwise than targets", _tokens),
    Check("own samples", "targets collapse: sequences end at the start token, or repeat", _samples, least=True),
    Check("replay", "the same text does not give the same activation", _replay, least=True),
    Check("attention against float32", NOT_FLOAT32, _attention),
    Check("dtype against float32", NOT_FLOAT32, _floor, least=True),
    Check("along μ", "the higher, the less a raw score says; centred ones are without μ", _shares),
    Check("massive coordinates", "the higher, the fewer coordinates a score is about", _massive),
)


@torch.inference_mode()
def check_backbone(backbone: Backbone) -> None:
    """Run the quick checks; raises ``BackboneError`` that names the one that failed."""
    material = Material(backbone, probe_ids(backbone))
    for found in (check.run(material) for check in QUICK):
        if not found.passed:
            said = f"{found.name}: {found.wrong}: {found.measured}"
            raise BackboneError(f"{backbone.name}: {said}; {type(backbone.model).__name__} is not supported")


def probe_ids(backbone: Backbone) -> list[list[int]]:
    """Two short sequences of unequal length, spread over the vocabulary."""
    step = max(backbone.model.config.vocab_size // 17, 1)
    ids = [(i * step + 5) % backbone.model.config.vocab_size for i in range(1, 10)]
    return [[backbone.start_id, *ids], [backbone.start_id, *ids[:4]]]


@torch.inference_mode()
def run_checks(backbone: Backbone) -> Iterator[Finding]:
    """Every check on 64 samples of the model's own, drawn behind the start token; one that raises has failed."""
    start_B1d = backbone.embed(torch.full((N_SAMPLES, 1), backbone.start_id))
    drawn = sample(backbone, start_B1d, SamplingSettings(MAX_TOKENS), row_streams(1, "check", range(N_SAMPLES)))
    material = Material(backbone, [[backbone.start_id, *drawn.sequence(i)] for i in range(N_SAMPLES)])
    for check in CHECKS:
        try:
            yield check.run(material)
        except NotImplementedError as error:
            yield Finding(check.name, f"not measured: {error}", check.wrong, None)
        except Exception as error:  # each architecture fails in a way of its own
            yield Finding(check.name, f"{type(error).__name__}: {error}".splitlines()[0], check.wrong, False)


# Activations in float32


@contextlib.contextmanager
def library_attention(backbone: Backbone) -> Iterator[None]:
    """Within it, attention is the library's."""
    used = backbone.model.config._attn_implementation
    backbone.model.set_attn_implementation(backbone.library_attention)
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(used)


@torch.inference_mode()
def float32_activations(backbone: Backbone, ids: Sequence[list[int]]) -> np.ndarray:
    """Activations (N, d) at the last token of each row, computed in float32 from the same weights with the attention
    in use. One block at a time is widened, so a large model needs little memory more; all rows are one batch."""
    if any(p.is_meta for p in backbone.model.parameters()):
        raise NotImplementedError("some weights are offloaded")
    ids_BT, mask_BT = pad(ids, backbone.pad_id, "right")
    with _float32_blocks(backbone.blocks):
        h_BTd = backbone.hidden_at_layer(inputs_embeds=backbone.embed(ids_BT).float()).cpu()
    return h_BTd[torch.arange(len(ids)), mask_BT.sum(dim=1) - 1].numpy()


@contextlib.contextmanager
def _float32_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Each block computes in float32; its weights are widened before it runs and are what they were after it."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(block: nn.Module, *_) -> None:
        for x in (*block.parameters(), *block.buffers()):
            if x.is_floating_point():
                given.append((x, x.data))
                x.data = x.data.float()

    def restore(*_) -> None:
        while given:
            x, data = given.pop()
            x.data = data

    handles = [h for b in blocks for h in (b.register_forward_pre_hook(widen), b.register_forward_hook(restore))]
    try:
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()
