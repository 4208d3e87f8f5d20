"""To be filled by the package's public names."""
