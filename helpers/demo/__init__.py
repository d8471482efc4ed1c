"""The demo: the bundle it shows, one person's visit, its panels and its page."""
