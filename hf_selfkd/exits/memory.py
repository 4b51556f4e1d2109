"""
The peak of memory of models, each in a process of its own.

The process that is started imports the libraries and then forks once for each model, so that all of them start from
the same state: what the peak of such a fork is above its start is what the model and its forward pass have added.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)


def peak_memory(places: list[Path], inputs: dict[str, Any], threads: int) -> list[int] | None:
    """
    What loading each model and running it once add to the resident memory of a process, at most, in bytes.

    Args:
        places (`list[Path]`): folders of models of transformers, and ONNX files.
        inputs (`dict[str, torch.Tensor]`): what they are run on.
        threads (`int`): of the forward pass.

    Returns:
        `list[int]`: in the order of the places; `None` where the system does not tell (that is, not Linux).
    """
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.contiguous() for name, value in inputs.items()}, f"{folder}/inputs.safetensors")
        words = [f"{folder}/inputs.safetensors", str(threads), *map(str, places)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", __name__, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")][-1]
    except IndexError:
        found = []
    if done.returncode or len(found) != len(places) or not all(found):
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        logger.warning(f"The peak of memory is left out: the process that measures it failed ({said}).")
        return None
    return found


def main(words: list[str]) -> None:
    """What the process does; it prints the peaks as JSON."""
    file, threads, *places = words
    imported = {path: _imported(Path(path)) for path in places}
    found = []
    for path in places:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(_added_by(Path(path), imported[path], file, int(threads))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as told:
            found.append(int(told.read() or 0))
        os.waitpid(child, 0)
    print(json.dumps(found))


def _imported(path: Path) -> Any:
    """What runs a model, imported with its libraries before anything is measured."""
    if path.is_file():
        import onnxruntime  # noqa: F401

        from .onnx import OnnxModel

        return OnnxModel
    import transformers

    (kind,) = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
    return getattr(transformers, kind)


def _added_by(path: Path, library: Any, file: str, threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    inputs = load_file(file)
    start = _resident("VmRSS")
    if path.is_file():
        library(path, threads)(**inputs)
    else:
        with torch.no_grad():
            library.from_pretrained(path).eval()(**inputs)
    return _resident("VmHWM") - start


def _resident(field: str) -> int:
    """`VmRSS`, what is in memory now, or `VmHWM`, its peak since the process was forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not tell {field}")


if __name__ == "__main__":
    main(sys.argv[1:])
