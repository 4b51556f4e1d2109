"""What metrics, tasks, teachers and papers are called in a card."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: its name, the digits and factor of its value, and in which direction it is better."""

    name: str
    digits: int = 3
    factor: float = 1.0
    lower: bool = False
    meaning: str = ""

    @property
    def plain(self) -> str:
        """`str`: the name for values as they are, before `factor`."""
        return self.name.removesuffix(" (%)") if self.factor == 100 else self.name

    def shown(self, value: float) -> str:
        """The value as text."""
        return self.with_spread(value, None)

    def with_spread(self, mean: float, std: float | None) -> str:
        """A mean over seeds with its standard deviation, if there are several, as text."""
        factor = 1.0 if self.factor == 100 and abs(mean) > 1 else self.factor  # it is in per cent already
        values = [mean] if std is None else [mean, std]
        return " ± ".join(f"{factor * value:.{self.digits}f}" for value in values)


# In the order of the table.
METRICS = {
    "accuracy": Metric("Accuracy (%)", 2, 100),
    "top5_accuracy": Metric("Top-5 accuracy (%)", 2, 100),
    "error": Metric("Error (%)", 2, 1, True),
    "f1": Metric("F1", 3),
    "map": Metric("mAP", 3),
    "map_50": Metric("mAP50", 3, 1, False, "mean average precision at an IoU of 0.5"),
    "map_75": Metric("mAP75", 3, 1, False, "mean average precision at an IoU of 0.75"),
    "d_ece": Metric("D-ECE (%)", 2, 1, True, "detection calibration error: how far scores are from precision"),
    "bleu": Metric("BLEU", 1),
    "chrf": Metric("chrF", 1),
    "perplexity": Metric("Perplexity", 2, 1, True),
    "nll": Metric("NLL (nats)", 3, 1, True, "negative log-likelihood of the right class"),
    "ece": Metric("ECE (%)", 2, 1, True, "expected calibration error, 10 bins: how far confidence is from accuracy"),
    "ece_15": Metric("ECE, 15 bins (%)", 2, 1, True),
    "brier": Metric("Brier score", 3, 1, True),
    "aurc": Metric("AURC (x1000)", 1, 1, True, "area under the risk-coverage curve: how well confidence ranks errors"),
    "eaurc": Metric("E-AURC (x1000)", 1, 1, True),
    "token_accuracy": Metric("Token accuracy (%)", 2, 100),
    "token_nll": Metric("Token NLL (nats)", 3, 1, True, "negative log-likelihood of a target token"),
    "token_ece": Metric("Token ECE (%)", 2, 1, True, "expected calibration error of the tokens, 10 bins"),
    "loss": Metric("Loss", 4, 1, True),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # with the user, or of old models without
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time", "epoch")


def metric(name: str) -> Metric:
    """How a metric of this name is shown; one that is not known is shown as it is."""
    of_class = name.removeprefix("map_")
    return METRICS.get(name, Metric(name, 4) if of_class == name else Metric(f"AP of {of_class}", 3))


@dataclass(frozen=True)
class Task:
    """A task as the Hub knows it, the Auto class that loads its models, and what is said of it in words."""

    name: str
    auto: str
    words: str


TASKS = {
    "image-classification": Task("Image Classification", "AutoModelForImageClassification", "image classification"),
    "text-classification": Task("Text Classification", "AutoModelForSequenceClassification", "text classification"),
    "token-classification": Task("Token Classification", "AutoModelForTokenClassification", "token classification"),
    "audio-classification": Task("Audio Classification", "AutoModelForAudioClassification", "audio classification"),
    "video-classification": Task("Video Classification", "AutoModelForVideoClassification", "video classification"),
    "text-generation": Task("Text Generation", "AutoModelForCausalLM", "text generation"),
    "fill-mask": Task("Fill-Mask", "AutoModelForMaskedLM", "masked language modeling"),
    "translation": Task("Translation", "AutoModelForSeq2SeqLM", "translation"),
    "summarization": Task("Summarization", "AutoModelForSeq2SeqLM", "summarization"),
    "text2text-generation": Task("Text-to-Text Generation", "AutoModelForSeq2SeqLM", "text-to-text generation"),
    "object-detection": Task("Object Detection", "AutoModelForObjectDetection", "object detection"),
    "image-segmentation": Task("Image Segmentation", "AutoModelForSemanticSegmentation", "segmentation"),
}
# The groups of classes of transformers, by the task that the Hub knows; the first that holds the class counts.
GROUPS = {
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification",
    "AUDIO_CLASSIFICATION": "audio-classification",
    "VIDEO_CLASSIFICATION": "video-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",  # some of which are masked language models, too
    "MASKED_LM": "fill-mask",
    "CAUSAL_LM": "text-generation",
    "OBJECT_DETECTION": "object-detection",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
}

TEACHERS = {
    "history": "the model's own prediction of the same sample when it was last trained on, in an earlier epoch",
    "snapshot": "the model's own weights at the end of the previous epoch, on the same view of the sample",
    "ema": "a moving average of the model's own weights",
    "predictions": "predictions that were given in a file",
}


@dataclass(frozen=True)
class Paper:
    """A paper: the tag that a model gets, and its BibTeX entry."""

    tag: str
    bibtex: str


PS_KD = Paper(
    "ps-kd",
    """@inproceedings{kim2021pskd,
  title = {Self-Knowledge Distillation with Progressive Refinement of Targets},
  author = {Kim, Kyungyul and Ji, ByeongMoon and Yoon, Doyoung and Hwang, Sangheum},
  booktitle = {ICCV},
  year = {2021}
}""",
)
BORN_AGAIN = Paper(
    "born-again",
    """@inproceedings{furlanello2018born,
  title = {Born Again Neural Networks},
  author = {Furlanello, Tommaso and Lipton, Zachary C. and Tschannen, Michael and Itti, Laurent and Anandkumar, Anima},
  booktitle = {ICML},
  year = {2018}
}""",
)
ZIPF = Paper(
    "zipf-label-smoothing",
    """@inproceedings{liang2022zipf,
  title = {Efficient One Pass Self-distillation with Zipf's Label Smoothing},
  author = {Liang, Jiajun and Li, Linze and Bing, Zhaodong and Zhao, Borui and Tang, Yao and Lin, Bo and
            Fan, Haoqiang},
  booktitle = {ECCV},
  year = {2022}
}""",
)
USKD = Paper(
    "uskd",
    """@inproceedings{yang2023uskd,
  title = {From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
           Customized Soft Labels},
  author = {Yang, Zhendong and Zeng, Ailing and Yuan, Chun and Li, Yu},
  booktitle = {ICCV},
  year = {2023}
}""",
)
SLA = Paper(
    "sla",
    """@inproceedings{lee2020sla,
  title = {Self-supervised Label Augmentation via Input Transformations},
  author = {Lee, Hankook and Hwang, Sung Ju and Shin, Jinwoo},
  booktitle = {ICML},
  year = {2020}
}""",
)
LSSKD = Paper(
    "lsskd",
    """@article{dahri2025lsskd,
  title = {A Layered Self-Supervised Knowledge Distillation Framework for Efficient Multimodal Learning on the Edge},
  author = {Dahri, Tarique and Memon, Zulfiqar Ali and Yu, Zhenyu and Idris, Mohd. Yamani Idna and Khan, Sheheryar and
            Ahmad, Sadiq and Shoman, Maged and Aziz, Saddam and Qureshi, Rizwan},
  journal = {arXiv preprint arXiv:2506.07055},
  year = {2025}
}""",
)
HSAKD = Paper(
    "hsakd",
    """@inproceedings{yang2021hsakd,
  title = {Hierarchical Self-supervised Augmented Knowledge Distillation},
  author = {Yang, Chuanguang and An, Zhulin and Cai, Linhang and Xu, Yongjun},
  booktitle = {IJCAI},
  year = {2021}
}""",
)
BYOT = Paper(
    "byot",
    """@inproceedings{zhang2019byot,
  title = {Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation},
  author = {Zhang, Linfeng and Song, Jiebo and Gao, Anni and Chen, Jingwei and Bao, Chenglong and Ma, Kaisheng},
  booktitle = {ICCV},
  year = {2019}
}""",
)


def papers(method: dict) -> list[Paper]:
    """
    The papers behind a method.

    Args:
        method (`dict`): as in [`~hf_selfkd.cards.CardFacts`].
    """
    found = []
    teacher, heads = method.get("teacher", "none"), method.get("auxiliary_heads")
    if teacher in ("history", "snapshot", "ema"):
        found.append(PS_KD)
    elif teacher == "predictions":
        found.append(BORN_AGAIN)
    elif teacher == "rank":
        found += [ZIPF, USKD] if method.get("rank_label_weights") else [ZIPF]
    if heads:
        layered = heads.get("deep_to_shallow_weight", 0) > 0
        if heads.get("views") == "rotation":
            found += [HSAKD, LSSKD] if layered else [HSAKD]
        elif layered:
            found.append(BYOT)
        if heads.get("heads_to_model_weight", 0) > 0:
            found.append(SLA)
    return found


def measured(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The metrics of an evaluation by their names without the prefix; times and counts are left out."""
    own = {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items() if name.startswith(f"{prefix}_")}
    return {
        name: float(value)
        for name, value in own.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NOT_METRICS
    }
