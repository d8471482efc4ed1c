"""From a GIF's address to its frames: fetching and decoding."""
