"""What a person looks at: the page of a search, plots, and tables."""
