# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd"]
# ///
"""The same as `hf-selfkd train language-modeling`, as a file for `accelerate launch`, `torchrun` and `uv run`."""

from hf_selfkd.scripts.language_modeling import main


if __name__ == "__main__":
    main()
