"""
What auxiliary heads cost: the multiply-adds of training per original image, and the time of inference after them.

For every preset, the multiply-adds (half of the floating point operations of convolutions and matrix products that
`torch.utils.flop_counter` counts, forward, backward and teacher) of the second epoch of a training by `SelfKDTrainer`,
over those of plain training; and the processor time of the same epoch, over that of plain training in the same
process. Then, for a model that has grown heads and lost them again, the multiply-adds and the time of its inference
over those of a model that never had any, in turns.

    OMP_NUM_THREADS=1 python benchmarks/layered_cost.py --model resnet18
    OMP_NUM_THREADS=1 python benchmarks/layered_cost.py --model vit
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings

import torch
from classification import cifar_vit, small_resnet
from step_time import InMemory
from torch.utils.flop_counter import FlopCounterMode
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, PrinterCallback, TrainerCallback

from hf_selfkd import SelfKDConfig, SelfKDTrainer, attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.heads.config import PRESETS


CASES = [(name, alpha) for name in PRESETS for alpha in (0.0, 0.8)]


def make_model(name: str) -> torch.nn.Module:
    """A model for 100 classes of images of 32 x 32 pixels."""
    torch.manual_seed(0)
    if name == "vit":
        return cifar_vit(100)
    if name == "mobilenet_v2":
        return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, num_labels=100))
    return small_resnet(name, 100)


class SecondEpoch(TrainerCallback):
    """Counts operations, or processor seconds, from the beginning of the second epoch to its end."""

    def __init__(self, counts: bool):
        self.counts, self.value = counts, 0.0

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch >= 1:
            self.start = time.process_time()
            self.counter = FlopCounterMode(display=False)
            if self.counts:
                self.counter.__enter__()

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch > 1:
            self.value = time.process_time() - self.start
            if self.counts:
                self.counter.__exit__(None, None, None)
                self.value = self.counter.get_total_flops() / 2


def epoch_of(args: argparse.Namespace, heads: str | None, alpha: float, counts: bool) -> float:
    """Multiply-adds, or processor seconds, of an epoch with a past, per original image."""
    data = InMemory(args.images, 100)
    watch = SecondEpoch(counts)
    with tempfile.TemporaryDirectory() as folder:
        config = SelfKDConfig(
            folder,
            alpha=alpha,
            auxiliary_heads=heads,
            num_train_epochs=2,
            per_device_train_batch_size=args.batch_size,
            optim="sgd",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = SelfKDTrainer(make_model(args.model), config, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.value / args.images


@torch.inference_mode()
def inference(args: argparse.Namespace) -> dict[str, float]:
    """A stripped model against a bare one: equal logits, ratio of multiply-adds, ratio of times."""
    bare, stripped = make_model(args.model).eval(), make_model(args.model).eval()
    strip_auxiliary_heads(attach_auxiliary_heads(stripped, "lsskd_full"))
    images = torch.randn(args.batch_size, 3, 32, 32)
    operations = []
    for model in (bare, stripped):
        with FlopCounterMode(display=False) as counter:
            logits = model(pixel_values=images).logits
        operations.append((counter.get_total_flops(), logits))
    ratios = []
    for number in range(args.rounds):
        seconds = {}
        for model in (bare, stripped) if number % 2 else (stripped, bare):
            start = time.process_time()
            model(pixel_values=images)
            seconds[model] = time.process_time() - start
        ratios.append(seconds[stripped] / seconds[bare])
    return {
        "equal_logits": torch.equal(operations[0][1], operations[1][1]),
        "multiply_adds": operations[1][0] / operations[0][0],
        "time": round(statistics.median(ratios), 4),
        "rounds": args.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet8", choices=("resnet8", "resnet18", "vit", "mobilenet_v2"))
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--images", type=int, default=64, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=200, help="pairs of inferences")
    parser.add_argument("--no_time", action="store_true", help="count multiply-adds of training only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # the counter asks every attribute
    plain = [epoch_of(args, None, 0.0, counts) for counts in (True, False)]
    print(json.dumps({"model": args.model, "plain_mega_multiply_adds": round(plain[0] / 1e6, 2)}))
    for heads, alpha in CASES:
        if heads == "exits" and args.model != "vit":
            continue  # a ResNet with another stem than its configuration's and MobileNet have no exits
        line = {"auxiliary_heads": heads, "alpha": alpha}
        line["multiply_adds"] = round(epoch_of(args, heads, alpha, True) / plain[0], 2)
        if not args.no_time:
            line["time"] = round(epoch_of(args, heads, alpha, False) / plain[1], 2)
        print(json.dumps(line), flush=True)
    print(json.dumps({"inference after strip_auxiliary_heads": inference(args)}))


if __name__ == "__main__":
    main()
