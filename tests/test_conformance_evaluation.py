"""Evaluation and prediction: whatever a user of the stock class asks for, before, during and after training."""

import numpy as np
import pytest
import torch
from conformance import Linear, Points, classes, with_each_class, without_clocks
from helpers import collate, make_model, make_samples, same_weights, with_decoder_inputs
from transformers import EarlyStoppingCallback


def accuracy(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean()), "rows": len(logits)}


def text(case, folder, **options):
    samples = make_samples("bert", 10)
    return case.make(folder, make_model("bert"), samples, data_collator=collate, eval_dataset=samples, **options)


@with_each_class("plain")
def test_evaluate_and_predict_before_training(case, tmp_path):
    def script(case, folder):
        trainer = text(case, folder, compute_metrics=accuracy)
        first, second = trainer.evaluate(), trainer.evaluate(make_samples("bert", 5, seed=1), metric_key_prefix="test")
        output = trainer.predict(make_samples("bert", 7))
        facts = [without_clocks(first), without_clocks(second), without_clocks(output.metrics)]
        return trainer, [*facts, output.predictions.tolist(), output.label_ids.tolist()]

    case.check(script, tmp_path)


@with_each_class("plain")
def test_evaluation_without_a_training_set(case, tmp_path):
    def script(case, folder):
        trainer = case.make(folder, make_model("bert"), None, data_collator=collate)
        return trainer, without_clocks(trainer.evaluate(make_samples("bert", 6)))

    case.check(script, tmp_path)


@with_each_class("history")
def test_evaluation_in_training_and_after(case, tmp_path):
    def script(case, folder):
        options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_delay": 1}
        trainer = text(case, folder, compute_metrics=accuracy, **options)
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_rows"] == 10
        assert metrics["eval_loss"] == pytest.approx(trainer.predict(trainer.eval_dataset).metrics["test_loss"])
        return trainer, sorted(metrics)

    case.check(script, tmp_path)


@with_each_class("history")
def test_dictionaries_of_evaluation_sets(case, tmp_path):
    def script(case, folder):
        sets = {"near": make_samples("bert", 6), "far": make_samples("bert", 3, seed=1)}
        options = {"eval_strategy": "epoch", "metric_for_best_model": "eval_far_loss", "greater_is_better": False}
        trainer = case.train(
            folder, make_model("bert"), make_samples("bert", 10), data_collator=collate, eval_dataset=sets, **options
        )
        names = {name for entry in trainer.state.log_history for name in entry}
        assert {"eval_near_loss", "eval_far_loss"} <= names
        assert trainer.state.best_metric == min(
            entry["eval_far_loss"] for entry in trainer.state.log_history if "eval_far_loss" in entry
        )
        return trainer, sorted(without_clocks(trainer.evaluate()))

    case.check(script, tmp_path)


@with_each_class("plain")
def test_include_for_metrics(case, tmp_path):
    def script(case, folder):
        facts = []

        def metrics(prediction):
            facts.append([np.asarray(part).tolist() for part in (prediction.inputs, prediction.losses)])
            return {}

        trainer = text(case, folder, compute_metrics=metrics, include_for_metrics=["inputs", "loss"])
        trainer.evaluate()
        return trainer, facts

    case.check(script, tmp_path)


@with_each_class("history")
def test_metrics_batch_by_batch(case, tmp_path):
    def script(case, folder):
        right = []

        def metrics(prediction, compute_result):
            right.append((prediction.predictions.argmax(-1) == prediction.label_ids).float().mean().item())
            return {"calls": len(right)} if compute_result else {}

        trainer = text(case, folder, compute_metrics=metrics, batch_eval_metrics=True)
        before = trainer.evaluate()["eval_calls"]
        trainer.train()
        return trainer, (before, trainer.evaluate()["eval_calls"])

    case.check(script, tmp_path)


@with_each_class("history")
def test_preprocess_logits_for_metrics(case, tmp_path):
    def script(case, folder):
        def best(logits, labels):
            assert len(logits) == len(labels)
            return logits.argmax(-1)

        def metrics(prediction):
            assert prediction.predictions.ndim == 1
            return {"classes": len(set(prediction.predictions.tolist()))}

        trainer = text(
            case, folder, compute_metrics=metrics, preprocess_logits_for_metrics=best, eval_strategy="epoch"
        )
        trainer.train()
        return trainer, trainer.predict(trainer.eval_dataset).predictions.shape

    case.check(script, tmp_path)


@pytest.mark.parametrize("name", ["bert_tokens", "plain_gpt2", "bert"])
@with_each_class("plain")
def test_labels_that_are_all_ignored(case, name, tmp_path):
    def script(case, folder):
        def ignored(items):
            batch = collate(items)
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

        rows = lambda prediction: {"rows": int((prediction.label_ids != -100).sum())}  # noqa: E731
        trainer = case.make(
            folder, make_model(name), make_samples(name, 6), data_collator=ignored, compute_metrics=rows
        )
        metrics = trainer.evaluate(make_samples(name, 6))
        facts = (metrics["eval_rows"], str(metrics["eval_loss"]))
        return trainer, facts

    case.check(script, tmp_path)


OPTIONS = {
    "accumulated": {"eval_accumulation_steps": 1},
    "loss_only": {"prediction_loss_only": True},
    "objects": {"eval_use_gather_object": True},
    "do_concat_batches": {"eval_do_concat_batches": False},
    "drop_last": {"dataloader_drop_last": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "no_labels": {"label_names": []},
}
REFUSED = {"label_smoothing": ("label_smoothing_factor=0.1", "alpha=0.8")}


@pytest.mark.parametrize(
    ("case", "options"), classes({name: (REFUSED.get(name, "plain"), options) for name, options in OPTIONS.items()})
)
def test_options_of_evaluation(case, options, tmp_path):
    def script(case, folder):
        trainer = text(
            case, folder, compute_metrics=lambda prediction: {"batches": len(prediction.predictions)}, **options
        )
        return trainer, without_clocks(trainer.evaluate())

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_prediction_step_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Doubles(case.trainer):
            def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
                assert inputs.keys() == {"x", "labels"}
                inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
                loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
                return loss * 2, logits, labels

        trainer = case.train(folder, Linear(), Points(), trainer=Doubles, eval_dataset=Points(), eval_strategy="epoch")
        plain = case.make(folder, trainer.model, Points()).evaluate(Points())["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == pytest.approx(2 * plain)
        return trainer

    case.check(script, tmp_path)


@with_each_class("plain")
def test_a_prediction_step_that_asks_nobody(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
                with torch.no_grad():
                    outputs = model(**self._prepare_inputs(inputs))
                return outputs["loss"], outputs["logits"], inputs["labels"]

        trainer = case.make(folder, Linear(), Points(), trainer=Own, compute_metrics=accuracy)
        return trainer, without_clocks(trainer.evaluate(Points(7)))

    case.check(script, tmp_path)


@with_each_class("history")
def test_an_evaluation_loop_and_evaluate_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix) | {"eval_mine": 1.0}

            def evaluation_loop(
                self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
            ):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
                output.metrics[f"{metric_key_prefix}_batches"] = len(dataloader)
                return output

        trainer = case.train(folder, Linear(), Points(), trainer=Own, eval_dataset=Points(6), eval_strategy="epoch")
        metrics = trainer.evaluate()
        return trainer, (metrics["eval_mine"], metrics["eval_batches"])

    case.check(script, tmp_path)


@with_each_class("history")
def test_early_stopping(case, tmp_path):
    def script(case, folder):
        scores = iter([0.5, 0.7, 0.6, 0.6, 0.9, 0.9])
        options = {"num_train_epochs": 6, "eval_strategy": "epoch", "save_strategy": "epoch"}
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_total_limit": 1}
        trainer = text(
            case,
            folder,
            compute_metrics=lambda _: {"score": next(scores)},
            callbacks=[EarlyStoppingCallback(2)],
            **options,
        )
        trainer.train()
        assert trainer.state.epoch == 4 and trainer.state.best_metric == 0.7
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6"]
        return trainer

    case.check(script, tmp_path)


@with_each_class("plain")
def test_generation(case, tmp_path):
    def script(case, folder):
        samples = make_samples("plain_marian", 8)
        options = {"config": case.seq2seq_config, "predict_with_generate": True, "generation_num_beams": 2}
        trainer = case.make(
            folder,
            make_model("plain_marian"),
            samples,
            trainer=case.seq2seq,
            data_collator=with_decoder_inputs(),
            **options,
        )
        output = trainer.predict(samples, max_length=9, num_beams=1)
        metrics = trainer.evaluate(samples, max_new_tokens=4)
        return trainer, (output.predictions.tolist(), output.label_ids.tolist(), metrics["eval_loss"])

    case.check(script, tmp_path)


@with_each_class("history")
def test_training_does_not_depend_on_evaluation(case, tmp_path):
    """Evaluation changes neither the model nor what is known of the samples."""

    def script(case, folder, **options):
        options |= {"train_sampling_strategy": "sequential", "data_collator": collate}
        samples = make_samples("bert", 10)
        return case.train(folder, make_model("plain_bert"), samples, eval_dataset=samples, **options)

    case.check(script, tmp_path)
    evaluated = script(case, tmp_path / "with", eval_strategy="steps", eval_steps=1)
    assert same_weights(evaluated.model, script(case, tmp_path / "without").model)
