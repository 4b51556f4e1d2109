"""`hf-selfkd train object-detection` and its metrics: tiny detectors, pictures of colored squares made on the spot."""

import json
import math
import shutil
from types import SimpleNamespace
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from detectors import tiny_resnet
from helpers import results, same_weights
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    HGNetV2Config,
    HGNetV2ForImageClassification,
    ResNetForImageClassification,
    RTDetrImageProcessor,
    pipeline,
)
from typer.testing import CliRunner

from hf_selfkd.cli import app
from hf_selfkd.metrics import DetectionMetrics, detection_ece, detection_metrics, is_lower_better
from hf_selfkd.metrics.detection import detections_that_are_right, objects_of
from hf_selfkd.scripts.arguments import DetectionDataArguments
from hf_selfkd.scripts.detection import data
from hf_selfkd.scripts.detection import object_detection as script
from hf_selfkd.scripts.detection.predictions import detections, objects
from hf_selfkd.scripts.detection.transforms import Augmentation, DetectionCollator, DetectionTransform


NAMES = ("blue", "green", "red")  # in the order of the alphabet, as Pascal VOC has no other
COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
WIDTH, HEIGHT = 48, 40
DETR = {
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": [4, 8, 8, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
    "num_queries": 6,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
HGNET = {
    "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 8, 8, 8],
    "stage_mid_channels": [4, 4, 4, 4],
    "stage_out_channels": [8, 8, 8, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 3, 3],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 16],
    "depths": [1, 1, 1, 1],
}
D_FINE = {
    "backbone_config": HGNET | {"model_type": "hgnet_v2", "out_features": ["stage2", "stage3", "stage4"]},
    "encoder_in_channels": [8, 8, 16],
    "encoder_hidden_dim": 16,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_in_channels": [16, 16, 16],
    "d_model": 16,
    "num_queries": 8,
    "num_denoising": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "hidden_expansion": 0.5,
    "max_num_bins": 8,
    "eval_size": None,
}
RUN = {
    "model_type": "detr",
    "config_overrides": DETR,
    "image_size": 32,
    "do_train": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": "1e-3",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


# Data made on the spot


def scenes(count=8, seed=0):
    """Pictures and their objects `(name, [left, top, width, height])`; no two overlap, picture 3 has none."""
    rng, found = np.random.default_rng(seed), []
    for n in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
        own = []
        for column in range(0 if n == 3 else 1 + n % 3):  # each has a column of its own
            width, height = rng.integers(6, 13, size=2).tolist()
            left, top = 16 * column + int(rng.integers(16 - width)), int(rng.integers(HEIGHT - height))
            name = NAMES[int(rng.integers(3))]
            pixels[top : top + height, left : left + width] = COLORS[name]
            own.append((name, [left, top, width, height]))
        found.append((PILImage.fromarray(pixels), own))
    return found


def write_coco(folder, pictures):
    """A folder of pictures with their COCO file, whose categories have ids with gaps."""
    folder.mkdir(parents=True)
    numbers = {name: 10 * place + 3 for place, name in enumerate(NAMES)}
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for n, i in numbers.items()]}
    for n, (picture, own) in enumerate(pictures):
        picture.save(folder / f"{n}.png")
        content["images"].append({"id": 100 + n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT})
        for name, box in own:
            entry = {"id": 7 * len(content["annotations"]), "image_id": 100 + n, "category_id": numbers[name]}
            content["annotations"].append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def write_voc(folder, pictures, splits):
    """A folder of Pascal VOC, with lists of images."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for n, (picture, own) in enumerate(pictures):
        picture.save(folder / "JPEGImages" / f"{n}.png")
        parts = [
            f"<object><name>{escape(name)}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for name, (x, y, w, h) in own
        ]
        xml = f"<annotation><filename>{n}.png</filename>{''.join(parts)}</annotation>"
        (folder / "Annotations" / f"{n}.xml").write_text(xml)
    for name, places in splits.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(map(str, places)) + "\n")
    return folder


def table_of(pictures, form="coco", as_rows=False, objects=True):
    """A dataset of the pictures, its boxes in a format, one list a field or one dictionary an object."""
    rows = []
    for picture, own in pictures:
        boxes = []
        for _, (x, y, w, h) in own:
            voc, center = [x, y, x + w, y + h], [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
            boxes.append({"coco": [x, y, w, h], "voc": voc, "yolo": center}[form])
        boxes, names = [list(map(float, box)) for box in boxes], [name for name, _ in own]
        entry = {"bbox": boxes, "category": names}
        if as_rows:
            entry = [{"bbox": box, "category": name} for box, name in zip(boxes, names, strict=True)]
        rows.append({"image": picture} | ({"objects": entry} if objects else {}))
    kinds = {"bbox": [[Value("float64")]], "category": [Value("string")]}
    if as_rows:
        kinds = [{"bbox": [Value("float64")], "category": Value("string")}]
    return Dataset.from_list(rows, features=Features({"image": Image()} | ({"objects": kinds} if objects else {})))


def read(split="train", **flags):
    """The objects of a split, as the script reads and checks them."""
    args = DetectionDataArguments(**flags)
    dataset = data.read_split(split, args, None)
    names = data.category_names(dataset, args)
    return data.with_objects(dataset, names, args, split, data.box_format_of(split, args)), names


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "coco", scenes())


@pytest.fixture
def run(run_script):
    return run_script


# Reading


def test_coco_pascal_voc_and_tables_are_read_equal(tmp_path, coco):
    pictures = scenes()
    wanted = [
        {
            "boxes": [[float(x), float(y), float(x + w), float(y + h)] for _, (x, y, w, h) in own],
            "labels": [NAMES.index(name) for name, _ in own],
            "iscrowd": [False] * len(own),
            "size": [HEIGHT, WIDTH],
        }
        for _, own in pictures
    ]
    voc = write_voc(tmp_path / "voc", pictures, {"train": range(8), "val": [6, 2]})
    sources = {
        "coco": {"train_dir": coco},
        "coco, file elsewhere": {"train_file": shutil.move(coco / "_annotations.coco.json", tmp_path / "a.json")},
        "voc": {"train_dir": voc},
    }
    write_coco(tmp_path / "again", pictures)
    sources["coco"] = {"train_dir": tmp_path / "again"}
    sources["coco, file elsewhere"] |= {"train_dir": coco}
    for form, as_rows in (("coco", False), ("voc", True), ("yolo", False)):
        file = tmp_path / f"{form}.parquet"
        table_of(pictures, form, as_rows).to_parquet(file)
        sources[form] = {"train_file": str(file), "box_format": form}
    for source, flags in sources.items():
        found, names = read(**{name: str(value) for name, value in flags.items()})
        assert tuple(names) == NAMES, source
        for row, own, (picture, _) in zip(found, wanted, pictures, strict=True):
            assert np.allclose(row["objects"].pop("boxes"), own["boxes"]), source
            assert row["objects"] == {name: own[name] for name in ("labels", "iscrowd", "size")}, source
            assert np.array_equal(np.asarray(row["image"].convert("RGB")), np.asarray(picture)), source
    validation, names = read("validation", validation_dir=str(voc), validation_split_name="val")
    found = [[names[label] for label in row["objects"]["labels"]] for row in validation]
    assert found == [[name for name, _ in pictures[n][1]] for n in (6, 2)]
    with pytest.raises(ValueError, match="has no test.txt, only train, val: name the split with"):
        read("test", test_dir=str(voc))
    (voc / "Annotations" / "0.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match="0.xml is no annotation of Pascal VOC .no element"):
        read(train_dir=str(voc))


def test_paths_of_json_lines_are_relative_to_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    lines = []
    for n, (picture, own) in enumerate(scenes()):
        picture.save(tmp_path / "pictures" / f"{n}.png")
        entry = {"bbox": [list(map(float, box)) for _, box in own], "category": [name for name, _ in own]}
        lines.append(json.dumps({"image": f"pictures/{n}.png", "objects": entry}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found, names = read(train_file=str(tmp_path / "train.jsonl"))
    assert tuple(names) == NAMES and found[3]["objects"]["labels"] == [] and found[0]["image"].size == (WIDTH, HEIGHT)


def test_boxes_without_area_are_left_out_and_edges_are_cut(tmp_path, caplog):
    pictures = scenes(2)
    name = pictures[0][1][0][0]
    pictures[0] = (pictures[0][0], [(name, [5, 5, 0, 8]), (name, [-0.5, 10, 8, 8])])
    pictures[1] = (pictures[1][0], [(name, [40, 30, 20, 30])])
    table_of(pictures).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of the training data has the box .*leaves its image of 48 x 40"):
        read(train_file=str(tmp_path / "t.parquet"))
    with caplog.at_level("WARNING", logger="hf_selfkd"):
        found, _ = read(train_file=str(tmp_path / "t.parquet"), clip_boxes=True)
    assert "Boxes without area in the train data, which are left out: 1 (the first in row 0)" in caplog.text
    assert found[0]["objects"]["boxes"] == [[0, 10, 7.5, 18]] and found[1]["objects"]["boxes"] == [[40, 30, 48, 40]]


def change(coco, change):
    file = coco / "_annotations.coco.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: c["annotations"][0].update(bbox=[40, 3, 20, 10]), r"Row 0 .* leaves its image of 48 x 40 pixels"),
        (lambda c: c["annotations"][0].update(bbox=[4, 3, -2, 10]), "Row 0 .* ends before it begins"),
        (lambda c: c["annotations"][0].update(bbox=[4, 3, float("nan"), 10]), "Row 0 .* is not four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[4, 3, 5]), "Row 0 .* is not four numbers"),
        (lambda c: c["annotations"][0].update(category_id=4), "annotation number 0 has the unknown category_id 4"),
        (lambda c: c["annotations"][0].update(image_id=4), "annotation number 0 has the unknown image_id 4"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotation number 1 has no bbox: mend or leave it out"),
        (lambda c: c["annotations"].clear(), "The training data have no box in objects: there is nothing to learn"),
        (lambda c: c.pop("categories"), "is no COCO file: it needs images, annotations, categories"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_told(run, coco, wrong, message):
    change(coco, wrong)
    with pytest.raises(ValueError, match=message) as error:
        run(script, RUN | {"train_dir": coco})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_dir": None}, "No data: give --dataset_name, --train_file or --train_dir"),
        (
            {"objects_column_name": "boxes"},
            "--objects_column_name boxes is not a column of the train data: .* objects",
        ),
        ({"box_field": "box"}, "--box_field box: the objects of row 0 have no such field, only bbox, category"),
        ({"box_format": "yolo"}, "leaves its image.*is its format yolo. See --box_format, or cut boxes off with"),
        ({"scale_range": [1.2, 0.8]}, "--scale_range 1.2 0.8: give two factors above 0, the smaller one first"),
        ({"min_visibility": 2}, "--min_visibility 2.0 is outside"),
        (
            {"validation_dir": "empty", "do_eval": True},
            "has 0 .json files and no .xml files: it must be of Pascal VOC",
        ),
        ({"validation_file": "other.parquet", "do_eval": True}, "Row 0 of the validation data has the category gray"),
        ({"auxiliary_heads": "lsskd"}, "auxiliary_heads"),
    ],
)
def test_what_is_wrong_is_told(run, tmp_path, monkeypatch, setting, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    table_of(scenes()).to_parquet("train.parquet")
    table_of([(scenes(1)[0][0], [("gray", [1, 1, 8, 8])])]).to_parquet("other.parquet")
    files = {"train_dir": None} if "train_dir" in setting else {"train_file": "train.parquet"}
    with pytest.raises(ValueError, match=message) as error:
        run(script, RUN | files | setting)
    assert "\n" not in str(error.value)


# Augmentation


def as_it_is(images, **options):
    """An image processor that does nothing."""
    return {"pixel_values": [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]}


@pytest.mark.parametrize("augmentation", ["scale_jitter", "iou_crop", "none"])
def test_ids_stay_with_their_objects(augmentation):
    """Each object has a color of its own: its box must be where that color is, and the ids those of what is left."""
    args = DetectionDataArguments(augmentation=augmentation, scale_range=[0.5, 3.0], vertical_flip=True)
    transform = DetectionTransform(as_it_is, "image", Augmentation(args), args.min_visibility)
    colors = [(255, 40 * n, 0) for n in range(6)]
    boxes = [[10 * n + 2, 7 * n + 1, 10 * n + 9, 7 * n + 7] for n in range(6)]
    pixels = np.full((45, 64, 3), 128, dtype=np.uint8)
    for color, (left, top, right, bottom) in zip(colors, boxes, strict=True):
        pixels[top:bottom, left:right] = color
    crowd = [False] * 5 + [True]
    row = {"boxes": boxes, "labels": [5, 4, 3, 2, 1, 0], "iscrowd": crowd, "size": [45, 64]}
    lost, seen = 0, set()
    for seed in range(40):
        torch.manual_seed(seed)
        item = transform({"image": [PILImage.fromarray(pixels)], "objects": [row]})
        image, labels = item["pixel_values"][0], item["labels"][0]
        height, width = image.shape[1:]
        shares = {
            n: int((image == torch.tensor(color).view(3, 1, 1)).all(0).sum()) / 42 for n, color in enumerate(colors)
        }
        ids = labels["annotation_id"].tolist()
        sure = 0.52 if augmentation == "iou_crop" else 0.32  # SSD's crops leave out what has its center outside, too
        assert {n for n in range(5) if shares[n] > sure} <= set(ids) <= {n for n in range(5) if shares[n] > 0.28}
        assert labels["class_labels"].tolist() == [5 - n for n in ids]
        for n, (x, y, w, h) in zip(ids, (labels["boxes"] * torch.tensor([width, height] * 2)).tolist(), strict=True):
            place = (image == torch.tensor(colors[n]).view(3, 1, 1)).all(0).nonzero()
            (top, left), (bottom, right) = place.min(0).values.tolist(), (place.max(0).values + 1).tolist()
            assert np.allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], [left, top, right, bottom], atol=1e-3)
        assert labels["orig_size"].tolist() == [45, 64]
        lost += 5 - len(ids)
        seen.add(tuple(ids))
    assert lost == 0 if augmentation == "none" else lost > 20 and len(seen) > 5


def test_scale_jitter_makes_larger_and_smaller():
    sizes = []
    for low, high in ((0.5, 0.5), (2.0, 2.0)):
        augment = Augmentation(DetectionDataArguments(scale_range=[low, high], horizontal_flip=False))
        image, _ = augment(PILImage.new("RGB", (40, 20)), torch.tensor([[1.0, 1, 5, 5]]))
        sizes.append(image.size)
    assert sizes == [(80, 40), (20, 10)]


def test_crowds_are_for_evaluation_only():
    row = {"boxes": [[0, 0, 24, 20], [24, 20, 48, 40]], "labels": [1, 2], "iscrowd": [True, False], "size": [40, 48]}
    labels = DetectionTransform(as_it_is, "image").item(PILImage.new("RGB", (48, 40)), row)["labels"]
    assert labels["class_labels"].tolist() == [2] and labels["crowd_labels"].tolist() == [1]
    table = objects([labels], labels["orig_size"][None])
    assert table.tolist() == [[[24, 20, 48, 40, 2, 0], [0, 0, 24, 20, 1, 1]]]


def test_images_of_several_sizes_are_padded_and_masked():
    items = [{"pixel_values": torch.ones(3, *size), "labels": {}} for size in ((4, 6), (5, 3))]
    takes, takes_not = (
        SimpleNamespace(forward=f) for f in (lambda pixel_values, pixel_mask: 0, lambda pixel_values: 0)
    )
    batch = DetectionCollator(takes)(items)
    assert batch["pixel_values"].shape == (2, 3, 5, 6) and batch["pixel_mask"].sum((1, 2)).tolist() == [24, 15]
    assert torch.equal(batch["pixel_values"][:, 0].long(), batch["pixel_mask"])
    assert "pixel_mask" not in DetectionCollator(takes)(items[:1])
    with pytest.raises(ValueError, match="takes no pixel_mask.*give --image_size"):
        DetectionCollator(takes_not)(items)


# Metrics


def random_images(rng, count):
    """Predictions and targets with many ties, near misses and crowds."""
    predictions, targets = [], []
    for _ in range(count):
        n, m = rng.integers(0, 12), rng.integers(0, 6)
        corner = rng.integers(0, 20, size=(m, 2))
        boxes = np.concatenate([corner, corner + rng.integers(4, 12, size=(m, 2))], axis=1).astype(float)
        chosen = boxes[rng.integers(m, size=n)] if m else np.tile([0.0, 0, 5, 5], (n, 1))
        near = chosen + rng.integers(-2, 3, size=(n, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        scores = rng.integers(1, 20, size=n) / 20
        predictions.append({"boxes": near, "scores": scores, "labels": rng.integers(0, 2, size=n)})
        targets.append({"boxes": boxes, "labels": rng.integers(0, 2, size=m), "iscrowd": rng.random(m) < 0.2})
    return predictions, targets


def naive_ece(predictions, targets, iou_threshold, score_threshold, bins):
    """Loops over detections and bins, with areas counted in a grid of whole pixels."""

    def cells(box):
        left, top, right, bottom = map(int, box)
        return {(x, y) for x in range(left, right) for y in range(top, bottom)}

    judged = []
    for prediction, target in zip(predictions, targets, strict=True):
        taken = set()
        for place in sorted(range(len(prediction["scores"])), key=lambda place: -prediction["scores"][place]):
            score, kind = prediction["scores"][place], prediction["labels"][place]
            if score < score_threshold:
                continue
            own, best, where, crowded = cells(prediction["boxes"][place]), -1.0, None, False
            for n, (box, label) in enumerate(zip(target["boxes"], target["labels"], strict=True)):
                other = cells(box)
                if label != kind:
                    continue
                if target["iscrowd"][n]:
                    crowded |= len(own & other) / len(own) >= iou_threshold
                elif n not in taken and len(own & other) / len(own | other) > best:
                    best, where = len(own & other) / len(own | other), n
            if where is not None and best >= iou_threshold:
                taken.add(where)
                judged.append((score, True))
            elif not crowded:
                judged.append((score, False))
    total = 0.0
    for b in range(bins):
        inside = [(s, r) for s, r in judged if b / bins < s <= (b + 1) / bins + 1e-12 and not s <= b / bins + 1e-12]
        if inside:
            total += abs(sum(s for s, _ in inside) - sum(r for _, r in inside)) / len(judged)
    return 100 * total


@pytest.mark.parametrize(("iou", "score", "bins"), [(0.5, 0.3, 10), (0.5, 0.0, 10), (0.75, 0.5, 5)])
def test_detection_ece_is_that_of_loops(iou, score, bins):
    predictions, targets = random_images(np.random.default_rng(0), 60)
    found = detection_ece(predictions, targets, iou, score, bins)
    assert found == pytest.approx(naive_ece(predictions, targets, iou, score, bins), abs=1e-9) and found > 5


def test_metrics_of_a_case_worked_out_by_hand():
    """Two objects of class 0, one of class 1; found: one of class 0 twice, and nothing of class 1."""
    boxes = [[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 20, 10, 30]]
    target = {"boxes": boxes, "labels": [0, 0, 1]}
    prediction = {"boxes": [boxes[0], boxes[0]], "scores": [0.9, 0.6], "labels": [0, 0]}
    found = detection_metrics([prediction], [target], class_names=["a", "b", "c"])
    # Precision 1 up to half the recall: 51 of COCO's 101 points.
    assert found["map_a"] == pytest.approx(51 / 101) and found["map_b"] == 0 and math.isnan(found["map_c"])
    assert found["map"] == found["map_50"] == found["map_75"] == pytest.approx(51 / 202)
    assert found["d_ece"] == pytest.approx(100 * (0.1 + 0.6) / 2)
    scores, right = detections_that_are_right([prediction], [target])
    assert scores.tolist() == [0.9, 0.6] and right.tolist() == [True, False]
    nothing = {"boxes": [], "scores": [], "labels": []}
    assert math.isnan(detection_ece([nothing], [target]))
    assert detection_metrics([nothing], [target])["map"] == 0 and is_lower_better("eval_d_ece")
    assert math.isnan(detection_metrics([prediction], [nothing])["map"])


def test_metrics_come_batch_by_batch_too():
    rng = np.random.default_rng(1)
    found = np.full((6, 5, 6), -100.0)
    truth = np.full((6, 4, 6), -100.0)
    for n in range(6):
        for table, count in ((found, n % 5 + 1), (truth, n % 4)):
            corner = rng.uniform(0, 20, size=(count, 2))
            table[n, :count, :4] = np.concatenate([corner, corner + 10], axis=1)
        found[n, : n % 5 + 1, 4:] = np.stack([rng.uniform(size=n % 5 + 1), rng.integers(2, size=n % 5 + 1)], axis=1)
        truth[n, : n % 4, 4:] = np.stack([rng.integers(2, size=n % 4), np.zeros(n % 4)], axis=1)
    measure = DetectionMetrics(score_threshold=0.0)
    whole = measure((found, truth))
    assert measure.signatures["d_ece"] == "IoU 0.5, scores from 0, 10 bins, 16 detections"
    assert measure((found[:2], truth[:2, :1]), compute_result=False) == {}
    assert measure((found[2:], truth[2:]), compute_result=True) == whole
    assert measure(([found[:2], found[2:]], [truth[:2], truth[2:]])) == whole
    assert [len(image["labels"]) for image in objects_of(truth)] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("no_object", [True, False])
def test_detections_are_those_of_the_image_processors(no_object):
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        logits=torch.randn(2, 7, 4, generator=generator), pred_boxes=torch.rand(2, 7, 4, generator=generator)
    )
    sizes = torch.tensor([[40, 48], [30, 20]])
    table = detections(vars(outputs), sizes, no_object)
    processor = DetrImageProcessor() if no_object else RTDetrImageProcessor()
    for own, wanted in zip(
        table, processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes), strict=True
    ):
        order = wanted["scores"].argsort(descending=True)
        assert torch.allclose(own[:, 4], wanted["scores"][order]) and torch.equal(
            own[:, 5].long(), wanted["labels"][order]
        )
        assert torch.allclose(own[:, :4], wanted["boxes"][order], atol=1e-4)


# The script


def test_training_from_a_folder(run, coco, tmp_path):
    settings = RUN | {"train_dir": coco, "validation_dir": coco, "test_dir": coco, "do_eval": True, "do_predict": True}
    settings |= {"save_strategy": "epoch", "seed_transforms": True, "logging_steps": 1, "score_threshold": 0.0}
    settings |= {"class_metrics": True, "max_drawn_images": 3, "num_train_epochs": 3}
    out = run(script, settings)
    found = results(out, "eval")
    assert {"eval_map", "eval_map_50", "eval_map_75", "eval_d_ece", "eval_map_red", "eval_loss"} <= found.keys()
    assert found["eval_map"] == results(out, "predict")["predict_map"]
    assert "IoU 0.5, scores from 0, 10 bins" in found["eval_d_ece_signature"]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    shares = [entry["rows_with_history"] for entry in log if "rows_with_history" in entry]
    assert shares[:2] == [0, 0] and max(shares[2:]) > 0.5  # random crops keep the ids
    assert AutoModelForObjectDetection.from_pretrained(out).config.id2label == dict(enumerate(NAMES))

    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["image_id"]) for line in lines] == [(n, 100 + n) for n in range(8)]
    processor = AutoImageProcessor.from_pretrained(out)
    tell = pipeline("object-detection", model=str(out), image_processor=processor, threshold=0.0)
    told = sorted(tell(str(coco / "0.png")), key=lambda one: -one["score"])
    assert len(told) == len(lines[0]["detections"]) == 6
    for own, other in zip(lines[0]["detections"], told, strict=True):
        assert own["label"] == other["label"] and own["score"] == pytest.approx(other["score"], abs=1e-4)
        assert all(abs(own["box"][side] - other["box"][side]) <= 1 for side in other["box"])
    pictures = sorted((out / "predictions").iterdir())
    assert [path.name for path in pictures] == ["0000.png", "0001.png", "0002.png"]
    drawn, plain = (np.asarray(PILImage.open(path).convert("RGB")) for path in (pictures[0], coco / "0.png"))
    assert drawn.shape == plain.shape and (drawn != plain).any()

    card = ModelCard.load(out / "README.md").data
    metrics = {result.metric_type: result.metric_name for result in card.eval_results}
    assert card.pipeline_tag == "object-detection" and "object-detection" in card.tags
    assert metrics["map"] == "mAP" and metrics["map_50"] == "mAP50" and metrics["d_ece"] == "D-ECE (%)"
    assert metrics["map_red"] == "AP of red"

    resumed = tmp_path / "resumed"
    first = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    shutil.copytree(first, resumed / first.name)
    run(script, settings | {"output_dir": resumed})
    whole, again, fresh = (AutoModelForObjectDetection.from_pretrained(path) for path in (out, resumed, first))
    assert same_weights(whole, again) and not same_weights(whole, fresh)


def test_a_trained_detector_is_evaluated_and_predicts(run, coco, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = run(script, RUN | {"train_dir": coco, "validation_dir": coco, "do_eval": True})
    words = ["evaluate", "object-detection", str(out), "--test_dir", str(coco), "--output_dir", str(tmp_path / "e")]
    words += ["--use_cpu", "--disable_tqdm", "true", "--cache_dir", str(tmp_path / "cache")]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "mAP50" in done.output and "predictions.jsonl" in done.output
    again, first = results(tmp_path / "e", "predict"), results(out, "eval")
    assert again["predict_map"] == pytest.approx(first["eval_map"]) and again["predict_loss"] > 0
    # Pictures of which nothing is known.
    table_of(scenes(), objects=False).to_parquet(tmp_path / "new.parquet")
    words[0], words[3:7] = (
        "predict",
        ["--test_file", str(tmp_path / "new.parquet"), "--output_dir", str(tmp_path / "p")],
    )
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--score_threshold", "0"], catch_exceptions=False)
    assert done.exit_code == 0 and "predictions.jsonl" in done.output
    assert "predict_map" not in results(tmp_path / "p", "predict")
    assert len((tmp_path / "p" / "predictions.jsonl").read_text().splitlines()) == 8


def test_a_classifier_becomes_the_backbone(coco, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.manual_seed(5)
    classifier = HGNetV2ForImageClassification(HGNetV2Config(**HGNET, num_labels=4))
    classifier.save_pretrained(tmp_path / "classifier")
    ResNetForImageClassification(tiny_resnet()).save_pretrained(tmp_path / "resnet")
    flags = ["--model_type", "d_fine", "--config_overrides", json.dumps(D_FINE), "--image_size", "64", "--do_train"]
    flags += ["--train_dir", str(coco), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]
    built = script.build([*flags, "--backbone_from", str(tmp_path / "classifier")])
    weights = built.trainer.model.model.backbone.model.state_dict()
    own = classifier.hgnet_v2.state_dict() if hasattr(classifier, "hgnet_v2") else classifier.base_model.state_dict()
    shared = [name for name in weights if name in own]
    assert len(shared) > 20 and all(torch.equal(weights[name], own[name]) for name in shared)
    built.trainer.args.max_steps = 1
    built.trainer.train()
    assert built.trainer.state.global_step == 1
    with pytest.raises(ValueError, match="no part of DFineForObjectDetection has all its weights in ResNet"):
        script.build([*flags, "--backbone_from", str(tmp_path / "resnet")])


def test_more_objects_than_queries_are_told(coco, run, caplog):
    few = DETR | {"num_queries": 2}
    with caplog.at_level("WARNING", logger="hf_selfkd"):
        run(script, RUN | {"config_overrides": few, "train_dir": coco, "max_steps": 1})
    assert "An image has 3 objects and DetrForObjectDetection 2 queries" in caplog.text
