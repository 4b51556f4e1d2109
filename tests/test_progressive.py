"""Against the methods written down naively: a dense table, or a second model, in a plain PyTorch loop."""

import copy
import math
from itertools import groupby

import datasets
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, Recording, Samples, collate, difference, make_model, make_samples, train

from hf_selfkd import SelfKDDataCollator


pytestmark = pytest.mark.trains


SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
SCHEDULES = {
    "linear": lambda epoch, epochs, step, steps: (epoch + 1) / epochs,
    "constant": lambda epoch, epochs, step, steps: 1.0,
    "cosine": lambda epoch, epochs, step, steps: (1 - math.cos(math.pi * (epoch + 1) / epochs)) / 2,
    "linear_step": lambda epoch, epochs, step, steps: (step + 1) / steps,
}


def soft_loss(logits, soft_targets, temperature, top_k):
    """Cross-entropy `[R]` under past probabilities; with `top_k` all other classes are one bucket."""
    now, soft_targets = F.softmax(logits / temperature, -1), F.softmax(soft_targets.log() / temperature, -1)
    if top_k is not None:
        soft_targets, kept = soft_targets.topk(top_k)
        now = now.gather(-1, kept)
        now, soft_targets = (torch.cat((p, 1 - p.sum(-1, keepdim=True)), dim=-1) for p in (now, soft_targets))
    return -(soft_targets * now.log()).sum(-1) * temperature**2


def loss_sum(logits, labels, soft_targets, alpha, temperature=1.0, top_k=None, hard_loss=None):
    """Sum over the rows with a label of the loss with target `(1 - alpha) * onehot + alpha * past`; NaN is no past."""
    labelled = labels != -100
    logits, labels, soft_targets = logits[labelled], labels[labelled], soft_targets[labelled]
    known = ~soft_targets.isnan().any(dim=-1)
    soft = soft_loss(logits[known], soft_targets[known], temperature, top_k).sum()
    if hard_loss is not None:  # any loss of the batch gives way by the share of rows with a past
        return (1 - alpha * known.float().mean()) * hard_loss(logits, labels) + alpha * soft
    hard = -F.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return hard[~known].sum() + (1 - alpha) * hard[known].sum() + alpha * soft


def naive(
    model,
    samples,
    visits,
    epochs,
    steps_per_epoch,
    teacher="history",
    alpha=0.8,
    schedule="linear",
    warm=False,
    ema_decay=None,
    rows=None,
    **loss_options,
):
    """Train on these visits (`(step, inputs)` as [`Recording`] notes them), as the method is described; SGD."""
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    rows = rows or {n: n for n in range(len(samples))}  # sample id: row of the dataset
    table, fresh = {}, {}  # sample id: probabilities of its labelled rows, of earlier epochs and of this one
    other = copy.deepcopy(model).eval() if warm or teacher == "ema" else None
    steps = visits[-1][0] + 1
    with torch.no_grad():
        for sample_id, row in rows.items() if warm and teacher == "history" else ():
            batch = collate([samples[row]])
            labels = batch.pop("labels").flatten()
            table[sample_id] = F.softmax(other(**batch).logits.flatten(0, -2)[labels != -100], -1)
    for step, group in groupby(visits, key=lambda visit: visit[0]):
        epoch = step // steps_per_epoch
        if step % steps_per_epoch == 0:
            table, fresh = table | fresh, {}
            if teacher == "snapshot" and epoch > 0:
                other = copy.deepcopy(model).eval()
        alpha_t = alpha * SCHEDULES[schedule](epoch, epochs, step, steps)
        batches = [(inputs, collate([samples[rows[n]] for n in inputs["sample_id"].tolist()])) for _, inputs in group]
        count = sum((batch["labels"] != -100).sum() for _, batch in batches)
        model.train()
        for inputs, batch in batches:
            ids, labels = inputs["sample_id"].tolist(), batch.pop("labels")
            per_sample = (labels != -100).view(len(ids), -1).sum(1).tolist()
            labels, partner = labels.flatten(), inputs.get("mix_partner")
            if partner is not None:
                batch = {"pixel_values": inputs["pixel_values"]}
            logits = model(**batch).logits.flatten(0, -2)
            soft_targets = torch.full_like(logits, math.nan)
            if teacher == "history":
                nothing = [torch.full((n, CLASSES), math.nan) for n in per_sample]
                soft_targets[labels != -100] = torch.cat(
                    [table.get(n, none) for n, none in zip(ids, nothing, strict=True)]
                )
            elif other is not None and (teacher == "snapshot" or epoch > 0):
                soft_targets = F.softmax(other(**batch).logits.detach().flatten(0, -2), -1)
            loss = loss_sum(logits, labels, soft_targets, alpha_t, **loss_options)
            if partner is not None:
                share = inputs["mix_lambda"][0]
                theirs = soft_targets[partner] if teacher == "history" else soft_targets
                loss = share * loss + (1 - share) * loss_sum(logits, labels[partner], theirs, alpha_t, **loss_options)
            else:
                probabilities = F.softmax(logits.detach()[labels != -100], -1).split(per_sample)
                fresh |= dict(zip(ids, probabilities, strict=True))
            (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        if teacher == "ema":
            weight = 1 - min(ema_decay, (1 + step) / (10 + step)) if step else 1.0
            for mean, live in zip(other.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(live.data, weight)
            for mean, live in zip(other.buffers(), model.buffers(), strict=True):
                mean.copy_(live)
    return model


def check_against_naive(tmp_path, name, naive_options=None, dataset=None, **options):
    """Train with the trainer and naively; the same comparison must tell that from training without a past."""
    samples = dataset if isinstance(dataset, Samples) else make_samples(name)
    dataset, options = dataset or samples, SGD | options
    trainer = train(tmp_path, name, dataset, trainer=Recording, **options)
    epochs = trainer.state.num_train_epochs
    batches = len(samples) / options.get("per_device_train_batch_size", 4)
    batches = math.floor(batches) if options.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = math.ceil(batches / options.get("gradient_accumulation_steps", 1))
    for teacher_option in ("teacher", "alpha", "ema_decay", "temperature"):
        if teacher_option in options:
            naive_options = {teacher_option: options[teacher_option]} | (naive_options or {})
    reference = naive(make_model(name), samples, trainer.visits, epochs, per_epoch, **(naive_options or {}))
    plain = train(tmp_path, name, dataset, **(options | {"alpha": 0.0, "warm_start_teacher": False}))
    assert difference(reference, trainer) < 1e-6
    assert difference(reference, plain) > 1e-4
    return trainer


def ids_by_epoch(trainer, steps_per_epoch):
    epochs = {}
    for step, inputs in trainer.visits:
        epochs.setdefault(step // steps_per_epoch, []).extend(inputs["sample_id"].tolist())
    return list(epochs.values())


@pytest.mark.parametrize("name", ["plain_vit", "resnet", "plain_bert", "plain_bert_tokens"])
def test_history_equals_naive_loop(tmp_path, name):
    trainer = check_against_naive(tmp_path, name)  # 22 samples: the last batch is half a one
    visited = ids_by_epoch(trainer, 6)
    assert [sorted(ids) for ids in visited] == [list(range(22))] * 3
    assert visited[0] != visited[1]


@pytest.mark.parametrize("name", ["plain_vit", "plain_bert_tokens"])
@pytest.mark.parametrize(
    "options, naive_options",
    [
        ({"gradient_accumulation_steps": 2}, {}),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, {}),
        ({"dataloader_drop_last": True}, {}),
        ({"train_sampling_strategy": "sequential"}, {}),
        ({"temperature": 2.0}, {}),
        ({"alpha": 1.0, "alpha_schedule": "constant"}, {"schedule": "constant"}),
        ({"alpha_schedule": "cosine"}, {"schedule": "cosine"}),
        ({"alpha_schedule": "linear_step"}, {"schedule": "linear_step"}),
        ({"warm_start_teacher": True}, {"warm": True}),
        ({"num_train_epochs": 2.5}, {}),
        ({"max_steps": 16}, {}),
        ({"history_device": "cpu"}, {}),
        ({"history_device": "disk"}, {}),
        ({"history_top_k": CLASSES}, {}),
        ({"history_top_k": 2, "history_tail": "bucket"}, {"top_k": 2}),
        ({"warm_start_teacher": True, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}, {"warm": True}),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) or "same",
)
def test_history_option_equals_naive_loop(tmp_path, name, options, naive_options):
    check_against_naive(tmp_path, name, naive_options, **options)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["plain_bert", "plain_bert_tokens"])
def test_history_with_group_by_length_equals_naive_loop(tmp_path, name, accumulation):
    trainer = check_against_naive(
        tmp_path, name, train_sampling_strategy="group_by_length", gradient_accumulation_steps=accumulation
    )
    visited = ids_by_epoch(trainer, math.ceil(22 / 4 / accumulation))
    assert [sorted(ids) for ids in visited] == [list(range(22))] * 3
    assert visited[0] != visited[1]


def test_history_with_ids_of_an_own_column_equals_naive_loop(tmp_path):
    samples = make_samples("plain_vit")
    ids = [1000 - 7 * n for n in range(len(samples))]
    columns = {"pixel_values": [item["pixel_values"].numpy() for item in samples.items], "key": ids}
    dataset = datasets.Dataset.from_dict(columns | {"labels": [item["labels"] for item in samples.items]})
    trainer = check_against_naive(
        tmp_path,
        "plain_vit",
        {"rows": {n: row for row, n in enumerate(ids)}},
        dataset=dataset.with_format("torch"),
        sample_id_column="key",
    )
    assert trainer.teacher.stored(ids).isfinite().all()
    in_order = train(tmp_path, "plain_vit", samples, **SGD)
    assert difference(trainer, in_order) == 0  # ids are names: they change nothing


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["plain_vit", "resnet", "plain_bert_tokens"])
def test_history_with_samples_without_a_label_equals_naive_loop(tmp_path, name, accumulation):
    samples = make_samples(name)
    for item in samples.items[:6]:
        item["labels"] = [-100] * len(item["labels"]) if isinstance(item["labels"], list) else -100
    trainer = check_against_naive(tmp_path, name, dataset=samples, gradient_accumulation_steps=accumulation)
    assert trainer.teacher.stored(range(6, 22)).isfinite().all()


@pytest.mark.parametrize("name", ["plain_vit", "resnet", "plain_bert_tokens"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_history_stays_near_the_dense_one(tmp_path, name, dtype):
    samples = make_samples(name)
    dense = train(tmp_path, name, samples, **SGD)
    half = train(tmp_path, name, samples, history_dtype=dtype, **SGD)
    plain = train(tmp_path, name, samples, alpha=0.0, **SGD)
    assert 0 < difference(dense, half) < 0.1 * difference(dense, plain)


@pytest.mark.parametrize("name", ["resnet", "plain_bert_tokens"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "options, naive_options",
    [
        ({"teacher": "snapshot"}, {}),
        ({"teacher": "snapshot", "warm_start_teacher": True}, {"warm": True}),
        ({"teacher": "snapshot", "temperature": 2.0, "alpha_schedule": "cosine"}, {"schedule": "cosine"}),
        ({"teacher": "ema", "ema_decay": 0.7}, {}),
        ({"teacher": "ema", "ema_decay": 0.999, "alpha_schedule": "linear_step"}, {"schedule": "linear_step"}),
    ],
    ids=["snapshot", "snapshot-warm", "snapshot-temperature", "ema", "ema-mean"],
)
def test_snapshot_and_ema_equal_naive_two_models(tmp_path, name, accumulation, options, naive_options):
    check_against_naive(tmp_path, name, naive_options, gradient_accumulation_steps=accumulation, **options)


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
@pytest.mark.parametrize("name", ["plain_vit", "resnet"])
@pytest.mark.parametrize("method", ["mixup_alpha", "cutmix_alpha"])
def test_mixed_images_equal_naive_loop(tmp_path, name, teacher, method):
    collator = SelfKDDataCollator(collate, mix_probability=0.5 if teacher == "history" else 1.0, **{method: 1.0})
    options = {"teacher": teacher, "data_collator": collator, "num_train_epochs": 4, "ema_decay": 0.7}
    trainer = check_against_naive(tmp_path, name, **options)
    mixed = ["mix_partner" in inputs for _, inputs in trainer.visits]
    assert any(mixed) and all(mixed) == (teacher != "history")
    for _, inputs in trainer.visits:
        images = collate([make_samples(name)[n] for n in inputs["sample_id"].tolist()])["pixel_values"]
        if "mix_partner" not in inputs:
            assert torch.equal(inputs["pixel_values"], images)
            continue
        share, theirs = inputs["mix_lambda"][0], images[inputs["mix_partner"]]
        if method == "mixup_alpha":
            torch.testing.assert_close(inputs["pixel_values"], share * images + (1 - share) * theirs)
        else:
            own = (inputs["pixel_values"] == images).all(dim=1)
            assert (own | (inputs["pixel_values"] == theirs).all(dim=1)).all()
            moved = [n for n, partner in enumerate(inputs["mix_partner"].tolist()) if n != partner]
            assert all(own[n].float().mean() == share for n in moved)


@pytest.mark.parametrize("name", ["plain_vit", "resnet"])
def test_warm_start_with_mixed_images_equals_naive_loop(tmp_path, name):
    collator = SelfKDDataCollator(collate, mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.7)
    trainer = check_against_naive(tmp_path, name, {"warm": True}, data_collator=collator, warm_start_teacher=True)
    assert trainer.teacher.stored(range(22)).isfinite().all()


def test_mixing_depends_on_seed_and_epoch(tmp_path):
    collator = SelfKDDataCollator(collate, mixup_alpha=1.0)
    options = {"data_collator": collator, "teacher": "snapshot", "train_sampling_strategy": "sequential"}
    shares = []
    for seed in (1, 1, 2):
        trainer = train(tmp_path, "plain_vit", make_samples("plain_vit"), trainer=Recording, seed=seed, **options)
        shares.append([inputs["mix_lambda"][0].item() for _, inputs in trainer.visits])
    assert shares[0] == shares[1]
    assert len(set(shares[0] + shares[2])) == 36


def test_mixing_learns_the_history_from_unmixed_batches_only(tmp_path):
    collator = SelfKDDataCollator(collate, mixup_alpha=1.0, mix_probability=0.5)
    samples = make_samples("plain_vit")
    trainer = train(tmp_path, "plain_vit", samples, trainer=Recording, data_collator=collator, **SGD)
    clean = {n for _, inputs in trainer.visits if "mix_partner" not in inputs for n in inputs["sample_id"].tolist()}
    stored = trainer.teacher.stored(range(22)).isfinite().all(dim=-1)
    assert {n for n in range(22) if stored[n]} == clean
    assert 0 < len(clean) < 22


@pytest.mark.parametrize("options", [{}, {"dataloader_drop_last": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["plain_vit", "plain_bert_tokens"])
def test_custom_loss_gives_way_by_the_share_of_rows_with_a_past(tmp_path, name, options):
    weight = torch.linspace(0.5, 2.0, CLASSES)

    def hard_loss(logits, labels):
        return F.cross_entropy(logits, labels, weight, reduction="sum")

    def compute_loss(outputs, labels, num_items_in_batch):
        return hard_loss(outputs.logits.flatten(0, -2), labels.flatten()) / num_items_in_batch

    trainer = check_against_naive(tmp_path, name, {"hard_loss": hard_loss}, compute_loss_func=compute_loss, **options)
    shares = {entry["rows_with_history"] for entry in trainer.state.log_history if "rows_with_history" in entry}
    assert any(0 < share < 1 for share in shares) == ("dataloader_drop_last" in options)


def test_models_own_loss_gives_way_like_a_custom_one(tmp_path):
    weight = torch.linspace(0.5, 2.0, CLASSES)

    class Weighted(type(make_model("plain_vit"))):
        def forward(self, pixel_values, labels=None):
            outputs = super().forward(pixel_values)
            if labels is not None:
                outputs["loss"] = F.cross_entropy(outputs.logits, labels, weight)
            return outputs

    def mean_times_rows(logits, labels):
        return F.cross_entropy(logits, labels, weight) * len(labels)

    model, samples = make_model("plain_vit"), make_samples("plain_vit")
    model.__class__ = Weighted
    options = SGD | {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, model, samples, trainer=Recording, **options)
    reference = naive(make_model("plain_vit"), samples, trainer.visits, 3, 3, hard_loss=mean_times_rows)
    assert difference(reference, trainer) < 1e-6
    assert difference(reference, train(tmp_path, "plain_vit", samples, **options)) > 1e-4


def test_every_epoch_reads_what_the_one_before_wrote(tmp_path):
    """With a learning rate of 0 the past of a sample is its present prediction, wherever it was shuffled to."""
    samples = make_samples("plain_bert_tokens", size=30)
    options = {"learning_rate": 0.0, "train_sampling_strategy": "group_by_length"}
    trainer = train(tmp_path, "plain_bert_tokens", samples, **options)
    model = trainer.model.eval()
    for n in range(len(samples)):
        batch = collate([samples[n]])
        labels = batch.pop("labels")
        with torch.no_grad():
            now = F.softmax(model(**batch).logits[labels != -100], -1)
        torch.testing.assert_close(trainer.teacher.stored([n]), now)


def test_alpha_of_a_uniform_past_is_label_smoothing(tmp_path):
    """A model that says the same of every class, warm-started: its past is uniform in epoch 1."""

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.zeros(CLASSES, 768))

        def forward(self, pixel_values, labels=None):
            logits = pixel_values.flatten(1) @ self.scale.T
            return (
                {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    samples, options = make_samples("images"), SGD | {"num_train_epochs": 1}
    warm = {"alpha": 0.3, "alpha_schedule": "constant", "warm_start_teacher": True}
    ours = train(tmp_path, Uniform(), samples, **options, **warm)

    def smoothed_loss(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs["logits"], labels, label_smoothing=0.3, reduction="sum") / num_items_in_batch

    smoothed = train(tmp_path, Uniform(), samples, alpha=0.0, compute_loss_func=smoothed_loss, **options)
    assert difference(ours, smoothed) < 1e-6
    assert difference(ours, train(tmp_path, Uniform(), samples, alpha=0.0, **options)) > 1e-3


def test_samples_left_out_of_an_epoch_keep_their_older_past(tmp_path):
    samples = make_samples("plain_vit")
    options = {"dataloader_drop_last": True, "num_train_epochs": 2}
    trainer = train(tmp_path, "plain_vit", samples, trainer=Recording, **options)
    epochs = ids_by_epoch(trainer, 5)
    never = set(range(22)) - set(epochs[0]) - set(epochs[1])
    stored = trainer.teacher.stored(range(22)).isfinite().all(dim=-1)
    assert {n for n in range(22) if not stored[n]} == never
    assert set(epochs[0]) - set(epochs[1])  # some were left out of epoch 2 only and keep epoch 1


def test_past_is_of_the_view_that_was_seen(tmp_path):
    """As published: another random view of the same image, not the image."""

    def view(item):
        return item | {"pixel_values": item["pixel_values"] + torch.randn(())}

    samples = make_samples("plain_vit", transform=view)
    options = {"learning_rate": 0.0, "num_train_epochs": 2, "weight_decay": 0.0}
    trainer = train(tmp_path, "plain_vit", samples, trainer=Recording, **options)
    ids, images = zip(*((i["sample_id"], i["pixel_values"]) for step, i in trainer.visits if step >= 6), strict=True)
    with torch.no_grad():
        seen = F.softmax(trainer.model.eval()(torch.cat(images)).logits, -1)
    torch.testing.assert_close(trainer.teacher.stored(torch.cat(ids)), seen)
