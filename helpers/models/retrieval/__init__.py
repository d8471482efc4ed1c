"""Text-video retrieval: heads that bring the embeddings of both into one space, their losses, bundles, and search."""
