"""`causalreel doctor`: what a run's records, settings, weights and previews say of its health.

files      what a run's folder holds, read within bounds
settings   recipe against the methods' own and against where its networks come from
records    metrics against each other
weights    checkpoints against each other
previews   how previews look, against the data's own clips
curves     metrics against curves of healthy runs
report     all of them together, in words
"""
