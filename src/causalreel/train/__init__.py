"""Training: one trainer, and stages that are losses over roles."""
