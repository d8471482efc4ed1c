"""The neural parts: the masked X-CLIP encoder, the connectors, and the GIF question answering model."""
