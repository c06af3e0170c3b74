"""The student: its weights, its tokens, its forward pass."""
