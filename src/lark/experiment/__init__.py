"""One run, in its order of events."""
