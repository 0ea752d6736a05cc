"""Fast parts for models of other packages."""
