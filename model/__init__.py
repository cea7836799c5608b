"""The mathematics of a GPT: torch and the standard library only. No files, no network, no Ray, no MLflow."""
