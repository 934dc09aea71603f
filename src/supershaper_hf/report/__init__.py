"""Results for people to read: the page of a search, plots, and tables."""
