"""How texts are generated: continuous batches of decoders over a paged cache."""
