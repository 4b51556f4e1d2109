"""Tiny classifiers of many architectures, with heads on several layers, and batches for them."""

import torch
import transformers
from helpers import CLASSES
from transformers import set_seed

from hf_selfkd import AuxiliaryHeadsConfig, attach_auxiliary_heads


WORDS = 30
_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_WAV2VEC2 = {name: value for name, value in _TEXT.items() if name not in ("vocab_size", "max_position_embeddings")} | {
    "conv_dim": [8, 8],
    "conv_kernel": [5, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
_DEBERTA = {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "conv_kernel_size": 3,
    "position_biased_input": False,
}

# name: (configuration, class, options, kind of data)
MODELS = {
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGE, "images"),
    "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", _IMAGE, "images"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _IMAGE, "images"),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2, 1],
            "num_heads": [2, 2, 2],
            "window_size": 2,
        },
        "images",
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "layer_type": "basic"},
        "images",
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"patch_size": 2, "hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "num_stages": 3, "image_size": 16},
        "images",
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", _TEXT, "texts"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _TEXT, "texts"),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": 16, "hidden_dim": 16, "n_layers": 3, "n_heads": 2},
        "texts",
    ),
    "deberta": ("DebertaV2Config", "DebertaV2ForSequenceClassification", _TEXT | _DEBERTA, "texts"),
    "gpt2": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        {"vocab_size": WORDS, "n_embd": 16, "n_layer": 3, "n_head": 2, "pad_token_id": 0},
        "texts",
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForSequenceClassification",
        _TEXT | {"num_key_value_heads": 1, "eos_token_id": 1, "bos_token_id": 2},
        "texts",
    ),
    "bart": ("BartConfig", "BartForSequenceClassification", _BART, "texts"),
    "wavlm": ("WavLMConfig", "WavLMForSequenceClassification", _WAV2VEC2, "sounds"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _WAV2VEC2, "sounds"),
}


def make(name, head="native", **changes):
    """A model of `MODELS` with heads, in evaluation mode; its random weights are large: they tell samples apart."""
    config, kind, options, _ = MODELS[name]
    set_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(num_labels=CLASSES, **options)).eval()
    inputs = changes.pop("inputs", None)
    layers = changes.pop("layers", "all" if head == "native" else [0, 1])
    config = AuxiliaryHeadsConfig(head=head, layers=layers, **({"views": "none"} | changes))
    attach_auxiliary_heads(model, config, inputs)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4 if name in ("bert", "roberta", "deberta", "vit", "bart", "gpt2") else 2)
        for buffer_name, buffer in model.named_buffers():  # statistics as after a training
            if buffer_name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def batch(name, rows=7, seed=1):
    """Samples of different lengths, padded to one."""
    generator = torch.Generator().manual_seed(seed)
    kind = MODELS[name][3]
    if kind == "images":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    lengths = torch.randint(4, 10, (rows,), generator=generator)
    lengths[0] = 9
    if kind == "sounds":
        mask = (torch.arange(180) < 20 * lengths.unsqueeze(1)).long()
        return {"input_values": torch.randn(rows, 180, generator=generator) * mask, "attention_mask": mask}
    mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    words = torch.randint(3, WORDS, (rows, 9), generator=generator) * mask
    if name == "bart":
        words[torch.arange(rows), lengths.clamp(max=9) - 1] = 1
    return {"input_ids": words, "attention_mask": mask}
