"""
The arguments of each script, and the table of the scripts.

The module imports nothing heavy, so that `hf-selfkd train TASK --help` can print the arguments at once. The scripts
add the fields of [`SelfKDConfig`], which are those of [`~transformers.TrainingArguments`] and more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


# Models


@dataclass
class ModelArguments:
    """Which model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model, of the Hub or a local folder; leave out to train from scratch."},
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model trained from scratch, such as bert, resnet or gpt2."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a model trained from scratch, of the Hub or a local folder."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": 'Fields of the configuration to change, as JSON: {"num_hidden_layers": 4}.'}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the pretrained model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloaded models and data."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub, if not the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model of the Hub brings."})

    def __post_init__(self):
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("No model: give --model_name_or_path, or --model_type or --config_name for a new one.")

    @property
    def hub(self) -> dict[str, Any]:
        """`dict`: what every `from_pretrained` needs."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class ClassifierArguments(ModelArguments):
    """Which classifier to train."""

    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Make a new classifier where the pretrained one has other classes."}
    )


@dataclass
class TokenizerArguments(ModelArguments):
    """Which model and which tokenizer to train."""

    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the one of the pretrained model."}
    )
    tokenizer_vocab_size: int = field(
        default=8192, metadata={"help": "Tokens of the byte-level BPE that is trained when there is no tokenizer."}
    )


# Data


@dataclass
class DataArguments:
    """Which data to train on."""

    # What a script uses: the splits, the flags that name data, and which `load_dataset` reads files and folders.
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "validation")
    SOURCES: ClassVar[tuple[str, ...]] = ("dataset_name", "train_file")
    FILE_KINDS: ClassVar[dict[str, str]] = {"csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    FOLDER_KIND: ClassVar[str | None] = None

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset of the Hub or a local folder; not used when files are given."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or Parquet file, or glob pattern."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    validation_split_name: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    validation_split_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training data held out when there are no validation data."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many random samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many random samples only."})

    def __post_init__(self):
        if not 0 < self.validation_split_fraction < 1:
            raise ValueError(
                f"--validation_split_fraction {self.validation_split_fraction} is outside (0, 1): 0.1 is "
                "usual; to hold nothing out, give --validation_file or leave out --do_eval."
            )

    def local_flags(self, split: str) -> list[str]:
        """The arguments that name local data of a split."""
        return [name for name in (f"{split}_file", f"{split}_dir") if hasattr(self, name)]

    @property
    def local(self) -> bool:
        """`bool`: whether files or folders are given."""
        return any(getattr(self, name) is not None for split in self.SPLITS for name in self.local_flags(split))


@dataclass
class PredictedDataArguments(DataArguments):
    """Which data to train on, and which to predict."""

    SPLITS = (*DataArguments.SPLITS, "test")

    test_file: str | None = field(
        default=None, metadata={"help": "The same, for prediction; labels or targets are optional."}
    )
    test_split_name: str = field(default="test", metadata={"help": "Split to predict."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict so many random samples only."})


@dataclass
class TokenizedDataArguments:
    """How texts are tokenized."""

    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if that was done before."})


# Image classification


@dataclass
class ImageModelArguments(ClassifierArguments):
    """Which model to train."""

    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not the one of the pretrained model."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Make an image processor for square images of this size instead of loading one."},
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata={"help": "Channel means of an image processor that is made, for pixels in [0, 1]."},
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225],
        metadata={"help": "Channel standard deviations of an image processor that is made."},
    )


@dataclass
class ImageDataArguments(PredictedDataArguments):
    """Which images to train on, and what to do to them."""

    SOURCES = (*DataArguments.SOURCES, "train_dir")
    FOLDER_KIND = "imagefolder"

    train_file: str | None = field(
        default=None,
        metadata={"help": "CSV, JSON or Parquet file or glob pattern; image paths in it are relative to its folder."},
    )
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, for prediction."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes: integers or text."})
    augmentation: Literal["random_resized_crop", "pad_crop", "none"] = field(
        default="random_resized_crop",
        metadata={"help": "Random crops of training images: random_resized_crop, pad_crop (small images) or none."},
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip half of the training images."})
    few_shot_fraction: float = field(
        default=1.0, metadata={"help": "Train on this share of each class only: the same images in every run."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of mixup; 0 is off."})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of CutMix; 0 is off."})
    mix_probability: float = field(default=1.0, metadata={"help": "Share of the batches that are mixed."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.few_shot_fraction <= 1:
            raise ValueError(f"--few_shot_fraction {self.few_shot_fraction} is outside (0, 1].")


# Object detection


@dataclass
class DetectorArguments(ImageModelArguments):
    """Which detector to train."""

    backbone_from: str | None = field(
        default=None,
        metadata={"help": "Image classifier, of the Hub or a local folder, whose weights become the backbone's."},
    )


@dataclass
class DetectionDataArguments(PredictedDataArguments):
    """Which images to train on, where their objects stand, and what to do to them."""

    SOURCES = (*DataArguments.SOURCES, "train_dir")
    FILE_KINDS = {"jsonl": "json", "parquet": "parquet"}

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "COCO file (.json), or Parquet or JSON lines file or glob pattern with images and objects; image "
            "paths in it are relative to --train_dir, or else to its own folder."
        },
    )
    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of images with a COCO file, or of Pascal VOC: Annotations, JPEGImages and, for the split, "
            "ImageSets/Main/SPLIT.txt."
        },
    )
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    test_dir: str | None = field(default=None, metadata={"help": "The same, for prediction."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    objects_column_name: str = field(
        default="objects", metadata={"help": "Column of the objects: a box and a category each."}
    )
    box_field: str = field(default="bbox", metadata={"help": "Where an object has its box."})
    category_field: str = field(default="category", metadata={"help": "Where an object has its category."})
    box_format: Literal["coco", "voc", "yolo"] = field(
        default="coco",
        metadata={
            "help": "Boxes of a table: coco (left, top, width, height) or voc (left, top, right, bottom) in pixels, "
            "or yolo (center, width, height as shares of the image)."
        },
    )
    clip_boxes: bool = field(
        default=False, metadata={"help": "Cut boxes off at the edge of their image instead of refusing them."}
    )
    augmentation: Literal["scale_jitter", "iou_crop", "none"] = field(
        default="scale_jitter",
        metadata={
            "help": "Of training images: scale_jitter (a random crop, or a random place on a larger canvas), iou_crop "
            "(the crops of SSD) or none."
        },
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.8, 1.25], metadata={"help": "Smallest and largest factor of scale_jitter."}
    )
    min_visibility: float = field(
        default=0.3, metadata={"help": "An object of which a crop leaves less than this share is not there."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip half of the training images."})
    vertical_flip: bool = field(
        default=False, metadata={"help": "Turn half of the training images upside down, for images without an above."}
    )
    score_threshold: float = field(
        default=0.3, metadata={"help": "Detections of lower scores are not predicted, drawn, or counted by D-ECE."}
    )
    class_metrics: bool = field(default=False, metadata={"help": "Average precision of each class, too."})
    max_drawn_images: int = field(default=8, metadata={"help": "Draw the predictions of so many test images."})

    def __post_init__(self):
        super().__post_init__()
        low, high = self.scale_range if len(self.scale_range) == 2 else (0, 0)
        if not 0 < low <= high:
            given = " ".join(map(str, self.scale_range))
            raise ValueError(f"--scale_range {given}: give two factors above 0, the smaller one first.")
        for name in ("min_visibility", "score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)} is outside [0, 1].")


# Text classification


@dataclass
class TextModelArguments(TokenizerArguments, ClassifierArguments):
    """Which model and which tokenizer to train."""


@dataclass
class TextDataArguments(TokenizedDataArguments, PredictedDataArguments):
    """Which texts to train on."""

    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    text_pair_column_name: str | None = field(
        default=None, metadata={"help": "Column of the second texts, to classify pairs."}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column of the classes: integers or text."})
    max_seq_length: int = field(default=128, metadata={"help": "Cut texts to so many tokens."})


# Translation


@dataclass
class TranslationModelArguments(TokenizerArguments):
    """Which model and which tokenizer to train."""

    tokenizer_vocab_size: int = field(
        default=8000,
        metadata={"help": "Tokens of the joint byte-level BPE that is trained when there is no tokenizer."},
    )


@dataclass
class TranslationDataArguments(TokenizedDataArguments, PredictedDataArguments):
    """Which sentences to train on."""

    SOURCES = (*DataArguments.SOURCES, "cldr_corpus")

    cldr_corpus: bool = field(
        default=False,
        metadata={"help": "Train on the English-German corpus made of locale data, which needs no download."},
    )
    validation_split_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training data held out when there are no validation data."}
    )
    source_lang: str = field(default="en", metadata={"help": "Language to translate from, as the data name it."})
    target_lang: str = field(default="de", metadata={"help": "Language to translate into, as the data name it."})
    source_column: str | None = field(
        default=None, metadata={"help": "Column to translate from, if not named after --source_lang."}
    )
    target_column: str | None = field(
        default=None, metadata={"help": "Column to translate into, if not named after --target_lang."}
    )
    translation_column: str = field(
        default="translation", metadata={"help": "Column that holds both languages, in datasets that have it (WMT)."}
    )
    source_lang_code: str | None = field(
        default=None, metadata={"help": "How a multilingual tokenizer names the language, if otherwise: eng_Latn."}
    )
    target_lang_code: str | None = field(default=None, metadata={"help": "The same for the target: deu_Latn."})
    source_prefix: str = field(default="", metadata={"help": "Text before every source sentence, for T5."})
    max_source_length: int = field(default=128, metadata={"help": "Cut source sentences to so many tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Cut target sentences to so many tokens."})
    bleu_tokenizer: str = field(default="13a", metadata={"help": "How sacrebleu splits words, such as zh, ja-mecab."})

    def __post_init__(self):
        super().__post_init__()
        if self.cldr_corpus and (self.local or self.dataset_name is not None):
            raise ValueError("--cldr_corpus is a corpus of its own: leave out the corpus or the other data.")


# Language modeling


@dataclass
class LanguageModelArguments(TokenizerArguments):
    """Which model and which tokenizer to train."""

    objective: Literal["causal", "masked"] = field(
        default="causal", metadata={"help": "Predict the next token (causal) or hidden ones (masked)."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights; for speed use --bf16, which keeps them in float32."}
    )

    @property
    def masked(self) -> bool:
        """`bool`: whether hidden tokens are predicted, and not the next one."""
        return self.objective == "masked"


@dataclass
class LanguageDataArguments(TokenizedDataArguments, DataArguments):
    """Which texts to train on."""

    FILE_KINDS = {"txt": "text", **DataArguments.FILE_KINDS}

    train_file: str | None = field(
        default=None, metadata={"help": "Text, CSV, JSON or Parquet file, or glob pattern; of .txt, a line is a text."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column of the texts."})
    block_size: int = field(
        default=256, metadata={"help": "Most tokens of a sample: a longer text is cut into several."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict, when masked."})
    fixed_masking: bool = field(
        default=False, metadata={"help": "Choose the masks of a training text once and not in every epoch."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} is outside (0, 1): 0.15 is usual.")
        if self.block_size < 2:
            raise ValueError(f"--block_size {self.block_size} leaves no token to predict: give at least 2.")


@dataclass(frozen=True)
class Script:
    """
    A script of the table.

    Args:
        module (`str`): its module in `hf_selfkd.scripts`, which has `make_parser` and `main`.
        summary (`str`): what it trains, in one sentence.
        arguments (`tuple`): the dataclasses of its own arguments.
        config (`str`): the name of the training arguments that are added to them.
        unsmoothed (`str`, *optional*): why labels cannot be smoothed, if they cannot.
    """

    module: str
    summary: str
    arguments: tuple[type, ...]
    config: str = "SelfKDConfig"
    unsmoothed: str | None = None


SCRIPTS = {
    "image-classification": Script(
        "image_classification",
        "Train any AutoModelForImageClassification, timm models included.",
        (ImageModelArguments, ImageDataArguments),
    ),
    "object-detection": Script(
        "detection.object_detection",
        "Train any AutoModelForObjectDetection: DETR and its relatives, RT-DETR, D-FINE, YOLOS.",
        (DetectorArguments, DetectionDataArguments),
        unsmoothed="the losses of detectors have no smoothed targets",
    ),
    "text-classification": Script(
        "text_classification",
        "Train any AutoModelForSequenceClassification, on texts or pairs of texts.",
        (TextModelArguments, TextDataArguments),
    ),
    "translation": Script(
        "translation",
        "Train any AutoModelForSeq2SeqLM to translate; without arguments, compare three methods on a small corpus.",
        (TranslationModelArguments, TranslationDataArguments),
        "Seq2SeqSelfKDConfig",
    ),
    "language-modeling": Script(
        "language_modeling",
        "Train any AutoModelForCausalLM or AutoModelForMaskedLM, one text a sample.",
        (LanguageModelArguments, LanguageDataArguments),
    ),
}


def command_of(task: str) -> str:
    """The command that runs a script."""
    return f"hf-selfkd train {task}"
