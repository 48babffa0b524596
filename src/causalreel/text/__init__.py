"""Text encoders: prompts -> text (B,K,E)."""
