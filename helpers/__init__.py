"""What the notebooks stand on: corpora, GIF decoding, tables, models, training, scoring."""
