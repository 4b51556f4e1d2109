"""Arguments: every way in, every refusal, and the schedules against their formulas."""

import dataclasses
import math

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_selfkd import SelfKDConfig
from hf_selfkd.config import MethodArguments
from hf_selfkd.schedule import alpha_at


DEFAULTS = {
    "alpha": 0.8,
    "alpha_schedule": "linear",
    "calibration_fraction": 0.0,
    "teacher": "auto",
    "teacher_predictions": None,
    "rank_label_weights": False,
    "hard_loss": "auto",
    "temperature": 1.0,
    "warm_start_teacher": False,
    "seed_transforms": False,
    "history_trace": False,
    "history_top_k": None,
    "history_dtype": "auto",
    "history_device": "auto",
    "history_max_bytes": None,
    "sample_id_column": None,
    "history_tail": "bucket",
    "chunked_logits": False,
    "ema_decay": 0.999,
    "teacher_dropout": False,
    "auxiliary_heads": None,
    "evaluate_heads": False,
    "save_heads": False,
}
OTHERS = {
    "alpha": 0.5,
    "alpha_schedule": "calibrated",
    "calibration_fraction": 0.25,
    "teacher": "history",
    "teacher_predictions": None,
    "rank_label_weights": False,
    "hard_loss": "additive",
    "temperature": 2.0,
    "warm_start_teacher": True,
    "seed_transforms": True,
    "history_trace": True,
    "history_top_k": 8,
    "history_dtype": "bfloat16",
    "history_device": "disk",
    "history_max_bytes": 10**9,
    "sample_id_column": "uid",
    "history_tail": "label",
    "chunked_logits": True,
    "ema_decay": 0.99,
    "teacher_dropout": False,
    "auxiliary_heads": "byot",
    "evaluate_heads": True,
    "save_heads": True,
}


def own(config):
    return {name: getattr(config, name) for name in DEFAULTS}


def method(**fields):
    return dataclasses.asdict(MethodArguments(**fields))


def config(tmp_path, **fields):
    return SelfKDConfig(str(tmp_path), report_to="none", **fields)


# Ways in


def test_defaults_and_names_of_the_design(tmp_path):
    """The fields on top of TrainingArguments."""
    assert own(config(tmp_path)) == DEFAULTS
    added = {f.name for f in dataclasses.fields(SelfKDConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    assert added == DEFAULTS.keys() == {f.name for f in dataclasses.fields(MethodArguments)}
    assert all(f.metadata.get("help") for f in dataclasses.fields(SelfKDConfig) if f.name in added)


def test_flags(tmp_path):
    """HfArgumentParser, every field."""
    flags = ["--output_dir", str(tmp_path), "--learning_rate", "0.01", "--report_to", "none"]
    for name, value in OTHERS.items():
        if value is not None:  # of two fields that exclude one another
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    (parsed,) = HfArgumentParser(SelfKDConfig).parse_args_into_dataclasses(flags)
    assert own(parsed) == OTHERS and parsed.learning_rate == 0.01
    assert {name: type(value) for name, value in own(parsed).items()} == {n: type(v) for n, v in OTHERS.items()}
    (parsed,) = HfArgumentParser(SelfKDConfig).parse_args_into_dataclasses(flags[:2])
    assert own(parsed) == DEFAULTS


def test_unknown_choice_as_a_flag(tmp_path, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(SelfKDConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--teacher", "me"])
    assert "history" in capsys.readouterr().err


def test_yaml_file(tmp_path):
    """Types are those of YAML; integers are good numbers."""
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "report_to": "none", **OTHERS}))
    (parsed,) = HfArgumentParser(SelfKDConfig).parse_yaml_file(str(path))
    assert own(parsed) == OTHERS
    whole = {"output_dir": str(tmp_path), "report_to": "none", "alpha": 1, "temperature": 4}
    (parsed,) = HfArgumentParser(SelfKDConfig).parse_dict(whole)
    assert parsed.alpha == 1 and parsed.temperature == 4


def test_yaml_refusals(tmp_path):
    with pytest.raises(ValueError, match="alpha=2"):
        HfArgumentParser(SelfKDConfig).parse_dict({"output_dir": str(tmp_path), "alpha": 2})
    with pytest.raises(ValueError, match="alpah"):
        HfArgumentParser(SelfKDConfig).parse_dict({"output_dir": str(tmp_path), "alpah": 0.2})


def test_to_dict_and_back(tmp_path):
    """As Trainer writes it to the logs."""
    first = config(tmp_path, **OTHERS)
    shown = first.to_dict()
    assert {name: shown[name] for name in OTHERS} == OTHERS
    again = SelfKDConfig(str(tmp_path), **{name: shown[name] for name in OTHERS})
    assert own(again) == OTHERS


# From plain arguments


PLAIN = {
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "num_train_epochs": 2.5,
    "max_steps": 17,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "logging_strategy": "steps",
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "save_strategy": "steps",
    "save_steps": 6,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "seed": 7,
    "data_seed": 8,
    "bf16": True,
    "optim": "adamw_torch",
    "optim_args": "fused=False",
    "label_names": ["labels"],
    "hub_token": "hf_not_a_token",
    "hub_model_id": "someone/something",
    "report_to": "none",
    "gradient_accumulation_steps": 2,
    "accelerator_config": {"split_batches": False, "even_batches": False},
    "dataloader_num_workers": 1,
    "dataloader_prefetch_factor": 3,
    "remove_unused_columns": False,
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("arguments", [{}, PLAIN], ids=["defaults", "many"])
def test_plain_arguments_have_the_defaults_and_stay_as_they_are(tmp_path, arguments):
    """Every field, tokens included, and everything derived from fields when they were built."""
    plain = TrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    before = {name: repr(value) for name, value in plain.__dict__.items()}
    read = MethodArguments.read(plain)
    assert dataclasses.asdict(read) == DEFAULTS and type(read) is MethodArguments
    read.alpha = 0.1
    assert {name: repr(value) for name, value in plain.__dict__.items()} == before and not hasattr(plain, "alpha")
    assert type(plain) is TrainingArguments
    if arguments:
        assert plain.hub_token == "hf_not_a_token" and plain.to_dict()["hub_token"] != "hf_not_a_token"


def test_the_fields_of_a_selfkd_config_are_read_as_they_stand_now(tmp_path):
    """Every one of them; the arguments do not change."""
    args = config(tmp_path, **OTHERS)
    assert dataclasses.asdict(MethodArguments.read(args)) == OTHERS == own(args)
    args.alpha = 0.3
    assert MethodArguments.read(args).alpha == 0.3


def test_fields_of_the_users_own(tmp_path):
    """Arguments of a subclass are left alone; those that it has of the method are read."""

    @dataclasses.dataclass
    class Mine(TrainingArguments):
        margin: float = 0.5
        alpha: float = 0.6

    args = Mine(str(tmp_path), margin=0.7)
    assert dataclasses.asdict(MethodArguments.read(args)) == DEFAULTS | {"alpha": 0.6} and args.margin == 0.7


def test_a_subclass_of_the_users_own(tmp_path):
    """Fields, methods and checks of both classes."""

    @dataclasses.dataclass
    class Mine(SelfKDConfig):
        margin: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            assert self.margin < 1

    mine = Mine(str(tmp_path), margin=0.7, alpha=0.2, report_to="none")
    assert mine.margin == 0.7 and MethodArguments.read(mine).alpha == 0.2
    with pytest.raises(AssertionError):
        Mine(str(tmp_path), margin=2.0, report_to="none")


def test_plain_label_smoothing_is_refused_when_read(tmp_path):
    """The defaults distil, so smoothing contradicts them."""
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 with alpha=0.8"):
        MethodArguments.read(TrainingArguments(str(tmp_path), label_smoothing_factor=0.1))


def test_the_trace_is_left_out_for_heads():
    assert dataclasses.asdict(MethodArguments(alpha=0.3, history_trace=True).without_trace()) == method(alpha=0.3)


# Refusals


REFUSED = [
    ({"alpha": -0.1}, "alpha=-0.1 is outside"),
    ({"alpha": 1.01}, "alpha=1.01 is outside"),
    ({"alpha": math.nan}, "alpha=nan is outside"),
    (
        {"alpha_schedule": "step"},
        "alpha_schedule='step' is unknown: choose one of linear, constant, cosine, linear_step",
    ),
    (
        {"teacher": "resnet"},
        "teacher='resnet' is unknown: choose one of auto, history, snapshot, ema, predictions, rank, none",
    ),
    ({"hard_loss": "focal"}, "hard_loss='focal' is unknown: choose one of auto, cross_entropy, additive, model"),
    ({"history_tail": "other"}, "history_tail='other' is unknown: choose one of bucket, label, uniform, renormalize"),
    ({"history_dtype": "int8"}, "history_dtype='int8' is unknown"),
    ({"history_device": "tpu"}, "history_device='tpu' is unknown: choose one of auto, accelerator, cpu, disk"),
    ({"temperature": 0.0}, "temperature=0.0 must be positive"),
    ({"temperature": -1.0}, "temperature=-1.0 must be positive"),
    ({"temperature": math.inf}, "temperature=inf must be positive and finite"),
    ({"temperature": math.nan}, "temperature=nan must be positive and finite"),
    ({"history_top_k": 0}, "history_top_k=0 must be at least 1"),
    ({"history_top_k": -3}, "history_top_k=-3 must be at least 1"),
    ({"history_max_bytes": 0}, "history_max_bytes=0 must be at least 1"),
    ({"ema_decay": 1.0}, "ema_decay=1.0 is outside"),
    ({"ema_decay": -0.1}, "ema_decay=-0.1 is outside"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with alpha=0.8.*Set label_smoothing_factor=0"),
    ({"history_trace": True, "teacher": "snapshot"}, "history_trace=True does nothing with teacher='snapshot'"),
    ({"history_trace": True, "teacher": "none"}, "history_trace=True does nothing with teacher='none'"),
    ({"warm_start_teacher": True, "teacher": "ema"}, "warm_start_teacher=True does nothing with teacher='ema'"),
    ({"warm_start_teacher": True, "teacher": "none"}, "use 'history' or 'snapshot'"),
    ({"teacher_dropout": True, "teacher": "history"}, "teacher_dropout=True does nothing with teacher='history'"),
    ({"chunked_logits": True, "teacher": "ema"}, "chunked_logits=True with teacher='ema'"),
    (
        {"chunked_logits": True, "alpha": 0.0, "label_smoothing_factor": 0.2},
        "chunked_logits=True with label_smoothing_factor=0.2",
    ),
    ({"auxiliary_heads": "no_such"}, "no_such"),
    (
        {"metric_for_best_model": "nll", "greater_is_better": True},
        "metric_for_best_model='nll' is better when lower.*set greater_is_better=False",
    ),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[f"{list(f)[0]}={list(f.values())[0]}" for f, _ in REFUSED]
)
def test_refusals_name_the_field_and_the_value(tmp_path, fields, message):
    """When built, and again when hyperparameter search has set the field."""
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)
    args = config(tmp_path)
    for name, value in fields.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        MethodArguments.read(args)


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": 0.0, "label_smoothing_factor": 0.1},
        {"teacher": "none", "label_smoothing_factor": 0.1},
        {"history_trace": True},
        {"history_trace": True, "alpha": 0.0},
        {"warm_start_teacher": True, "teacher": "snapshot"},
        {"ema_decay": 0.0, "teacher": "ema"},
        {"history_top_k": 1, "history_max_bytes": 1},
        {"temperature": 0.1},
    ],
)
def test_accepted(tmp_path, fields):
    """The edges of what is allowed."""
    args = config(tmp_path, **fields)
    for name, value in fields.items():
        assert getattr(args, name) == value


def test_values_set_later_are_accepted_too(tmp_path):
    """Hyperparameter search: setattr, then they are read again."""
    args = config(tmp_path)
    for name, value in OTHERS.items():
        setattr(args, name, value)
    assert dataclasses.asdict(MethodArguments.read(args)) == OTHERS


@pytest.mark.parametrize(
    ("teacher", "alpha", "distils"),
    [
        ("auto", 0.8, True),
        ("history", 0.8, True),
        ("snapshot", 0.1, True),
        ("ema", 0.1, True),
        ("none", 0.8, False),
        ("auto", 0.0, False),
    ],
)
def test_whether_past_predictions_can_enter_the_loss(tmp_path, teacher, alpha, distils):
    assert config(tmp_path, teacher=teacher, alpha=alpha).distils is distils
    assert MethodArguments(alpha=alpha, teacher=teacher).distils is distils


@pytest.mark.parametrize("name", ["ece", "eval_nll", "eval_aurc", "token_nll", "eval_valid_ece", "perplexity"])
def test_metrics_that_are_better_when_lower(tmp_path, name):
    assert config(tmp_path, metric_for_best_model=name).greater_is_better is False
    with pytest.raises(
        ValueError, match=f"metric_for_best_model='{name}' is better when lower.*greater_is_better=False"
    ):
        config(tmp_path, metric_for_best_model=name, greater_is_better=True)
    assert config(tmp_path, metric_for_best_model="accuracy").greater_is_better is True


# Schedules


def test_published_ramp():
    """Invariant 3: 0.8 over 300 epochs."""
    ramp = [alpha_at(0.8, "linear", epoch, 300) for epoch in range(300)]
    assert ramp[0] == pytest.approx(0.0026667, abs=5e-8)
    assert ramp[99] == pytest.approx(0.2666667, abs=5e-8)
    assert ramp[299] == 0.8
    assert [alpha_at(0.8, "linear", 1, 3), alpha_at(0.8, "linear", 2, 3)] == pytest.approx([0.8 * 2 / 3, 0.8])


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [
        ("linear", 0.06, 0.3, 0.6),
        ("constant", 0.6, 0.6, 0.6),
        ("cosine", 0.3 * (1 - math.cos(math.pi / 10)), 0.3, 0.6),
    ],
)
def test_schedules_by_epoch(schedule, first, middle, last):
    """First, fifth and last of ten epochs; never falling, the same anywhere inside an epoch."""
    values = [alpha_at(0.6, schedule, epoch, 10, step=3, num_steps=70) for epoch in range(10)]
    assert [values[0], values[4], values[9]] == pytest.approx([first, middle, last], abs=1e-12)
    assert all(0 < a <= b <= 0.6 for a, b in zip(values, values[1:], strict=False))
    assert values == [alpha_at(0.6, schedule, epoch, 10, step=69, num_steps=70) for epoch in range(10)]
    assert schedule == "constant" or values[0] < values[1] < values[9]


def test_schedule_by_step():
    """`linear_step`: the first of 70 steps has 1/70, the last the whole; the epoch does not matter."""
    values = [alpha_at(0.7, "linear_step", step // 7, 10, step, 70) for step in range(70)]
    assert values == pytest.approx([0.01 * (step + 1) for step in range(70)])
    assert values[-1] == 0.7 and values == sorted(set(values))
    assert alpha_at(0.7, "linear_step", 0, 10, 34, 70) == alpha_at(0.7, "linear_step", 9, 10, 34, 70)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine", "linear_step"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_schedules_stay_between_zero_and_alpha(schedule, alpha):
    values = [alpha_at(alpha, schedule, step // 4, 5, step, 20) for step in range(20)]
    assert all(0 <= value <= alpha for value in values) and values[-1] == pytest.approx(alpha)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine", "linear_step"])
def test_a_single_epoch_or_step_has_the_whole_weight(schedule):
    """t = T from the start."""
    assert alpha_at(0.4, schedule, 0, 1, 0, 1) == pytest.approx(0.4)
