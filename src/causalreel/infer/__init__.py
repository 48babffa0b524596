"""Generation: models by name, what a request asks of a rollout, and the pipeline from prompts to pixels."""
