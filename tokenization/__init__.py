"""Hub remote code: the tokenizer and its vocabulary file."""
