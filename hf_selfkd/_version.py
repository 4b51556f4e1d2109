"""The single source of the version."""

# Of the package, as `hf-selfkd --version` prints it.
__version__ = "0.1.0"
