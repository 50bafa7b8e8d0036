"""The machinery behind the root commands. It is given models, configs and state dicts, and knows no architecture."""

__version__ = "0.2.0"  # the only place: pyproject.toml reads it
