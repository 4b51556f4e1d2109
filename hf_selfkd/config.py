"""Training arguments of self-distillation: flat fields on top of [`~transformers.TrainingArguments`]."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Literal, get_args, get_type_hints

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .heads.config import AuxiliaryHeadsConfig
from .metrics import is_lower_better


AlphaSchedule = Literal["linear", "constant", "cosine", "linear_step", "calibrated"]
Teacher = Literal["auto", "history", "snapshot", "ema", "predictions", "rank", "none"]
HistoryDtype = Literal["auto", "float32", "float16", "bfloat16"]
HistoryTail = Literal["bucket", "label", "uniform", "renormalize"]
HardLossKind = Literal["auto", "cross_entropy", "additive", "model"]
HistoryDevice = Literal["auto", "accelerator", "cpu", "disk"]


_KINDS = {  # types of fields: what to call a value, and whether something is one
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    bool: ("true or false", lambda value: isinstance(value, (bool, Integral)) and value in (0, 1)),
}


def default_alpha(teacher: str) -> float:
    """The published weight with a teacher."""
    return 0.1 if teacher == "rank" else 0.8


@dataclass
class MethodArguments:
    r"""
    The fields of self-distillation. They are flat, so that `HfArgumentParser`, YAML and `hyperparameter_search` reach
    them.

    The target of a row at epoch `t = 1..T` is `(1 - a_t) * onehot + a_t * past`, with `past` the model's own earlier
    prediction (PS-KD, Kim et al., ICCV 2021). A row without a past prediction is trained with its hard label.

    Args:
        alpha (`float`, *optional*):
            Weight of the past prediction at the end of training, in [0, 1]. 0 is plain training. 0.8 if it is left
            out, and 0.1 with `teacher="rank"`, both as published.
        alpha_schedule (`str`, *optional*, defaults to `"linear"`):
            How the weight grows: `"linear"` (`alpha * t / T`, per epoch, as published), `"constant"`, `"cosine"`
            (`alpha * (1 - cos(pi * t / T)) / 2`), `"linear_step"` (linear in optimizer steps) or `"calibrated"`
            (linear, by as much as held-out data say that the past is worth beside the present, down to 0; measured
            before every epoch on 2,048 samples of `eval_dataset`, or of `calibration_fraction`).
        calibration_fraction (`float`, *optional*, defaults to `0.0`):
            Share of the training set that is held out for `alpha_schedule="calibrated"` and not trained on, in
            [0, 0.5]; 0 takes `eval_dataset`, which then must not be the test set.
        teacher (`str`, *optional*, defaults to `"auto"`):
            Where the past prediction comes from: `"history"` (the row stored when the sample was last trained on, in
            an earlier epoch; no extra forward pass), `"snapshot"` (the weights at the end of the previous epoch, on
            the same view), `"ema"` (a moving average of the weights, from epoch 2), `"predictions"` (a file of your
            own, `teacher_predictions`), `"rank"` (no past: Zipf's law over the ranks of the present scores, a term
            `alpha * KL` beside the hard loss that acts in the first epoch and keeps nothing; Zipf's label smoothing,
            Liang et al., ECCV 2022) or `"none"` (plain training with the loss scaled correctly). `"auto"` is
            `"history"`, and `"snapshot"` with auxiliary heads that learn from past predictions, whose history would
            be many times larger; what data and length do not allow, it leaves.
        teacher_predictions (`str`, *optional*):
            Path of a `.npz` or `.safetensors` file with one array `probs`, `log_probs` or `logits` of shape
            `[samples, classes]` for the training set, of any other model, an ensemble or an earlier run; with `ids`
            `[samples]` beside it where samples have ids of their own. It teaches from the first epoch on and stays as
            it is (born-again networks, Furlanello et al., ICML 2018). For one label a sample.
        rank_label_weights (`bool`, *optional*, defaults to `False`):
            With `teacher="rank"`: labels that are told well count more than others, by the square of their probability
            less its mean over a micro-batch (target part of USKD, Yang et al., ICCV 2023).
        hard_loss (`str`, *optional*, defaults to `"auto"`):
            What the model's own loss is, where no `compute_loss_func` is given: `"cross_entropy"` (of its rows; hard
            and soft part are computed in one pass), `"additive"` (cross-entropy and further terms, which keep their
            weight: `loss + alpha * (soft - hard)`), `"model"` (of any make; the loss gives way as a whole,
            `(1 - alpha) * loss + alpha * soft`) or `"auto"`: what the class of the model tells, `"model"` for a class
            of your own.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both sides of the soft term, which is multiplied by its square.
        warm_start_teacher (`bool`, *optional*, defaults to `False`):
            Give epoch 1 a past: one pass over the training set fills the history before training (`"snapshot"`: the
            initial weights are the first teacher). For pretrained models and short fine-tunes.
        seed_transforms (`bool`, *optional*, defaults to `False`):
            Seed the random transforms of each sample by `(seed, epoch, sample id)`, so that a run with random
            augmentation resumes bit for bit and does not depend on the number of workers.
        history_trace (`bool`, *optional*, defaults to `False`):
            Keep the probability of the true class of every sample in every epoch (float16), in
            `trainer.teacher.trace`.
        history_top_k (`int`, *optional*):
            Entries kept per stored row; the rest of the mass is one bucket. `None` keeps whole rows while the history
            is small (256 MiB in all) or has at most 64 classes, and 32 entries otherwise.
        history_tail (`str`, *optional*, defaults to `"bucket"`):
            Where the mass goes that the stored entries lack: `"bucket"` (to the other classes together: only their
            total mass is compared), `"label"` (to the label), `"uniform"` (evenly to the other classes) or
            `"renormalize"` (nowhere: the entries are scaled up).
        history_dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the stored log-probabilities: `"float32"`, `"float16"`, `"bfloat16"` or `"auto"` (`float32` while
            the history is small, `float16` otherwise).
        history_device (`str`, *optional*, defaults to `"auto"`):
            Where the history lives: `"accelerator"` (beside the model), `"cpu"`, `"disk"` (memory-mapped)
            or `"auto"` (beside the model while small, on disk otherwise).
        history_max_bytes (`int`, *optional*):
            Refuse a history that needs more bytes than this. `None` takes half of what is free where it lives.
        sample_id_column (`str`, *optional*):
            Your own column of stable, unique, non-negative integer ids. Without it, ids are the row numbers of the
            dataset given to the trainer.
        chunked_logits (`bool`, *optional*, defaults to `False`):
            For language models: compute head and loss piece by piece and never hold the logits of all tokens in
            training, which saves most of a step's memory. The result is the same to rounding. Needs a head that is an
            `nn.Linear`, plain cross-entropy and `teacher` `"history"` or `"none"`; `outputs.logits` of a training
            step then hold one position only.
        ema_decay (`float`, *optional*, defaults to `0.999`):
            Decay of the moving average for `teacher="ema"`, in [0, 1); at most `(1 + t) / (10 + t)` after `t` steps.
        teacher_dropout (`bool`, *optional*, defaults to `False`):
            Leave dropout on in the teachers `"snapshot"` and `"ema"`. In evaluation mode a model knows by heart what
            it was trained on; with dropout its predictions are softer (measured for translation: better NLL, much
            better calibration).
        auxiliary_heads (`str`, *optional*):
            Layered self-distillation: a preset of [`AuxiliaryHeadsConfig`] (`"lsskd"`, `"lsskd_full"`, `"joint"`,
            `"sla"`, `"byot"`, `"deep_supervision"`, `"exits"`) or where a configuration was saved. The trainer's
            argument of that name takes a configuration itself.
        save_heads (`bool`, *optional*, defaults to `False`):
            Save the auxiliary heads beside the model, in the folder `auxiliary_heads`, which plain transformers does
            not read: [`load_auxiliary_heads`], `hf-selfkd export` and [`EarlyExit`] do.
        evaluate_heads (`bool`, *optional*, defaults to `False`):
            Report every auxiliary head as a classifier of its own in evaluation (`eval_head0_accuracy` and so on).

    Raises:
        ValueError: if a field is out of range or two fields contradict each other.
    """

    alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the past prediction at the end of training, in [0, 1]; 0.8, or 0.1 for rank."},
    )
    alpha_schedule: AlphaSchedule = field(
        default="linear",
        metadata={"help": "How alpha grows: linear (per epoch), constant, cosine, linear_step or calibrated."},
    )
    calibration_fraction: float = field(
        default=0.0, metadata={"help": "Share of the training set held out for alpha_schedule='calibrated'."}
    )
    teacher: Teacher = field(
        default="auto",
        metadata={"help": "Where the past prediction comes from: history, snapshot, ema, predictions, rank or none."},
    )
    teacher_predictions: str | None = field(
        default=None, metadata={"help": "A .npz or .safetensors file of predictions to learn from."}
    )
    rank_label_weights: bool = field(
        default=False, metadata={"help": "With teacher='rank': labels that are told well count more than others."}
    )
    hard_loss: HardLossKind = field(
        default="auto",
        metadata={"help": "What the model's own loss is: auto (its class tells), cross_entropy, additive or model."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of both sides of the soft term."})
    warm_start_teacher: bool = field(
        default=False, metadata={"help": "Give epoch 1 a past, with one pass over the data before training."}
    )
    seed_transforms: bool = field(
        default=False, metadata={"help": "Seed the random transforms of each sample by (seed, epoch, sample id)."}
    )
    history_trace: bool = field(
        default=False, metadata={"help": "Keep the true-class probability of every sample in every epoch."}
    )
    history_top_k: int | None = field(
        default=None, metadata={"help": "Entries kept per stored row; whole rows while the history is small."}
    )
    history_tail: HistoryTail = field(
        default="bucket",
        metadata={"help": "Where the mass goes that is not stored: bucket, label, uniform or renormalize."},
    )
    history_dtype: HistoryDtype = field(
        default="auto", metadata={"help": "Type of stored rows: auto, float32, float16 or bfloat16."}
    )
    history_device: HistoryDevice = field(
        default="auto", metadata={"help": "Where the history lives: auto, accelerator, cpu or disk."}
    )
    history_max_bytes: int | None = field(
        default=None, metadata={"help": "Refuse a history that needs more bytes than this."}
    )
    sample_id_column: str | None = field(
        default=None, metadata={"help": "Column of stable, unique, non-negative integer sample ids."}
    )
    chunked_logits: bool = field(
        default=False, metadata={"help": "Never hold the logits of all tokens of a language model in training."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the moving average for the ema teacher."})
    teacher_dropout: bool = field(
        default=False, metadata={"help": "Leave dropout on in the snapshot and ema teachers."}
    )
    auxiliary_heads: str | None = field(
        default=None,
        metadata={"help": "Layered self-distillation: a preset (sla, lsskd, byot, ...) or a saved configuration."},
    )
    save_heads: bool = field(default=False, metadata={"help": "Save the auxiliary heads beside the model."})
    evaluate_heads: bool = field(
        default=False, metadata={"help": "Report every auxiliary head as a classifier of its own in evaluation."}
    )

    def __post_init__(self):
        inherited = getattr(super(), "__post_init__", None)
        if inherited is not None:
            inherited()
        for name in ("auxiliary_heads", "teacher_predictions"):
            if getattr(self, name) == "None":  # of a command line, or as `hyperparameter_search` casts a trial's None
                setattr(self, name, None)
        self.alpha_left_out = self.alpha is None
        if self.alpha_left_out:
            self.alpha = default_alpha(self.teacher)
        self.check()

    @classmethod
    def read(cls, args: TrainingArguments) -> MethodArguments:
        """
        The fields as they stand in training arguments now; plain [`~transformers.TrainingArguments`] have defaults.

        Args:
            args ([`~transformers.TrainingArguments`]): left as they are.

        Raises:
            ValueError: if they contradict each other, or other fields of the arguments.
        """
        values = {spec.name: getattr(args, spec.name, spec.default) for spec in fields(cls)}
        method = MethodArguments(**values)
        method.check_with(args)
        return method

    @property
    def distils(self) -> bool:
        """`bool`: whether past predictions can enter the loss at all."""
        return self.alpha > 0 and self.teacher != "none"

    @property
    def has_past(self) -> bool:
        """`bool`: whether what is learned from are predictions of another time."""
        return self.distils and self.teacher != "rank"

    @property
    def teacher_asked(self) -> str:
        """`str`: the teacher, `"predictions"` if a file of them is given."""
        return "predictions" if self.teacher_predictions is not None else self.teacher

    def without_trace(self) -> MethodArguments:
        """The same without `history_trace`, which is of the model's own predictions."""
        return replace(self, history_trace=False)

    def check(self) -> None:
        """Check the fields by themselves.

        Raises:
            ValueError: naming the field, its value and what to do.
        """
        for name, allowed in (
            ("alpha_schedule", get_args(AlphaSchedule)),
            ("teacher", get_args(Teacher)),
            ("hard_loss", get_args(HardLossKind)),
            ("history_tail", get_args(HistoryTail)),
            ("history_dtype", get_args(HistoryDtype)),
            ("history_device", get_args(HistoryDevice)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        self._check_types()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside [0, 1]: it is the weight of the past prediction.")
        if not 0 <= self.calibration_fraction <= 0.5:
            raise ValueError(
                f"calibration_fraction={self.calibration_fraction} is outside [0, 0.5]: use for instance 0.1."
            )
        if self.calibration_fraction > 0 and self.alpha_schedule != "calibrated":
            raise ValueError(
                f"calibration_fraction={self.calibration_fraction} does nothing with "
                f"alpha_schedule={self.alpha_schedule!r}: set alpha_schedule='calibrated', or leave it out."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is outside [0, 1): use for instance 0.999.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature} must be positive and finite: 1.0 is the published value."
            )
        for name in ("history_top_k", "history_max_bytes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1: leave it out for the default.")
        self._check_teacher()

    def _check_types(self) -> None:
        """A YAML file has `1e-3` and `no` in quotes as texts, which neither compare nor mean what they say."""
        for name, kinds in _types().items():
            value = getattr(self, name)
            if kinds[0] not in _KINDS or (value is None and type(None) in kinds):
                continue
            told, is_one = _KINDS[kinds[0]]
            if not is_one(value):
                raise ValueError(f"{name}={value!r} is not {told}: give {told}, without quotes in a file.")

    def _check_teacher(self) -> None:
        if not isinstance(self.auxiliary_heads, (str, type(None))):
            raise ValueError(
                f"auxiliary_heads={self.auxiliary_heads!r} in the arguments must be the name of a preset or a path: "
                "give the configuration itself to the trainer, SelfKDTrainer(..., auxiliary_heads=config)."
            )
        AuxiliaryHeadsConfig.resolve(self.auxiliary_heads)  # an error, if it stands for nothing
        asked, given = self.teacher_asked, self.teacher_predictions is not None
        if self.teacher != "auto" and (self.teacher == "predictions") != given:
            raise ValueError(
                f"teacher={self.teacher!r} with teacher_predictions={self.teacher_predictions!r}: one needs the "
                "other, set teacher='predictions' and the path of a file, or neither."
            )
        if self.alpha_schedule == "calibrated" and asked in ("rank", "predictions"):
            raise ValueError(
                f"alpha_schedule='calibrated' asks what the run's own past is worth, and teacher={asked!r} has none: "
                "set alpha_schedule='constant'."
            )
        for name, kinds in (
            ("history_trace", ("history", "auto")),
            ("warm_start_teacher", ("history", "snapshot", "auto")),
            ("teacher_dropout", ("snapshot", "ema", "auto")),
            ("rank_label_weights", ("rank",)),
        ):
            if getattr(self, name) and asked not in kinds:
                raise ValueError(
                    f"{name}=True does nothing with teacher={asked!r}: use "
                    f"{' or '.join(repr(kind) for kind in kinds if kind != 'auto')}."
                )
        if asked == "rank" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} does nothing with teacher='rank', whose law has none: leave it out."
            )
        if self.chunked_logits and self.distils and asked not in ("history", "auto"):
            raise ValueError(
                f"chunked_logits=True with teacher={asked!r}: it works with teacher='history' or alpha=0."
            )

    def check_with(self, args: TrainingArguments) -> None:
        """Check the fields together with those of [`~transformers.TrainingArguments`].

        Args:
            args ([`~transformers.TrainingArguments`]): left as they are.

        Raises:
            ValueError: naming the fields, their values and what to do.
        """
        smoothing = args.label_smoothing_factor
        if smoothing != 0 and self.distils:
            raise ValueError(
                f"label_smoothing_factor={smoothing} with alpha={self.alpha}: both soften the targets. Set "
                "label_smoothing_factor=0, or alpha=0 for a label smoothing baseline."
            )
        if smoothing != 0 and self.chunked_logits:
            raise ValueError(
                f"chunked_logits=True with label_smoothing_factor={smoothing}: it works without smoothing only."
            )
        metric = args.metric_for_best_model
        if metric is not None and args.greater_is_better and is_lower_better(metric):
            raise ValueError(
                f"metric_for_best_model={metric!r} is better when lower and greater_is_better=True would keep the "
                "worst checkpoint: set greater_is_better=False."
            )


@lru_cache
def _types() -> dict[str, tuple[type, ...]]:
    """The types that each field may have."""
    hints = get_type_hints(MethodArguments)
    return {spec.name: get_args(hints[spec.name]) or (hints[spec.name],) for spec in fields(MethodArguments)}


@dataclass
class SelfKDConfig(MethodArguments, TrainingArguments):
    r"""
    Arguments of [`SelfKDTrainer`]: all of [`~transformers.TrainingArguments`], with the same meaning and defaults, and
    all of [`~hf_selfkd.config.MethodArguments`]: `alpha`, `alpha_schedule`, `teacher`, `temperature`,
    `auxiliary_heads` and so on.

    Raises:
        ValueError: if a field is out of range or two fields contradict each other.

    Example:

    ```python
    args = SelfKDConfig("out", num_train_epochs=30, alpha=0.8, teacher="history")
    ```
    """

    def __post_init__(self):
        undecided = self.greater_is_better is None
        super().__post_init__()
        if undecided and self.metric_for_best_model is not None and is_lower_better(self.metric_for_best_model):
            self.greater_is_better = False
        self.check_with(self)


@dataclass
class Seq2SeqSelfKDConfig(SelfKDConfig, Seq2SeqTrainingArguments):
    """
    Arguments of [`Seq2SeqSelfKDTrainer`]: all of [`~transformers.Seq2SeqTrainingArguments`] (`predict_with_generate`,
    `generation_max_length`, `generation_num_beams`, ...) and all of [`SelfKDConfig`].
    """
