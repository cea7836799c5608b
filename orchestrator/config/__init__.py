"""Configuration: every setting of a run or a sweep, checked before anything is written.

Start with `sections.py`, which lists all fields.

- `experiment`: `Experiment`, `load_experiment`, `parse_experiment`
- `sections`: the fields of an experiment, by section
- `sweep`: `SweepSection`, `parse_sweep`
- `fields`: types of fields; `OneOf`, a field whose choices are the keys of a table
- `load`: YAML files and `section.field=value` overrides
- `checks`: fields that contradict each other
- `messages`: the lines that say why a configuration was refused
- `reference`: the page docs/reference.md
"""
