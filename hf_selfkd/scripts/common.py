"""What the scripts have in common: reading the arguments, the configuration of the model, the run, sharing."""

from __future__ import annotations

import csv
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import yaml
from datasets import Dataset
from transformers import AutoConfig, HfArgumentParser, PreTrainedConfig, set_seed

import hf_selfkd
from hf_selfkd import SelfKDConfig, SelfKDTrainer
from hf_selfkd.checkpoint_files import last_whole_checkpoint
from hf_selfkd.metrics.temperature import TemperatureFit
from hf_selfkd.plots import reliability_diagram, risk_coverage_plot
from hf_selfkd.report.saving import save_samples

from .arguments import SCRIPTS, DataArguments, ModelArguments, command_of


logger = logging.getLogger(__name__)

SETTINGS_FILES = (".yaml", ".yml", ".json")


# Arguments


def make_parser(task: str) -> HfArgumentParser:
    """
    The parser of all flags of a script: its own and those of training.

    Args:
        task (`str`): the name of the script in `SCRIPTS`.
    """
    script, command = SCRIPTS[task], command_of(task)
    return HfArgumentParser(
        (*script.arguments, getattr(hf_selfkd, script.config)),
        allow_abbrev=False,
        prog=command,
        usage=f"{command} [SETTINGS.yaml] [FLAGS]",  # and not all flags, above every error
        description=script.summary,
    )


def parse_arguments(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, Any, SelfKDConfig]:
    """
    The flags, over the settings of the YAML or JSON file that may stand first.

    Args:
        parser ([`~transformers.HfArgumentParser`]): of three dataclasses.
        argv (`Sequence[str]`, *optional*): the words of the command line; those of the process by default.

    Returns:
        `tuple`: the arguments of the model, of the data and of training.

    Raises:
        ValueError: if a setting of the file or a word is no flag, or a value is wrong.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    if flags and flags[0].endswith(SETTINGS_FILES):
        file = flags.pop(0)
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        unknown = settings.keys() - vars(parser.parse_args([])).keys()
        if unknown:
            raise ValueError(f"{file} has unknown settings: {', '.join(sorted(unknown))}.")
        # As text, so that argparse reads them like flags: to YAML, 1e-4 is text and not a number.
        as_is = (dict, list, type(None))
        parser.set_defaults(**{k: v if isinstance(v, as_is) else str(v) for k, v in settings.items()})
    _, unknown = parser.parse_known_args(flags)
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: no such flag. `{parser.prog} --help` lists them; a file of settings stands first."
        )
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def start(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, Any, SelfKDConfig]:
    """[`parse_arguments`], with the logging set up and all generators seeded."""
    arguments = parse_arguments(parser, argv)
    set_up_logging(arguments[-1])
    set_seed(arguments[-1].seed)
    return arguments


def set_up_logging(training_args: SelfKDConfig) -> None:
    """Log to the terminal; only the main process tells what goes well."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    level = training_args.get_process_log_level()
    tells = training_args.should_log and training_args.log_level == "passive"
    logging.getLogger("hf_selfkd").setLevel(logging.INFO if tells else level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    logger.warning(
        f"Process {training_args.process_index} of {training_args.world_size} on {training_args.device}, "
        f"{training_args.parallel_mode.value}."
    )


# The model


def make_config(
    model_args: ModelArguments, names: list[str] | None = None, image_size: int | list[int] | None = None
) -> PreTrainedConfig:
    """
    The configuration of the model, with the overrides.

    Args:
        model_args ([`ModelArguments`]): say which one.
        names (`list[str]`, *optional*): the classes; those of the configuration by default.
        image_size (`int`, *optional*): the size of the images, for configurations that have it.
    """
    overrides = model_args.config_overrides or {}
    overrides = yaml.safe_load(overrides) if isinstance(overrides, str) else dict(overrides)
    source = model_args.config_name or model_args.model_name_or_path
    if source is not None:
        base = AutoConfig.from_pretrained(source, **model_args.hub)
    else:
        base = AutoConfig.for_model(model_args.model_type)
    if image_size is not None and hasattr(base, "image_size"):
        overrides.setdefault("image_size", image_size)
    unknown = [name for name in overrides if not hasattr(base, name)]
    if unknown:
        raise ValueError(f"--config_overrides: {type(base).__name__} has no {', '.join(unknown)}.")
    if names is not None:
        overrides["id2label"] = dict(enumerate(names))
        overrides["label2id"] = {name: i for i, name in enumerate(names)}
    if source is not None:
        return AutoConfig.from_pretrained(source, **overrides, **model_args.hub)
    return AutoConfig.for_model(model_args.model_type, **overrides)


def class_list(config: PreTrainedConfig) -> list[str]:
    """The classes of a configuration, in the order of their numbers."""
    return [config.id2label[i] for i in range(config.num_labels)]


def make_classifier(auto: Any, model_args: ModelArguments, config: PreTrainedConfig) -> torch.nn.Module:
    """
    A pretrained classifier, or a new one.

    Args:
        auto (`type`): its `AutoModelFor…Classification`.
        model_args ([`ClassifierArguments`]): say which one.
        config ([`~transformers.PreTrainedConfig`]): from [`make_config`].
    """
    if model_args.model_name_or_path is None:
        return auto.from_config(config, trust_remote_code=model_args.trust_remote_code)
    return auto.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.hub,
    )


# The run


@dataclass
class Run:
    """
    A run of a script, before its first step.

    Args:
        trainer ([`SelfKDTrainer`]): with its datasets.
        model_args, data_args: for the model card.
        tasks (`str`): the task, as the Hub names it.
        predict (`Callable`, *optional*): predicts the test split, if there is one.
        card (`dict`): more of the model card.
    """

    trainer: SelfKDTrainer
    model_args: ModelArguments
    data_args: DataArguments
    tasks: str
    predict: Callable[[], None] | None = None
    card: dict[str, Any] = field(default_factory=dict)


def carry_out(run: Run) -> None:
    """Do what the arguments of training ask for: train, evaluate, predict, write the model card, upload."""
    trainer = run.trainer
    if trainer.args.do_train:
        train(trainer)
    if trainer.args.do_eval:
        record(trainer, "eval", trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)})
    if trainer.args.do_predict and run.predict is not None:
        run.predict()
    if trainer.args.do_train:
        share(run)


def find_checkpoint(training_args: SelfKDConfig) -> str | None:
    """The checkpoint to resume from: the one asked for, or the last whole one in the output folder."""
    if training_args.resume_from_checkpoint is not None or not os.path.isdir(training_args.output_dir):
        return training_args.resume_from_checkpoint
    checkpoint = last_whole_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}. To train from the start, choose another --output_dir.")
    return checkpoint


def train(trainer: SelfKDTrainer) -> None:
    """Train, and save model, metrics, state and what a report shows."""
    result = trainer.train(resume_from_checkpoint=find_checkpoint(trainer.args))
    trainer.save_model()
    record(trainer, "train", result.metrics | {"train_samples": len(trainer.train_dataset)})
    trainer.save_state()
    save_samples(trainer)


def record(trainer: SelfKDTrainer, split: str, metrics: dict[str, Any]) -> None:
    """Print the metrics, and save them with the signatures that say how they were computed, if they have some."""
    trainer.log_metrics(split, metrics)
    signatures = getattr(trainer.compute_metrics, "signatures", {})
    kept = {f"{split}_{name}_signature": text for name, text in signatures.items() if f"{split}_{name}" in metrics}
    trainer.save_metrics(split, metrics | kept)


def predict_classes(trainer: SelfKDTrainer, dataset: Dataset) -> None:
    """
    Write `predictions.csv`: row, class and its probability. Where there are labels: the label and its probability, the
    metrics, the temperature that would calibrate the model, and pictures if matplotlib is installed.
    """
    result = trainer.predict(dataset, metric_key_prefix="predict")
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    labelled = isinstance(result.label_ids, np.ndarray) and bool((result.label_ids >= 0).all())
    finite = labelled and bool(np.isfinite(logits).all())
    temperature = {"predict_temperature": temperature_of(logits, result.label_ids)} if finite else {}
    record(trainer, "predict", result.metrics | temperature | {"predict_samples": len(dataset)})
    if not trainer.is_world_process_zero():
        return
    if finite:
        draw(logits, result.label_ids, trainer.args.output_dir)
    probs = torch.from_numpy(logits).float().softmax(dim=-1)
    names, (confidence, best) = trainer.model.config.id2label, probs.max(dim=-1)
    columns = {"prediction": [names[i] for i in best.tolist()], "confidence": confidence.tolist()}
    if labelled:
        labels = torch.from_numpy(result.label_ids).long()
        columns["label"] = [names[i] for i in labels.tolist()]
        columns["label_probability"] = probs.gather(-1, labels[:, None]).squeeze(-1).tolist()
    with open(os.path.join(trainer.args.output_dir, "predictions.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *columns])
        for row, values in enumerate(zip(*columns.values(), strict=True)):
            writer.writerow([row, *(f"{value:.9g}" if isinstance(value, float) else value for value in values)])


def temperature_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that would calibrate these predictions `[n, C]`: above 1 where they are over-confident."""
    fit = TemperatureFit()
    fit.update(torch.from_numpy(logits).float(), torch.from_numpy(labels).long())
    return math.exp(fit.log_temperature())


def draw(logits: np.ndarray, labels: np.ndarray, folder: str) -> None:
    """Draw `reliability.png` and `risk_coverage.png`, if matplotlib is installed."""
    if find_spec("matplotlib") is not None:
        results = {"test": (logits, labels)}
        reliability_diagram(results, os.path.join(folder, "reliability.png"))
        risk_coverage_plot(results, os.path.join(folder, "risk_coverage.png"))


def share(run: Run) -> None:
    """Write the model card, which names what is on the Hub, and upload with `--push_to_hub`."""
    trainer, data_args = run.trainer, run.data_args
    base, data = run.model_args.model_name_or_path, data_args.dataset_name
    hub_data = data is not None and not data_args.local and not os.path.isdir(data)
    card = {
        "tasks": run.tasks,
        "finetuned_from": "" if base is None or os.path.isdir(base) else base,
        "dataset_tags": [data] if hub_data else [],
        "dataset_args": [data_args.dataset_config_name] if hub_data else [],
        **run.card,
        "tags": [run.tasks, *run.card.get("tags", [])],
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
