"""The package's version, which manifests and checkpoints name."""

__version__ = "0.1.0"
