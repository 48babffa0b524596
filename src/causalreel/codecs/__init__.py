"""Video codecs: pixels <-> latents, whole clips and streams."""
