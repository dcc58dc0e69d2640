"""Ways of reading an activation side by side: how close, how fluent, and what beyond the last words."""
