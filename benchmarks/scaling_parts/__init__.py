"""Parts of the scaling benchmark: what is run, its terms, the lines through them, the page."""
