"""Where training rows and videos come from: the tiny world and video files."""
