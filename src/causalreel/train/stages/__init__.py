"""The training stages: losses over roles, one module a stage."""
