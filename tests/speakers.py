"""Tiny models of speech, and sounds whose words can be told."""

from importlib.util import find_spec

import numpy as np
import torch
import transformers as tf
from helpers import Samples
from transformers import set_seed


SYMBOLS, BLANK = 8, 0  # of CTC models; the others have words 0 to 29

_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_CONV = {
    "conv_dim": [8, 8],
    "conv_kernel": [5, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.2,
    "mask_time_length": 2,
    "vocab_size": SYMBOLS,
    "pad_token_id": BLANK,
    "layerdrop": 0.0,
}
_SEW = {"squeeze_factor": 1, "feature_layer_norm_eps": 1e-5}
_PLAIN = {
    name: 0.0
    for name in (
        "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout mask_time_prob".split()
    )
}


def wav2vec2(config=tf.Wav2Vec2Config, **more):
    return config(**_SIZES | _CONV | more)


def parakeet(**more):
    sizes = {"subsampling_factor": 2, "subsampling_conv_channels": 4, "num_mel_bins": 8, "conv_kernel_size": 3}
    return tf.ParakeetCTCConfig(
        encoder_config=tf.ParakeetEncoderConfig(**_SIZES | sizes), vocab_size=SYMBOLS, pad_token_id=BLANK, **more
    )


# name: (class, configuration, width of the features of an input, or 0 for waves); plain ones have no randomness
CTC_MODELS = {
    "plain_wav2vec2": (tf.Wav2Vec2ForCTC, lambda: wav2vec2(**_PLAIN, initializer_range=0.3), 0),
    "wav2vec2": (tf.Wav2Vec2ForCTC, wav2vec2, 0),
    "wav2vec2_mean": (tf.Wav2Vec2ForCTC, lambda: wav2vec2(ctc_loss_reduction="mean"), 0),
    "plain_wav2vec2_mean": (
        tf.Wav2Vec2ForCTC,
        lambda: wav2vec2(**_PLAIN, initializer_range=0.3, ctc_loss_reduction="mean"),
        0,
    ),
    "hubert": (tf.HubertForCTC, lambda: wav2vec2(tf.HubertConfig), 0),
    "wavlm": (tf.WavLMForCTC, lambda: wav2vec2(tf.WavLMConfig, num_buckets=8, max_bucket_distance=8), 0),
    "unispeech": (tf.UniSpeechForCTC, lambda: wav2vec2(tf.UniSpeechConfig), 0),
    "unispeech_sat": (tf.UniSpeechSatForCTC, lambda: wav2vec2(tf.UniSpeechSatConfig), 0),
    "wav2vec2_conformer": (
        tf.Wav2Vec2ConformerForCTC,
        lambda: wav2vec2(tf.Wav2Vec2ConformerConfig, conv_depthwise_kernel_size=3),
        0,
    ),
    "data2vec_audio": (
        tf.Data2VecAudioForCTC,
        lambda: wav2vec2(tf.Data2VecAudioConfig, num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
        0,
    ),
    "sew": (tf.SEWForCTC, lambda: wav2vec2(tf.SEWConfig, **_SEW), 0),
    "sew_d": (
        tf.SEWDForCTC,
        lambda: wav2vec2(tf.SEWDConfig, **_SEW, max_position_embeddings=64, position_buckets=8),
        0,
    ),
    "wav2vec2_bert": (
        tf.Wav2Vec2BertForCTC,
        lambda: tf.Wav2Vec2BertConfig(
            **_SIZES, feature_projection_input_dim=8, vocab_size=SYMBOLS, pad_token_id=BLANK, mask_time_prob=0.0,
            conv_depthwise_kernel_size=3, left_max_position_embeddings=8, right_max_position_embeddings=4,
        ),
        8,
    ),
    "parakeet": (tf.ParakeetForCTC, parakeet, 8),
}  # fmt: skip


def lasr():
    sizes = {"subsampling_conv_channels": 4, "num_mel_bins": 8, "conv_kernel_size": 4, "layerdrop": 0.0}
    return tf.LasrCTCConfig(encoder_config=_SIZES | sizes, vocab_size=SYMBOLS, pad_token_id=BLANK)


def granite():
    sizes = {
        "vocab_size": SYMBOLS,
        "num_mel_bins": 8,
        "context_size": 8,
        "conv_kernel_size": 3,
        "subsample_layers": [0],
    }
    return tf.GraniteSpeech5CTCConfig(
        encoder_config=_SIZES | sizes | {"num_hidden_layers": 2}, vocab_size=SYMBOLS, pad_token_id=BLANK
    )


def omniasr():
    sizes = {name: value for name, value in _CONV.items() if name.startswith(("conv", "num_conv", "layerdrop"))}
    audio = {"model_type": "omniasr_audio"} | _SIZES | sizes
    return tf.OmniASRCTCConfig(audio_config=audio, vocab_size=SYMBOLS, blank_token_id=BLANK, pad_token_id=1)


# Classes that the oldest supported transformers does not have.
NEW = {
    "LasrForCTC": (lasr, 8),
    "GraniteSpeech5ForCTC": (granite, 32),
    "OmniASRForCTC": (omniasr, 0),
}
CTC_MODELS |= {name: (getattr(tf, name), *found) for name, found in NEW.items() if hasattr(tf, name)}
if find_spec("transformers.loss.loss_ctc") is None:
    # In transformers 5.20 these take the -100 of padding for symbols, which reads outside of the logits.
    for name in ("parakeet", "LasrForCTC", "GraniteSpeech5ForCTC"):
        CTC_MODELS.pop(name, None)


def make_ctc(name, seed=0):
    cls, config, _ = CTC_MODELS[name]
    set_seed(seed)
    return cls(config())


class Spoken(Samples):
    """
    Sounds of different length. Each symbol of a transcript is a tone of its own, spoken for a while; that of sample 3
    is empty.
    """

    def __init__(self, size=14, seed=0, width=0, transform=None):
        rng = np.random.default_rng(seed)
        items = []
        for number in range(size):
            symbols = rng.integers(1, SYMBOLS, size=int(rng.integers(2, 5)))
            tones = np.repeat(symbols, 60 if not width else 16)
            if width:
                sound = rng.normal(size=(len(tones), width)) / 2 + np.sin(tones[:, None] * np.arange(1, width + 1))
            else:
                sound = np.sin(np.arange(len(tones)) * tones / 3) + rng.normal(size=len(tones)) / 2
            labels = [] if number == 3 else symbols.tolist()
            key = "input_features" if width else "input_values"
            items.append({key: torch.tensor(sound, dtype=torch.float32), "labels": labels})
        super().__init__(items, transform)


def pad_sounds(items, length=None, filler=-100):
    """Sounds padded with zeros, with a mask; transcripts with -100."""
    name = next(key for key in items[0] if key != "labels")
    sounds = [item[name] for item in items]
    shape = (len(items), max(map(len, sounds)) if length is None else length, *sounds[0].shape[1:])
    batch, mask = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.long)
    for place, sound in enumerate(sounds):
        batch[place, : len(sound)], mask[place, : len(sound)] = sound, 1
    width = max(1, *(len(item["labels"]) for item in items))
    labels = torch.tensor([item["labels"] + [filler] * (width - len(item["labels"])) for item in items])
    return {name: batch, "attention_mask": mask, "labels": labels}


def pad_for(name):
    """The collator of a model, by its name."""

    def with_channels(items):
        batch = pad_sounds(items)
        mask = batch.pop("attention_mask")
        return batch | {"input_values": batch["input_values"].unsqueeze(1), "padding_mask": mask}

    return with_channels if name == "OmniASRForCTC" else pad_sounds
