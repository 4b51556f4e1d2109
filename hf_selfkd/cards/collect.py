"""What a trainer knows of its run, as the facts of a card."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import MISSING, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import accelerate
import datasets
import torch
import transformers
from transformers.trainer_utils import has_length

from .._version import __version__
from ..heads import head_names, heads_of
from ..heads.config import PRESETS
from ..models import base_model, class_of, classes_of, uncompiled
from .facts import CardFacts
from .names import GROUPS, HUB_ID


if TYPE_CHECKING:
    from ..trainer import SelfKDMixin


ALWAYS = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "optim",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
# Fields that say where and how a run was watched and kept, or where it ran, and nothing of the model.
PRIVATE = (
    "dir",
    "path",
    "token",
    "hub",
    "run_name",
    "report",
    "project",
    "logging",
    "log_",
    "save_",
    "disable_tqdm",
    "do_",
    "push",
    "resume",
    "debug",
    "remove_unused",
    "dataloader",
    "local_rank",
    "use_cpu",
    "load_best",
    "metric_for_best",
    "greater_is_better",
    "per_device_eval",
    "eval_",
    "config",
    "trackio",
    "ddp",
    "deepspeed",
    "fsdp",
    "include_",
    "generation_",
    "predict_with",
    "label_names",
    "batch_eval",
)
CURVE_POINTS = 200


def collect(trainer: SelfKDMixin, **given: Any) -> CardFacts:
    """
    The facts of the model of a trainer, as far as it knows them.

    Args:
        trainer ([`~hf_selfkd.SelfKDMixin`]): before, in or after a training.
        **given: parameters of `create_model_card`.
    """
    args, model = trainer.args, base_model(trainer.model)
    name = given.get("model_name") or (args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir)))
    source = getattr(model.config, "_name_or_path", "") if hasattr(model, "config") else ""
    base = source if given.get("finetuned_from") is None else given["finetuned_from"]
    repo = getattr(trainer, "hub_model_id", None) or args.hub_model_id
    trained = trainer.state.global_step > 0
    return CardFacts(
        model_name=name.split("/")[-1],
        repo_id=repo,
        model_class=class_of(model).__name__,
        parameters=_count_parameters(trainer.model),
        classes=_classes(trainer),
        input_length=_input_length(trainer, model),
        base_model=base if HUB_ID.fullmatch(base or "") and not os.path.exists(base) and base != repo else None,
        task=_listed(given.get("tasks"))[0] if given.get("tasks") else task_of(model),
        library="peft" if hasattr(uncompiled(trainer.model), "peft_config") else "transformers",
        language=_listed(given.get("language")),
        license=given.get("license"),
        tags=_listed(given.get("tags")),
        datasets=_listed(given.get("dataset_tags")) or _builder_of(trainer.train_dataset),
        data=_data(trainer, given),
        method=_method(trainer) if trained else {},
        settings=_settings(args) if trained else {},
        evaluations=list(trainer.evaluations.values()),
        chosen_by=_chosen_by(trainer),
        curves=_curves(trainer.state.log_history),
        training=_training(trainer) if trained else {},
        versions=_versions(),
    )


def _classes(trainer: SelfKDMixin) -> list[str]:
    """The classes of a classifier; none of a model whose classes are tokens."""
    task, model = trainer._find_task_quietly(), base_model(trainer.model)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    if task is None or task.num_classes != len(names):
        return []
    return [str(names[number]) for number in sorted(names)]


def _input_length(trainer: SelfKDMixin, model: torch.nn.Module) -> int | None:
    """What tokenizer and positions of the model allow, if they tell."""
    known = [getattr(trainer.processing_class, "model_max_length", None)]
    known.append(getattr(getattr(model, "config", None), "max_position_embeddings", None))
    limits = [limit for limit in known if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits) if limits and known[0] is not None else None


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _count_parameters(model: torch.nn.Module) -> int:
    heads = head_names(model) if heads_of(model) is not None else set()
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in heads)


def task_of(model: torch.nn.Module) -> str | None:
    """The task of a model as the Hub names it, by its class; `None` for a class that says nothing of it."""
    known = {cls.__name__ for cls in type(model).__mro__}
    return next((task for group, task in GROUPS.items() if known & classes_of(group)), None)


def _builder_of(dataset: Any) -> list[str]:
    """The name on the Hub of a dataset that was loaded from there."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", str(source)) for source in sources]
    return list(dict.fromkeys(match[1] for match in found if match))


def _data(trainer: SelfKDMixin, given: dict[str, Any]) -> dict[str, Any]:
    dataset, data = trainer.train_dataset, {}
    described = _listed(given.get("dataset"))
    if described:
        data["description"] = ", ".join(described)
    if any(_listed(given.get("dataset_args"))):
        data["configuration"] = ", ".join(filter(None, _listed(given["dataset_args"])))
    if dataset is not None and has_length(dataset):
        data["samples"] = len(dataset)
    columns = getattr(dataset, "column_names", None)
    if columns:
        data["columns"] = list(columns)
    return data


def _method(trainer: SelfKDMixin) -> dict[str, Any]:
    """The self-distillation that was done, not what was asked for."""
    method, distiller, heads = trainer.method, trainer.distiller, heads_of(trainer.model)
    teacher = "none" if distiller is None or distiller.alpha == 0 else distiller.teacher.kind
    if teacher != "none" and trainer._never_taught():
        teacher = "none"
    done: dict[str, Any] = {"teacher": teacher}
    if teacher != "none":
        done |= {
            "alpha": distiller.alpha,
            "alpha_schedule": distiller.schedule,
            "alpha_reached": distiller.alpha_reached,
        }
        done |= {"temperature": method.temperature, "rank_label_weights": method.rank_label_weights}
        done["warm_start"] = method.warm_start_teacher
    if heads is not None and heads.config.trains:
        asked = heads.config.to_dict()
        done["auxiliary_heads"] = asked | {"heads": len(heads.heads)}
        done["preset"] = method.auxiliary_heads if method.auxiliary_heads in PRESETS else None
    smoothing = trainer.args.label_smoothing_factor
    if smoothing:
        done["label_smoothing"] = smoothing
    mixer = trainer._mixer()
    if mixer is not None and mixer.mixes:
        done["mixing"] = {name: getattr(mixer, name) for name in ("mixup_alpha", "cutmix_alpha", "mix_probability")}
    return done


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _settings(args: transformers.TrainingArguments) -> dict[str, Any]:
    """The fields that always matter, and those that differ from their defaults and say nothing of places."""
    result = {}
    for spec in fields(transformers.Seq2SeqTrainingArguments):  # what a class of the user's adds may be anything
        value = _plain(getattr(args, spec.name, None))
        default = spec.default_factory() if spec.default_factory is not MISSING else _plain(spec.default)
        if not isinstance(value, (bool, int, float, str)) or (isinstance(value, str) and os.path.exists(value)):
            continue
        differs = value != default and (value or default)
        if spec.name in ALWAYS or (differs and not any(part in spec.name for part in PRIVATE)):
            result[spec.name] = value
    return dict(sorted(result.items(), key=lambda item: (item[0] not in ALWAYS, item[0])))


def _chosen_by(trainer: SelfKDMixin) -> dict[str, Any] | None:
    args, state = trainer.args, trainer.state
    if not trainer.best_is_loaded or state.best_metric is None:
        return None
    metric = args.metric_for_best_model
    return {
        "metric": metric if metric.startswith("eval_") else f"eval_{metric}",
        "value": state.best_metric,
        "step": state.best_global_step,
    }


def _curves(history: list[dict[str, Any]]) -> dict[str, list]:
    """Training and evaluation loss over the steps, thinned to what a picture can show."""
    curves = {}
    for name in ("loss", "eval_loss"):
        points = [[entry["step"], entry[name]] for entry in history if name in entry and "step" in entry]
        every = max(1, len(points) // CURVE_POINTS)
        if len(points) > 1:
            curves[name] = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    return curves


def _training(trainer: SelfKDMixin) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    result: dict[str, Any] = {"epochs": state.epoch, "steps": state.global_step, "processes": args.world_size}
    runtimes = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    if runtimes:
        result["seconds"] = runtimes[-1]
    energy = _energy(trainer)
    if energy:
        result["energy"] = energy
    device = args.device
    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if device.type == "cpu":
        result["device"] = f"CPU, {platform.machine()}, threads a process: {torch.get_num_threads()}"
    return result


def _energy(trainer: SelfKDMixin) -> dict[str, float]:
    """What CodeCarbon measured, if it is installed and its callback ran: kilowatt-hours and kilograms of CO2."""
    for callback in trainer.callback_handler.callbacks:
        data = getattr(getattr(callback, "tracker", None), "final_emissions_data", None)
        if data is not None:
            return {"kwh": float(data.energy_consumed), "co2_kg": float(data.emissions)}
    return {}


def _versions() -> dict[str, str]:
    return {
        "hf_selfkd": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
