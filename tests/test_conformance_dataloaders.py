"""What a user's own collator, sampler and dataloader may be: whatever the stock class trains on."""

import pickle

import pytest
import torch
from conformance import Linear, Points, classes, columns, stack, with_each_class
from datasets import Dataset as HFDataset
from helpers import MASK, collate, make_model, make_samples, make_trainer
from torch.utils.data import DataLoader
from transformers import default_data_collator


pytestmark = pytest.mark.trains


# Collators


def drops_a_sample(items):
    return default_data_collator(items[:-1])


def drops_a_rare_sample(items):
    rare = Points(24)[1]["x"]  # not one of those that are looked at before training
    return default_data_collator(
        [item for item in items if not torch.equal(torch.as_tensor(item["x"]), torch.as_tensor(rare))]
    )


def two_views(items):
    batch = default_data_collator(items)
    return {"x": torch.cat([batch["x"], batch["x"].flip(-1)]), "labels": batch["labels"].repeat(2)}


def halves(items):
    batch = default_data_collator(items)
    return {"x": batch["x"][::2], "labels": batch["labels"][::2]}


def adds_a_tensor(items):
    return default_data_collator(items) | {"noise": torch.zeros(7)}


class Callable:
    """A collator object that remembers."""

    def __init__(self):
        self.calls = 0

    def __call__(self, items):
        self.calls += 1
        return default_data_collator(items)


class TakesAnything(Linear):
    def forward(self, x, labels=None, **others):
        return super().forward(x, labels)


COLLATORS = {
    "drops_a_sample": ("snapshot", lambda: drops_a_sample),
    "drops_a_rare_sample": ("history", lambda: drops_a_rare_sample),  # which no probe finds
    "two_views": ("snapshot", lambda: two_views),
    "halves": ("snapshot", lambda: halves),
    "adds_a_tensor": ("history", lambda: adds_a_tensor),
    "an_object": ("history", Callable),
}


@pytest.mark.parametrize(("case", "make"), classes(COLLATORS))
def test_collators(case, make, tmp_path):
    def script(case, folder):
        points = Points(24)
        return case.train(folder, TakesAnything(), points, data_collator=make(), eval_dataset=Points(8))

    case.check(script, tmp_path)


@with_each_class("snapshot")
def test_random_masking(case, tmp_path):
    def masking(items):
        batch = collate(items)
        words = batch["input_ids"]
        masked = (torch.rand(words.shape) < 0.4) & (words != 0)
        masked[:, 0] = True
        return batch | {"labels": words.masked_fill(~masked, -100), "input_ids": words.masked_fill(masked, MASK)}

    def script(case, folder):
        return case.train(folder, make_model("bert_mlm"), make_samples("texts", 10), data_collator=masking)

    case.check(script, tmp_path)


@pytest.mark.parametrize("keep", [True, False])
@with_each_class("history")
def test_a_sample_id_column_of_the_users_own(case, keep, tmp_path):
    """The user's collator gets the column, and the model what the collator makes of the column."""
    seen = []

    class Weighs(Linear):
        def forward(self, x, labels=None, sample_id=None):
            seen.extend(sample_id.tolist())
            outputs = super().forward(x + sample_id[:, None] / 100, labels)
            return outputs

    def script(case, folder):
        seen.clear()
        points = Points(10, lambda x, y, index: {"x": x, "labels": y, "sample_id": 1000 - index})
        options = {"remove_unused_columns": not keep, "eval_dataset": points, "eval_strategy": "epoch"}
        trainer = case.train(folder, Weighs(), points, **options)
        return trainer, sorted(set(seen))

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_collator_that_needs_unused_columns(case, tmp_path):
    def collator(items):
        assert all(item["text"] == f"row {item['sample_id']}" for item in items)
        return stack((item["x"], item["y"]) for item in items)

    def script(case, folder):
        rows = columns(Points())
        rows = {"x": rows["x"], "y": rows["labels"], "sample_id": list(range(10))}
        rows["text"] = [f"row {n}" for n in range(10)]
        dataset = HFDataset.from_dict(rows).with_format("torch", columns=["x"], output_all_columns=True)
        return case.train(folder, Linear(), dataset, data_collator=collator, remove_unused_columns=False)

    case.check(script, tmp_path)


# Dataloaders and samplers


@with_each_class("snapshot")
def test_no_dataset_and_a_dataloader_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def get_train_dataloader(self):
                return DataLoader(Points(), batch_size=4, shuffle=True, collate_fn=default_data_collator)

            def get_eval_dataloader(self, eval_dataset=None):
                return DataLoader(Points(6), batch_size=3, collate_fn=default_data_collator)

        trainer = case.train(folder, Linear(), None, trainer=Own)
        trainer.evaluate()
        return trainer

    case.check(script, tmp_path)


@with_each_class("snapshot")
def test_a_dataloader_without_a_dataset(case, tmp_path):
    class Batches:
        """An iterable of batches that is no `DataLoader`."""

        def __iter__(self):
            return iter(DataLoader(Points(), batch_size=5, collate_fn=default_data_collator))

        def __len__(self):
            return 2

    def script(case, folder):
        class Own(case.trainer):
            def get_train_dataloader(self):
                return Batches()

        return case.train(folder, Linear(), Points(), trainer=Own)

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_dataloader_built_upon_that_of_the_class(case, tmp_path):
    def script(case, folder):
        class Own(case.trainer):
            def get_train_dataloader(self):
                self.asked = True
                return super().get_train_dataloader()

        trainer = case.train(folder, Linear(), Points(), trainer=Own)
        assert trainer.asked
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_a_sampler_of_ones_own(case, tmp_path):
    def script(case, folder):
        class Backwards(case.trainer):
            def _get_train_sampler(self, train_dataset=None):
                return list(range(len(self.train_dataset)))[::-1]

        return case.train(folder, Linear(), Points(), trainer=Backwards)

    case.check(script, tmp_path)


@with_each_class("plain")
def test_a_loop_of_ones_own(case, tmp_path):
    """A batch of the training dataloader goes into the model as it is, and holds nothing of ours."""

    def script(case, folder):
        trainer = case.make(folder, Linear(), Points())
        optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
        names, losses = set(), []
        for _ in range(2):
            for batch in trainer.get_train_dataloader():
                names.update(batch)
                loss = trainer.model(**batch)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return trainer, (names, losses)

    case.check(script, tmp_path)


@with_each_class("history")
def test_training_after_a_look_at_the_dataloader(case, tmp_path):
    def script(case, folder):
        trainer = case.make(folder, Linear(), Points())
        assert next(iter(trainer.get_train_dataloader())).keys() == {"x", "labels"}
        trainer.train()
        assert next(iter(trainer.get_train_dataloader())).keys() == {"x", "labels"}
        return trainer

    case.check(script, tmp_path)


OPTIONS = {
    "data_seed": {"data_seed": 7},
    "sequential": {"train_sampling_strategy": "sequential"},
    "drop_last": {"dataloader_drop_last": True},
    "not_pinned": {"dataloader_pin_memory": False},
    "not_split": {"accelerator_config": {"split_batches": True}},
    "seeded_sampler_off": {"accelerator_config": {"use_seedable_sampler": False}},
    "batches_of_one": {"per_device_train_batch_size": 1},
    "batches_larger_than_the_data": {"per_device_train_batch_size": 64},
}


@pytest.mark.parametrize(("case", "options"), classes({name: ("history", value) for name, value in OPTIONS.items()}))
def test_options_of_the_dataloader(case, options, tmp_path):
    case.check(lambda case, folder: case.train(folder, Linear(), Points(), **options), tmp_path)


@with_each_class("history")
def test_workers(case, tmp_path):
    def script(case, folder):
        options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
        trainer = case.train(folder, Linear(), Points(), eval_dataset=Points(6), **options)
        trainer.evaluate()
        return trainer

    case.check(script, tmp_path)


@with_each_class("history")
def test_batch_rebalance(case, tmp_path):
    def script(case, folder):
        options = {"train_sampling_strategy": "batch_rebalance", "data_collator": collate}
        return case.train(folder, make_model("bert"), make_samples("bert", 12), **options)

    case.check(script, tmp_path)


@with_each_class("history")
def test_group_by_length(case, tmp_path):
    """Ours draws another order, which resumes: what both promise is that lengths are grouped, the longest first."""
    lengths, samples = [], [item | {"labels": 0} for item in make_samples("bert", 12)]

    def collator(items):
        lengths.append([len(item["input_ids"]) for item in items])
        return collate(items)

    trainer = case.make(
        tmp_path, make_model("bert"), samples, train_sampling_strategy="group_by_length", data_collator=collator
    )
    del lengths[:]
    trainer.train()
    epochs = [lengths[-6:-3], lengths[-3:]]
    for batches in epochs:
        assert sorted(sum(batches, [])) == sorted(len(item["input_ids"]) for item in samples)
        assert batches[0][0] == max(max(batch) for batch in batches)
    assert trainer.state.global_step == 6


# Worker processes


def test_what_workers_are_sent_has_no_model_in_it(tmp_path):
    """Processes that are spawned are sent the collator, and a model may have hooks that cannot be sent."""
    model = make_model("bert")
    model.register_forward_hook(lambda *args: None)
    trainer = make_trainer(tmp_path, model, make_samples("texts", 8), num_train_epochs=2)
    trainer.train()
    assert len(pickle.dumps(trainer._train_collator)) < 4096
