"""Problems, samples, verdicts, metrics."""
