"""How models are computed: the shared base in packed form, its window layers, attention and heads."""
