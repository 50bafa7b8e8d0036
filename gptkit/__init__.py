"""The machinery behind the commands: one package per layer (CONTRIBUTING.md)."""

__version__ = "0.2.0"
