"""Stage: what the user wrote → rules. `_config` checks it against a model, the others read and write its other forms."""
