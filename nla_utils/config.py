"""What a run is: profiles, the run's configuration, the verbalizer's configuration.

All are frozen dataclasses, built through functions that refuse unknown keys and name the nearest
known one, so that a typo never silently runs the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, MutableMapping, Optional

from nla_utils.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
# An installed copy brings its data along, whatever stands beside it.
CHECKOUT = (PACKAGE.parent / "pyproject.toml").exists() and not (PACKAGE / "data").exists()
# Where runs, pages and figures are kept: the checkout, or where an installed copy is used.
ROOT = PACKAGE.parent if CHECKOUT else Path.cwd()
# What is only read: notebooks, bundles, the published numbers.
DATA = PACKAGE.parent if CHECKOUT else PACKAGE / "data"


def cache_dir() -> Path:
    """Folder for fetched and converted weights: ``$NLA_CACHE`` or ``~/.cache/nla_utils``; ``ConfigError`` without a home."""
    given = os.environ.get("NLA_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "nla_utils"
    except RuntimeError:
        raise ConfigError("there is no home directory to keep weights in; set NLA_CACHE to a folder") from None


@dataclass(frozen=True)
class Profile:
    """Sizes of a run (PROTOCOL.md §1-§6): N, M, K, pool, epochs and how often to validate."""

    n_targets: int
    n_eval: int
    n_rollouts: int
    pool_size: int
    epochs: int
    validate_every: int
    n_validate: int
    max_new_tokens: int = 64

    @property
    def n_train_rows(self) -> int:
        """Targets that training may see: all but the held-out ones at the end."""
        return self.n_targets - self.n_eval

    def record(self) -> dict:
        """The sizes as results files have them."""
        return {
            "N": self.n_targets,
            "M": self.n_eval,
            "K": self.n_rollouts,
            "pool": self.pool_size,
            "epochs": self.epochs,
            "T": self.max_new_tokens,
        }


PROFILES: dict[str, Profile] = {
    "smoke": Profile(96, 8, 4, 48, 1, 2, 8, max_new_tokens=24),
    "quick": Profile(640, 32, 16, 512, 1, 20, 32),
    "laptop": Profile(3000, 100, 32, 2000, 3, 100, 128),
    "full": Profile(30000, 200, 64, 2000, 3, 500, 512),
}

DTYPES = ("bfloat16", "float32", "float16")
DEVICE = re.compile(r"(auto|split|cpu|mps|cuda)|(cuda|cpu):\d+")
# Of the parameters that papermill may have read as another kind of value: ``-p out 2026``, ``-p seed abc``.
TYPES = {name: (str,) for name in ("backbone", "profile", "out", "device", "dtype")}
TYPES |= {"seed": (int,), "layer": (int, type(None))}
TYPES |= {name: (str, type(None)) for name in ("av", "released_targets", "corpus")}
SIZES = ("n_targets", "n_eval", "n_rollouts", "pool_size")
# The variable of a notebook that says that its configuration was made before.
CONFIGURED = "_configured"
BATCH_SIZE = 16
LEARNING_RATE = 3e-5
GRAD_CLIP = 1.0
VALIDATION_SHARE = 0.05
N_PARAPHRASES = 8
TAIL_LENGTHS = (1, 2, 4, 8, 16, 32)
# Tokens of the end that a linear read of v is asked for, and how many of them are scored.
TAIL_TOKENS = 8
PROBE_LENGTHS = (1, 2, 4, 8)
FLOOR_ROWS = 512
# Texts of the pool that evidence keeps.
POOL_TEXTS = 256


@dataclass(frozen=True)
class RunConfig:
    """One run: a backbone, a profile, a seed, and where its artefacts go.

    ``av``: a released AV to evaluate instead of training one, ``released_targets``: targets to use instead of drawing
    them; each ``released`` (what the authors published for the backbone), ``hub:org/name[@commit]`` or a folder. Targets
    may also be one file, or ``pool``: the authors' vectors alone, without texts. ``corpus``: texts to take targets from instead of the model's
    samples, a ``.jsonl`` or a folder of ``.txt``. ``layer``, ``n_targets``, ``n_eval``, ``n_rollouts`` and
    ``pool_size`` are overrides; ``None`` means the backbone's or the profile's own value.
    """

    backbone: str = "gemma3-270m"
    profile: str = "quick"
    seed: int = 1
    out: str = "runs"
    layer: Optional[int] = None
    n_targets: Optional[int] = None
    n_eval: Optional[int] = None
    n_rollouts: Optional[int] = None
    pool_size: Optional[int] = None
    device: str = "auto"
    dtype: str = "bfloat16"
    av: Optional[str] = None
    released_targets: Optional[str] = None
    corpus: Optional[str] = None

    def __post_init__(self) -> None:
        for name, kinds in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = "text (papermill: -r keeps it so)" if kinds[0] is str else "a whole number"
                raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
        if self.profile not in PROFILES:
            raise ConfigError(f"unknown profile {self.profile!r}: {nearest(self.profile, PROFILES)}")
        if not DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r} is none of auto, cpu, mps, split, cuda, or cuda:1 and the like")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: {nearest(self.dtype, DTYPES)}")
        if self.corpus is not None and self.released_targets is not None:
            raise ConfigError(f"targets come from {self.released_targets} or from {self.corpus}, not from both")
        check_sizes(self.sizes)

    @property
    def sizes(self) -> Profile:
        """The profile with this run's overrides applied."""
        overrides = {n: getattr(self, n) for n in SIZES if getattr(self, n) is not None}
        return dataclasses.replace(PROFILES[self.profile], **overrides)

    @property
    def folder_name(self) -> str:
        """``quick``, or ``quick-layer9-seed2``: whatever differs from the profile is in the name."""
        parts = [self.profile]
        for name in ("layer", *SIZES):
            if getattr(self, name) is not None:
                parts.append(f"{name}{getattr(self, name)}")
        for kind, source in (("av", self.av), ("targets", self.released_targets), ("corpus", self.corpus)):
            if source is not None:
                parts.append(f"{kind}-" + source.split("@")[0].rstrip("/").split("/")[-1].removesuffix(".jsonl"))
        if self.seed != 1:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "RunConfig":
        """A configuration from a mapping; raises ``ConfigError`` on a key that is no parameter."""
        return _build(cls, values, "unknown parameter")

    @classmethod
    def from_notebook(cls, namespace: MutableMapping[str, Any]) -> "RunConfig":
        """A configuration from a notebook's globals, the first time right after its parameters cell.

        Papermill only warns about a parameter that the notebook does not have; every public plain
        value in the namespace is taken for a parameter here, so an unknown one is an error. Once a configuration was
        made there, the notebook's other cells have variables of their own, and only known parameters are read.
        """
        plain, known = (str, int, float, bool, type(None)), {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, plain)}
        if CONFIGURED in namespace:
            values = {k: v for k, v in values.items() if k in known}
        try:
            config = cls.from_mapping(values)
        except ConfigError as error:
            hint = "every plain variable is taken for a parameter here: if you defined it yourself, restart the kernel"
            raise ConfigError(f"{error} ({hint})") from None
        namespace[CONFIGURED] = True
        return config


def check_sizes(s: Profile) -> None:
    """Raise ``ConfigError`` where the sizes cannot be met together."""
    for name in SIZES:
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if s.n_eval < 2:
        raise ConfigError(f"n_eval is {s.n_eval}: at least 2 targets are needed to compare them")
    need = 2 * s.n_eval + s.pool_size
    if need > s.n_targets:
        raise ConfigError(
            f"n_targets is {s.n_targets}, too few: {s.n_eval} in-sample targets + {s.pool_size} of "
            f"the pool + {s.n_eval} held-out targets need {need}"
        )
    if s.n_rollouts > s.pool_size:
        raise ConfigError(
            f"n_rollouts is {s.n_rollouts} but the pool holds {s.pool_size} texts: the unrelated-text "
            f"null draws as many texts as there are rollouts"
        )


def parse_seeds(text: str) -> list[int]:
    """``1,2,3`` as numbers; raises ``ConfigError`` for what is no whole number or comes twice."""
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdigit() for p in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"seeds {text!r}: write different whole numbers with commas, for example 1,2,3")
    return [int(p) for p in parts]


def size_overrides(pairs: Iterable[str]) -> dict[str, int]:
    """``n_rollouts=8`` and the like as numbers; raises ``ConfigError`` for an unknown size or what is no number."""
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not value.lstrip("-").isdigit():
            raise ConfigError(f"--set {pair!r}: write it as name=number, for example n_rollouts=8")
        if name not in SIZES:
            raise ConfigError(f"unknown size {name!r}: {nearest(name, SIZES)}")
        values[name] = int(value)
    return values


@dataclass(frozen=True)
class AVConfig:
    """The authors' ``config.json`` (PROTOCOL.md §2); the last fields are carried along unused.

    ``prefix_mode``: ``static`` (P vectors) or ``mlp`` (P vectors made of v). ``use_layer_embed``: an embedding of the layer
    is added to every slot. ``inject_norm``: ``none``, ``embed`` (v at the mean norm of the rows of the raw embedding
    table), or, in our own studies alone, a number. ``temperature`` and ``top_p`` are those of the AV's rollouts.
    ``target_span`` is ours: what the AV was trained to write, ``full`` as every published one, or ``last:n``.
    """

    backbone_id: str
    extraction_layer: int
    num_prefix_tokens: int
    backbone_dtype: str = "bfloat16"
    d_vector: Optional[int] = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    pool: str = "last"
    prefix_mode: str = "static"
    prefix_mlp_hidden: Optional[int] = None
    num_inject_slots: int = 1
    use_layer_embed: bool = False
    target_span: str = "full"
    inject_norm: str | float | None = None
    lambda_mag: float = 0.0
    beta_kl: float = 0.0
    gamma_entropy: float = 0.0
    delta_community: float = 0.0
    h_min: float = 0.0
    h_max: float = 0.0

    def __post_init__(self) -> None:
        norm, whole = self.inject_norm, lambda x, least: type(x) is int and x >= least
        right = {
            "backbone_id": (isinstance(self.backbone_id, str), "a model's name"),
            "extraction_layer": (whole(self.extraction_layer, 1), "a whole number of at least 1"),
            "num_prefix_tokens": (whole(self.num_prefix_tokens, 0), "a whole number of at least 0"),
            "max_new_tokens": (whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            "num_inject_slots": (whole(self.num_inject_slots, 1), "a whole number of at least 1"),
            "d_vector": (self.d_vector is None or whole(self.d_vector, 1), "null or a whole number"),
            "pool": (self.pool == "last", "'last'"),
            "prefix_mode": (self.prefix_mode in ("static", "mlp"), "'static' or 'mlp'"),
            "prefix_mlp_hidden": (
                self.prefix_mode != "mlp" or whole(self.prefix_mlp_hidden, 1),
                "a whole number where prefix_mode is 'mlp'",
            ),
            "use_layer_embed": (isinstance(self.use_layer_embed, bool), "true or false"),
            "inject_norm": (
                norm in (None, "none", "embed") or _is_number(norm) and norm > 0,
                "'none', 'embed' or a norm",
            ),
            "temperature": (_is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            "top_p": (_is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
        }
        for name, (is_right, wanted) in right.items():
            if not is_right:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; an AV's configuration has {wanted} there")

    @classmethod
    def from_json(cls, path: Path) -> "AVConfig":
        """Read a ``config.json``. Keys that no release is known to have are named in a warning and not used.

        Raises ``ConfigError`` that names the file for what is not a JSON object, and for missing or wrong values.
        """
        try:
            values = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} is not a JSON object ({error})") from None
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            meant = "; ".join(f"{key!r}: {nearest(key, known)}" for key in unknown)
            print(f"warning: {path}: keys that are not used: {meant}")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _build(kind: type, values: Mapping[str, Any], complaint: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{complaint} {key!r}: {nearest(key, known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{complaint.partition(':')[0]}: {error}") from None
