"""Live video for people: sessions on one model, and what carries them to a browser."""
