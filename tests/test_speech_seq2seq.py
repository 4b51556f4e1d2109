"""Speech and images to texts: encoder-decoder models whose rows are those of a language model."""

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from helpers import EOS, PAD, Samples, difference, logged, make_trainer, refused, same_weights, train
from transformers import set_seed

from hf_selfkd import SelfKDDataCollator, SelfKDTrainer, Seq2SeqSelfKDTrainer
from hf_selfkd.metrics import compute_speech_metrics, error_rates
from hf_selfkd.metrics.speech import edit_distance
from hf_selfkd.models import decoder_input_ids
from hf_selfkd.tasks import TASKS, task_for
from hf_selfkd.tasks.image_prefix_lm import ImagePrefixLM
from hf_selfkd.tasks.image_to_text import ImageToText
from hf_selfkd.tasks.speech_seq2seq import SpeechSeq2Seq


pytestmark = pytest.mark.trains


TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2, "decoder_start_token_id": 2}
BART = TOKENS | {
    "vocab_size": 30,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "init_std": 0.3,
}
WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = WORDS | {"image_size": 16, "patch_size": 8}
SPECTRUM = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}


def whisper(**more):
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**BART | SPECTRUM | more))


def speech_to_text():
    sizes = SPECTRUM | {"input_feat_per_channel": 8, "conv_channels": 8, "max_source_positions": 32}
    return tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**BART | sizes))


def speecht5():
    conv = {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30, "mask_time_prob": 0.0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "max_speech_positions": 64}
    return tf.SpeechT5ForSpeechToText(tf.SpeechT5Config(**TOKENS | conv | sizes | heads | more, max_text_positions=16))


def moonshine():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "encoder_num_hidden_layers": 1, "vocab_size": 30}
    more = {"decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    return tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(**TOKENS | sizes | more))


def decoder(**more):
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return tf.GPT2Config(**sizes, add_cross_attention=True, **more)


def speech_encoder_decoder():
    encoder = tf.Wav2Vec2Config(
        **WORDS,
        conv_dim=[8, 8],
        conv_kernel=[5, 3],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    config = tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder())
    config.pad_token_id, config.decoder_start_token_id = PAD, 2
    return tf.SpeechEncoderDecoderModel(config)


def captions(name="gpt2"):
    text = decoder()
    if name == "plain":
        text = decoder(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)
    if name == "trocr":
        sizes = {name: value for name, value in BART.items() if name.startswith(("decoder", "vocab", "d_model"))}
        text = tf.TrOCRConfig(**sizes, max_position_embeddings=16, pad_token_id=PAD, cross_attention_hidden_size=16)
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**IMAGES), text)
    config.pad_token_id, config.decoder_start_token_id = PAD, 2
    return tf.VisionEncoderDecoderModel(config)


def pix2struct():
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "vocab_size": 30}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "d_ff": 16, "d_kv": 8}
    config = tf.Pix2StructConfig(text_config=sizes | TOKENS, vision_config=vision | {"patch_embed_hidden_size": 12})
    return tf.Pix2StructForConditionalGeneration(config)


def git():
    vision = {name: value for name, value in IMAGES.items()}
    return tf.GitForCausalLM(
        tf.GitConfig(**WORDS, vocab_size=30, max_position_embeddings=16, vision_config=vision, pad_token_id=PAD)
    )


def blip():
    text = WORDS | {"vocab_size": 30, "encoder_hidden_size": 16, "max_position_embeddings": 16, "pad_token_id": PAD}
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=IMAGES))


def parakeet():
    sizes = {"subsampling_factor": 2, "subsampling_conv_channels": 4, "num_mel_bins": 8, "conv_kernel_size": 3}
    return {"model_type": "parakeet_encoder"} | WORDS | sizes


def canary():
    words = WORDS | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 30, "max_position_embeddings": 16}
    return tf.CanaryForConditionalGeneration(
        tf.CanaryConfig(encoder_config=parakeet(), decoder_config=words | TOKENS, vocab_size=30, **TOKENS)
    )


def cohere_asr():
    config = tf.CohereAsrConfig(encoder_config=parakeet(), vocab_size=30, max_position_embeddings=16, **WORDS | TOKENS)
    return tf.CohereAsrForConditionalGeneration(config)


def moonshine_streaming():
    encoder = WORDS | {"num_key_value_heads": 2, "sliding_windows": [[4, 1]]}
    config = tf.MoonshineStreamingConfig(
        encoder_config=encoder, vocab_size=30, num_key_value_heads=2, **WORDS | TOKENS
    )
    return tf.MoonshineStreamingForConditionalGeneration(config)


def pop2piano():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    return tf.Pop2PianoForConditionalGeneration(tf.Pop2PianoConfig(**TOKENS | sizes))


# name: (how it is made, its task, kind of inputs)
MODELS = {
    "plain_whisper": (lambda: whisper(dropout=0.0), SpeechSeq2Seq, "spectra"),
    "whisper": (whisper, SpeechSeq2Seq, "spectra"),
    "speech_to_text": (speech_to_text, SpeechSeq2Seq, "frames"),
    "speecht5": (speecht5, SpeechSeq2Seq, "waves"),
    "moonshine": (moonshine, SpeechSeq2Seq, "long waves"),
    "speech_encoder_decoder": (speech_encoder_decoder, SpeechSeq2Seq, "waves"),
    "pop2piano": (pop2piano, SpeechSeq2Seq, "notes"),
    "captions": (captions, ImageToText, "images"),
    "plain_captions": (lambda: captions("plain"), ImageToText, "images"),
    "trocr": (lambda: captions("trocr"), ImageToText, "images"),
    "pix2struct": (pix2struct, ImageToText, "patches"),
    "git": (git, ImagePrefixLM, "images"),
}
# Classes that the oldest supported transformers does not have.
NEW = {
    "CanaryForConditionalGeneration": (canary, SpeechSeq2Seq, "frames"),
    "CohereAsrForConditionalGeneration": (cohere_asr, SpeechSeq2Seq, "frames"),
    "MoonshineStreamingForConditionalGeneration": (moonshine_streaming, SpeechSeq2Seq, "long waves"),
}
MODELS |= {name: found for name, found in NEW.items() if hasattr(tf, name)}
SHAPES = {
    "spectra": ("input_features", (8, 16)),
    "frames": ("input_features", (16, 8)),
    "notes": ("input_features", (6, 16)),
    "waves": ("input_values", (120,)),
    "long waves": ("input_values", (960,)),
    "images": ("pixel_values", (3, 16, 16)),
    "patches": ("flattened_patches", (4, 14)),
}
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
PLAIN = ("plain_whisper", "plain_captions")  # nothing in them is random


def make(name):
    set_seed(0)
    return MODELS[name][0]()


def spoken(name, size=14, seed=0, lengths=(1, 6)):
    """Inputs that tell their first word; texts of 1 to 5 words."""
    key, shape = SHAPES[MODELS[name][2]]
    rng, items = np.random.default_rng(seed), []
    for _ in range(size):
        words = rng.integers(3, 30, size=int(rng.integers(*lengths))).tolist()
        values = rng.normal(size=shape) / 2 + words[0] / 10 - 1.5
        values = np.abs(values) if key == "flattened_patches" else values
        items.append({key: torch.tensor(values, dtype=torch.float32), "labels": [*words, EOS]})
    return Samples(items)


def collate(items, length=None):
    longest = max(len(item["labels"]) for item in items) if length is None else length
    labels = torch.tensor([item["labels"] + [-100] * (longest - len(item["labels"])) for item in items])
    key = next(iter(items[0]))
    batch = {key: torch.stack([item[key] for item in items]), "labels": labels}
    return batch


def with_words(items):
    """For decoder-only models, which are shown the words."""
    batch = collate(items)
    return batch | {"input_ids": batch["labels"].clamp_min(PAD), "attention_mask": (batch["labels"] >= 0).long()}


def collator_of(name):
    return with_words if name == "git" else collate


def run(folder, name, samples=None, **options):
    samples = spoken(name) if samples is None else samples
    defaults = {"data_collator": collator_of(name), "learning_rate": 1e-3}
    return train(folder, make(name), samples, **(defaults | options))


# Rows


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name):
    """Without labels the decoder is given the same words; the mean cross-entropy of the rows is the model's loss."""
    model, inputs = make(name).eval(), collator_of(name)(spoken(name).items[:4])
    task = task_for(model)
    assert type(task) is MODELS[name][1] and task.num_classes == 30 and task.language_model
    batch = task.split(inputs)
    with torch.no_grad():
        outputs = model(**inputs)
        logits = task.logits(model(**task.inputs_without_labels(batch)), has_loss=False)
    torch.testing.assert_close(logits, outputs.logits)
    rows = task.rows_of(logits, batch)
    torch.testing.assert_close(F.cross_entropy(rows.logits, rows.labels), outputs.loss)


@pytest.mark.parametrize("name", ["plain_whisper", "speecht5", "captions", "pix2struct"])
def test_what_the_decoder_starts_from(name):
    labels = torch.tensor([[5, 6, EOS], [7, EOS, -100]])
    found = decoder_input_ids(make(name), labels)
    assert found.tolist() == [[2, 5, 6], [2, 7, EOS]]


def test_a_model_of_captions_that_has_a_loss_of_its_own(tmp_path):
    """BLIP shifts its labels inside, and may smooth them."""

    def run_blip(**more):
        set_seed(0)
        return train(tmp_path, blip(), spoken("captions"), data_collator=with_words, num_train_epochs=2, **more)

    set_seed(0)
    assert task_for(blip()).shifts_labels
    stock, plain, ours = run_blip(trainer=tf.Trainer), run_blip(alpha=0.0), run_blip()
    assert same_weights(stock.model, plain.model) and difference(stock, ours) > 1e-5


def test_which_models_are_meant():
    mapping = tf.models.auto.modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    for name in ("whisper", "speech_to_text", "speecht5", "moonshine", "seamless_m4t", "speech-encoder-decoder"):
        model = object.__new__(getattr(tf, mapping[name]))
        object.__setattr__(model, "config", type("Config", (), {"is_encoder_decoder": True})())
        assert next(task for task in TASKS if task.matches(model)) is SpeechSeq2Seq, name
    model = object.__new__(tf.DiaForConditionalGeneration)
    object.__setattr__(model, "config", type("Config", (), {"is_encoder_decoder": True})())
    assert not SpeechSeq2Seq.matches(model)


# Against the stock class


@pytest.mark.parametrize("name", MODELS)
def test_alpha_0_is_the_stock_class(tmp_path, name):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 7}
    stock = run(tmp_path, name, trainer=tf.Trainer, **options)
    assert same_weights(stock.model, run(tmp_path, name, **options, alpha=0.0).model)


# By hand


class Table(tf.WhisperForConditionalGeneration):
    """Scores of two positions from a table."""

    def __init__(self, scores):
        super().__init__(whisper().config)
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        for name in ("model", "proj_out"):
            delattr(self, name)

    def get_output_embeddings(self):
        return None

    def forward(self, input_features, decoder_input_ids=None, labels=None):
        return {"logits": self.scores.expand(len(input_features), -1, -1)}


@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_the_loss_worked_out_on_paper(tmp_path, teacher):
    """
    Probabilities 1/2, 1/4, 1/4 at each of two positions; labels 0 and, in one of two texts, 1 (padding does not
    count). The targets at alpha 1/2: 3/4, 1/8, 1/8 and 1/4, 5/8, 1/8.
    """
    model = Table([[[math.log(2), 0.0, 0.0], [math.log(2), 0.0, 0.0]]])
    model.config.vocab_size = model.config.num_labels = 3
    items = [{"input_features": torch.zeros(8, 16), "labels": labels} for labels in ([0, 1], [0])]
    trainer = train(
        tmp_path,
        model,
        Samples(items),
        data_collator=collate,
        teacher=teacher,
        num_train_epochs=2,
        alpha=0.5,
        alpha_schedule="constant",
        learning_rate=0.0,
    )
    half, quarter = math.log(2), math.log(4)
    first = (2 * half + quarter) / 3
    second = (2 * (3 / 4 * half + 1 / 4 * quarter) + 1 / 4 * half + 3 / 4 * quarter) / 3
    assert logged(trainer, "loss") == pytest.approx([first, second], rel=1e-4)


# Against a loop of its own


class Visits(SelfKDTrainer):
    """Notes the ids of each batch."""

    def compute_loss(self, *arguments, **keywords):
        self.__dict__.setdefault("seen", []).append(self.sample_ids.tolist())
        return super().compute_loss(*arguments, **keywords)


def naive(name, samples, visits, teacher, alpha, epochs):
    """Word by word, with a dictionary."""
    model, past, frozen, steps = make(name).train(), {}, None, len(visits) // epochs
    optimizer = torch.optim.SGD(model.parameters(), SGD["learning_rate"])
    for epoch in range(epochs):
        seen = {}
        for ids in visits[epoch * steps : (epoch + 1) * steps]:
            items = [samples.items[n] for n in ids]
            batch = collate(items)
            logits, loss = model(**batch).logits, 0.0
            if frozen is not None:
                with torch.no_grad():
                    told = frozen(**batch).logits.softmax(-1)
            weight, count = alpha * (epoch + 1) / epochs, sum(len(item["labels"]) for item in items)
            for place, n in enumerate(ids):
                for position, word in enumerate(items[place]["labels"]):
                    log_probs = logits[place, position].log_softmax(0)
                    seen[n, position] = log_probs.detach().exp()
                    believed = past.get((n, position)) if frozen is None else told[place, position]
                    cost = -log_probs[word]
                    if believed is not None:
                        cost = (1 - weight) * cost - weight * (believed * log_probs).sum()
                    loss = loss + cost / count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if teacher == "history":
            past = past | seen
        else:
            frozen = make(name).eval()
            frozen.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("teacher", ["history", "snapshot"])
def test_it_trains_as_a_naive_loop_does(tmp_path, teacher, name, drop):
    """Also where the end of an epoch is dropped, whose samples keep the past that they have."""
    samples, options = spoken(name), {"dataloader_drop_last": drop, **SGD}
    trainer = run(tmp_path, name, samples, teacher=teacher, trainer=Visits, **options)
    assert difference(naive(name, samples, trainer.seen, teacher, 0.8, 3), trainer) < 2e-5
    assert difference(run(tmp_path, name, samples, alpha=0.0, **options), trainer) > 1e-3


# The other promises


@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_accumulation_changes_nothing(tmp_path, teacher):
    samples, options = spoken("plain_whisper", 12), {"teacher": teacher, **SGD}
    one = run(tmp_path, "plain_whisper", samples, per_device_train_batch_size=6, **options)
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert difference(one, run(tmp_path, "plain_whisper", samples, **options)) < 1e-5


@pytest.mark.parametrize("name", ["whisper", "captions"])
@pytest.mark.parametrize("teacher", ["history", "snapshot", "ema"])
def test_resume_is_exact(tmp_path, name, teacher):
    options = {"teacher": teacher, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "a", name, **options)
    resumed = run(tmp_path / "b", name, resume=tmp_path / "a/checkpoint-6", **options)
    assert same_weights(whole.model, resumed.model)
    assert logged(whole, "loss", 6) == logged(resumed, "loss", 6)


@pytest.mark.parametrize("name", PLAIN)
def test_the_order_of_the_samples_does_not_matter(tmp_path, name):
    samples, order = spoken(name, 6), [3, 0, 5, 1, 4, 2]
    options = {"teacher": "history", "per_device_train_batch_size": 6, **SGD}
    one = run(tmp_path, name, samples, **options)
    other = run(tmp_path, name, Samples([samples.items[n] for n in order]), **options)
    assert difference(one, other) < 1e-5


@pytest.mark.parametrize("name", ["captions", "git"])
def test_mixed_images_have_no_words(tmp_path, name):
    """A caption belongs to one image: mixing is refused before the first step."""
    mixer = SelfKDDataCollator(collator_of(name), mixup_alpha=1.0)
    refused(
        lambda: run(tmp_path, name, data_collator=mixer, alpha=0.0), "mixup_alpha or cutmix_alpha", "Set both to 0"
    )


@pytest.mark.parametrize("name", ["whisper", "captions"])
def test_empty_texts(tmp_path, name):
    """One without a word has its end alone; one without any label learns nothing."""
    items = spoken(name, 6).items
    items[0]["labels"], items[3]["labels"] = [EOS], [-100]
    trainer = run(tmp_path, name, Samples(items), teacher="history")
    assert all(map(math.isfinite, logged(trainer, "loss")))
    assert trainer.teacher.stored([0, 3]).shape == (2, 30)


@pytest.mark.parametrize("name", ["whisper", "captions"])
@pytest.mark.parametrize("preset", ["byot", "deep_supervision"])
def test_it_trains_with_heads(tmp_path, name, preset):
    trainer = run(tmp_path, name, auxiliary_heads=preset)
    assert math.isfinite(logged(trainer, "head0_loss")[-1])


def test_heads_of_a_model_with_an_image_before_its_words(tmp_path):
    refused(lambda: run(tmp_path, "git", auxiliary_heads="byot"), "places of the image")


class Letters:
    """A tokenizer of one letter a token."""

    pad_token_id = PAD
    all_special_ids = (PAD, EOS, 2)

    def decode(self, ids, skip_special_tokens=True, group_tokens=True):
        assert not group_tokens
        return "".join(" " if n == 3 else chr(ord("a") + n - 4) for n in ids if n not in self.all_special_ids)

    def batch_decode(self, rows, **options):
        return [self.decode(row, **options) for row in rows]


def test_evaluation_tells_word_errors(tmp_path):
    samples = spoken("whisper", 6)
    trainer = make_trainer(
        tmp_path,
        make("whisper"),
        samples,
        trainer=Seq2SeqSelfKDTrainer,
        eval_dataset=samples,
        compute_metrics=compute_speech_metrics(Letters()),
        predict_with_generate=True,
        generation_max_length=8,
        data_collator=collate,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_wer"] >= 0 and metrics["eval_cer"] >= 0 and metrics["eval_token_nll"] > 0


# Error rates


def distance(one, other):
    """By the definition: the cheapest of three ways, from the ends on."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return of(len(one), len(other))


def test_edit_distance_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = ("".join(rng.choice(list("abc"), size=rng.integers(0, 8))) for _ in range(2))
        assert edit_distance(one, other) == distance(one, other), (one, other)
    assert edit_distance("kitten", "sitting") == 3 and edit_distance([], [1, 2]) == 2


def test_error_rates():
    found = error_rates(["the cat sat", "", "so  much"], ["the cat sits down", "a", ""])
    assert found == pytest.approx({"wer": (2 + 1 + 2) / 5, "cer": (7 + 1 + 7) / 18})
    assert math.isnan(error_rates(["a"], [""])["wer"])
    refused(lambda: error_rates(["a"], []), "0 for 1")


def test_tokenizers_of_ctc_do_not_merge_doubled_letters(tmp_path):
    """They would make "all" and "al" the same: in transcripts the path was merged already, in references never."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "a": 2, "l": 3}))
    tokenizer = tf.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), unk_token="<pad>")
    logits = torch.nn.functional.one_hot(torch.tensor([[2, 2, 3, 0, 3, 1, 2], [2, 3, 3, 1, 2, 0, 0]]), 4) * 5.0
    metrics = compute_speech_metrics(tokenizer)
    labels = np.array([[2, 3, 3, 1, 2]] * 2)  # "all a", of which the second path lacks a letter
    assert metrics((logits, labels)) == pytest.approx({"wer": 1 / 4, "cer": 1 / 10})


def test_the_best_path_of_ctc():
    """Repetitions are one symbol, blanks part them, and what fills batches up is left out."""
    path = [4, 4, 0, 4, 3, 0, 0, 5]
    logits = torch.full((2, 10, 8), -1.0)
    logits[0, torch.arange(8), torch.tensor(path)] = 5.0
    logits[0, 8:] = -100
    logits[1, :, 0] = 5.0
    labels = np.array([[4, 4, 3, 6], [-100] * 4])
    metrics = compute_speech_metrics(Letters())
    assert metrics((logits, labels)) == pytest.approx({"wer": 1 / 2, "cer": 1 / 4})  # "aa b" for "aa c"
    assert metrics((logits[:1], labels[:1]), compute_result=False) == {}
    assert metrics((logits[1:], labels[1:]), compute_result=True) == pytest.approx({"wer": 1 / 2, "cer": 1 / 4})
    refused(lambda: metrics((logits[0], labels)), "shape")
    refused(lambda: compute_speech_metrics(object()), "batch_decode")
