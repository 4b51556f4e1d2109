"""The data of the scripts: from the Hub, files and folders to the splits that a run uses, with labels and tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value, load_dataset

from hf_selfkd import SelfKDConfig

from .arguments import DataArguments, ModelArguments


logger = logging.getLogger(__name__)

DOING = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
LABEL_TYPES = ("bool", "int", "uint", "string", "large_string")
NO_LABEL = -100


# Splits


def load_splits(
    data_args: DataArguments,
    model_args: ModelArguments,
    read: Callable[[str, DataArguments, str | None], Dataset | None] | None = None,
) -> dict[str, Dataset]:
    """
    The splits that there are, by their names in `data_args.SPLITS`.

    Args:
        data_args ([`DataArguments`]): say which data.
        model_args ([`ModelArguments`]): say where to keep downloads, and the token.
        read (`Callable`, *optional*): reads a split from files or folders; [`load_local`] by default.
    """
    if data_args.local:
        if data_args.dataset_name is not None:
            logger.info(f"Local data are given: --dataset_name {data_args.dataset_name} is not used.")
        splits = {split: (read or load_local)(split, data_args, model_args.cache_dir) for split in data_args.SPLITS}
        return {split: dataset for split, dataset in splits.items() if dataset is not None}
    if data_args.dataset_name is None:
        raise ValueError(f"No data: give {_either(data_args.SOURCES)}.")
    loaded = load_dataset(
        data_args.dataset_name, data_args.dataset_config_name, cache_dir=model_args.cache_dir, token=model_args.token
    )
    logger.info(f"{data_args.dataset_name} has the splits {', '.join(loaded)}.")
    names = {split: getattr(data_args, f"{split}_split_name") for split in data_args.SPLITS}
    return {split: loaded[name] for split, name in names.items() if name in loaded}


def load_local(split: str, data_args: DataArguments, cache_dir: str | None) -> Dataset | None:
    """A split from the folder or the file that is given for it, if any."""
    file, folder = getattr(data_args, f"{split}_file"), getattr(data_args, f"{split}_dir", None)
    if folder is not None:
        files = {"train": os.path.join(folder, "**")}
        return load_dataset(data_args.FOLDER_KIND, data_files=files, split="train", cache_dir=cache_dir)
    return None if file is None else load_file(split, data_args, cache_dir)


def load_file(split: str, data_args: DataArguments, cache_dir: str | None) -> Dataset:
    """A split from the file, or the files of the pattern, that is given for it."""
    file = getattr(data_args, f"{split}_file")
    kind = Path(file).suffix.lstrip(".")
    if kind not in data_args.FILE_KINDS:
        kinds = [f".{kind}" for kind in data_args.FILE_KINDS]
        raise ValueError(f"--{split}_file {file} is not a {', '.join(kinds[:-1])} or {kinds[-1]} file.")
    try:
        return load_dataset(data_args.FILE_KINDS[kind], data_files=file, split="train", cache_dir=cache_dir)
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # what `datasets` says of a file with nothing but a header
            raise
        raise ValueError(f"--{split}_file {file} has no rows: give a file with at least one sample.") from error


def needed_splits(
    splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig
) -> dict[str, Dataset]:
    """Leave out the splits that the run does not use; fail early if one is missing."""
    if training_args.do_predict and "test" not in data_args.SPLITS:
        raise ValueError(
            "--do_predict: there is nothing to predict; for metrics of other data, give --validation_file."
        )
    needed = {split for split in data_args.SPLITS if getattr(training_args, DOING[split])}
    if not needed:
        raise ValueError(f"Nothing to do: give {_either([DOING[split] for split in data_args.SPLITS])}.")
    if "validation" in needed and "validation" not in splits:
        needed = (needed | {"train"}) - {"validation"}  # to be split off
    for split in data_args.SPLITS:
        if split in needed and split not in splits:
            flags = ", ".join(f"--{name}" for name in data_args.local_flags(split))
            raise ValueError(
                f"No {split} data, only {', '.join(splits)}: give {flags} or the right --{split}_split_name."
            )
    return {split: splits[split] for split in data_args.SPLITS if split in needed}


def hold_out(splits: dict[str, Dataset], data_args: DataArguments, training_args: SelfKDConfig) -> dict[str, Dataset]:
    """Take the validation data from the training data where there are none, and leave out what is not trained on."""
    if training_args.do_eval and "validation" not in splits:
        # One seed for all runs: they are compared on the same samples.
        parts = splits["train"].train_test_split(data_args.validation_split_fraction, seed=0)
        splits = splits | {"train": parts["train"], "validation": parts["test"]}
    return {split: splits[split] for split in data_args.SPLITS if getattr(training_args, DOING[split])}


def cut(splits: dict[str, Dataset], data_args: DataArguments) -> dict[str, Dataset]:
    """Splits of the size that was asked for: the same random samples in every run, whatever its seed."""
    limits = {split: getattr(data_args, LIMITS[split]) for split in splits}
    return {
        split: dataset
        if limits[split] is None or limits[split] >= len(dataset)
        else dataset.shuffle(seed=0).select(range(limits[split]))
        for split, dataset in splits.items()
    }


def datasets_of(splits: dict[str, Dataset]) -> dict[str, Dataset | None]:
    """The datasets of the trainer, by the names of its parameters."""
    return {"train_dataset": splits.get("train"), "eval_dataset": splits.get("validation")}


def map_once(
    dataset: Dataset,
    function: Callable,
    data_args: DataArguments,
    training_args: SelfKDConfig,
    desc: str,
    **options: Any,
) -> Dataset:
    """[`~datasets.Dataset.map`] in the main process first, whose cache the others read."""
    with training_args.main_process_first(desc=desc):
        return dataset.map(
            function,
            num_proc=data_args.preprocessing_num_workers,
            load_from_cache_file=not data_args.overwrite_cache,
            desc=desc,
            **options,
        )


def _either(names: list[str] | tuple[str, ...]) -> str:
    *others, last = [f"--{name}" for name in names]
    return f"{', '.join(others)} or {last}"


# Columns


def check_column(dataset: Dataset, column: str, flag: str, split: str) -> None:
    """Fail where a column is missing."""
    if column not in dataset.column_names:
        raise ValueError(
            f"--{flag} {column} is not a column of the {split} data: choose among {', '.join(dataset.column_names)}."
        )


def check_columns(splits: dict[str, Dataset], data_args: DataArguments, flags: tuple[str, ...]) -> None:
    """Fail where a column that these arguments name is missing; the test data need no classes."""
    for split, dataset in splits.items():
        for flag in flags:
            column = getattr(data_args, flag)
            if column is not None and (split, flag) != ("test", "label_column_name"):
                check_column(dataset, column, flag, split)


def check_text(dataset: Dataset, column: str) -> None:
    """Fail where a column holds something else than text."""
    feature = dataset.features[column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
        raise ValueError(f"Column {column} holds {feature}: it must be text.")


def with_images(dataset: Dataset, column: str, folder: Path | None) -> Dataset:
    """Decode the image column; paths in a file are relative to `folder`."""
    feature = dataset.features[column]
    if isinstance(feature, Image):
        return dataset
    if isinstance(feature, Value) and folder is not None:
        folder = Path(folder).resolve()
        dataset = dataset.map(lambda path: {column: str(folder / path)}, input_columns=column)
    return dataset.cast_column(column, Image())


def class_names(dataset: Dataset, column: str, item: str = "sample") -> list[str]:
    """The names of the classes, in the order of their numbers; `item` is what has one."""
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif isinstance(feature, Value) and feature.dtype.startswith(LABEL_TYPES):
        names = [str(value) for value in sorted(value for value in dataset.unique(column) if value is not None)]
    else:
        raise ValueError(
            f"--label_column_name {column} holds {feature}: one class per {item}, an integer or text, is supported."
        )
    if len(names) < 2:
        raise ValueError(
            f"--label_column_name {column} has {len(names)} classes ({', '.join(names) or 'no label at all'}): there "
            "is nothing to tell apart; give training data with at least 2, or the column that has them."
        )
    return names


def with_labels(dataset: Dataset, column: str, names: list[str], split: str) -> Dataset:
    """Replace the label column by `labels`: numbers into `names`, -100 where a row has no label."""
    if column not in dataset.column_names:
        return dataset
    feature = dataset.features[column]
    own = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}
    number = {name: i for i, name in enumerate(names)} | {None: NO_LABEL}
    # On the Hub, the label of an unlabelled row is -1.
    found = [own.get(value) if own else value for value in dataset.with_format(None)[column][:]]
    found = [None if value is None else str(value) for value in found]
    unknown = set(found) - number.keys()
    if unknown:
        raise ValueError(f"The {split} data have classes that the model does not know: {', '.join(sorted(unknown))}.")
    if split == "train" and None in found:
        raise ValueError(f"Row {found.index(None)} of the training data has no {column}.")
    dataset = dataset.remove_columns(column)
    if set(found) == {None}:
        return dataset
    return dataset.add_column("labels", [number[name] for name in found])
