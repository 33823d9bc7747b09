"""Many runs: studies over seeds, searches, pipelines, each with its own config."""
