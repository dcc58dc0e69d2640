"""What a run is: profiles, the run's configuration, the AV's configuration.

Unknown keys are refused with the nearest known one, so that a typo never silently runs the defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, MutableMapping, Optional, get_type_hints

from nla_utils.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent
# An installed copy brings its data along, whatever stands beside it.
CHECKOUT = (PACKAGE.parent / "pyproject.toml").exists() and not (PACKAGE / "data").exists()
# Where runs, pages and figures are kept: the checkout, or where an installed copy is used.
ROOT = PACKAGE.parent if CHECKOUT else Path.cwd()
# What is only read: notebooks, bundles, the published numbers.
DATA = PACKAGE.parent if CHECKOUT else PACKAGE / "data"


def cache_dir() -> Path:
    """Folder for weights: ``$NLA_CACHE`` or ``~/.cache/nla_utils``; raises ``ConfigError`` where there is no home."""
    try:
        return Path(os.environ.get("NLA_CACHE") or Path.home() / ".cache" / "nla_utils")
    except RuntimeError:
        raise ConfigError("there is no home directory to keep weights in; set NLA_CACHE to a folder") from None


@dataclass(frozen=True)
class Profile:
    """Sizes of a run (PROTOCOL.md §1-§6): N, M, K, pool, epochs, steps between validations."""

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

    ``av``, ``released_targets``: an AV and targets to use, instead of training and drawing them: ``released`` (what
    the authors published for the backbone), ``hub:org/name[@commit]`` or a folder. Targets may also be one file, or
    ``pool``: the authors' vectors without texts. ``corpus``: a ``.jsonl`` or a folder of ``.txt`` to take targets
    from. ``None`` as a layer or a size is the backbone's or the profile's own.
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
        # Papermill may have read another kind of value: ``-p out 2026``, ``-p seed abc``.
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "a whole number" if isinstance(0, kind) else "text (papermill: -r keeps it so)"
                raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
        if self.profile not in PROFILES:
            raise ConfigError(f"unknown profile {self.profile!r}: {nearest(self.profile, PROFILES)}")
        if not DEVICE.fullmatch(self.device):
            raise ConfigError(f"device {self.device!r} is none of auto, cpu, mps, split, cuda, or cuda:1 and the like")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: {nearest(self.dtype, DTYPES)}")
        if self.corpus is not None and self.released_targets is not None:
            raise ConfigError(f"targets come from {self.released_targets} or from {self.corpus}, not from both")
        s = self.sizes
        for name in SIZES:
            if getattr(s, name) < 1:
                raise ConfigError(f"{name} is {getattr(s, name)}; it must be a whole number of at least 1")
        for name, why in (("n_eval", "targets to compare"), ("n_rollouts", "rollouts of a target to choose from")):
            if getattr(s, name) < 2:
                raise ConfigError(f"{name} is {getattr(s, name)}: there must be at least 2 {why}")
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
    def from_notebook(cls, namespace: MutableMapping[str, Any]) -> "RunConfig":
        """A configuration from a notebook's globals, the first time right after its parameters cell.

        Papermill only warns about a parameter that the notebook does not have. So every public plain value is taken
        for a parameter here, and an unknown one raises ``ConfigError``. When the cell is run again the notebook has
        variables of its own, and the known parameters alone are read.
        """
        plain = (str, int, float, bool, type(None))
        values = {k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, plain)}
        try:
            for key in [k for k in values if k not in PARAMETERS]:
                if CONFIGURED not in namespace:
                    raise ConfigError(f"unknown parameter {key!r}: {nearest(key, PARAMETERS)}")
                del values[key]
            config = cls(**values)
        except ConfigError as error:
            hint = "every plain variable is taken for a parameter here: if you defined it yourself, restart the kernel"
            raise ConfigError(f"{error} ({hint})") from None
        namespace[CONFIGURED] = True
        return config


PARAMETERS = tuple(field.name for field in dataclasses.fields(RunConfig))


def source_name(source: str) -> str:
    """What records call an AV or targets that were given: a hub id as it is, of a path its last part."""
    return source if source.startswith("hub:") else Path(source).name


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

    ``prefix_mode``: ``static`` (P vectors) or ``mlp`` (P vectors made of v). ``use_layer_embed``: an embedding of the
    layer is added to every slot. ``inject_norm``: ``none``, ``embed`` (the mean norm of the rows of the raw embedding
    table) or, in our own studies, a number. ``target_span`` is ours: the AV was trained to write ``full`` texts or
    ``last:n``.
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
        def whole(value: object, least: int) -> bool:
            return type(value) is int and value >= least

        def above_zero(value: object) -> bool:
            return type(value) in (int, float) and value > 0

        count, norm = "a whole number of at least 1", self.inject_norm
        for name, is_right, wanted in (
            ("backbone_id", isinstance(self.backbone_id, str), "a model's name"),
            ("extraction_layer", whole(self.extraction_layer, 1), count),
            ("num_prefix_tokens", whole(self.num_prefix_tokens, 0), "a whole number of at least 0"),
            ("max_new_tokens", whole(self.max_new_tokens, 1), count),
            ("num_inject_slots", whole(self.num_inject_slots, 1), count),
            ("d_vector", self.d_vector is None or whole(self.d_vector, 1), "null or a whole number"),
            ("pool", self.pool == "last", "'last'"),
            ("prefix_mode", self.prefix_mode in ("static", "mlp"), "'static' or 'mlp'"),
            ("prefix_mlp_hidden", self.prefix_mode != "mlp" or whole(self.prefix_mlp_hidden, 1), f"{count} with 'mlp'"),
            ("use_layer_embed", isinstance(self.use_layer_embed, bool), "true or false"),
            ("inject_norm", norm in (None, "none", "embed") or above_zero(norm), "'none', 'embed' or a norm"),
            ("temperature", above_zero(self.temperature), "a number above 0"),
            ("top_p", above_zero(self.top_p) and self.top_p <= 1, "a number above 0, at most 1"),
        ):
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
