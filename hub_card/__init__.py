"""The template of the model cards, and the snippets that they show."""
