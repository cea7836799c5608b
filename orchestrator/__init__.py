"""Everything between a corpus and a trained, tracked GPT. Imports run downward: pipelines -> orchestrator -> model."""
