"""What a person looks at: the table in a terminal, and the report as a page."""
