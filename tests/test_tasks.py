"""Tasks: that of real (tiny) models, what is refused, and where every row comes from."""

import numpy as np
import pytest
import torch
import transformers as tf
from detectors import DETECTORS
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_selfkd.batch import BatchRecord
from hf_selfkd.models import base_model, logits_of
from hf_selfkd.samples import sample_index
from hf_selfkd.tasks import SUPPORTED, TASKS, Task, task_for
from hf_selfkd.tasks.by_shape import ByShape
from hf_selfkd.tasks.causal_lm import CausalLM
from hf_selfkd.tasks.ctc import CTC
from hf_selfkd.tasks.masked_lm import MaskedLM
from hf_selfkd.tasks.sample_classification import SampleClassification
from hf_selfkd.tasks.segmentation import SemanticSegmentation
from hf_selfkd.tasks.seq2seq_lm import Seq2SeqLM
from hf_selfkd.tasks.token_classification import TokenClassification


TEXT = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
IMAGE = {"image_size": 8, "patch_size": 4} | {k: v for k, v in TEXT.items() if k != "vocab_size"}
LABELS = {"num_labels": 3, "pad_token_id": 0}
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks


def bert(**extra):
    return tf.BertConfig(**TEXT, max_position_embeddings=16, **LABELS, **extra)


def distilbert(**extra):
    return tf.DistilBertConfig(vocab_size=30, dim=8, n_layers=1, n_heads=2, hidden_dim=8, **LABELS, **extra)


def gpt2(**extra):
    return tf.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=16, **LABELS, **extra)


def llama():
    return tf.LlamaConfig(**TEXT, **LABELS)


def wav2vec2(**extra):
    return tf.Wav2Vec2Config(
        **TEXT,
        conv_dim=(4,),
        conv_kernel=(4,),
        conv_stride=(2,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        classifier_proj_size=4,
        mask_time_prob=0.0,
        **LABELS,
        **extra,
    )


def resnet(**extra):
    return tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", **LABELS, **extra)


def timm():
    pytest.importorskip("timm")
    return tf.TimmWrapperConfig.from_dict({"architecture": "test_resnet", "num_classes": 3})


def t5():
    return tf.T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, num_labels=3)


IDS = {
    "input_ids": torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1] * 4]),
}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)}
SOUND = {"input_values": torch.linspace(-1, 1, 2 * 64).reshape(2, 64)}

SAMPLE_MODELS = {
    "bert": (tf.BertForSequenceClassification, bert, IDS),
    "distilbert": (tf.DistilBertForSequenceClassification, distilbert, IDS),
    "gpt2": (tf.GPT2ForSequenceClassification, gpt2, IDS),
    "llama": (tf.LlamaForSequenceClassification, llama, IDS),
    "vit": (tf.ViTForImageClassification, lambda: tf.ViTConfig(**IMAGE, num_labels=3), PIXELS),
    "deit with teacher": (
        tf.DeiTForImageClassificationWithTeacher,
        lambda: tf.DeiTConfig(**IMAGE, num_labels=3),
        PIXELS,
    ),
    "resnet": (tf.ResNetForImageClassification, resnet, PIXELS),
    "timm": (tf.TimmWrapperForImageClassification, timm, {"pixel_values": PIXELS["pixel_values"].repeat(1, 1, 4, 4)}),
    "wav2vec2": (tf.Wav2Vec2ForSequenceClassification, wav2vec2, SOUND),
    "ast": (
        tf.ASTForAudioClassification,
        lambda: tf.ASTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            patch_size=4,
            max_length=16,
            num_mel_bins=8,
            frequency_stride=4,
            time_stride=4,
            num_labels=3,
        ),
        {"input_values": torch.linspace(-1, 1, 2 * 16 * 8).reshape(2, 16, 8)},
    ),
    "videomae": (
        tf.VideoMAEForVideoClassification,
        lambda: tf.VideoMAEConfig(**IMAGE, num_frames=2, tubelet_size=1, num_labels=3),
        {"pixel_values": torch.linspace(-1, 1, 2 * 2 * 3 * 64).reshape(2, 2, 3, 8, 8)},
    ),
}
TOKEN_MODELS = {
    "bert": (tf.BertForTokenClassification, bert),
    "distilbert": (tf.DistilBertForTokenClassification, distilbert),
    "gpt2": (tf.GPT2ForTokenClassification, gpt2),
}


def build(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, where every input gives the same logits
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# Which task


@pytest.mark.parametrize("name", SAMPLE_MODELS)
def test_sample_models(name):
    """One row per sample, in the order of the batch."""
    cls, config, inputs = SAMPLE_MODELS[name]
    model = build(cls, config())
    task = task_for(model)
    assert type(task) is SampleClassification and task.num_classes == 3 and not task.per_token
    labels = torch.tensor([2, 0])
    with torch.no_grad():
        rows = task.rows(task.logits(model(**inputs), has_loss=False), labels)
        second = model(**{key: value[1:] for key, value in inputs.items()}).logits
    assert rows.logits.shape == (2, 3) and rows.labels.tolist() == [2, 0]
    torch.testing.assert_close(rows.logits[1:], second, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(rows.logits[:1], second, atol=1e-4)


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_token_models(name):
    """Row b * L + l is position l of sample b."""
    cls, config = TOKEN_MODELS[name]
    model = build(cls, config())
    task = task_for(model)
    assert type(task) is TokenClassification and task.num_classes == 3 and task.per_token
    labels = torch.tensor([[0, 1, 2, -100], [2, -100, 1, 0]])
    with torch.no_grad():
        outputs = model(**IDS, labels=labels)
    rows = task.rows(task.logits(outputs, has_loss=True), labels)
    assert rows.logits.shape == (8, 3) and rows.labels.tolist() == [0, 1, 2, -100, 2, -100, 1, 0]
    for sample in range(2):
        for position in range(4):
            assert torch.equal(rows.logits[sample * 4 + position], outputs.logits[sample, position])
    loss = nn.functional.cross_entropy(rows.logits, rows.labels)
    torch.testing.assert_close(loss, outputs.loss)


@PEFT
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_peft_models(task):
    """The task is that of the model inside."""
    peft = pytest.importorskip("peft")
    cls, expected = {
        "SEQ_CLS": (tf.BertForSequenceClassification, SampleClassification),
        "TOKEN_CLS": (tf.BertForTokenClassification, TokenClassification),
    }[task]
    inner = build(cls, bert())
    wrapped = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["query"], task_type=task))
    assert type(task_for(wrapped)) is expected and task_for(wrapped).num_classes == 3
    assert task_for(wrapped).wrapped is wrapped and task_for(wrapped).model is inner
    assert type(base_model(wrapped)) is cls and base_model(inner) is inner


@PEFT
def test_peft_of_an_unsupported_task():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="BertForPreTraining is of a task that is not supported yet"):
        task_for(peft.get_peft_model(build(tf.BertForPreTraining, bert()), config))


class Mine(tf.BertForSequenceClassification):
    """A user's subclass of a model that transformers knows."""


class Classifier(tf.BertPreTrainedModel):
    """A user's own head on a transformers backbone."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = tf.BertModel(config), nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.head(self.bert(input_ids, attention_mask).pooler_output)}


def test_models_of_the_user():
    """A subclass is known by its base; an unknown class decides by its shapes, and tells no classes before it runs."""
    assert type(task_for(build(Mine, bert()))) is SampleClassification
    for model in (build(Classifier, bert()), nn.Linear(2, 3)):
        task = task_for(model)
        assert type(task) is ByShape and task.num_classes is None
        assert task.rows(torch.zeros(2, 3), torch.tensor([0, 1])).logits.shape == (2, 3)
        assert task.rows(torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)).logits.shape == (8, 3)
        with pytest.raises(ValueError, match="needs"):
            task.rows(torch.zeros(3), torch.tensor([0, 1, 2]))


TASK = {task: task(nn.Linear(2, 3)) for task in (*TASKS, ByShape) if not task.per_object}
OF_LABELS = [task for task in TASK.values() if "labels" in task.label_names and not task.bernoulli]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("BertForMaskedLM", bert, MaskedLM),
        ("T5ForConditionalGeneration", t5, Seq2SeqLM),
        ("GPT2LMHeadModel", gpt2, CausalLM),
    ],
)
def test_language_models(name, config, expected):
    """Masked and encoder-decoder models have a row where its label is, causal ones where the label before it is."""
    task = task_for(build(getattr(tf, name), config()))
    assert type(task) is expected and task.language_model and task.per_token and task.num_classes >= 30
    assert task.shifts_labels is (expected is CausalLM)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[5, 6, -100, 1], [2, 3, 4, -100]])
    rows = task.rows(logits, labels)
    assert torch.equal(rows.logits.view(2, 4, 7), logits)
    in_place = [5, 6, -100, 1, 2, 3, 4, -100]
    assert rows.labels.tolist() == ([6, -100, 1, -100, 3, 4, -100, -100] if expected is CausalLM else in_place)


@pytest.mark.parametrize("config", [gpt2, llama])
def test_the_loss_of_causal_rows_is_that_of_the_model(config):
    """The mean over the positions that predict a word."""
    model = build(tf.LlamaForCausalLM if config is llama else tf.GPT2LMHeadModel, config())
    labels = torch.tensor([[5, 6, -100, 1], [2, 3, 4, -100]])
    with torch.no_grad():
        outputs = model(**IDS, labels=labels)
    task = task_for(model)
    rows = task.rows(task.logits(outputs, has_loss=True), labels)
    torch.testing.assert_close(nn.functional.cross_entropy(rows.logits, rows.labels), outputs.loss)


def test_causal_rows_predict_the_next_token():
    """The last position of a sample predicts nothing, nor does one whose next label is -100."""
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[5, 6, -100, 1], [2, 3, 4, -100]])
    rows = TASK[CausalLM].rows(logits, labels)
    assert rows.labels.tolist() == [6, -100, 1, -100, 3, 4, -100, -100]
    assert torch.equal(rows.logits.view(2, 4, 7), logits)


# What is refused


def segmenter():
    config = DETECTORS["detr"][1]()
    config.encoder_attention_heads = config.decoder_attention_heads = 8
    config.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return config


UNSUPPORTED = {
    "GPT2DoubleHeadsModel": gpt2,
    "BertForPreTraining": bert,
    "BertModel": bert,
    "ViTForMaskedImageModeling": lambda: tf.ViTConfig(**IMAGE, encoder_stride=4),
    "DetrForSegmentation": segmenter,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_tasks_that_are_not_supported(name):
    """One error before any batch, which lists what is."""
    model = build(getattr(tf, name), UNSUPPORTED[name]())
    with pytest.raises(ValueError, match=f"{name} is of a task that is not supported yet") as error:
        task_for(model)
    assert SUPPORTED in str(error.value)


class MyLanguageModel(tf.GPT2DoubleHeadsModel):
    """A user's subclass of a model whose rows would be misread."""


class MyDetector(tf.DetrForSegmentation):
    """The same for masks."""


@pytest.mark.parametrize("cls", [MyLanguageModel, MyDetector])
def test_subclasses_of_unsupported_models(cls):
    """A class of one's own does not make the task a supported one."""
    with pytest.raises(ValueError, match=f"{cls.__name__} is of a task that is not supported yet"):
        task_for(build(cls, UNSUPPORTED[cls.__mro__[1].__name__]()))


@pytest.mark.parametrize(
    ("problem", "cls"),
    [
        ("regression", tf.BertForSequenceClassification),
        ("regression", tf.BertForTokenClassification),
        ("multi_label_classification", tf.BertForTokenClassification),
    ],
)
def test_problem_types_that_are_not_supported(problem, cls):
    with pytest.raises(ValueError, match=f"problem_type='{problem}' is not supported.*single_label_classification"):
        task_for(build(cls, bert(problem_type=problem)))
    single = build(cls, bert(problem_type="single_label_classification"))
    assert type(task_for(single)) in (SampleClassification, TokenClassification)


def test_one_label_is_regression():
    config = bert()
    config.num_labels = 1
    with pytest.raises(ValueError, match="num_labels=1 is regression"):
        task_for(build(tf.BertForSequenceClassification, config))


# Shapes


def test_sample_rows_take_labels_with_a_trailing_dimension():
    task = TASK[SampleClassification]
    assert task.rows(torch.zeros(2, 3), torch.tensor([[1], [2]])).labels.tolist() == [1, 2]
    samples = task.sample_index(np.array([7, 8]), torch.tensor([[1], [2]]))
    assert samples.label_hash.tolist() == [1, 2] and samples.rows is None
    assert TASK[TokenClassification].sample_index(np.array([7, 8]), torch.tensor([[1], [2]])).rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        (SampleClassification, (2, 4, 3), (2,)),
        (SampleClassification, (2, 3), (3,)),
        (SampleClassification, (2, 3), (2, 3)),
        (TokenClassification, (2, 3), (2,)),
        (TokenClassification, (2, 4, 3), (2, 5)),
        (TokenClassification, (2, 4, 3), (8,)),
    ],
)
def test_shapes_that_do_not_fit(task, logits, labels):
    """Both shapes are in the message."""
    with pytest.raises(ValueError) as error:
        TASK[task].rows(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))
    assert str(list(logits)) in str(error.value) and str(list(labels)) in str(error.value)


def test_rows_carry_the_gradient():
    logits = torch.zeros(2, 4, 3, requires_grad=True)
    TASK[TokenClassification].rows(logits, torch.zeros(2, 4, dtype=torch.long)).logits[5].sum().backward()
    assert logits.grad.nonzero().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]


# Logits


LOSS, LOGITS = torch.tensor(1.0), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outputs", "has_loss"),
    [
        (SequenceClassifierOutput(loss=LOSS, logits=LOGITS), True),
        (SequenceClassifierOutput(logits=LOGITS), False),
        (SequenceClassifierOutput(logits=LOGITS), True),
        ({"logits": LOGITS, "hidden": LOSS}, False),
        ((LOSS, LOGITS), True),
        ((LOGITS,), False),
        ([LOGITS, LOSS], False),
        (type("Plain", (), {"logits": LOGITS})(), True),
    ],
)
def test_logits_of(outputs, has_loss):
    assert logits_of(outputs, has_loss) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "has_loss", "found"),
    [
        (SequenceClassifierOutput(loss=LOSS), True, "loss"),
        ({"start_logits": LOGITS}, False, "start_logits"),
        ({"logits": None}, False, "logits"),
        ((LOSS,), True, "a tuple of 1"),
        ((), False, "a tuple of 0"),
        (None, False, "NoneType"),
        (LOGITS, False, "Tensor"),
        ((LOSS, "text"), True, "a tuple of 2"),
    ],
)
def test_outputs_without_logits(outputs, has_loss, found):
    """The message says what there was instead."""
    with pytest.raises(ValueError, match=f"no logits but {found}: self-distillation needs outputs.logits"):
        logits_of(outputs, has_loss)


# Labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "labels are a list"),
        (None, "labels are a NoneType"),
        ({"boxes": 1}, "labels are a dict"),
        (torch.tensor([0.5, 1.0]), "labels are torch.float32: regression is not supported, and several labels"),
        (torch.tensor([[1.0, 0.0]], dtype=torch.float16), "labels are torch.float16.*as MixUp and CutMix of torchvis"),
        (torch.tensor([True, False]), "labels are torch.bool"),
    ],
)
def test_labels_that_are_refused(labels, message):
    """By every task, when a batch is split."""
    for task in OF_LABELS:
        if task.per_token:
            message = message.partition(".*")[0]
        with pytest.raises(ValueError, match=message):
            task.split({"x": 1, "labels": labels})
        assert not task.accepts({"x": 1, "labels": labels})


@pytest.mark.parametrize(
    ("labels", "bad", "sample_id"),
    [
        (torch.tensor([0, 3]), 3, 41),
        (torch.tensor([-1, 2]), -1, 40),
        (torch.tensor([[-1, 2], [-100, 0]]), -1, 40),
        (torch.tensor([[-100, 2], [7, 0]]), 7, 41),
    ],
)
def test_labels_that_are_no_classes(labels, bad, sample_id):
    """The label and the id of its sample are found on the host."""
    samples = sample_index(np.array([40, 41]), labels)
    assert not samples.fits(3) and samples.misfit(3) == (bad, sample_id)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_that_are_accepted(dtype):
    """Batches have them as `int64`, whatever the collator made."""
    for task in OF_LABELS:
        shape = {CTC: (1, 3), SemanticSegmentation: (1, 1, 3)}.get(type(task), (3,))
        batch = task.split({"labels": torch.tensor([0, 2, 1]).to(dtype).view(shape)})
        assert batch.labels.dtype == torch.int64 and batch.labels.flatten().tolist() == [0, 2, 1]
    for labels in ([0, 2, 1], [[0, 2], [-100, -100]], [-100]):
        assert sample_index(np.arange(len(labels)), torch.tensor(labels)).fits(3)
    assert sample_index(np.arange(1), torch.tensor([7])).fits(8)


# Batches


def test_a_batch_is_split_into_what_the_model_sees_and_the_labels():
    """The dictionary stays as it is; labels are found under the first of their names."""
    task = SampleClassification(nn.Linear(2, 3), ("labels", "target"))
    inputs = {"x": torch.ones(2), "target": torch.tensor([1, 2])}
    batch = task.split(inputs, BatchRecord(np.array([7, 5])))
    assert inputs.keys() == {"x", "target"} and batch.inputs.keys() == {"x"} and batch.label_name == "target"
    assert batch.ids.tolist() == [7, 5] and batch.samples.label_hash.tolist() == [1, 2] and batch.mixing is None
    assert task.accepts(inputs) and not task.accepts({"x": 1})
    with pytest.raises(ValueError, match="the batch has no 'labels' or 'target', only x: .*label_names"):
        task.split({"x": torch.ones(2)})
    assert task.split(inputs).samples is None


def test_what_travels_beside_a_batch_is_taken_as_it_is():
    """The address that the collator found, and how images were mixed."""
    task, samples = TASK[SampleClassification], sample_index(np.array([7, 5]), torch.tensor([1, 2]))
    record = BatchRecord(np.array([7, 5]), samples, torch.tensor([1, 0]), 0.25)
    batch = task.split({"labels": torch.tensor([1, 2])}, record)
    assert batch.samples is samples and batch.mixing.partner.tolist() == [1, 0]
    assert batch.mixing.weight.item() == 0.25 and batch.mixing.weight.shape == ()


def test_a_causal_model_addresses_the_next_words():
    """In the address of samples, in rows and in their labels alike."""
    labels = torch.tensor([[5, 6, -100, 1], [2, 3, 4, -100]])
    task = TASK[CausalLM]
    samples = task.sample_index(np.array([0, 1]), labels)
    row_labels = task.row_labels(labels)
    assert samples.rows.tolist() == (row_labels != -100).nonzero().flatten().tolist() == [0, 2, 4, 5]
    assert samples.total == 4 and task.rows(torch.zeros(2, 4, 7), labels).labels.tolist() == row_labels.tolist()


def test_encoder_decoder_models_without_labels_get_what_their_decoder_starts_from():
    """The same logits as with labels; what the batch has already stays."""
    model = build(tf.T5ForConditionalGeneration, t5())
    model.config.decoder_start_token_id = 0
    labels = torch.tensor([[5, 6, 1], [2, 1, -100]])
    task = task_for(model)
    batch = task.split({**IDS, "labels": labels})
    with torch.no_grad():
        expected = model(**IDS, labels=labels).logits
        given = task.inputs_without_labels(batch)
        torch.testing.assert_close(model(**given).logits, expected)
    assert "labels" not in given and given["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 2, 1]]
    own = torch.tensor([[0, 1, 2], [0, 3, 4]])
    batch.inputs["decoder_input_ids"] = own
    assert task.inputs_without_labels(batch)["decoder_input_ids"] is own


def test_a_task_of_ones_own_says_what_is_missing():
    task = Task(nn.Linear(2, 3))
    with pytest.raises(NotImplementedError, match="Task.rows"):
        task.rows(torch.zeros(1, 3), torch.zeros(1))
    assert not Task.matches(nn.Linear(2, 3)) and task.row_labels(torch.tensor([[1, 2]])).tolist() == [1, 2]
