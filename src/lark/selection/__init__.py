"""From statistics to the chosen rows with weights."""
