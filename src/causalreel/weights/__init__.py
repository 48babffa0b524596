"""Weights on disk: strict loading and saving, foreign parameter names, exported models. Nothing else knows them."""
