# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_selfkd[translation]"]
# ///
"""The same as `hf-selfkd train translation`, as a file for `accelerate launch`, `torchrun` and `uv run`."""

from hf_selfkd.scripts.translation import main


if __name__ == "__main__":
    main()
