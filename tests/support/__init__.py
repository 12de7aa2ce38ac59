"""What the tests of several folders share: tiny models and tokenizers, twins, budgets, processes."""
