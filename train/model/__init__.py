"""The Wan transformer, its weights and its attention."""
