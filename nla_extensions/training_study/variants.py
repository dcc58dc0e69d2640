"""The variants of a training study: positive controls, a learning curve, and recipes that change one factor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nla_utils.training import Recipe

# The learning curve's factor, in steps and in pairs.
FACTOR = 8
N_MEMORISED, MEMORISING_STEPS = 64, 3000
# Sources so short are known by heart in minutes on a CPU. Their span is all of them: nothing is tokenized again, so that
# all are equally long and an AV that was never shown an end stops where they do.
MEMORISED, FEWER_STEPS = 16, 1000
SHORT = 4
SPAN = 8
RATES = (1e-4, 3e-4, 1e-3)

HELD_OUT, TRAINED = "held out", "trained on"


@dataclass(frozen=True)
class Variant:
    """One training run of a study. ``part`` is the table it stands in, ``asked_on`` the texts it is measured on,
    ``tokens`` how many of a source's first tokens are a source here, ``None`` for all."""

    part: str
    label: str
    recipe: Recipe
    asked_on: str = HELD_OUT
    tokens: Optional[int] = None


def variants(n_pairs: int, n_steps: int, norm: float) -> list[Variant]:
    """The study of a run of so many training pairs and steps; ``norm`` is the mean norm of an embedding.

    Recipes have an eighth of its steps, and differ in one factor alone.
    """
    pairs, steps = max(1, n_pairs // FACTOR), max(1, n_steps // FACTOR)
    curve = [
        Variant("learning curve", "1/8 of the pairs, 1/8 of the steps", Recipe(pairs=pairs, steps=steps)),
        Variant("learning curve", "all pairs, 1/8 of the steps", Recipe(steps=steps)),
        Variant("learning curve", "1/8 of the pairs, all steps", Recipe(pairs=pairs, steps=n_steps)),
        Variant("learning curve", "all pairs, all steps", Recipe(steps=n_steps)),
    ]
    factors = [
        Variant("one factor", "v at an embedding's norm", Recipe(steps=steps, inject_norm=norm)),
        *(Variant("one factor", f"rate {rate:g}", Recipe(steps=steps, learning_rate=rate)) for rate in RATES),
        Variant("one factor", f"the last {SPAN} tokens alone", Recipe(steps=steps, span=SPAN)),
    ]
    together = [
        Variant("what helps", f"rate {RATES[-1]:g}, all steps", Recipe(None, n_steps, RATES[-1])),
        Variant(
            "what helps",
            f"rate {RATES[-1]:g}, all steps, the last {SPAN} tokens alone",
            Recipe(None, n_steps, RATES[-1], None, SPAN),
        ),
    ]
    controls = [
        Variant(
            "positive control",
            f"{N_MEMORISED} pairs learned by heart, v at an embedding's norm",
            Recipe(N_MEMORISED, MEMORISING_STEPS, RATES[-1], norm),
            TRAINED,
        ),
        Variant(
            "positive control",
            f"{N_MEMORISED} pairs learned by heart, v at its own norm",
            Recipe(N_MEMORISED, MEMORISING_STEPS, RATES[-1]),
            TRAINED,
        ),
        Variant(
            "by heart",
            f"{N_MEMORISED} sources of {MEMORISED} tokens, v at its own norm",
            Recipe(N_MEMORISED, FEWER_STEPS, RATES[-1], span=MEMORISED),
            TRAINED,
            MEMORISED,
        ),
        Variant(
            "positive control", f"sources of {SHORT} tokens, the paper's recipe", Recipe(steps=steps), tokens=SHORT
        ),
        Variant(
            "positive control",
            f"sources of {SHORT} tokens, v at an embedding's norm, rate {RATES[-1]:g}",
            Recipe(None, steps, RATES[-1], norm),
            tokens=SHORT,
        ),
    ]
    return [*controls, *factors, *curve, *together]
