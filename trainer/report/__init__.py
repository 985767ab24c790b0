"""HTML reports from what runs left behind."""
