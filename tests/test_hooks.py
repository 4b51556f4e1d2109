"""What we take over of the stock Trainer: its hooks, their parameters and the attributes that we set.

A hook that upstream renames, no longer calls or calls with other arguments would fail somewhere else, or nowhere. Each
hook that we override therefore stands in a table here, with the parameters that transformers 5.20 to 5.24 give it.
"""

import ast
import inspect
import textwrap

import pytest
import transformers
from transformers import Seq2SeqTrainer, Trainer, trainer, trainer_seq2seq

from hf_selfkd import SelfKDTrainer, Seq2SeqSelfKDTrainer


# The later ones of the supported versions of transformers have it.
PRIVATE = "private= " if "private" in inspect.signature(Trainer.init_hf_repo).parameters else ""
# The parameters after `self`, in order; `name=` has a default. Hooks that nothing of ours overrides may stand here.
HOOKS = {
    "__init__": "model= args= data_collator= train_dataset= eval_dataset= processing_class= model_init= "
    "compute_loss_func= compute_metrics= callbacks= optimizers= optimizer_cls_and_kwargs= "
    "preprocess_logits_for_metrics=",
    # data
    "_get_collator_with_removed_columns": "data_collator description=",
    "_get_dataloader": "dataset description batch_size sampler_fn= is_training= dataloader_key=",
    "_get_eval_sampler": "eval_dataset",
    "_get_train_sampler": "train_dataset=",
    "_remove_unused_columns": "dataset description=",
    "_set_signature_columns_if_needed": "",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_eval_dataloader": "eval_dataset=",
    "get_test_dataloader": "test_dataset",
    "get_train_dataloader": "",
    # the run and its steps
    "_get_num_items_in_batch": "batch_samples device",
    "_hp_search_setup": "trial",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_inner_training_loop": "batch_size= args= resume_from_checkpoint= trial= ignore_keys_for_eval=",
    "_prepare_for_training": "max_steps train_dataloader resume_from_checkpoint",
    "_prepare_input": "data",
    "_prepare_inputs": "inputs",
    "_wrap_model": "model training= dataloader=",
    "call_model_init": "trial=",
    "compute_loss": "model inputs return_outputs= num_items_in_batch=",
    "create_optimizer": "model=",
    "hyperparameter_search": "hp_space= compute_objective= n_trials= direction= backend= hp_name= **kwargs",
    "log": "logs start_time=",
    "train": "resume_from_checkpoint= trial= ignore_keys_for_eval=",
    "training_step": "model inputs num_items_in_batch=",
    # evaluation
    "_determine_best_metric": "metrics trial",
    "evaluate": "eval_dataset= ignore_keys= metric_key_prefix=",
    "evaluation_loop": "dataloader description prediction_loss_only= ignore_keys= metric_key_prefix=",
    "predict": "test_dataset ignore_keys= metric_key_prefix=",
    "prediction_step": "model inputs prediction_loss_only ignore_keys=",
    # checkpoints and the Hub
    "_finish_current_push": "",
    "_issue_warnings_after_load": "load_result",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model=",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_push_from_checkpoint": "checkpoint_folder",
    "_save": "output_dir= state_dict=",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "create_model_card": "language= license= tags= model_name= finetuned_from= tasks= dataset_tags= dataset= "
    "dataset_args=",
    "init_hf_repo": f"token= {PRIVATE}".strip(),
    "push_to_hub": f"commit_message= blocking= token= revision= {PRIVATE}**kwargs",
    "save_model": "output_dir= _internal_call=",
}
# Where `Seq2SeqTrainer` has other parameters than `Trainer`.
SEQ2SEQ_HOOKS = {
    "__init__": HOOKS["__init__"].replace("optimizer_cls_and_kwargs= ", ""),
    "evaluate": HOOKS["evaluate"] + " **gen_kwargs",
    "predict": HOOKS["predict"] + " **gen_kwargs",
    "prediction_step": HOOKS["prediction_step"] + " **gen_kwargs",
}
# Attributes of the stock Trainer that we set: one that upstream renames would be set for nobody, without a word.
ATTRIBUTES = {
    "_gen_kwargs",
    "_loss_shifts_labels",
    "_signature_columns",
    "_train_batch_size",
    "args",
    "compute_loss_func",
    "compute_metrics",
    "data_collator",
    "eval_dataset",
    "gather_function",
    "label_names",
    "label_smoother",
    "loss_is_scaled_for_ga",
    "lr_scheduler",
    "model",
    "model_accepts_loss_kwargs",
    "model_wrapped",
    "optimizer",
    "preprocess_logits_for_metrics",
    "processing_class",
    "train_dataset",
}
FAMILIES = [(Trainer, SelfKDTrainer), (Seq2SeqTrainer, Seq2SeqSelfKDTrainer)]


def hooks_of(stock):
    return HOOKS | (SEQ2SEQ_HOOKS if issubclass(stock, Seq2SeqTrainer) else {})


def spelled(hook):
    """The parameters of a method after `self`, as in the table."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(
        stars.get(parameter.kind, "") + name + ("" if parameter.default is parameter.empty else "=")
        for name, parameter in list(inspect.signature(hook).parameters.items())[1:]
    )


def overridden(stock, ours):
    """The methods of `stock` that classes of ours, all before it, define anew."""
    own = ours.__mro__[: ours.__mro__.index(stock)]
    names = {name for cls in own for name in vars(cls) if callable(getattr(cls, name))}
    return {name for name in names if getattr(stock, name, None) is not getattr(object, name, None)}


def complaint(stock, name, expected):
    """What differs between a hook and what the table says of it: one sentence, or None."""
    where = f"transformers {transformers.__version__}: {stock.__name__}.{name}"
    if not hasattr(stock, name):
        return f"{where} is gone: find what took its place, or take the hook out of hf_selfkd and of the table."
    found = spelled(getattr(stock, name))
    if found == expected:
        return None
    before, now = expected.split(), found.split()
    gained, lost = [p for p in now if p not in before], [p for p in before if p not in now]
    changes = [f"gained {' '.join(gained)}"] * bool(gained) + [f"lost {' '.join(lost)}"] * bool(lost)
    changes = " and ".join(changes or ["has another order"])
    return f"{where} {changes}: is now ({found}), was ({expected}). Read our override, then change the table."


def self_attributes(source, context=None):
    """The names of `self.name` in a source text, read and written or in one context only."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
    return {
        node.attr
        for node in nodes
        if isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and (context is None or isinstance(node.ctx, context))
    }


def upstream_source():
    return "\n".join(inspect.getsource(module) for module in (trainer, trainer_seq2seq))


@pytest.mark.parametrize("stock, ours", FAMILIES)
def test_every_hook_that_we_override_is_in_the_table(stock, ours):
    unknown = overridden(stock, ours) - hooks_of(stock).keys()
    assert not unknown, f"add to the table what {stock.__name__} gives to {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("stock", [Trainer, Seq2SeqTrainer])
@pytest.mark.parametrize("name", HOOKS)
def test_upstream_gives_a_hook_the_parameters_of_the_table(stock, name):
    problem = complaint(stock, name, hooks_of(stock)[name])
    assert problem is None, problem


@pytest.mark.parametrize("stock, ours", FAMILIES)
def test_our_hooks_take_all_that_upstream_may_pass(stock, ours):
    for name in overridden(stock, ours) & hooks_of(stock).keys():
        signature = inspect.signature(getattr(ours, name))
        names = [part.rstrip("=") for part in hooks_of(stock)[name].split()]
        plain = [part for part in names if not part.startswith("*")]
        some = [part for part in hooks_of(stock)[name].split() if not part.startswith("*") and not part.endswith("=")]
        keywords = {"another": None} if len(plain) < len(names) else {}
        try:
            signature.bind(None, *plain, **keywords)
            signature.bind(None, **dict.fromkeys(plain), **keywords)
            signature.bind(None, *some)
        except TypeError as error:
            pytest.fail(f"{ours.__name__}.{name}{signature} cannot be called as {stock.__name__}.{name}: {error}")


def test_upstream_still_calls_the_private_hooks():
    """A private method that is defined and not called is no hook: our override would be dead."""
    source = upstream_source()
    for stock, ours in FAMILIES:
        private = {name for name in overridden(stock, ours) if name.startswith("_") and not name.startswith("__")}
        uncalled = private - self_attributes(source, ast.Load)
        assert not uncalled, f"transformers {transformers.__version__} does not call {', '.join(sorted(uncalled))}"


def test_attributes_that_we_set_are_those_that_upstream_reads():
    read = self_attributes(upstream_source(), ast.Load)
    gone = ATTRIBUTES - read
    assert not gone, f"transformers {transformers.__version__} does not read {', '.join(sorted(gone))} any more"
    own = {cls for _, ours in FAMILIES for cls in ours.__mro__ if cls.__module__.startswith("hf_selfkd.")}
    written = set()
    for cls in own:
        written |= self_attributes(textwrap.dedent(inspect.getsource(cls)), ast.Store)
        written |= {name for name, value in vars(cls).items() if not (callable(value) or name.startswith("__"))}
    unknown = (written & read) - ATTRIBUTES - HOOKS.keys()
    assert not unknown, f"add the attributes {', '.join(sorted(unknown))} to the table"


# The check itself


class Changed(Trainer):
    """A stock Trainer of a later version."""

    def log(self, logs, start_time, step=None):
        """With a parameter more, and one that lost its default."""

    def _load_from_checkpoint(self, model=None, resume_from_checkpoint=""):
        """In another order."""


@pytest.mark.parametrize(
    "name, parts",
    [
        ("log", ["Changed.log", "gained start_time step=", "lost start_time=", "(logs start_time step=)"]),
        ("compute_loss_of_another_name", ["Changed.compute_loss_of_another_name", "is gone"]),
        ("_load_from_checkpoint", ["gained resume_from_checkpoint=", "lost resume_from_checkpoint"]),
    ],
)
def test_a_change_upstream_is_named(name, parts):
    problem = complaint(Changed, name, HOOKS.get(name, ""))
    assert all(part in problem for part in parts), problem


def test_another_order_is_named():
    assert "another order" in complaint(Trainer, "log", "start_time= logs")


def test_a_new_override_is_found():
    class WithAnotherHook(SelfKDTrainer):
        def floating_point_ops(self, inputs):
            return 0

        def of_our_own(self):
            pass

    found = overridden(Trainer, WithAnotherHook) - overridden(Trainer, SelfKDTrainer)
    assert found == {"floating_point_ops"}
    assert {"__init__", "compute_loss", "log"} <= overridden(Trainer, SelfKDTrainer)
