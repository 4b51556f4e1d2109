"""
What early exit gains: time of inference over that of the whole model, in turns within one process, on the CPU.

With `--folder`, of a model that `EarlyExit.save_pretrained` saved, on noise or on the tensors of a `torch.save`d batch
(`--inputs`): a share of samples leaves early that depends on the samples. Without, of a small ViT with random weights
whose thresholds are set so that equal shares of the noise leave at every exit. Of every round the ratio of two times
that follow one another is taken; the table has the median and the quartiles.

    OMP_NUM_THREADS=1 python benchmarks/early_exit.py --rounds 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_selfkd import AuxiliaryHeadsConfig, EarlyExit, attach_auxiliary_heads
from hf_selfkd.early_exit.passing import at_full_depth
from hf_selfkd.heads.inputs import varied_inputs


def random_model(args: argparse.Namespace) -> EarlyExit:
    """A ViT of 12 layers with exits after 3, 6 and 9 of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_attention_heads": args.width // 64}
    model = ViTForImageClassification(ViTConfig(image_size=args.pixels, num_labels=100, **sizes)).eval()
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig.preset("exits", layers=[2, 5, 8]))
    return EarlyExit(model)


def spread_thresholds(early: EarlyExit, inputs: dict[str, torch.Tensor]) -> list[float]:
    """Thresholds at which as many samples leave at each exit as stay to the end, of these samples."""
    with torch.no_grad():
        said = at_full_depth(early.model, early.indices, inputs)
    stay, found = torch.ones(len(said[0]), dtype=torch.bool), []
    for place, logits in enumerate(said[:-1]):
        sure = logits.softmax(-1).amax(-1)
        found.append(float(sure[stay].quantile(1 - 1 / (len(said) - place))))
        stay &= sure < found[-1]
    return found


def seconds(model: torch.nn.Module, parts: list[dict[str, torch.Tensor]]) -> float:
    """Time of inference."""
    start = time.perf_counter()
    with torch.no_grad():
        for part in parts:
            model(**part)
    return time.perf_counter() - start


def measure(early: EarlyExit, inputs: dict[str, torch.Tensor], size: int, rounds: int) -> dict[str, object]:
    """Ratios of times, early exit over the whole model, in alternating order."""
    count = len(next(iter(inputs.values())))
    parts = [{k: v[at : at + size] for k, v in inputs.items()} for at in range(0, count, size)]
    seconds(early, parts[:1]), seconds(early.model, parts[:1])
    early.reset()
    ratios, whole = [], []
    for number in range(rounds):
        order = (early, early.model) if number % 2 else (early.model, early)
        taken = {id(model): seconds(model, parts) for model in order}
        ratios.append(taken[id(early)] / taken[id(early.model)])
        whole.append(1000 * taken[id(early.model)] / count)
    low, middle, high = statistics.quantiles(ratios, n=4)
    shares = early.shares()
    operations = sum(share * cost for share, cost in zip(shares.values(), early.costs, strict=True))
    return {
        "batch": size,
        "ratio": middle,
        "quartiles": [low, high],
        "operations": operations,
        "ms_whole": statistics.median(whole),
        "shares": shares,
        "samples": count,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="of a saved EarlyExit")
    parser.add_argument("--inputs", help="a dictionary of tensors, saved by torch.save")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--output", default="early_exit.jsonl")
    args = parser.parse_args()
    early = EarlyExit.from_pretrained(args.folder) if args.folder else random_model(args)
    inputs = torch.load(args.inputs) if args.inputs else varied_inputs(early.model, args.samples)
    if early.thresholds is None:
        early.thresholds = spread_thresholds(early, inputs)
    print("| batch | time over whole model | quartiles | operations | whole model, ms a sample | share at each exit |")
    print("|---|---|---|---|---|---|")
    for size in (1, 32):
        row = measure(early, inputs, size, args.rounds)
        shares = ", ".join(f"{layers}: {share:.2f}" for layers, share in row["shares"].items())
        low, high = row["quartiles"]
        figures = f"{row['ratio']:.3f} | {low:.3f} to {high:.3f} | {row['operations']:.3f} | {row['ms_whole']:.2f}"
        print(f"| {size} | {figures} | {shares} |")
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"model": args.folder or "random ViT"} | row) + "\n")


if __name__ == "__main__":
    main()
