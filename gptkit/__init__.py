"""The machinery behind the root commands. It is given models, configs and state dicts, and knows no architecture."""
