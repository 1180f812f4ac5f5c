"""A model -> figures: how likely it holds a text, how many questions it answers."""
