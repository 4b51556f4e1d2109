# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd[vision]"]
# ///
"""The same as `hf-selfkd train image-classification`, as a file for `accelerate launch`, `torchrun` and `uv run`."""

from hf_selfkd.scripts.image_classification import main


if __name__ == "__main__":
    main()
