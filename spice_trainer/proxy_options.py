"""Settings of a proxy: a small model that scores in the place of the one that trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from spice_trainer.utils.fields import model_name, real_number, truth_value, whole_number


@dataclass(kw_only=True)
class ProxyOptions:
    r"""The part of [`SpiceConfig`] that controls a proxy.

    Parameters:
        proxy_model_name_or_path (`str`, *optional*):
            A small causal language model, on the hub or in a folder, that scores instead of the one that trains and
            learns from what it picked. It gets LoRA r 16 on all linear layers; for another adapter or tokenised rows
            of its own pass a [`ProxyModel`] to [`attach_spice`].
        proxy_learning_rate (`float`, *optional*, defaults to `0.0002`):
            Constant learning rate of the proxy's own AdamW. 0 keeps the proxy as it is. For
            `proxy_model_name_or_path`; a [`ProxyModel`] has its own.
        proxy_update_every (`int`, *optional*, defaults to `1`):
            Number of optimizer steps from one update of the proxy to the next. For `proxy_model_name_or_path`.
        proxy_check_pools (`int`, *optional*, defaults to `0`):
            Number of first pools that the target scores too. How well the proxy's gains and picks agree with the
            target's is logged.
        overlap_scoring (`bool`, *optional*, defaults to `False`):
            Whether the proxy scores the next step's pools while the target trains on this one's. Changes no pick.
    """

    proxy_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A small model that scores instead of the one that trains. None: none does."}
    )
    proxy_learning_rate: float = field(
        default=2e-4, metadata={"help": "Learning rate of the proxy's own updates on what it picked. 0: none."}
    )
    proxy_update_every: int = field(
        default=1, metadata={"help": "Number of optimizer steps from one update of the proxy to the next."}
    )
    proxy_check_pools: int = field(
        default=0, metadata={"help": "Number of first pools that the target scores too, to compare the proxy with it."}
    )
    overlap_scoring: bool = field(
        default=False,
        metadata={"help": "Let the proxy score the next step's pools while the target trains on this one's."},
    )

    def check_proxy_options(self) -> None:
        """Checks each of these fields.

        Raises:
            ValueError: If one is out of range.
        """
        owner = "SpiceConfig"
        self.proxy_model_name_or_path = model_name(owner, "proxy_model_name_or_path", self.proxy_model_name_or_path)
        self.proxy_learning_rate = real_number(
            owner,
            "proxy_learning_rate",
            self.proxy_learning_rate,
            legal="at least 0",
            reason="a negative rate would unlearn the picks",
            is_legal=lambda rate: rate >= 0,
        )
        truth_value(owner, "overlap_scoring", self.overlap_scoring)
        self.proxy_update_every = whole_number(
            owner,
            "proxy_update_every",
            self.proxy_update_every,
            1,
            "it counts cycles from one update of the proxy to the next",
        )
        self.proxy_check_pools = whole_number(owner, "proxy_check_pools", self.proxy_check_pools, 0, "it counts pools")
