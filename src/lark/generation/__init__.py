"""Samples from a student: transformers here, vLLM in a process of its own."""
