"""Configuration: every setting of a run or a sweep, validated before anything is written.

Start with `sections.py`, which lists all fields.

- `experiment`: `Experiment`, `load_experiment`, `parse_experiment`
- `sections`: the fields of an experiment, by section; `models`: those of each kind of model
- `sweep`: `SweepSection`, `parse_sweep`
- `fields`: types of fields; `OneOf`, a field whose choices are the keys of a table
- `load`: YAML files and `section.field=value` overrides
- `checks`: finds fields that contradict each other
- `messages`: validation, and error messages of one line per field
- `reference`: writes docs/reference.md
"""
