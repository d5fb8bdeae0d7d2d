"""What serves the chapters of the book more than importers: plots, players, data sets."""
