"""What a user's own dataset and its items may be: whatever the stock class trains on."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conformance import Linear, Points, classes, columns, stack
from datasets import Dataset as HFDataset
from datasets import IterableDataset as HFIterableDataset
from helpers import SizedStream, Stream
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split
from transformers import BatchEncoding, default_data_collator


pytestmark = pytest.mark.trains


# Datasets


def subset():
    return Subset(Points(20), [1, 3, 4, 7, 8, 9, 11, 12, 15, 19])


def subset_of_a_subset():
    return Subset(Subset(Points(20), range(2, 18)), range(0, 16, 2))


def concatenated():
    return ConcatDataset([Points(6), Subset(Points(9, seed=1), range(4)), Points(3, seed=2)])


def randomly_split():
    return random_split(Points(14), [10, 4], torch.Generator().manual_seed(1))[0]


def a_list():
    return [Points()[n] for n in range(10)]


def numpy_items():
    return Points(10, lambda x, y, index: {"x": x.numpy(), "labels": np.int64(y)})


def batch_encodings():
    return Points(10, lambda x, y, index: BatchEncoding({"x": x, "labels": y}))


def named_label():
    return Points(10, lambda x, y, index: {"x": x, "label": y})


def label_ids():
    return Points(10, lambda x, y, index: {"x": x, "label_ids": torch.tensor(y)})


def unused_columns():
    return Points(10, lambda x, y, index: {"x": x, "labels": y, "text": f"number {index}", "note": None})


def sample_ids_of_ones_own():
    return Points(10, lambda x, y, index: {"x": x, "labels": y, "sample_id": f"row-{index}"})


def ignored_labels():
    return Points(10, lambda x, y, index: {"x": x, "labels": -100 if index in (2, 7) else y})


def hf_dataset():
    return HFDataset.from_dict(columns(Points()))


def hf_dataset_with_format():
    return hf_dataset().with_format("torch")


def hf_dataset_shuffled_and_selected():
    return HFDataset.from_dict(columns(Points(20))).shuffle(seed=1).select(range(10))


def hf_dataset_with_transform():
    def double(rows):
        return {"x": [torch.tensor(x) * 2 for x in rows["x"]], "labels": rows["labels"]}

    return hf_dataset().with_transform(double)


def hf_dataset_with_other_columns():
    rows = columns(Points())
    return HFDataset.from_dict(rows | {"sample_id": [f"row-{n}" for n in range(10)], "text": ["-"] * 10})


class Batched(Points):
    """A dataset that fetches whole batches itself."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Sequence:
    """A dataset that is no `torch.utils.data.Dataset`."""

    def __init__(self):
        self.points = Points()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index]


class Aware(Points):
    """A dataset that is told the epoch."""

    def set_epoch(self, epoch):
        self.epoch = epoch


MAP_STYLE = (subset, subset_of_a_subset, concatenated, randomly_split, a_list, numpy_items, batch_encodings)
MAP_STYLE += (
    named_label,
    label_ids,
    ignored_labels,
    unused_columns,
    sample_ids_of_ones_own,
    hf_dataset,
    hf_dataset_with_format,
)
MAP_STYLE += (hf_dataset_shuffled_and_selected, hf_dataset_with_transform, hf_dataset_with_other_columns)
MAP_STYLE += (Batched, Sequence, Aware)


@pytest.mark.parametrize(("case", "make"), classes({make.__name__: ("history", make) for make in MAP_STYLE}))
def test_datasets(case, make, tmp_path):
    def script(case, folder):
        trainer = case.train(folder, Linear(), make(), eval_dataset=make(), eval_strategy="epoch")
        return trainer, trainer.predict(make()).label_ids.tolist()

    case.check(script, tmp_path)


def stream():
    return Stream(Points())


def sized_stream():
    return SizedStream(Points())


def hf_stream():
    rows = [{"x": item["x"].tolist(), "labels": item["labels"]} for item in map(Points().__getitem__, range(10))]
    return HFIterableDataset.from_generator(lambda: iter(rows))


STREAMS = (stream, sized_stream, hf_stream)


@pytest.mark.parametrize(
    ("case", "make", "accumulation"),
    classes({f"{make.__name__}-{n}": ("snapshot", make, n) for make in STREAMS for n in (1, 2)}),
)
def test_iterable_datasets(case, make, accumulation, tmp_path):
    def script(case, folder):
        # 3 batches a pass: the data end, and begin again, within the steps
        options = {"max_steps": 7, "gradient_accumulation_steps": accumulation, "alpha_schedule": "constant"}
        if case.name != "alpha_0":
            del options["alpha_schedule"]
        return case.train(folder, Linear(), make(), eval_dataset=make(), eval_strategy="epoch", **options)

    case.check(script, tmp_path)


# Items that are no dictionaries, with a collator of one's own


@dataclass
class Item:
    x: torch.Tensor
    y: int


@dataclass
class Frozen:
    __slots__ = ("x", "y")
    x: torch.Tensor
    y: int


def of_objects(items):
    return stack((item.x, item.y) for item in items)


def as_encoding(items):
    return BatchEncoding(stack(items))


def of_the_first_two(items):
    return stack((item[0], int(item[1])) for item in items)


def looked_up(numbers):
    points = Points()
    return default_data_collator([points[number] for number in numbers])


def of_lines(lines):
    rows = [[float(part) for part in line.split()] for line in lines]
    return {"x": torch.tensor(rows)[:, :4], "labels": torch.tensor(rows)[:, 4].long()}


def tensors():
    points = Points()
    return TensorDataset(points.x, points.y)


ITEMS = {
    "tuples": ("history", lambda: Points(10, lambda x, y, index: (x, y)), stack),
    "lists": ("history", lambda: Points(10, lambda x, y, index: [x, y, index]), of_the_first_two),
    "dataclasses": ("history", lambda: Points(10, lambda x, y, index: Item(x, y)), of_objects),
    "slots": ("history", lambda: Points(10, lambda x, y, index: Frozen(x, y)), of_objects),
    "tensor_dataset": ("history", tensors, of_the_first_two),
    "subset_of_tuples": ("history", lambda: Subset(Points(20, lambda x, y, index: (x, y)), range(3, 13)), stack),
    "numbers": ("history", lambda: list(range(10)), looked_up),
    "lines": ("history", lambda: Points(10, lambda x, y, index: " ".join(map(str, [*x.tolist(), y]))), of_lines),
    "collated_to_encodings": ("history", lambda: Points(10, lambda x, y, index: (x, y)), as_encoding),
}


@pytest.mark.parametrize(("case", "make", "collator"), classes(ITEMS))
def test_items_with_a_collator(case, make, collator, tmp_path):
    def script(case, folder):
        return case.train(folder, Linear(), make(), data_collator=collator, eval_dataset=make(), eval_strategy="epoch")

    case.check(script, tmp_path)
