"""Files that are whole or absent, logs, ranks, signals and errors: what every layer uses."""
