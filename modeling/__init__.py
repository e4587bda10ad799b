"""Hub remote code: configuration, model, concept heads and generation."""
