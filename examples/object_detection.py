# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd[detection]"]
# ///
"""The same as `hf-selfkd train object-detection`, as a file for `accelerate launch`, `torchrun` and `uv run`."""

from hf_selfkd.scripts.detection.object_detection import main


if __name__ == "__main__":
    main()
