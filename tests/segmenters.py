"""Tiny models for semantic segmentation, and images whose classes can be told."""

import numpy as np
import torch
import transformers as tf
from helpers import Samples
from transformers import set_seed


LABELS = 4
_VIT = {
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": LABELS,
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
    "use_auxiliary_head": True,
    "drop_path_rate": 0.1,
    "use_relative_position_bias": True,
}


def segformer(dropout=0.0, **extra):
    sizes = {"depths": [1, 1], "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [1, 1]}
    return tf.SegformerConfig(
        num_encoder_blocks=2,
        hidden_sizes=[8, 8],
        num_attention_heads=[1, 1],
        decoder_hidden_size=8,
        num_labels=LABELS,
        initializer_range=0.3,
        hidden_dropout_prob=dropout,
        classifier_dropout_prob=dropout,
        drop_path_rate=dropout,
        **sizes,
        **extra,
    )


def upernet(auxiliary=True):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1] * 4, layer_type="basic", out_features=stages
    )
    options = {"auxiliary_in_channels": 4, "auxiliary_channels": 4, "use_auxiliary_head": auxiliary}
    return tf.UperNetConfig(backbone_config=backbone, hidden_size=8, num_labels=LABELS, pool_scales=[1, 2], **options)


def dpt():
    return tf.DPTConfig(
        **{name: value for name, value in _VIT.items() if name not in ("out_indices", "pool_scales")},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=8,
        is_hybrid=False,
        readout_type="ignore",
    )


def mobilevit(kind):
    sizes = {"image_size": 32, "num_labels": LABELS, "num_channels": 3, "atrous_rates": [1, 1, 1]}
    if kind is tf.MobileViTConfig:
        sizes |= {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 4, 4, 8], "num_attention_heads": 2}
        sizes |= {"intermediate_size": 8, "aspp_out_channels": 8}
    else:
        sizes |= {"width_multiplier": 0.5, "n_attn_blocks": [1, 1, 1], "aspp_out_channels": 8}
    return kind(**sizes)


# name: (class, configuration, height and width of the logits for images of 16 x 16)
SEGMENTERS = {
    "plain_segformer": (tf.SegformerForSemanticSegmentation, segformer, 8),
    "segformer": (tf.SegformerForSemanticSegmentation, lambda: segformer(0.1), 8),
    "upernet": (tf.UperNetForSemanticSegmentation, upernet, 16),
    "upernet_alone": (tf.UperNetForSemanticSegmentation, lambda: upernet(False), 16),
    "beit": (tf.BeitForSemanticSegmentation, lambda: tf.BeitConfig(**_VIT, vocab_size=9), 16),
    "data2vec": (tf.Data2VecVisionForSemanticSegmentation, lambda: tf.Data2VecVisionConfig(**_VIT), 16),
    "dpt": (tf.DPTForSemanticSegmentation, dpt, 64),
    "mobilenet_v2": (
        tf.MobileNetV2ForSemanticSegmentation,
        lambda: tf.MobileNetV2Config(image_size=16, depth_multiplier=0.1, num_labels=LABELS),
        1,
    ),
    "mobilevit": (tf.MobileViTForSemanticSegmentation, lambda: mobilevit(tf.MobileViTConfig), 1),
    "mobilevitv2": (tf.MobileViTV2ForSemanticSegmentation, lambda: mobilevit(tf.MobileViTV2Config), 1),
}


def sapiens2():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_attention_heads": 1, "num_first_full_attention_layers": 1}
    head = {"upsample_out_channels": [8], "use_pixel_shuffle": False, "conv_out_channels": [8]}
    options = {"num_last_full_attention_layers": 1, "num_register_tokens": 1, "num_labels": LABELS}
    return tf.Sapiens2Config(image_size=16, patch_size=4, head_config=head, **sizes, **heads, **options)


def tipsv2():
    sizes = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 1, "patch_size": 4}
    backbone = tf.AutoConfig.for_model(
        "tipsv2_vision_model", image_size=16, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, **sizes
    )
    return tf.Tipsv2DptConfig(
        backbone_config=backbone, neck_hidden_sizes=[4] * 4, fusion_hidden_size=8, num_labels=LABELS
    )


# Classes that the oldest supported transformers does not have.
NEW = {"Sapiens2ForSemanticSegmentation": (sapiens2, 8), "Tipsv2DptForSemanticSegmentation": (tipsv2, 32)}
SEGMENTERS |= {name: (getattr(tf, name), *found) for name, found in NEW.items() if hasattr(tf, name)}


def make_segmenter(name, seed=0):
    """A tiny one with random weights; plain ones have neither dropout nor statistics of batches."""
    cls, config, _ = SEGMENTERS[name]
    set_seed(seed)
    model = cls(config())
    if name == "plain_segformer":
        model.decode_head.batch_norm = torch.nn.Identity()
    return model


class Maps(Samples):
    """
    Images of 16 x 16 pixels: each half of an image has a class, which is seen as a brightness, and some pixels have
    none. All pixels of image 3 have none.
    """

    def __init__(self, size=14, seed=0, transform=None, ignored=255, side=16):
        rng = np.random.default_rng(seed)
        items = []
        for number in range(size):
            classes = rng.integers(LABELS, size=2)
            labels = np.repeat(classes, side // 2)[None].repeat(side, 0)
            pixels = rng.normal(size=(3, side, side)) / 2 + labels - 1.5
            labels[rng.random(labels.shape) < 0.2] = ignored
            labels[:3, :3] = ignored
            if number == 3:
                labels[:] = ignored
            items.append({"pixel_values": torch.tensor(pixels, dtype=torch.float32), "labels": torch.tensor(labels)})
        super().__init__(items, transform)
