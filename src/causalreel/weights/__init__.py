"""Weights on disk: strict loading and saving, foreign parameter names, exported models. The only room that knows them."""
