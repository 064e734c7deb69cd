"""Ways to score less than everything, as the command line names them, and what they leave of a gradient.

    "layers=10 modules=q_proj+v_proj tokens=32 prefilter=0.5"        any of the four

`attention` and `mlp` stand for all of their matrices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class ScoringOption:
    """One setting under the floor; without any of the four it is full scoring."""

    layers: int | None = None
    modules: tuple[str, ...] | None = None
    tokens: int | None = None
    prefilter: float | None = None

    @property
    def name(self) -> str:
        words = []
        if self.layers is not None:
            words.append(f"layers={self.layers}")
        if self.modules is not None:
            names = list(self.modules)
            for group, members in GROUPS.items():
                if set(members) <= set(names):
                    names = [group, *(name for name in names if name not in members)]
            words.append(f"modules={'+'.join(names)}")
        if self.tokens is not None:
            words.append(f"tokens={self.tokens}")
        if self.prefilter is not None:
            words.append(f"prefilter={self.prefilter:g}")
        return " ".join(words) or "full"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `SpiceConfig`."""
        return {
            "scoring_layers": self.layers,
            "scoring_target_modules": None if self.modules is None else list(self.modules),
            "scoring_max_tokens": self.tokens,
            "scoring_prefilter": self.prefilter,
        }


def parse_option(text: str) -> ScoringOption:
    """Reads one setting.

    Raises:
        ValueError: If it is not made of `layers=`, `modules=`, `tokens=` and `prefilter=`.
    """
    found: dict[str, Any] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        try:
            if key == "modules":
                names = [part for name in value.split("+") for part in GROUPS.get(name, (name,))]
                found[key] = tuple(dict.fromkeys(names))
            else:
                found[key] = {"layers": int, "tokens": int, "prefilter": float}[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"--scoring-options {text!r}: cannot read {word!r}. A setting is made of layers=NUMBER, "
                "modules=NAME+NAME, tokens=NUMBER and prefilter=SHARE, such as 'layers=10 tokens=32'."
            ) from None
    return ScoringOption(**found)


def default_options(num_layers: int) -> list[ScoringOption]:
    """Each option at a few strengths, and combinations."""
    third, half, sixth = (max(1, num_layers // part) for part in (3, 2, 6))
    texts = [
        f"layers={half}", f"layers={third}", f"layers={sixth}",
        "modules=q_proj", "modules=v_proj", "modules=o_proj", "modules=down_proj", "modules=attention", "modules=mlp",
        "tokens=16", "tokens=32", "tokens=64",
        "prefilter=0.25", "prefilter=0.5", "prefilter=0.75",
        f"layers={third} modules=down_proj", f"layers={third} modules=v_proj+o_proj", f"layers={third} tokens=32",
        f"layers={sixth} tokens=32", f"layers={half} tokens=16", "modules=down_proj tokens=32",
        f"layers={third} prefilter=0.5",
    ]  # fmt: skip
    return list(dict.fromkeys(map(parse_option, texts)))


def layer_of(name: str) -> int | None:
    """The number of the layer that a module belongs to."""
    found = _LAYER.search(f".{name}")
    return None if found is None else int(found.group(1))


def kept_modules(names: Iterable[str], option: ScoringOption) -> list[bool]:
    """Which LoRA modules (`...layers.3.self_attn.q_proj.lora_A.default`) a setting leaves."""
    names = list(names)
    layers = [layer_of(name) for name in names]
    first = None
    if option.layers is not None:
        first = max(layer for layer in layers if layer is not None) + 1 - option.layers
    kept = []
    for name, layer in zip(names, layers, strict=True):
        owner = re.split(r"\.lora_[AB]\.", name)[0]
        right_name = option.modules is None or any(f".{owner}".endswith(f".{wanted}") for wanted in option.modules)
        kept.append(right_name and (first is None or (layer is not None and layer >= first)))
    return kept
