"""What a user's own subclass may do: losses, steps, batches, logs, whatever works with the stock class."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conformance import Linear, Points, cross_entropy_of, with_each_class
from helpers import collate, make_model, make_samples, same_weights
from transformers import Trainer, TrainerCallback, default_data_collator


pytestmark = pytest.mark.trains


def points(case, folder, **options):
    return case.train(folder, Linear(), Points(), **options)


def texts(case, folder, name="bert", **options):
    return case.train(folder, make_model(name), make_samples(name, 10), data_collator=collate, **options)


# A loss and a step of one's own


@with_each_class("history")
def test_compute_loss_that_calls_super(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                loss = loss + 0.1 * outputs["logits"].square().mean()
                return (loss, outputs) if return_outputs else loss

        return points(case, folder, trainer=Own, eval_dataset=Points(6), eval_strategy="epoch")

    case.check(script, tmp_path)


@pytest.mark.parametrize("name", ["bert", "llama"])
@with_each_class("history")
def test_compute_loss_that_calls_super_without_the_count(case, name, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
                self.logits = outputs.logits.detach()
                return (loss, outputs) if return_outputs else loss

        return texts(case, folder, name, trainer=Own)

    case.check(script, tmp_path)


def without_super(base):
    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            weight = torch.tensor([0.5, 1.0, 2.0])
            loss = F.cross_entropy(outputs["logits"], labels, weight)
            return (loss, outputs) if return_outputs else loss

    return Own


@pytest.mark.parametrize("accumulation", [1, 2])
@with_each_class(("Own.compute_loss", "super().compute_loss", "compute_loss_func"))
def test_compute_loss_that_does_not_call_super(case, accumulation, tmp_path):
    def script(case, folder):
        return points(case, folder, trainer=without_super(case.trainer), gradient_accumulation_steps=accumulation)

    case.check(script, tmp_path)  # with accumulation too: the loss is divided by the steps once


@with_each_class("history")
def test_compute_loss_func(case, tmp_path):
    def script(case, folder):
        return points(case, folder, compute_loss_func=cross_entropy_of, gradient_accumulation_steps=2)

    case.check(script, tmp_path)


@with_each_class("history")
def test_training_step_that_moves_every_value(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def training_step(self, model, inputs, num_items_in_batch=None):
                assert inputs.keys() == {"x", "labels"}
                inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
                return super().training_step(model, inputs, num_items_in_batch)

        return points(case, folder, trainer=Own)

    case.check(script, tmp_path)


@with_each_class("history")
def test_prepare_inputs_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def _prepare_inputs(self, inputs):
                inputs = {name: value.clone() for name, value in super()._prepare_inputs(inputs).items()}
                return inputs | {"x": inputs["x"] * 2}

        return points(case, folder, trainer=Own, eval_dataset=Points(6), eval_strategy="epoch")

    case.check(script, tmp_path)


@with_each_class("history")
def test_log_and_batches_of_ones_own(case, tmp_path):
    def script(case, folder):
        rows = []

        class Own(case.trainer):
            def log(self, logs, *args, **kwargs):
                super().log(logs | {"mine": 1.0}, *args, **kwargs)

            def get_batch_samples(self, *args, **kwargs):
                batches, count = super().get_batch_samples(*args, **kwargs)
                rows.append([(sorted(batch), len(batch["x"])) for batch in batches])
                return batches, count

        trainer = points(case, folder, trainer=Own)
        assert all(entry["mine"] == 1.0 for entry in trainer.state.log_history)
        return trainer, rows

    case.check(script, tmp_path)


@pytest.mark.parametrize("new", [True, False])
@with_each_class("history")
def test_compute_loss_that_takes_something_out_of_the_batch(case, new, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                inputs = dict(inputs) if new else inputs
                weight = inputs.pop("weight").mean()
                loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                return (loss[0] * weight, loss[1]) if return_outputs else loss * weight

        weighted = Points(10, lambda x, y, index: {"x": x, "labels": y, "weight": 0.5 + index / 10})
        options = {"remove_unused_columns": False, "eval_dataset": weighted, "eval_strategy": "epoch"}
        return case.train(folder, Linear(), weighted, trainer=Own, **options)

    case.check(script, tmp_path)


@with_each_class("history")
def test_compute_loss_that_runs_the_model_once_more(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                noisy = inputs | {"x": inputs["x"] + 0.1}
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                again = model(x=noisy["x"])["logits"].log_softmax(-1)
                loss = loss + F.kl_div(
                    again, outputs["logits"].log_softmax(-1), log_target=True, reduction="batchmean"
                )
                return (loss, outputs) if return_outputs else loss

        return points(case, folder, trainer=Own)

    case.check(script, tmp_path)


@with_each_class("plain")
def test_steps_outside_of_a_training(case, tmp_path):
    def script(case, folder):
        trainer = case.make(folder, make_model("plain_bert"), make_samples("bert", 8), data_collator=collate)
        batch = collate([make_samples("bert")[n] for n in range(4)])
        loss = trainer.compute_loss(trainer.model, dict(batch))
        step = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=4)
        parts = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
        gradients = [parameter.grad.tolist() for parameter in trainer.model.parameters()]
        return trainer, (loss.item(), step.item(), gradients, [part.tolist() for part in parts])

    case.check(script, tmp_path)


@with_each_class("history")
def test_saving_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def _save(self, output_dir=None, state_dict=None):
                super()._save(output_dir, state_dict)
                (folder / "saved").write_text(str(output_dir))

            def _save_checkpoint(self, model, trial):
                super()._save_checkpoint(model, trial)
                self.checkpoints = getattr(self, "checkpoints", 0) + 1

        trainer = points(case, folder, trainer=Own, save_strategy="epoch")
        assert (folder / "saved").exists() and trainer.checkpoints == 2
        resumed = points(case, folder, trainer=Own, save_strategy="epoch", resume=3)
        assert same_weights(trainer.model, resumed.model)
        return resumed

    case.check(script, tmp_path)


@with_each_class("history")
def test_callbacks_that_use_the_trainer(case, tmp_path):
    def script(case, folder):
        seen = []

        class Uses(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step != 2:
                    return
                with torch.random.fork_rng():
                    seen.append(self.trainer.predict(Points(6)).predictions.shape)
                    seen.append(sorted(next(iter(self.trainer.get_train_dataloader()))))

        callback = Uses()
        trainer = case.make(folder, Linear(), Points(), callbacks=[callback])
        callback.trainer = trainer
        trainer.train()
        return trainer, seen

    case.check(script, tmp_path)


@with_each_class("history")
def test_positional_arguments(case, tmp_path):
    def script(case, folder):
        metrics = lambda prediction: {"rows": len(prediction.label_ids)}  # noqa: E731
        args = case.arguments(folder, eval_strategy="epoch")
        trainer = case.trainer(
            Linear(), args, default_data_collator, Points(), Points(6), None, None, cross_entropy_of, metrics
        )
        trainer.train()
        return trainer

    case.check(script, tmp_path)


@with_each_class()
def test_signatures(case):
    """Libraries look parameters up by their names before they pass any."""
    for name in ("__init__", "train", "evaluate", "predict", "compute_loss", "training_step", "prediction_step"):
        stock = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert list(inspect.signature(getattr(case.trainer, name)).parameters)[: len(stock)] == stock


@with_each_class("history")
def test_small_services(case, tmp_path):
    def script(case, folder):
        trainer = texts(case, folder)
        loader = trainer.get_train_dataloader()
        trainer.save_state()
        trainer.save_metrics("train", {"train_loss": 1.0})
        trainer.create_model_card(model_name="a model")
        facts = [trainer.num_examples(loader), trainer.get_total_train_batch_size(trainer.args), len(loader)]
        facts += [len(trainer.get_eval_dataloader(make_samples("bert", 9))), trainer.is_in_train]
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert case.name == "stock" or "selfkd_card.json" in names  # what our card is made of
        return trainer, [*facts, sorted(names - {"selfkd_card.json", "selfkd_card"})]

    case.check(script, tmp_path)
