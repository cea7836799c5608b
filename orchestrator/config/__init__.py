"""Configuration: every setting of a run or a sweep, validated before anything is written.

Start with `sections.py`, which lists all fields.

- `experiment`: `Experiment`, `load_experiment`, `parse_experiment`
- `sections`: the fields of an experiment, by section; `models`: those of each kind of model;
  `schedules`: the section `schedule`; `places`: the sections `compute` and `tracking`
- `steps`: `Steps`, all settings that may change from step to step
- `sweep`: `SweepSection`, `parse_sweep`
- `fields`: types of fields; `OneOf`, a field whose choices are the keys of a table
- `only_for`: when a field has an effect
- `meanings`: the values that null stands for
- `load`: experiment files and `section.field=value` overrides; `yaml_text`: YAML
- `checks`: finds fields that contradict each other
- `messages`: validation, and error messages of one line per field
- `reference`: writes docs/reference.md
"""
