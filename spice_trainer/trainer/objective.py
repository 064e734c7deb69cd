"""What a trainer trains, and how much of it samples are scored by."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spice_trainer.gradients.forward import base_model
from spice_trainer.gradients.label_head import PLAIN, LabelLoss
from spice_trainer.utils.logging import logger


def check_objective(trainer: Any) -> None:
    """Refuses trainers that train something else than the likelihood of label tokens, which is what SPICE scores."""
    # The first one decides: trl's GKDTrainer, for one, is an SFTTrainer with another loss.
    theirs = (cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] == "trl")
    other = next((name for name in theirs if name.endswith("Trainer")), "SFTTrainer")
    if other != "SFTTrainer":
        raise ValueError(
            f"SPICE scores samples by the likelihood of their label tokens, and {other} trains another objective "
            "(preferences, rewards or its own generations), for which these scores mean nothing. Use it with "
            "SFTTrainer or transformers.Trainer, or select beforehand with `select_subset` on the texts."
        )
    model = getattr(trainer, "model", None)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(trainer).__name__} trains {type(model).__name__}, an encoder-decoder model. SPICE shifts labels "
            "by one as causal language models do, so its gradients would be others. Use a decoder-only model."
        )


def label_loss_of(trainer: Any) -> LabelLoss:
    """The loss of a label token that the trainer trains, as far as samples are scored by it."""
    if _is_sft_trainer(trainer) and getattr(trainer.args, "loss_type", "nll") == "dft":
        return LabelLoss("dft")
    # Somebody's own loss takes the smoothed one's place, and of other models the Trainer (5.23) shifts no label then.
    is_causal = type(base_model(trainer.model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return LabelLoss(smoothing=trainer.args.label_smoothing_factor if is_causal and not _own_loss(trainer) else 0.0)


def _is_sft_trainer(trainer: Any) -> bool:
    return any(cls.__module__.startswith("trl.") and cls.__name__ == "SFTTrainer" for cls in type(trainer).__mro__)


def _own_loss(trainer: Any) -> bool:
    # Older versions of SFTTrainer set one for its other loss.
    is_theirs = getattr(trainer.compute_loss_func, "__module__", "").startswith("trl.")
    return trainer.compute_loss_func is not None and not is_theirs


def warn_of_objective(trainer: Any) -> None:
    """Says by name what of the trained loss is not in the scores."""
    args, config, is_plain = trainer.args, getattr(trainer.model, "config", None), label_loss_of(trainer) == PLAIN
    config = getattr(config, "text_config", config)
    loss_type, smoothing = getattr(args, "loss_type", "nll"), args.label_smoothing_factor
    theirs = [
        f"loss_type={loss_type!r}" if loss_type not in ("nll", "chunked_nll", "dft") else None,
        f"label_smoothing_factor={smoothing}" if smoothing > 0 and is_plain and not _own_loss(trainer) else None,
        "a compute_loss_func" if _own_loss(trainer) else None,
        "an auxiliary loss of the router (output_router_logits)"
        if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0)
        else None,
    ]
    named = " and ".join(name for name in theirs if name is not None)
    if named:
        logger.warning(
            "SPICE: the trainer trains by %s, and samples are scored by the cross-entropy of their labels without it. "
            "Where the two differ, picks are those for the latter.",
            named,
        )
