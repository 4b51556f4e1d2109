"""The data of object detection: COCO files, Pascal VOC folders, tables of boxes; read and checked before training."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import ExifTags
from PIL import Image as PILImage

from ..arguments import DetectionDataArguments
from ..data import load_file, with_images


logger = logging.getLogger(__name__)

COCO_PARTS = ("images", "annotations", "categories")
TOLERANCE = 1.0  # pixels by which a box may stand over the edge of its image, and is cut off there
OBJECTS = "objects"  # the column of what `with_objects` makes


# Files and folders


def read_split(split: str, data_args: DetectionDataArguments, cache_dir: str | None) -> Dataset | None:
    """A split from the files or the folder that are given for it, if any."""
    file, folder = getattr(data_args, f"{split}_file"), getattr(data_args, f"{split}_dir")
    if file is None:
        return None if folder is None else read_folder(Path(folder), split, data_args)
    images = Path(file).parent if folder is None else Path(folder)
    if Path(file).suffix == ".json":
        return read_coco(Path(file), images, data_args)
    return with_images(load_file(split, data_args, cache_dir), data_args.image_column_name, images)


def read_folder(folder: Path, split: str, data_args: DetectionDataArguments) -> Dataset:
    """A folder of Pascal VOC, or of images beside their COCO file."""
    if (folder / "Annotations").is_dir() or any(folder.glob("*.xml")):
        return read_voc(folder, getattr(data_args, f"{split}_split_name"), data_args)
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise ValueError(
            f"--{split}_dir {folder} has {len(files)} .json files and no .xml files: it must be of Pascal VOC, or "
            f"have one COCO file; name that in --{split}_file where it is elsewhere."
        )
    return read_coco(files[0], folder, data_args)


def read_coco(file: Path, folder: Path, data_args: DetectionDataArguments) -> Dataset:
    """
    The images that a COCO file names, with their boxes.

    Args:
        file (`Path`): with `images`, `annotations` and `categories`.
        folder (`Path`): of the images.
        data_args ([`DetectionDataArguments`]): names the columns.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(part in content for part in COCO_PARTS):
        raise ValueError(f"{file} is no COCO file: it needs {', '.join(COCO_PARTS)}. Name JSON lines .jsonl.")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = {category["id"]: category["name"] for category in categories}
    objects, images = defaultdict(list), {image["id"] for image in content["images"]}
    for place, annotation in enumerate(content["annotations"]):
        lacking = [field for field in ("image_id", "category_id", "bbox") if field not in annotation]
        if lacking:
            raise ValueError(f"{file}: annotation number {place} has no {', '.join(lacking)}: mend or leave it out.")
        for field, known in (("image_id", images), ("category_id", names)):
            if annotation[field] not in known:
                raise ValueError(
                    f"{file}: annotation number {place} has the unknown {field} {annotation[field]}: mend or leave it "
                    "out."
                )
        crowd = bool(annotation.get("iscrowd", 0))
        objects[annotation["image_id"]].append((annotation["bbox"], names[annotation["category_id"]], crowd))
    rows = [(image["id"], folder / image["file_name"], objects[image["id"]]) for image in content["images"]]
    return _table(rows, list(names.values()), data_args)


def read_voc(folder: Path, name: str, data_args: DetectionDataArguments) -> Dataset:
    """
    The images of a folder of Pascal VOC, with their boxes as they are (no pixel is taken off).

    Args:
        folder (`Path`): has `Annotations` and `JPEGImages`, or .xml files and images side by side.
        name (`str`): the split, where the folder has lists of images in `ImageSets/Main`.
        data_args ([`DetectionDataArguments`]): names the columns.
    """
    annotations, images = folder / "Annotations", folder / "JPEGImages"
    annotations, images = (part if part.is_dir() else folder for part in (annotations, images))
    files = sorted(annotations.glob("*.xml"))
    lists = folder / "ImageSets" / "Main"
    if lists.is_dir():
        if not (lists / f"{name}.txt").is_file():
            found = ", ".join(sorted(path.stem for path in lists.glob("*.txt")))
            raise ValueError(f"{lists} has no {name}.txt, only {found}: name the split with --train_split_name or so.")
        stems = [line.split()[0] for line in (lists / f"{name}.txt").read_text().splitlines() if line.strip()]
        files = [annotations / f"{stem}.xml" for stem in stems]
    rows = [_read_voc_file(file, images) for file in files]
    names = sorted({category for _, _, objects in rows for _, category, _ in objects})
    return _table(rows, names, data_args)


def _read_voc_file(file: Path, images: Path) -> tuple[str, Path, list]:
    try:
        root, objects = ElementTree.parse(file).getroot(), []
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is no annotation of Pascal VOC ({error}): mend or leave it out.") from None
    for found in root.iter("object"):
        sides = [float(found.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        left, top, right, bottom = sides
        objects.append(([left, top, right - left, bottom - top], found.findtext("name", "").strip(), False))
    name = (root.findtext("filename") or "").strip()
    if not (images / name).is_file():  # of an image that was renamed, the name of the annotation is right
        name = next((path.name for path in sorted(images.glob(f"{file.stem}.*")) if path.suffix != ".xml"), name)
    return file.stem, images / name, objects


def _table(rows: list[tuple], names: list[str], data_args: DetectionDataArguments) -> Dataset:
    """A dataset of rows `(id, image, [(box, name, crowd)])`, as tables of boxes are."""
    number = {name: i for i, name in enumerate(names)}
    fields = {data_args.box_field: 0, data_args.category_field: 1, "iscrowd": 2}
    objects = [[(box, number[name], crowd) for box, name, crowd in row[2]] for row in rows]
    columns = {
        "image_id": [row[0] for row in rows],
        data_args.image_column_name: [str(row[1]) for row in rows],
        data_args.objects_column_name: [
            {field: [part[place] for part in own] for field, place in fields.items()} for own in objects
        ],
    }
    kinds = {
        data_args.box_field: [[Value("float64")]],
        data_args.category_field: [ClassLabel(names=names)],
        "iscrowd": [Value("bool")],
    }
    whole = all(isinstance(row[0], int) for row in rows)
    columns["image_id"] = columns["image_id"] if whole else [str(row[0]) for row in rows]
    ids = Value("int64" if whole else "string")
    features = Features({"image_id": ids, data_args.image_column_name: Image(), data_args.objects_column_name: kinds})
    return Dataset.from_dict(columns, features=features)


# Objects


def box_format_of(split: str, data_args: DetectionDataArguments) -> str:
    """The format of the boxes of a split: that of a table is said by `--box_format`."""
    file, folder = (getattr(data_args, name, None) for name in (f"{split}_file", f"{split}_dir"))
    own = Path(file).suffix == ".json" if file is not None else folder is not None
    return "coco" if own else data_args.box_format


def category_names(dataset: Dataset, data_args: DetectionDataArguments) -> list[str]:
    """The names of the categories of the training data, in the order of their numbers."""
    feature = _category_feature(dataset, data_args)
    if isinstance(feature, ClassLabel):
        return feature.names
    values = {value for row in _rows(dataset, data_args) for value in row[data_args.category_field]}
    return [str(value) for value in sorted(values)]


def with_objects(
    dataset: Dataset, names: list[str], data_args: DetectionDataArguments, split: str, box_format: str
) -> Dataset:
    """
    The images of a split, and a column `objects` in one form: `boxes` (left, top, right, bottom in pixels), `labels`
    (numbers into `names`), `iscrowd`, and the `size` of the image (height, width).

    Args:
        dataset ([`~datasets.Dataset`]): with decoded images; without objects, only the size is told.
        names (`list[str]`): the classes of the model.
        data_args ([`DetectionDataArguments`]): name columns and fields.
        split (`str`): for messages.
        box_format (`str`): `"coco"`, `"voc"` or `"yolo"`.

    Raises:
        ValueError: at the first box that cannot be one, and at categories that the model does not know.
    """
    sizes = image_sizes(dataset, data_args.image_column_name)
    kept = dataset.select_columns(
        [name for name in ("image_id", data_args.image_column_name) if name in dataset.column_names]
    )
    if data_args.objects_column_name not in dataset.column_names:
        return kept.add_column(OBJECTS, [{"size": size} for size in sizes])
    reader = _Reader(dataset, names, data_args, split, box_format)
    objects = [reader(*row) for row in enumerate(zip(_rows(dataset, data_args), sizes, strict=True))]
    reader.tell()
    if split == "train" and not any(row["labels"] for row in objects):
        raise ValueError(
            f"The training data have no box in {data_args.objects_column_name}: there is nothing to learn."
        )
    return kept.add_column(OBJECTS, objects)


class _Reader:
    """From the objects of a row to one form, with what is wrong told in one line."""

    def __init__(self, dataset: Dataset, names: list[str], data_args: DetectionDataArguments, split: str, form: str):
        feature = _category_feature(dataset, data_args)
        self.own = feature.names if isinstance(feature, ClassLabel) else None
        self.number = {name: i for i, name in enumerate(names)}
        self.args, self.split, self.form = data_args, split, form
        self.empty: list[int] = []  # rows with a box without area
        self.bare = 0  # images without a box

    def __call__(self, place: int, row: tuple[dict[str, list], tuple[int, int]]) -> dict[str, Any]:
        objects, size = row
        boxes, categories = objects[self.args.box_field], objects[self.args.category_field]
        crowds = objects.get("iscrowd") or [False] * len(boxes)
        if not len(boxes) == len(categories) == len(crowds):
            raise self._error(place, f"has {len(boxes)} boxes and {len(categories)} categories")
        found = {"boxes": [], "labels": [], "iscrowd": []}
        for box, category, crowd in zip(boxes, categories, crowds, strict=True):
            corners, label = self._corners(place, box, size), self._label(place, category)
            if corners is None:
                self.empty.append(place)
                continue
            for name, value in zip(found, (corners, label, bool(crowd)), strict=True):
                found[name].append(value)
        self.bare += not found["labels"]
        return found | {"size": list(size)}

    def _corners(self, place: int, box: Any, size: tuple[int, int]) -> list[float] | None:
        """Left, top, right and bottom in pixels, inside the image; `None` of a box without area."""
        height, width = size
        if box is None or len(box) != 4 or not all(value is not None and math.isfinite(value) for value in box):
            raise self._error(place, f"has the box {box}, which is not four numbers")
        one, two, three, four = map(float, box)
        if self.form == "coco":
            corners = [one, two, one + three, two + four]
        elif self.form == "yolo":
            corners = [one - three / 2, two - four / 2, one + three / 2, two + four / 2]
            corners = [corner * side for corner, side in zip(corners, (width, height, width, height), strict=True)]
        else:
            corners = [one, two, three, four]
        if corners[2] < corners[0] or corners[3] < corners[1]:
            raise self._error(place, f"has the box {box}, which ends before it begins", self._format_remedy())
        low, high = np.array([0, 0, 0, 0]), np.array([width, height, width, height])
        inside = np.clip(corners, low, high)
        if not self.args.clip_boxes and np.abs(inside - corners).max() > TOLERANCE:
            problem = f"has the box {box}, which leaves its image of {width} x {height} pixels"
            raise self._error(place, problem, f"{self._format_remedy()}, or cut boxes off with --clip_boxes")
        corners = inside.tolist()
        return corners if corners[2] > corners[0] and corners[3] > corners[1] else None

    def _label(self, place: int, category: Any) -> int:
        name = self.own[category] if self.own is not None and category is not None else str(category)
        if name not in self.number:
            known = ", ".join(list(self.number)[:12]) + (", ..." if len(self.number) > 12 else "")
            raise self._error(place, f"has the category {name}, which the model does not know", f"it knows {known}")
        return self.number[name]

    def _format_remedy(self) -> str:
        return f"is its format {self.form}? See --box_format" if self.form == self.args.box_format else "mend the file"

    def _error(self, place: int, problem: str, remedy: str = "mend or leave out the row") -> ValueError:
        data = {"train": "training"}.get(self.split, self.split)
        return ValueError(f"Row {place} of the {data} data {problem}: {remedy}.")

    def tell(self) -> None:
        """Say what was left out, and which images are empty."""
        if self.empty:
            logger.warning(
                f"Boxes without area in the {self.split} data, which are left out: {len(self.empty)} (the first in "
                f"row {self.empty[0]})."
            )
        if self.bare:
            logger.info(f"Images without a box in the {self.split} data: {self.bare}.")


def image_sizes(dataset: Dataset, column: str) -> list[tuple[int, int]]:
    """Height and width of all images as they are decoded, from their headers."""
    encoded, sizes = dataset.select_columns(column).cast_column(column, Image(decode=False)), []
    for row in encoded:
        value = row[column]
        with PILImage.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter, when decoded
            sizes.append(image.size if turned else image.size[::-1])
    return sizes


def _rows(dataset: Dataset, data_args: DetectionDataArguments) -> Iterator[dict[str, list]]:
    """The objects of all images, each as lists by field."""
    box, category = data_args.box_field, data_args.category_field
    for place, row in enumerate(dataset.select_columns(data_args.objects_column_name).with_format(None)):
        objects = row[data_args.objects_column_name]
        if isinstance(objects, list):  # one dictionary an object
            objects = {name: [part[name] for part in objects] for name in (objects[0] if objects else ())}
        objects = {name: list(values or ()) for name, values in (objects or {}).items()}
        missing = [
            f for f, name in (("box_field", box), ("category_field", category)) if objects and name not in objects
        ]
        if missing:
            given = getattr(data_args, missing[0])
            raise ValueError(
                f"--{missing[0]} {given}: the objects of row {place} have no such field, only {', '.join(objects)}."
            )
        yield {box: [], category: []} | objects


def _category_feature(dataset: Dataset, data_args: DetectionDataArguments) -> Any:
    """What the categories of the objects are, as the dataset knows it; `None` where it does not."""
    feature = _item(dataset.features[data_args.objects_column_name])
    return _item(feature.get(data_args.category_field)) if isinstance(feature, dict) else None


def _item(feature: Any) -> Any:
    """What a list of a dataset, however it is declared, is made of; anything else as it is."""
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature
