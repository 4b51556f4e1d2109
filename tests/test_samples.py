"""Ids, seeded transforms, the collator and mixed images."""

import copy
import math
import pickle
import random
from collections import namedtuple
from itertools import permutations, product

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers import BatchFeature, default_data_collator

from hf_selfkd import SelfKDDataCollator, with_sample_ids
from hf_selfkd.batch import peek_record, pop_record
from hf_selfkd.collator import TrainingCollator
from hf_selfkd.samples import (
    SAMPLE_ID,
    BatchIdDataset,
    IdentifiedItems,
    SampleIdDataset,
    checked_ids,
    is_hf_dataset,
    sample_index,
    seeded,
)


def table(rows=6):
    """Row i has the text ti, the label i % 3 and the id 10 * i + 5."""
    return datasets.Dataset.from_dict(
        {
            "text": [f"t{i}" for i in range(rows)],
            "label": [i % 3 for i in range(rows)],
            "uid": [10 * i + 5 for i in range(rows)],
        }
    )


class Plain(Dataset):
    """A torch dataset; counts what is asked of it."""

    def __init__(self, rows=6, **extra):
        self.items, self.asked = [{"x": i, "labels": i % 3, "uid": 10 * i + 5} | extra for i in range(rows)], []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.items[index]


class Batched(Plain):
    """The same with the batch path of torch."""

    def __getitems__(self, indices):
        self.asked.append(tuple(indices))
        return [self.items[i] for i in indices]


class Noisy(Dataset):
    """Items drawn from all three generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"x": torch.tensor([index, *noise], dtype=torch.float64), "labels": index % 3}


def first(batch):
    return batch


def ids_of(dataset, indices):
    one_by_one = [dataset[i][SAMPLE_ID] for i in indices]
    assert [item[SAMPLE_ID] for item in dataset.__getitems__(list(indices))] == one_by_one
    return one_by_one


# Ids


def test_row_numbers_of_a_table():
    """The items are those of the dataset, with the id beside them; the table itself is not rewritten."""
    plain = table()
    wrapped = with_sample_ids(plain)
    assert len(wrapped) == 6 and ids_of(wrapped, range(6)) == list(range(6))
    assert wrapped[4] == {"text": "t4", "label": 1, "uid": 45, SAMPLE_ID: 4}
    assert wrapped.dataset is plain and SAMPLE_ID not in plain.column_names and SAMPLE_ID not in plain[0]


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda d: d.shuffle(seed=1), None),
        (lambda d: d.select([4, 0, 2]), ["t4", "t0", "t2"]),
        (lambda d: d.filter(lambda row: row["label"] == 1), ["t1", "t4"]),
        (lambda d: d.with_transform(lambda batch: {"text": [t + "!" for t in batch["text"]]}), None),
        (lambda d: d.select(range(5, -1, -1)), ["t5", "t4", "t3", "t2", "t1", "t0"]),
    ],
)
def test_changed_tables_keep_working(change, texts):
    """Ids are the row numbers of the dataset given; items and batches agree with it."""
    changed = change(table())
    wrapped = with_sample_ids(changed)
    assert ids_of(wrapped, range(len(changed))) == list(range(len(changed)))
    items = wrapped.__getitems__(list(range(len(changed))))
    assert [item["text"] for item in items] == [changed[i]["text"] for i in range(len(changed))]
    assert texts is None or [item["text"] for item in items] == texts
    assert type(items[0][SAMPLE_ID]) is int


@pytest.mark.parametrize(
    "change",
    [lambda d: d, lambda d: d.shuffle(seed=1), lambda d: d.select([4, 0, 2]), lambda d: d.select(range(5, -1, -1))],
)
def test_an_id_column_of_a_table_follows_the_rows(change):
    """Whatever was done to the dataset before."""
    changed = change(table())
    wrapped = with_sample_ids(changed, "uid")
    assert ids_of(wrapped, range(len(changed))) == [changed[i]["uid"] for i in range(len(changed))]
    assert all(item["text"] == f"t{(item[SAMPLE_ID] - 5) // 10}" for item in wrapped)
    assert wrapped.ids.dtype == np.int64


def test_an_id_column_behind_a_transform_or_a_format():
    """The column is read from the table, though the items may lack it."""
    hidden = table().with_transform(lambda batch: {"text": batch["text"]})
    assert ids_of(with_sample_ids(hidden, "uid"), range(6)) == [5, 15, 25, 35, 45, 55]
    item = with_sample_ids(table().with_format("torch", columns=["label"]), "uid")[3]
    assert (
        item[SAMPLE_ID] == 35 and torch.equal(item["label"], torch.tensor(0)) and item.keys() == {"label", SAMPLE_ID}
    )


def test_torch_format():
    wrapped = with_sample_ids(table().with_format("torch"))
    assert ids_of(wrapped, [3, 1]) == [3, 1]
    batch = next(iter(DataLoader(wrapped, batch_size=4)))
    assert batch[SAMPLE_ID].tolist() == [0, 1, 2, 3] and batch["label"].tolist() == [0, 1, 2, 0]


def test_torch_dataset():
    plain = Plain()
    wrapped = with_sample_ids(plain)
    assert wrapped[2] == {"x": 2, "labels": 2, "uid": 25, SAMPLE_ID: 2} and SAMPLE_ID not in plain.items[2]
    assert ids_of(wrapped, [5, 0]) == [5, 0]
    assert ids_of(with_sample_ids(plain, "uid"), [5, 0]) == [55, 5]
    assert ids_of(with_sample_ids(Subset(plain, [4, 2])), [0, 1]) == [0, 1]
    assert with_sample_ids(wrapped) is wrapped
    assert ids_of(Subset(wrapped, [4, 2]), [0, 1]) == [4, 2]  # fixed before wrapping further


@pytest.mark.parametrize("value", [7, np.int32(7), torch.tensor(7), np.uint8(7)])
def test_integer_ids_of_any_type(value):
    item = with_sample_ids(Plain(own=value), "own")[0]
    assert item[SAMPLE_ID] == 7 and type(item[SAMPLE_ID]) is int


def test_the_batch_path_is_used_where_there_is_one():
    """`__getitems__` of the dataset is called once for the batch."""
    plain = Batched()
    assert [item[SAMPLE_ID] for item in with_sample_ids(plain).__getitems__([3, 1])] == [3, 1]
    assert plain.asked == [(3, 1)]
    slow = Plain()
    assert [item["x"] for item in with_sample_ids(slow).__getitems__([3, 1])] == [3, 1] and slow.asked == [3, 1]
    batch = next(iter(DataLoader(with_sample_ids(plain), batch_size=2, sampler=[5, 0, 1])))
    assert batch[SAMPLE_ID].tolist() == [5, 0] and plain.asked[1] == (5, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_that_travel_beside_the_items(workers):
    """The user's collator gets the items of the dataset themselves, and they are not changed."""
    plain, own = Plain(), []

    def inner(items):
        own.append(all(item is plain.items[item["x"]] and SAMPLE_ID not in item for item in items))
        return {"own": all(own)} | default_data_collator(items)

    for dataset, ids in ((BatchIdDataset(plain), [3, 1, 4]), (BatchIdDataset(plain, np.arange(6) + 7), [10, 8, 11])):
        collator = TrainingCollator(inner, index=sample_index)
        loader = DataLoader(dataset, batch_size=3, sampler=[3, 1, 4], collate_fn=collator, num_workers=workers)
        (batch,) = loader
        record = pop_record(batch)
        assert batch["own"] and record.ids.tolist() == record.samples.ids.tolist() == ids
        assert batch["x"].tolist() == [3, 1, 4] and batch.keys() == {"own", "x", "labels", "uid"}
    assert BatchIdDataset(plain)[5][SAMPLE_ID] == 5  # one by one, the items carry their ids


def test_a_sample_id_of_the_users_own():
    """It stays in the items, and the user's collator makes of it what it likes; ids travel beside."""
    plain, seen = Plain(own=4), []
    for item in plain.items:
        item[SAMPLE_ID] = item["x"] + 20
    collator = TrainingCollator(lambda items: seen.extend(items) or default_data_collator(items))
    for column, ids in ((None, [2, 5]), (SAMPLE_ID, [22, 25])):
        batch = collator(BatchIdDataset(plain, id_column=column).__getitems__([2, 5]))
        assert pop_record(batch).ids.tolist() == ids and batch[SAMPLE_ID].tolist() == [22, 25]
    assert all(item is plain.items[item["x"]] for item in seen) and plain.items[2][SAMPLE_ID] == 22


class Fields:
    """An item that is no dictionary, and holds an id."""

    def __init__(self, x):
        self.x, self.uid = x, 10 * x + 5


@pytest.mark.parametrize("make", [lambda i: (i, i % 3), lambda i: f"text {i}", lambda i: [i], Fields, lambda i: None])
def test_items_of_any_kind(make):
    """Row numbers are their ids, and the collator gets them as they are."""
    plain = Plain()
    plain.items = [make(i) for i in range(6)]
    items = BatchIdDataset(plain).__getitems__([3, 1])
    assert isinstance(items, IdentifiedItems) and items.ids.tolist() == [3, 1]
    assert items[0] is plain.items[3] and items[1] is plain.items[1]
    batch = TrainingCollator(lambda found: {"same": [a is b for a, b in zip(found, items, strict=True)]})(items)
    assert pop_record(batch).ids.tolist() == [3, 1] and batch == {"same": [True, True]}


def test_an_id_column_of_items_that_are_no_dictionaries():
    """A field of an object is one; a tuple has none, and the message says which item."""
    plain = Plain()
    plain.items = [Fields(i) for i in range(6)]
    assert BatchIdDataset(plain, id_column="uid").__getitems__([3, 1]).ids.tolist() == [35, 15]
    plain.items[4] = (1, 2)
    message = r"sample_id_column='uid' is not among the keys of train_dataset\[4\]: a tuple"
    with pytest.raises(ValueError, match=message):
        BatchIdDataset(plain, id_column="uid").__getitems__([3, 4])


def test_a_dataset_that_gives_too_few_items():
    plain = Batched()
    plain.__class__ = type("Short", (Batched,), {"__getitems__": lambda self, indices: self.items[:1]})
    with pytest.raises(ValueError, match="gave 1 items for 2 indices"):
        BatchIdDataset(plain).__getitems__([3, 4])


def test_indices_of_other_integer_types():
    """Samplers may hand out tensors or NumPy integers."""
    wrapped = with_sample_ids(Plain())
    assert wrapped[torch.tensor(3)][SAMPLE_ID] == 3 and wrapped[np.int64(2)]["x"] == 2


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        ("none", ValueError, "sample_id_column='none' is not a column of the dataset: choose among text, label, uid"),
        ("text", ValueError, "sample_id_column='text' holds"),
    ],
)
def test_bad_columns_of_a_table(column, error, message):
    with pytest.raises(error, match=message):
        with_sample_ids(table(), column)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, -1, 2], "sample_id_column='uid' holds -1: ids must not be negative"),
        ([3, 4, 3], "sample_id_column='uid' holds 3 2 times: ids must be unique"),
        ([0.0, 1.0, 2.0], "sample_id_column='uid' holds float64: ids must be integers"),
        ([0, None, 2], "sample_id_column='uid' holds .*: ids must be integers"),
        ([True, False, True], "sample_id_column='uid' holds bool: ids must be integers"),
        (["0", "1", "2"], "sample_id_column='uid' holds .*: ids must be integers"),
    ],
)
def test_bad_ids_of_a_table(values, message):
    """Through the dataset and by themselves."""
    with pytest.raises(ValueError, match=message):
        with_sample_ids(datasets.Dataset.from_dict({"uid": values}), "uid")
    with pytest.raises(ValueError, match=message):
        checked_ids(values, "uid")


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_good_ids(dtype):
    ids = checked_ids(np.array([9, 0, 4], dtype=dtype), "uid")
    assert ids.dtype == np.int64 and ids.tolist() == [9, 0, 4]


@pytest.mark.parametrize("batched", [False, True])
def test_bad_ids_of_a_torch_dataset(batched):
    """Shown by the first item that has them."""
    cls = Batched if batched else Plain
    with pytest.raises(
        ValueError, match="sample_id_column='none' is not among the keys of train_dataset.3.: x, labels"
    ):
        with_sample_ids(cls(), "none").__getitems__([3])
    for value in (3.7, 3.0, "3", torch.tensor(3.0), None):
        with pytest.raises(ValueError, match="sample_id_column='own' holds .*: ids must be integers"):
            with_sample_ids(cls(own=value), "own").__getitems__([3])


@pytest.mark.parametrize("item", [(1, 2), [1, 2], torch.zeros(2), "text", None])
def test_items_that_are_not_dictionaries(item):
    """The message names the item and its type."""
    plain = Plain()
    plain.items[2] = item
    with pytest.raises(TypeError, match=rf"dataset\[2\] is a {type(item).__name__}: .*dictionaries"):
        with_sample_ids(plain)[2]
    with pytest.raises(TypeError, match=rf"dataset\[2\] is a {type(item).__name__}: .*dictionaries"):
        with_sample_ids(plain).__getitems__([1, 2])
    assert with_sample_ids(plain)[1][SAMPLE_ID] == 1


def test_items_that_are_mappings():
    """BatchFeature is one."""
    plain = Plain()
    plain.items[2] = BatchFeature({"x": 2})
    assert with_sample_ids(plain)[2] == {"x": 2, SAMPLE_ID: 2}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("dataset", [Stream(), iter([{}]), table().to_iterable_dataset()])
def test_iterable_datasets(dataset):
    with pytest.raises(TypeError, match="needs a map-style dataset, not .*sample_id_column"):
        with_sample_ids(dataset)


def test_is_hf_dataset():
    assert is_hf_dataset(table()) and not is_hf_dataset(Plain()) and not is_hf_dataset(with_sample_ids(table()))
    assert not is_hf_dataset(table().to_iterable_dataset())


def test_wrapped_datasets_can_be_pickled():
    """For workers that are spawned."""
    wrapped = pickle.loads(pickle.dumps(with_sample_ids(Plain(), "uid")))
    assert ids_of(wrapped, [1]) == [15]


# Seeded transforms


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seeded_is_reproducible_and_restores_the_generators():
    """Also after an error; the words of the seed all count."""

    def draw(*entropy):
        with seeded(*entropy):
            return random.random(), np.random.rand(), torch.rand(()).item()

    before = states()
    assert draw(1, 2, 3) == draw(1, 2, 3)
    drawn = [
        draw(1, 2, 3),
        draw(1, 2, 4),
        draw(1, 3, 3),
        draw(2, 2, 3),
        draw(3, 2, 1),
        draw(0, 0, 0),
        draw(0, 2**40, 1),
    ]
    for generator in zip(*drawn, strict=True):
        assert len(set(generator)) == len(drawn)
    with pytest.raises(KeyError), seeded(1):
        torch.rand(3)
        raise KeyError
    assert states() == before
    torch.rand(())
    assert states() != before


def noisy(seed=7, epoch=0, **arguments):
    dataset = with_sample_ids(Noisy(), **arguments)
    dataset.transform_seed = seed
    dataset.set_epoch(epoch)
    return dataset


def collect(dataset, order, **loader):
    """Item by id, as loaded in this order."""
    loaded = DataLoader(dataset, sampler=order, collate_fn=first, **loader)
    return {item[SAMPLE_ID]: item["x"].tolist() for batch in loaded for item in batch}


def test_transforms_depend_on_seed_epoch_and_id_only():
    """Not on the order, the batch size, the number of workers or what was drawn before."""
    expected = collect(noisy(), range(12), batch_size=1)
    torch.rand(5), random.random()
    assert collect(noisy(), range(11, -1, -1), batch_size=5) == expected
    assert collect(noisy(), [3, 3, 7], batch_size=2) == {i: expected[i] for i in (3, 7)}
    for other in (noisy(seed=8), noisy(epoch=1), noisy(epoch=-1)):
        changed = collect(other, range(12), batch_size=4)
        assert all(a != b for i in range(12) for a, b in zip(changed[i][1:], expected[i][1:], strict=True))
    assert len({tuple(values[1:]) for values in expected.values()}) == 12
    unseeded = noisy(seed=None)
    assert collect(unseeded, range(12), batch_size=4) != collect(unseeded, range(12), batch_size=4)


def test_loading_an_item_leaves_the_generators_alone():
    dataset, before = noisy(), states()
    dataset[3]
    dataset.__getitems__([1, 2])
    assert states() == before
    noisy(seed=None)[3]
    assert states() != before


def test_an_id_column_seeds_the_transforms():
    """A shuffled dataset gives each sample the same draws."""

    def draws(rows):
        drawn = rows.with_transform(lambda batch: {"x": [torch.rand(()).item() for _ in batch["uid"]], **batch})
        dataset = with_sample_ids(drawn, "uid")
        dataset.transform_seed = 1
        return {item["uid"]: item["x"] for item in dataset.__getitems__(list(range(6)))}

    assert draws(table()) == draws(table().shuffle(seed=3)) and len(set(draws(table()).values())) == 6


def test_workers_give_the_same_items_over_epochs():
    """Two workers that outlive the epochs see each new epoch."""
    expected = {}
    for epoch in (0, 1):
        expected[epoch] = collect(noisy(epoch=epoch), range(12), batch_size=3)
    assert expected[0] != expected[1]
    dataset = noisy()
    loader = DataLoader(
        dataset,
        batch_size=2,
        sampler=[5, 1, 7, 0, 11, 3],
        collate_fn=first,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        loaded = {item[SAMPLE_ID]: item["x"].tolist() for batch in loader for item in batch}
        assert loaded == {i: expected[epoch][i] for i in (5, 1, 7, 0, 11, 3)}


def test_the_epoch_survives_a_copy_in_another_process():
    """It is in shared memory."""
    dataset = noisy()
    assert dataset.epoch.is_shared()
    dataset.set_epoch(5)
    assert int(dataset.epoch) == 5


# Keys


def padded(sequences, target, width):
    rows = [s + [-100] * (width - len(s)) if target == "right" else [-100] * (width - len(s)) + s for s in sequences]
    return torch.tensor(rows)


def hashes(labels):
    return sample_index(torch.arange(len(labels)), labels).label_hash.tolist()


def test_keys_of_samples():
    """One label each: the hash is the label, row b is sample b."""
    samples = sample_index(torch.tensor([7, 3, 9]), torch.tensor([2, -100, 0]))
    assert samples.ids.tolist() == [7, 3, 9] and samples.ids.dtype == np.int64
    assert (
        samples.label_hash.tolist() == [2, -100, 0] and samples.total == 2 and samples.counts is samples.rows is None
    )


@pytest.mark.parametrize("shape", [(3, 1), (1, 1)])
def test_keys_of_sequences_of_one_token(shape):
    """A length of 1 does not make a sequence a sample."""
    samples = sample_index(torch.arange(shape[0]), torch.ones(shape, dtype=torch.int64))
    assert samples.rows.tolist() == list(range(shape[0])) and samples.counts.tolist() == [1] * shape[0]


def test_keys_of_tokens():
    """Where the labelled positions stand among the flattened rows."""
    labels = torch.tensor([[-100, 4, -100, 2], [-100, -100, -100, -100], [1, 1, 0, -100]])
    samples = sample_index(torch.tensor([5, 6, 7]), labels)
    assert samples.counts.tolist() == [2, 0, 3] and samples.rows.tolist() == [1, 3, 8, 9, 10]


SEQUENCES = [[1, 2, 3], [4], [], [0, 0], [3, 2, 1, 0]]


def test_hash_does_not_depend_on_padding():
    """Either side, any width, gaps between the labels (word pieces)."""
    expected = hashes(padded(SEQUENCES, "right", 4))
    assert expected == hashes(padded(SEQUENCES, "left", 4)) == hashes(padded(SEQUENCES, "left", 9))
    assert hashes(torch.tensor([[1, -100, 2, -100, -100, 3]])) == expected[:1]
    assert hashes(torch.tensor([[4]])) == expected[1:2]


def test_hash_tells_labels_apart():
    """Every permutation, every length of the same label, every change of one label."""
    assert len(set(hashes(torch.tensor(list(permutations(range(6))))))) == 720
    assert len(set(hashes(padded([[0] * n for n in range(20)], "right", 20)))) == 20
    assert len(set(hashes(torch.tensor(list(product(range(4), repeat=5)))))) == 4**5
    rng = np.random.default_rng(0)
    assert len(set(hashes(torch.from_numpy(rng.integers(0, 50_000, (5000, 30)))))) == 5000


def test_hash_is_the_same_for_other_integer_types():
    labels = padded(SEQUENCES, "right", 4)
    assert hashes(labels) == hashes(labels.to(torch.int32))


# The collator


def features(count=4, images=False, **extra):
    """Items as the dataset of a training gives them in a batch."""
    pixels = [{"pixel_values": torch.full((3, 6, 8), float(i))} for i in range(count)]
    items = [{"x": i, "labels": i % 3} | (pixels[i] if images else {}) | extra for i in range(count)]
    return IdentifiedItems(items, np.arange(10, 10 + count))


def test_the_inner_collator_does_not_see_the_ids():
    """It gets the items as they are; they are not changed."""
    seen = []

    def inner(items):
        seen.append(items)
        return default_data_collator(items)

    given = features()
    before = copy.deepcopy(list(given))
    batch = TrainingCollator(inner, index=sample_index)(given)
    assert list(seen[0]) == before == list(given) and all(a is b for a, b in zip(seen[0], given, strict=True))
    record = pop_record(batch)
    assert record.ids.tolist() == [10, 11, 12, 13] and record.ids.dtype == np.int64
    assert record.samples.ids.tolist() == [10, 11, 12, 13] and record.samples.label_hash.tolist() == [0, 1, 2, 0]
    assert batch["x"].tolist() == [0, 1, 2, 3] and record.partner is record.weight is None


def test_collators_that_drop_columns():
    """Ids survive; so they do a collator that returns a BatchFeature."""
    for kind in (dict, BatchFeature):
        batch = TrainingCollator(
            lambda items, kind=kind: kind({"x": torch.tensor([i["x"] for i in items])}), index=sample_index
        )(features())
        record = pop_record(batch)
        assert record.ids.tolist() == [10, 11, 12, 13] and record.samples is None and type(batch) is kind
        assert batch.keys() == {"x"}


def test_default_collator():
    """Given to nobody, it is that of transformers; in a training, its batch is the same beside the record."""
    expected = default_data_collator(list(features()))
    given = SelfKDDataCollator()(list(features()))
    trained = TrainingCollator(SelfKDDataCollator().collator, index=sample_index)(features())
    assert pop_record(trained).samples is not None
    for batch in (given, trained):
        assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in expected)


def test_features_without_ids():
    """Evaluation: nothing is added; an id here and there is a fault of the data."""
    plain = [{"x": 1, "labels": 0}, {"x": 2, "labels": 1}]
    for collator in (SelfKDDataCollator(), TrainingCollator(default_data_collator, index=sample_index)):
        assert collator(plain).keys() == {"x", "labels"}
    with pytest.raises(ValueError, match="sample_id_column='uid' holds None: ids must be integers"):
        TrainingCollator(default_data_collator, id_column="uid")([{"x": 1, "uid": 4}, {"x": 2}])
    for collator in (SelfKDDataCollator, TrainingCollator):
        assert collator(lambda items: {"n": len(items)})([(1, 2), (3, 4)]) == {"n": 2}


@pytest.mark.parametrize("batch", [(1, 2), "text", None, torch.zeros(2)])
def test_batches_of_another_make(batch):
    """They are passed on as they are."""
    assert TrainingCollator(lambda items: batch)(features()) is batch


def test_an_id_column_of_a_stream():
    """Taken from the features, as integers; the items, which may be the dataset's own, are not changed."""
    collator, items = TrainingCollator(default_data_collator, id_column="uid"), [{"x": 1, "uid": 7, "labels": 0}]
    items.append({"x": 2, "uid": np.int32(3), "labels": 1})
    batch = collator(items)
    assert pop_record(batch).ids.tolist() == [7, 3] and "uid" not in batch
    assert items[0] == {"x": 1, "uid": 7, "labels": 0} and items[1]["uid"] == 3
    with pytest.raises(ValueError, match="sample_id_column='uid' holds 2.5: ids must be integers"):
        collator([{"x": 1, "uid": 2.5, "labels": 0}])


def test_an_id_column_of_a_stream_of_objects():
    item = namedtuple("Item", "x uid")
    collator = TrainingCollator(lambda items: {"labels": torch.tensor([i.x for i in items])}, id_column="uid")
    assert pop_record(collator([item(1, 7), item(2, 3)])).ids.tolist() == [7, 3]
    assert pop_record(TrainingCollator(collator.collator, id_column="other")([item(1, 7)])) is None


def test_tensors_only():
    """Where batches travel between processes: ids as a tensor, and no address."""
    batch = TrainingCollator(default_data_collator, index=sample_index, as_tensors=True)(features())
    assert all(isinstance(value, torch.Tensor) and len(value) == 4 for value in batch.values())
    assert len(batch) == 3 and peek_record(batch) is None
    record = pop_record(batch)
    assert record.ids.tolist() == [10, 11, 12, 13] and record.samples is None and batch.keys() == {"x", "labels"}


@pytest.mark.parametrize(
    ("labels", "ids", "addressed"),
    [
        (torch.tensor([0, 1, 2, 0]), True, True),
        (torch.tensor([[0, 1], [2, 0], [1, -100], [1, 1]]), True, True),
        (torch.tensor([0, 1, 2, 0], dtype=torch.int32), True, True),
        (torch.rand(4), True, False),  # the task refuses them, with a message of its own
        (torch.ones(4, dtype=torch.bool), True, False),
        (torch.zeros(4, 2, 2, dtype=torch.int64), True, False),
        (np.zeros(4, dtype=np.int64), True, False),
        (torch.tensor([0, 1]), False, False),  # packed or dropped
        (torch.tensor(0), False, False),
    ],
)
def test_labels_that_can_be_addressed(labels, ids, addressed):
    """One row of integers for each sample; samples that were packed have no ids, so that the step can say so."""
    batch = TrainingCollator(lambda items: {"x": torch.zeros(4), "labels": labels}, index=sample_index)(features())
    record = pop_record(batch)
    assert (record is not None and record.ids is not None) is ids and batch.keys() == {"x", "labels"}
    assert (record is not None and record.samples is not None) is addressed


def test_labels_under_another_name():
    batch = TrainingCollator(
        lambda items: {"target": torch.tensor([2, 1, 0, 2])},
        index=sample_index,
        labels_of=lambda batch: batch["target"],
    )(features())
    assert pop_record(batch).samples.label_hash.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixup_alpha": -1}, "mixup_alpha=-1 must not be negative"),
        ({"cutmix_alpha": -0.5}, "cutmix_alpha=-0.5 must not be negative"),
        ({"mix_probability": 1.5}, "mix_probability=1.5 is outside"),
        ({"mix_probability": -0.1}, "mix_probability=-0.1 is outside"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfKDDataCollator(**arguments)


def test_what_mixes():
    assert not SelfKDDataCollator().mixes
    assert not SelfKDDataCollator(mixup_alpha=0.2, mix_probability=0.0).mixes
    assert SelfKDDataCollator(mixup_alpha=0.2).mixes and SelfKDDataCollator(cutmix_alpha=1.0).mixes


def test_mixing_needs_images():
    collator = TrainingCollator(default_data_collator, SelfKDDataCollator(mixup_alpha=0.2))
    with pytest.raises(ValueError, match="mixup_alpha=0.2, cutmix_alpha=0.0: the batch has no pixel_values .*x"):
        collator(features())


def test_a_mixing_collator_outside_of_a_training():
    """The labels would be those of the own images alone: it refuses, and one that does not mix works anywhere."""
    for collator in (SelfKDDataCollator(mixup_alpha=0.2), SelfKDDataCollator(cutmix_alpha=1.0)):
        with pytest.raises(ValueError, match="mixes images in the training of SelfKDTrainer only.*data_collator"):
            collator(list(features(images=True)))
    batch = SelfKDDataCollator(mixup_alpha=0.2, mix_probability=0.0)(list(features(images=True)))
    assert batch.keys() == {"x", "labels", "pixel_values"}


# Mixed images


def images(count, seed=0, height=6, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator)


def mixed(collator, pixels, base=0, **training):
    """A batch of a training, and how its images were mixed."""
    items = [{"pixel_values": p, "labels": i % 3} for i, p in enumerate(pixels)]
    made = TrainingCollator(collator.collator, collator, index=sample_index, **training)
    batch = made(IdentifiedItems(items, np.arange(base, base + len(items))))
    return batch, pop_record(batch)


def box_of(batch, pixels):
    """The pasted box, found by looking: rows and columns where some image has its partner's pixels."""
    moved = (batch["pixel_values"] != pixels).any(1).any(0)
    rows, columns = moved.any(1).nonzero().flatten().tolist(), moved.any(0).nonzero().flatten().tolist()
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if rows else (0, 0, 0, 0)


@pytest.mark.parametrize("trial", range(5))
def test_mixup(trial):
    """Every pixel is lambda * own + (1 - lambda) * partner's, with one lambda for the batch."""
    pixels = images(8, trial)
    batch, record = mixed(SelfKDDataCollator(mixup_alpha=1.0), pixels, base=100 * trial)
    partner, lam = record.partner, record.weight
    assert sorted(partner.tolist()) == list(range(8)) and type(lam) is float and 0 <= lam <= 1
    expected = lam * pixels.double() + (1 - lam) * pixels[partner].double()
    torch.testing.assert_close(batch["pixel_values"].double(), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(batch["pixel_values"], pixels, atol=1e-3)
    assert batch["labels"].tolist() == [i % 3 for i in range(8)]  # the partner's are found through the partner


def test_cutmix():
    """The partner's pixels in one box, the own elsewhere; lambda is the share of the own."""
    seen = set()
    for trial in range(60):
        pixels = images(8, trial)
        kept = pixels.clone()
        batch, record = mixed(SelfKDDataCollator(cutmix_alpha=1.0), pixels, base=100 * trial)
        assert torch.equal(pixels, kept)
        top, bottom, left, right = box_of(batch, pixels)
        expected = pixels.clone()
        expected[..., top:bottom, left:right] = pixels[record.partner][..., top:bottom, left:right]
        assert torch.equal(batch["pixel_values"], expected)
        assert record.weight == pytest.approx(1 - (bottom - top) * (right - left) / 48, abs=1e-6)
        seen.add((top, bottom, left, right))
    assert len(seen) > 30 and any(top > 0 and bottom < 6 for top, bottom, _, _ in seen)


@pytest.mark.parametrize("arguments", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_mixing_does_not_change_the_tensors_of_the_collator(arguments):
    """They may be views of a dataset in memory."""
    pixels = images(6)
    kept = pixels.clone()
    collator = TrainingCollator(
        lambda items: {"pixel_values": pixels, "labels": torch.zeros(6).long()}, SelfKDDataCollator(**arguments)
    )
    batch = collator(IdentifiedItems([{}] * 6, np.arange(20, 26)))
    assert torch.equal(pixels, kept) and not torch.equal(batch["pixel_values"], pixels)


def test_mixup_lambda_is_beta_distributed():
    """Kolmogorov-Smirnov distance to Beta(a, a); to another a it is large."""
    from scipy.stats import beta, kstest

    pixels = images(2, height=1, width=1)
    drawn = [mixed(SelfKDDataCollator(mixup_alpha=0.4), pixels, base=2 * i)[1].weight for i in range(1500)]
    assert kstest(drawn, beta(0.4, 0.4).cdf).statistic < 0.04
    assert kstest(drawn, beta(1.0, 1.0).cdf).statistic > 0.1


def test_cutmix_boxes_have_the_drawn_area_and_land_everywhere():
    """Mean share of the box for uniform lambda, centres uniform, borders cut: against a simulation of the paper."""
    rng = np.random.default_rng(1)
    size, areas = 16, []
    for _ in range(4000):
        lam, y, x = rng.random(), rng.integers(size), rng.integers(size)
        half = int(size * math.sqrt(1 - lam)) // 2
        spans = [min(c + half, size) - max(c - half, 0) for c in (y, x)]
        areas.append(spans[0] * spans[1] / size**2)
    pixels = images(2, height=size, width=size)[:, :1]
    shares = [1 - mixed(SelfKDDataCollator(cutmix_alpha=1.0), pixels, 2 * i)[1].weight for i in range(1500)]
    assert np.mean(shares) == pytest.approx(np.mean(areas), abs=0.02)
    assert np.std(shares) == pytest.approx(np.std(areas), abs=0.02)


def test_both_methods_share_the_batches():
    """Each mixed batch draws one of the two."""
    collator, cut = SelfKDDataCollator(mixup_alpha=1.0, cutmix_alpha=1.0), 0
    for trial in range(200):
        pixels = images(4, trial)
        batch, record = mixed(collator, pixels, base=10 * trial)
        own, partner = pixels, pixels[record.partner]
        cut += bool(((batch["pixel_values"] == own) | (batch["pixel_values"] == partner)).all())
    assert 70 < cut < 130


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.0, 0, 0), (0.5, 160, 240), (0.1, 20, 65), (1.0, 400, 400)]
)
def test_share_of_mixed_batches(probability, low, high):
    """Batches that are not mixed are untouched and carry no partner."""
    collator, count, pixels = SelfKDDataCollator(mixup_alpha=1.0, mix_probability=probability), 0, images(3)
    for trial in range(400):
        batch, record = mixed(collator, pixels, base=10 * trial)
        count += record.partner is not None
        if record.partner is None:
            assert torch.equal(batch["pixel_values"], pixels) and record.weight is None
    assert low <= count <= high


@pytest.mark.parametrize("arguments", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_mixing_is_reproducible_by_seed_epoch_and_ids(arguments):
    """Whatever else was drawn; and leaves the global generators alone."""

    def mix(seed=3, epoch=0, base=0):
        pixels = images(6, height=32, width=32)
        batch, record = mixed(SelfKDDataCollator(**arguments), pixels, base, seed=seed, epoch=torch.tensor(epoch))
        return batch["pixel_values"], record.partner.tolist(), record.weight

    pixels, partner, lam = mix()
    torch.rand(3), np.random.rand()
    before = states()
    again = mix()
    assert states() == before
    assert torch.equal(again[0], pixels) and again[1:] == (partner, lam)
    for other in (mix(seed=4), mix(epoch=1), mix(base=1), mix(epoch=-1)):
        assert other[2] != lam and not torch.equal(other[0], pixels)


def test_mixing_without_ids_follows_the_global_generator():
    """There is nothing else that tells two batches apart."""
    collator, pixels = TrainingCollator(default_data_collator, SelfKDDataCollator(mixup_alpha=1.0)), images(6)

    def mix(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return pop_record(collator([{"pixel_values": p, "labels": 0} for p in pixels])).weight

    assert mix(1) == mix(1) != mix(2)
    assert mix() != mix()


def test_mixing_other_shapes():
    """One image alone is its own partner; videos have a dimension more; half precision stays."""
    alone, _ = mixed(SelfKDDataCollator(mixup_alpha=1.0), images(1))
    torch.testing.assert_close(alone["pixel_values"], images(1))
    video = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch, record = mixed(SelfKDDataCollator(cutmix_alpha=1.0), video, base=1)
    moved = batch["pixel_values"] != video
    assert moved.any() and batch["pixel_values"].shape == video.shape
    share = moved.any(2).any(1).any(0).float().mean().item()
    assert record.weight == pytest.approx(1 - share, abs=1e-6)
    half, _ = mixed(SelfKDDataCollator(mixup_alpha=1.0), images(2).half())
    assert half["pixel_values"].dtype == torch.float16


def test_collators_can_be_copied_and_pickled():
    """For workers."""
    collator = SelfKDDataCollator(mixup_alpha=0.5, mix_probability=0.3)
    for other in (copy.deepcopy(collator), pickle.loads(pickle.dumps(collator))):
        assert (other.mixup_alpha, other.mix_probability) == (0.5, 0.3) and other.mixes
    training = TrainingCollator(default_data_collator, collator, index=sample_index, seed=3, epoch=torch.tensor(2))
    other, items = pickle.loads(pickle.dumps(training)), features(images=True)
    (one, two) = (made(items)["pixel_values"] for made in (training, other))
    assert torch.equal(one, two) and pop_record(other(items)).ids.tolist() == [10, 11, 12, 13]


def test_direct_construction_with_ids():
    """As the trainer does."""
    wrapped = SampleIdDataset(Plain(3), np.array([9, 4, 6]))
    assert ids_of(wrapped, [2, 0, 1]) == [6, 9, 4]
