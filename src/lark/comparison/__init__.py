"""Many runs as one comparison, with intervals."""
