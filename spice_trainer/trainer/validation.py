"""The validation rows of a trainer's run, prepared as the trainer prepares its own."""

from __future__ import annotations

from functools import partial
from typing import Any

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import TargetRows, fetch_rows
from spice_trainer.data.validation_sets import DEFAULT_NAME, checked_sets, named_sets
from spice_trainer.trainer.inputs import describe_rows, training_rows
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state


def validation_sets(trainer: Any, given: Any, config: SpiceConfig) -> dict[str, TargetRows] | None:
    """What the run compares candidates with: `given` to [`attach_spice`], or for `"less"` the `eval_dataset`.

    The rows of the latter are taken as the trainer's own evaluation reads them; `None` if there is nothing.
    """
    if given is not None:
        return prepare_validation(trainer, given, config.validation_rows)
    if not config.takes_alignment or trainer.eval_dataset is None:
        return None
    given = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {DEFAULT_NAME: trainer.eval_dataset}
    read: dict[str, TargetRows] = {}
    for name, rows in given.items():
        read[name] = _as_evaluated(trainer, rows)
    return read


def prepare_validation(trainer: Any, given: Any, num_rows: int) -> dict[str, TargetRows]:
    """The first `num_rows` rows of each set as the trainer's evaluation reads them, without copies of training rows.

    TRL's trainers tokenise them as they did the training rows. Raises a ValueError for a set of which nothing is left.
    """
    prepared: dict[str, TargetRows] = {}
    for name, dataset in named_sets(given).items():
        rows = _first(dataset, num_rows)
        with preserved_random_state(trainer.args.device):
            rows = _tokenize(trainer, rows, name)
        if len(rows) < min(num_rows, len(dataset)):
            logger.warning(
                "SPICE: the trainer left out %d of the %d first rows of the validation set %r, of which max_length=%s "
                "leaves no label token.",
                min(num_rows, len(dataset)) - len(rows), min(num_rows, len(dataset)), name,
                getattr(trainer.args, "max_length", None),
            )  # fmt: skip
        if not len(rows):
            raise ValueError(
                f"The trainer's own preparation left no row with a label token of the validation set {name!r} "
                f"(max_length={getattr(trainer.args, 'max_length', None)}). Fix: give shorter rows, or raise it."
            )
        prepared[name] = _as_evaluated(trainer, rows)
    with preserved_random_state(trainer.args.device):
        return checked_sets(prepared, trainer.train_dataset, num_rows)


def set_sizes(given: Any) -> dict[str, int]:
    """How many rows each set that the user gave has."""
    return {} if given is None else {name: len(rows) for name, rows in named_sets(given).items()}


def _as_evaluated(trainer: Any, rows: Any) -> TargetRows:
    """Rows as the trainer's own loader for evaluation reads them."""
    get_loader = partial(trainer.get_eval_dataloader, rows)
    dataset, collate = training_rows(trainer, get_loader, name="get_eval_dataloader")
    return describe_rows(trainer, dataset, collate, rows)


def _first(dataset: Any, num_rows: int) -> Any:
    if len(dataset) <= num_rows:
        return dataset
    return dataset.select(range(num_rows)) if hasattr(dataset, "select") else fetch_rows(dataset, range(num_rows))


def _tokenize(trainer: Any, dataset: Any, name: str) -> Any:
    """What TRL's SFTTrainer makes of an evaluation set, rows unpacked; what others train on comes tokenised."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    kwargs = getattr(trainer.args, "dataset_kwargs", None) or {}
    is_left = kwargs.get("skip_prepare_dataset") or getattr(trainer, "_skip_prepare_dataset", False)
    if prepare is None or is_left or getattr(trainer, "_is_vision_dataset", False):
        return dataset
    # TRL, which has this method, needs the library; a plain Trainer does not.
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        dataset = Dataset.from_list([dict(row) for row in fetch_rows(dataset, range(len(dataset)))])
    formatting_func = getattr(trainer, "_formatting_func", None)
    try:
        return prepare(dataset, trainer.processing_class, trainer.args, False, formatting_func, name)
    except KeyError as error:
        # Before TRL 1.0 it kept no formatting_func.
        given = "" if formatting_func is None else ", and its formatting_func was called"
        raise ValueError(
            f"The trainer's own preparation of the validation set {name!r} asks for the column {error}, and the rows "
            f"have {', '.join(map(repr, dataset.column_names))}{given}. Fix: give rows with the columns of the "
            'training rows; where the trainer has a formatting_func, validation_dataset.map(lambda row: {"text": '
            "formatting_func(row)})."
        ) from error
