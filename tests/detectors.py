"""Tiny detectors of every supported make, with random weights, and images of colored squares for them."""

import numpy as np
import torch
import transformers as tf
from torch.utils.data import Dataset


CLASSES = 3
_BACKBONE = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_channels": 3,
    "num_queries": 6,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "auxiliary_loss": True,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
_RT = {
    "encoder_in_channels": [8, 8, 16],
    "encoder_hidden_dim": 16,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [16, 16, 16],
    "d_model": 16,
    "feat_strides": [8, 16, 32],
    "num_queries": 8,
    "num_denoising": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "hidden_expansion": 0.5,
    "num_labels": CLASSES,
    "eval_size": None,
}


def _backbone(stages=("stage4",)):
    return tf.ResNetConfig(**_BACKBONE, out_features=list(stages))


def _rt_backbone(config_class):
    return config_class(
        embedding_size=4,
        hidden_sizes=[4, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _yolos():
    return tf.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=6,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _d_fine():
    backbone = tf.HGNetV2Config(
        stem_channels=[3, 4, 8],
        stage_in_channels=[8, 8, 8, 8],
        stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 8, 8, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return tf.DFineConfig(**_RT, backbone_config=backbone, max_num_bins=8)


DETECTORS = {
    "detr": (tf.DetrForObjectDetection, lambda: tf.DetrConfig(**_DETR, backbone_config=_backbone())),
    "table_transformer": (
        tf.TableTransformerForObjectDetection,
        lambda: tf.TableTransformerConfig(**_DETR, backbone_config=_backbone()),
    ),
    "yolos": (tf.YolosForObjectDetection, _yolos),
    "conditional_detr": (
        tf.ConditionalDetrForObjectDetection,
        lambda: tf.ConditionalDetrConfig(**_DETR, backbone_config=_backbone()),
    ),
    "dab_detr": (
        tf.DabDetrForObjectDetection,
        lambda: tf.DabDetrConfig(
            **{k: v for k, v in _DETR.items() if k not in ("d_model", "num_channels")},
            hidden_size=16,
            backbone_config=_backbone(),
        ),
    ),
    "deformable_detr": (
        tf.DeformableDetrForObjectDetection,
        lambda: tf.DeformableDetrConfig(
            **_DETR | {"d_model": 32},
            num_feature_levels=2,
            encoder_n_points=2,
            decoder_n_points=2,
            backbone_config=_backbone(),
        ),
    ),
    "rt_detr": (
        tf.RTDetrForObjectDetection,
        lambda: tf.RTDetrConfig(**_RT, backbone_config=_rt_backbone(tf.RTDetrResNetConfig)),
    ),
    "rt_detr_v2": (
        tf.RTDetrV2ForObjectDetection,
        lambda: tf.RTDetrV2Config(**_RT, backbone_config=_rt_backbone(tf.RTDetrResNetConfig)),
    ),
    "d_fine": (tf.DFineForObjectDetection, _d_fine),
}
SOFTMAX = ("detr", "table_transformer", "yolos")
FOCAL = ("conditional_detr", "dab_detr", "deformable_detr")
VARIFOCAL = ("rt_detr", "rt_detr_v2", "d_fine")


def make_detector(name="detr", seed=0):
    """A detector with random weights that depend on the seed only."""
    model_class, config = DETECTORS[name]
    tf.set_seed(seed)
    return model_class(config())


class Scenes(Dataset):
    """Images of squares, whose color is their class; image `n` has `n % 4` objects, so that some are empty."""

    def __init__(self, size=8, transform=None, ids=True, pixels=32):
        rng, self.items, self.transform = np.random.default_rng(0), [], transform
        for n in range(size):
            image = torch.from_numpy(rng.normal(scale=0.1, size=(3, pixels, pixels))).float()
            boxes, classes = [], rng.integers(CLASSES, size=n % 4).tolist()
            for label in classes:
                x, y, side = (*rng.uniform(0.25, 0.75, size=2), rng.uniform(0.2, 0.4))
                boxes.append([x, y, side, side])
                top, left = (int(pixels * (center - side / 2)) for center in (y, x))
                image[label, top : top + int(pixels * side), left : left + int(pixels * side)] += 2.0
            labels = {"class_labels": torch.tensor(classes, dtype=torch.int64)}
            labels["boxes"] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            if ids:
                labels["annotation_id"] = 10 * torch.arange(len(classes)) + n
            self.items.append({"pixel_values": image, "labels": labels})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = dict(self.items[index])
        return item if self.transform is None else self.transform(item)


def take(labels, places):
    """Some objects of an image, in this order."""
    return {name: values[places] for name, values in labels.items()}


def collate_scenes(items):
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [dict(item["labels"]) for item in items],
    }


def drop_and_permute(item):
    """Some objects out of the picture, the others in another order, otherwise in every epoch."""
    labels = item["labels"]
    order = torch.randperm(len(labels["class_labels"]))
    order = order[torch.rand(len(order)) < 0.7]
    return item | {"labels": take(labels, order)}


def tiny_resnet(**more):
    """The configuration of a classifier, built as the backbone of most detectors here."""
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return tf.ResNetConfig(**sizes, num_labels=5, **more)
