"""Plans and timelines as tables, pictures, words and trace files."""
