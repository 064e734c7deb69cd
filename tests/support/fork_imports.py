"""Imports of the fork server, shared by all that it forks."""

import contextlib
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    import tests.distributed.worker
    import tests.examples.comparisons  # noqa: F401

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401

torch.set_num_threads(1)
