"""The activation verbalizer (AV): a linear map and P prefix vectors in front of a frozen backbone; its files, its
rollouts, and what v is worth to it (PROTOCOL.md §2, §3, §9)."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Callable, Iterable, Mapping, Optional, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nla_utils import store
from nla_utils.config import BATCH_SIZE, GRAD_CLIP, LEARNING_RATE, VALIDATION_SHARE, AVConfig, RunConfig
from nla_utils.encoding import TEXTS_FORMAT, Texts, read, save_texts, text_logprobs, texts_of, write_in_chunks
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.lm.weights import fetch_av, resolve
from nla_utils.metrics import mean_of_known
from nla_utils.protocol import PROTOCOLS
from nla_utils.run import Run
from nla_utils.store import SPECS, ChunkStore, Progress, arrays_hash, atomic_write, json_hash, require_disk, write_json
from nla_utils.targets import Targets

BEST_AV = "best_av"
# Validation pairs whose cross-entropies are taken.
N_LOSSES = 64
# What the authors' verbalizers are made of, and under which keys their scripts look for the tensors.
MODULES = ("proj", "proj_extra", "layer_embed", "prefix_embeds", "prefix_mlp")
NESTED = ("trainable", "av", "av_state_dict", "model", "state_dict")


class ActivationVerbalizer(nn.Module):
    """Slots made of v, and P prefix vectors, in front of a frozen backbone (PROTOCOL.md §2).

    ``proj`` (d×d, no bias, identity at first) makes the first slot, ``proj_extra`` the further ones that some releases
    have; ``layer_embed`` adds the row of the AV's layer to each of them. ``prefix_embeds`` (P, d) is the BOS embedding
    at first; where ``prefix_mode`` is ``mlp``, ``prefix_mlp`` makes the P vectors of v. Names are the authors'. All are
    float32 and cast to the backbone's dtype where they enter it.

    Args:
        start_embedding_d: embedding of the start token.
        n_layers: L of the backbone, for ``layer_embed`` (L + 1, d).
        embed_norm: mean norm of the rows of the raw embedding table, for ``inject_norm`` ``embed``.
    """

    def __init__(
        self, config: AVConfig, d: int, start_embedding_d: Tensor, n_layers: int = 0, embed_norm: Optional[float] = None
    ):
        super().__init__()
        if config.d_vector not in (None, d):
            raise ConfigError(f"d_vector is {config.d_vector}, the backbone's hidden size is {d}")
        self.config, p = config, config.num_prefix_tokens
        self.norm = {None: None, "none": None, "embed": embed_norm}.get(config.inject_norm, config.inject_norm)
        self.proj = _identity(d)
        if config.num_inject_slots > 1:
            self.proj_extra = nn.ModuleList(_identity(d) for _ in range(config.num_inject_slots - 1))
        if config.use_layer_embed:
            self.layer_embed = nn.Embedding.from_pretrained(torch.zeros(n_layers + 1, d), freeze=False)
        self.prefix_embeds = self.prefix_mlp = None
        if p and config.prefix_mode == "mlp":
            hidden = config.prefix_mlp_hidden
            self.prefix_mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, p * d))
        elif p:
            self.prefix_embeds = nn.Parameter(start_embedding_d.detach().float().cpu().repeat(p, 1))

    @classmethod
    def fresh(
        cls,
        backbone: Backbone,
        max_new_tokens: int = 64,
        span: Optional[int] = None,
        inject_norm: Optional[float] = None,
    ) -> "ActivationVerbalizer":
        """An untrained AV for a backbone, on its device; ``span``: it is to write the last n tokens alone;
        ``inject_norm``: v is rescaled to this norm."""
        config = AVConfig(
            backbone_id=backbone.spec.name,
            backbone_dtype=str(backbone.dtype).removeprefix("torch."),
            extraction_layer=backbone.layer,
            num_prefix_tokens=backbone.spec.num_prefix_tokens,
            max_new_tokens=min(max_new_tokens, span or max_new_tokens),
            target_span=f"last:{span}" if span else "full",
            inject_norm=inject_norm,
        )
        return cls.of(config, backbone)

    @classmethod
    def of(cls, config: AVConfig, backbone: Backbone) -> "ActivationVerbalizer":
        """An untrained AV of a configuration, on the backbone's device."""
        with torch.no_grad():
            start = backbone.embed(torch.tensor([backbone.start_id]))[0]
            embed_norm = None
            if config.inject_norm == "embed":
                # The raw table, as the authors take it: without the scale that Gemma's module applies.
                table_Vd = backbone.model.get_input_embeddings().weight
                embed_norm = float(torch.cat([t.float().norm(dim=1) for t in table_Vd.split(16384)]).mean())
        return cls(config, backbone.d, start, backbone.n_layers, embed_norm).to(backbone.device)

    def forward(self, v_Bd: Tensor, dtype: torch.dtype) -> Tensor:
        """Input embeddings ``[slots, prefix]`` (B, slots + P, d) in the backbone's dtype."""
        v_Bd = v_Bd.float()
        if self.norm is not None:
            v_Bd = nn.functional.normalize(v_Bd, dim=-1) * self.norm
        slots_BSd = torch.stack([proj(v_Bd) for proj in (self.proj, *getattr(self, "proj_extra", ()))], dim=1)
        if self.config.use_layer_embed:
            slots_BSd = slots_BSd + self.layer_embed.weight[self.config.extraction_layer]
        parts = [slots_BSd.to(dtype)]
        if self.prefix_mlp is not None:
            parts.append(self.prefix_mlp(v_Bd).unflatten(1, (self.config.num_prefix_tokens, -1)).to(dtype))
        elif self.prefix_embeds is not None:
            parts.append(self.prefix_embeds.to(dtype).expand(len(v_Bd), -1, -1))
        return torch.cat(parts, dim=1)

    def sampling(self, max_new_tokens: int) -> SamplingSettings:
        """How the AV's rollouts are sampled: at its configuration's temperature and top_p."""
        return SamplingSettings(max_new_tokens, temperature=self.config.temperature, top_p=self.config.top_p)

    @torch.inference_mode()
    def write(
        self,
        backbone: Backbone,
        v_Md: np.ndarray,
        k: int,
        settings: SamplingSettings,
        streams_B: Optional[np.ndarray] = None,
        rows: Optional[np.ndarray] = None,
    ) -> Texts:
        """The greedy text of each v and k draws, decoded in one batch; each of the M (1 + k) has a random stream.

        ``streams_B`` may be left out where nothing is drawn; ``rows`` are the targets', 0 … M − 1 if not given.
        """
        rows, shape = np.arange(len(v_Md)) if rows is None else rows, (len(v_Md), k + 1)
        v_Bd = torch.from_numpy(v_Md).to(backbone.device)
        prompt_BPd = self(v_Bd, backbone.dtype).repeat_interleave(k + 1, dim=0)
        greedy_B = torch.arange(len(prompt_BPd), device=backbone.device) % (k + 1) == 0
        samples = sample(backbone, prompt_BPd, settings, streams_B, greedy_B=greedy_B)
        logp_Mn = samples.mean_logprob.reshape(shape)
        # No greedy text is sampled.
        logp_Mn[:, 0] = np.nan
        lengths_Mn = samples.lengths.reshape(shape)
        return Texts("rollout", rows, samples.ids.reshape(*shape, -1), lengths_Mn, {"sampled": logp_Mn})

    def trainable(self) -> dict[str, Tensor]:
        """The authors' names for the parameters, on the CPU in float32."""
        own = dict(self.named_parameters())
        # The authors' order: the map first.
        return {n: own[n].detach().float().cpu().clone() for n in sorted(own, key=lambda n: n != "proj.weight")}

    def load_trainable(self, tensors: dict[str, Tensor], source: str) -> "ActivationVerbalizer":
        """Take parameters; other tensors that no AV has are named in a warning.

        Raises ``ArtefactError`` that names ``source`` where a parameter is missing, of another shape or not finite, or
        where there are parameters of an AV with another configuration.
        """
        own = dict(self.named_parameters())
        # Some write the prefix of an AV that has none.
        given = {k: t for k, t in tensors.items() if t.numel()}
        missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
        if missing:
            filled = "only some of" if set(own) & set(given) else "none of"
            raise ArtefactError(
                f"{source} holds {sorted(tensors)}: it fills {filled} the AV's parameters {sorted(own)}, which its "
                f"config.json calls for"
            )
        extra = [k for k in unknown if k.split(".")[0] in MODULES]
        if extra:
            raise ArtefactError(f"{source} holds {extra}, which its config.json does not call for: the two do not fit")
        if unknown:
            print(f"warning: {source}: tensors that are not used: {unknown}")
        for name, p in own.items():
            if tuple(given[name].shape) != tuple(p.shape):
                raise ArtefactError(
                    f"{source}: {name} is {tuple(given[name].shape)}, this backbone's AV has "
                    f"{tuple(p.shape)}; it was trained on another backbone or prefix length"
                )
            if not given[name].is_floating_point() or not torch.isfinite(given[name]).all():
                raise ArtefactError(f"{source}: {name} contains non-finite values")
            p.data.copy_(given[name])
        return self


def _identity(d: int) -> nn.Linear:
    proj = nn.Linear(d, d, bias=False)
    nn.init.eye_(proj.weight)
    return proj


def export_av(av: ActivationVerbalizer, folder: Path, val_fve_nrm: float, step: int) -> None:
    """Write ``best_av.safetensors``, the authors' ``best_av.pt`` and ``config.json`` into ``folder``."""
    if store.process_rank():
        return store.wait_for_processes()
    trainable = av.trainable()
    atomic_write(folder / "best_av.safetensors", save(trainable))
    buffer = io.BytesIO()
    torch.save({"trainable": trainable, "val_fve_nrm": val_fve_nrm, "step": step}, buffer)
    atomic_write(folder / "best_av.pt", buffer.getvalue())
    write_json(folder / "config.json", asdict(av.config))
    store.wait_for_processes()


def checkpoint_record(folder: Path) -> dict:
    """``val_fve_nrm`` and ``step`` of a checkpoint folder, ``None`` where the file does not say.

    The authors' ``val_fve_nrm`` is a plain cosine, not ½(1 + cos).
    """
    path = find_file(folder, "best_av.pt")
    state = _read(path, _load_pt) if path.exists() else {}
    return {k: state[k] if isinstance(state.get(k), (int, float)) else None for k in ("val_fve_nrm", "step")}


def import_av(folder: Path, backbone: Backbone) -> ActivationVerbalizer:
    """Load an AV from a folder with ``config.json`` and either checkpoint format; see :func:`check_av`."""
    config, tensors, source = _read_av(folder, backbone.layer)
    return ActivationVerbalizer.of(config, backbone).load_trainable(tensors, source)


def check_av(folder: Path, layer: int, d: int, n_layers: int) -> AVConfig:
    """The configuration of a folder's AV, if it fits a backbone of this layer and shape; no weights are needed.

    A ``.pt`` is read with ``weights_only=True``, its tensors nested under one of :data:`NESTED` or flat. Raises
    ``ConfigError`` or ``ArtefactError`` that names the file if it does not fit.
    """
    config, tensors, source = _read_av(folder, layer)
    ActivationVerbalizer(config, d, torch.zeros(d), n_layers, 1.0).load_trainable(tensors, source)
    return config


def av_hash(folder: Path) -> str:
    """Hash of an AV's configuration and tensors, whatever format its folder keeps them in."""
    config, tensors, _ = _read_av(folder)
    arrays = {name: t.detach().float().contiguous().numpy() for name, t in tensors.items()}
    return json_hash([asdict(config), arrays_hash(arrays)])[:16]


def find_file(folder: Path, name: str) -> Path:
    """A release's file: in its folder, or (gpt-oss-20b) in ``best_av`` inside."""
    inside = folder / "best_av" / name
    return inside if inside.exists() and not (folder / name).exists() else folder / name


def _read_av(folder: Path, layer: Optional[int] = None) -> tuple[AVConfig, dict[str, Tensor], str]:
    config = AVConfig.from_json(find_file(folder, "config.json"))
    if layer not in (None, config.extraction_layer):
        raise ArtefactError(f"{folder}: the AV reads layer {config.extraction_layer}, this run extracts layer {layer}")
    path = find_file(folder, "best_av.safetensors")
    if path.exists():
        return config, _read(path, load_file), str(path)
    path = find_file(folder, "best_av.pt")
    return config, _unwrapped(_read(path, _load_pt), path), str(path)


def _load_pt(path: Path) -> dict:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}, not a dictionary")
    return state


def _unwrapped(state: dict, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, wherever the authors' scripts keep them."""
    inner = next((state[key] for key in NESTED if isinstance(state.get(key), dict)), state)
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ArtefactError(f"{path} holds {sorted(map(str, state))}: no tensors there, nor under {', '.join(NESTED)}")
    return tensors


def _read(path: Path, read: Callable[[Path], dict]) -> dict:
    try:
        return read(path)
    # Each format has errors of its own for a file that is empty, cut, altered or unsafe.
    except Exception as error:
        raise ArtefactError(f"{path} was not read ({error or type(error).__name__}); fetch it again") from None


@dataclass(frozen=True)
class Recipe:
    """How an AV is trained; the paper's way where nothing is given.

    ``pairs`` and ``steps``: of how many, ``None`` for all of the run's. ``inject_norm``: v is rescaled to this norm.
    ``span``: the AV is to write the source's last n tokens, not all of it.
    """

    pairs: Optional[int] = None
    steps: Optional[int] = None
    learning_rate: float = LEARNING_RATE
    inject_norm: Optional[float] = None
    span: Optional[int] = None


def training_spec(config: RunConfig, recipe: Recipe = Recipe()) -> dict:
    """What a trained AV depends on beside the run's identity and its targets."""
    s = config.sizes
    return {
        "recipe": asdict(recipe),
        "batch_size": BATCH_SIZE,
        "grad_clip": GRAD_CLIP,
        "epochs": s.epochs,
        "train_rows": s.n_train_rows,
        "longest_text": s.max_new_tokens,
        "prefix": resolve(config.backbone).num_prefix_tokens,
        "validation": [VALIDATION_SHARE, s.n_validate, s.validate_every, N_LOSSES],
        # μ of the pool centres one of the scores that validation keeps.
        "pool": [s.n_eval, s.pool_size],
    }


def av_spec(config: RunConfig) -> dict:
    """What the AV depends on beside the run's identity and its targets: how it is trained, or whose it is."""
    if config.av is None:
        return {"av_sha256": None, **training_spec(config)}
    return {"av_sha256": av_hash(fetch_av(config.av, resolve(config.backbone)))}


SPECS[BEST_AV] = av_spec


def load_av(run: Run) -> ActivationVerbalizer:
    """The AV of this run, trained or released; raises ``ArtefactError`` if notebook 02 has not made it."""
    artefact = run.folder.load(BEST_AV)
    if run.config.av is None:
        av = ActivationVerbalizer.fresh(run.backbone, run.sizes.max_new_tokens)
    else:
        av = ActivationVerbalizer.of(AVConfig.from_json(run.folder.file("av/config.json")), run.backbone)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in artefact.tensors.items()}
    return av.load_trainable(tensors, str(artefact.path)).eval()


def published_pairs(
    backbone: Backbone, targets: Targets, rows: Iterable[int], limit: float = math.inf
) -> tuple[Texts, int]:
    """The paper's training texts, decoded without special tokens, tokenized again, long ones skipped; and how many came
    back as other ids than were sampled, special tokens aside."""
    kept, changed = {}, 0
    special = set(backbone.tokenizer.all_special_ids)
    for row in rows:
        sampled = targets.sequence(row)
        ids = backbone.tokenize_text(backbone.decode_text(sampled))
        changed += ids != [t for t in sampled if t not in special]
        if 0 < len(ids) <= limit:
            kept[row] = ids
    return Texts.of("source", list(kept), list(kept.values())), changed


SOURCE_LOSS = "source_loss"
# What stands in the slot; ``none``: the prefix alone, without one.
CONDITIONS = ("own", "other", "mean", "none")
# Other targets whose source has the same token at one end, and which token of it that is.
ALIKE = {"ends_alike": -1, "begins_alike": 0}
# Other targets whose v each text is predicted from. Of the shipped AVs, on 64 stored texts, the interval of another's −
# own is 3 to 5 % wider with 8 than with 32; of the AVs of two `quick` runs, 7 %.
N_OTHERS = 8
# Texts predicted together.
LOSS_BATCH = 64
SPECS[SOURCE_LOSS] = lambda config: {
    "n_eval": config.sizes.n_eval,
    "pool_size": config.sizes.pool_size,
    "longest_text": config.sizes.max_new_tokens,
    "n_others": N_OTHERS,
    "alike": list(ALIKE),
}


@dataclass
class SourceLoss:
    """Nats of every token of M sources, (M, T) by condition, NaN after the end; ``rows`` (M,) are the targets'.

    ``other`` is the mean over up to ``N_OTHERS`` other targets, those of ``ALIKE`` over as many that no protocol
    evaluates; NaN where no source ends, or begins, with the same token.
    """

    rows: np.ndarray
    nats: dict[str, np.ndarray]

    @property
    def per_target(self) -> dict[str, np.ndarray]:
        """Mean nats a token of each source (M,)."""
        return {c: mean_of_known(nats_MT, axis=1) for c, nats_MT in self.nats.items()}


def make_source_loss(run: Run, targets: Targets) -> SourceLoss:
    """The losses of the held-out targets' texts, cut at the length trained on, or what is on disk."""
    if run.folder.has(SOURCE_LOSS):
        tensors = run.folder.load(SOURCE_LOSS).tensors
        return SourceLoss(tensors["rows"], {c: tensors[c] for c in (*CONDITIONS, *ALIKE)})
    pairs, _ = published_pairs(run.backbone, targets, targets.held_out)
    pairs.lengths = np.minimum(pairs.lengths, run.sizes.max_new_tokens)
    alike = {name: v_of_alike(targets, pairs, at) for name, at in ALIKE.items()}
    loss = source_loss(run.backbone, load_av(run), targets, pairs, N_OTHERS, "losses of the sources' texts", alike)
    parents = {"targets": targets.sha256, BEST_AV: run.folder.sha256_of(BEST_AV)}
    run.folder.save(SOURCE_LOSS, {"rows": loss.rows, **loss.nats}, made_from=parents)
    return loss


def v_of_alike(targets: Targets, pairs: Texts, at: int) -> list[np.ndarray]:
    """Up to ``N_OTHERS`` times a v for each of M texts (M, d), of targets that no protocol evaluates and whose source
    has the text's token at index ``at``; NaN where there are not so many."""
    token_of = {row: targets.sequence(row)[at] for row in targets.unevaluated if targets.lengths[row]}
    found_MJd = np.full((len(pairs.rows), N_OTHERS, targets.v.shape[1]), np.nan, dtype=np.float32)
    for found_Jd, text in zip(found_MJd, pairs.sequences):
        alike = [row for row, token in token_of.items() if token == text[at]][:N_OTHERS]
        found_Jd[: len(alike)] = targets.v[alike]
    return list(found_MJd.transpose(1, 0, 2))


def source_loss(
    backbone: Backbone,
    av: ActivationVerbalizer,
    targets: Targets,
    pairs: Texts,
    n_others: int,
    label: str = "",
    alike: Mapping[str, list[np.ndarray]] = MappingProxyType({}),
) -> SourceLoss:
    """Nats of the texts of M pairs under every condition, NaN for ``other`` where there is none; a progress bar where
    ``label`` names it. ``alike``: further conditions, and the v (M, d) that each is the mean over, NaN left out."""
    v_Md, texts = targets.v[pairs.rows], pairs.sequences
    shifts = range(1, min(n_others, len(texts) - 1) + 1)
    given = {
        "own": [v_Md],
        "other": [np.roll(v_Md, shift, axis=0) for shift in shifts],
        "mean": [np.broadcast_to(targets.mu, v_Md.shape)],
        "none": [None],
        **alike,
    }
    found = {}
    with Progress(total=sum(map(len, given.values())), desc=label, unit="pass", disable=not label) as bar:
        for condition, slots in given.items():
            total_MT = np.zeros((len(texts), pairs.lengths.max(initial=1)))
            known_MT = np.zeros_like(total_MT)
            for slot_Md in slots:
                logp_MT = _logprobs(backbone, av, slot_Md, texts)
                total_MT -= np.nan_to_num(logp_MT)
                known_MT += np.isfinite(logp_MT)
                bar.update()
            found[condition] = np.where(known_MT, total_MT / np.maximum(known_MT, 1), np.nan).astype(np.float32)
    return SourceLoss(pairs.rows, found)


@torch.inference_mode()
def _logprobs(
    backbone: Backbone, av: ActivationVerbalizer, slot_Md: np.ndarray | None, texts: Sequence[list[int]]
) -> np.ndarray:
    """log p of each token (M, T), NaN after the end; ``None`` leaves the slot out."""
    logp_MT = np.full((len(texts), max(map(len, texts), default=1)), np.nan)
    v_Md = np.zeros((len(texts), backbone.d), np.float32) if slot_Md is None else slot_Md
    for first in range(0, len(texts), LOSS_BATCH):
        part = texts[first : first + LOSS_BATCH]
        prefix_BPd = av(torch.tensor(v_Md[first : first + LOSS_BATCH]).to(backbone.device), backbone.dtype)
        if slot_Md is None:
            prefix_BPd = prefix_BPd[:, av.config.num_inject_slots :]
            if not prefix_BPd.shape[1]:
                break  # an AV of no prefix has nothing that a first token could be predicted from
        logp_BT = text_logprobs(backbone, prefix_BPd, part).cpu().numpy()
        logp_MT[first : first + len(part), : logp_BT.shape[1]] = logp_BT
    return logp_MT


ROLLOUTS = "rollouts"


def rollouts_spec(config: RunConfig) -> dict:
    """What rollouts depend on beside the run's identity, its targets and its AV."""
    sizes = config.sizes
    sampling = SamplingSettings(sizes.max_new_tokens, AVConfig.temperature, top_p=AVConfig.top_p).record()
    if config.av is not None:
        # The rest is said by the configuration of the AV itself.
        sampling = {key: sampling[key] for key in ("max_new_tokens", "top_k")}
    return {**TEXTS_FORMAT, "n_eval": sizes.n_eval, "k": sizes.n_rollouts, "rollout_sampling": sampling}


SPECS[ROLLOUTS] = rollouts_spec


def make_rollouts(run: Run, targets: Targets) -> Texts:
    """Roll out the AV on the in-sample and the held-out targets, or load finished rollouts.

    Text 0 of each target is greedy. ``logp`` is ``sampled``, under the distribution that was sampled, and
    ``published``, as the authors compute it, of the targets that the published protocol evaluates.
    """
    folder, backbone, k = run.folder, run.backbone, run.sizes.n_rollouts
    if folder.has(ROLLOUTS):
        return load_rollouts(run)
    av = load_av(run)
    rows = np.concatenate([targets.in_sample, targets.held_out])
    require_disk(folder.path, 4 * len(rows) * (k + 1) * (2 * backbone.d + run.sizes.max_new_tokens) * 4)
    settings = av.sampling(run.sizes.max_new_tokens)
    if settings != SamplingSettings(run.sizes.max_new_tokens):
        print(
            f"the AV's configuration has temperature {settings.temperature} and top_p {settings.top_p}: so its "
            f"rollouts are sampled, where the run's own targets and paraphrases are sampled at temperature 1"
        )
    parents = {"targets": targets.sha256, BEST_AV: folder.sha256_of(BEST_AV)}
    plan = {**folder.conditions, **parents, **rollouts_spec(run.config), "sampling": settings.record()}
    chunks = ChunkStore(folder.file("rollouts.chunks"), plan)

    def write(chosen: np.ndarray) -> Texts:
        streams_B = row_streams(run.seed, "rollouts", chosen, k + 1)
        texts = av.write(backbone, targets.v[chosen], k, settings, streams_B, chosen)
        wanted_M = np.isin(chosen, targets.in_sample)
        texts.logp["published"] = published_logprobs(backbone, av, targets.v[chosen], texts, wanted_M)
        return read(backbone, texts, *PROTOCOLS)

    per_chunk = max(1, backbone.sample_batch // (k + 1))
    rollouts = write_in_chunks(chunks, "rollout", rows, per_chunk, write, "rolling out")
    save_texts(folder, ROLLOUTS, {"rollout": rollouts}, made_from=parents, sampling=settings.record())
    chunks.clear()
    return rollouts


def load_rollouts(run: Run) -> Texts:
    """Rollouts made by notebook 04; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return texts_of(run.folder.load(ROLLOUTS))["rollout"]


@torch.inference_mode()
def published_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: np.ndarray, rollouts: Texts, wanted_M: np.ndarray
) -> np.ndarray:
    """Mean token log-probability (M, 1 + K) as the authors' rerank script computes it, one target's draws at a time;
    NaN of greedy texts and where it is not wanted. Slips ``logp_embeds``, ``top_k``.

    Token embeddings are rows of the raw table, so Gemma's √d scale is missing, and the normaliser is the whole
    vocabulary's although the sampling was truncated to 50.
    """
    logp_Mn = np.full(rollouts.lengths.shape, np.nan, dtype=np.float32)
    table_Vd = backbone.model.get_input_embeddings().weight
    for m in np.flatnonzero(wanted_M):
        draws = [rollouts.sequence(m, j) for j in range(1, rollouts.k + 1)]
        v_Bd = torch.from_numpy(v_Md[m]).to(backbone.device).expand(len(draws), -1)
        logp_BT = text_logprobs(backbone, av(v_Bd, backbone.dtype), draws, lambda ids_BT: table_Vd[ids_BT])
        logp_Mn[m, 1:] = logp_BT.nanmean(dim=1).cpu().numpy()
    return logp_Mn
