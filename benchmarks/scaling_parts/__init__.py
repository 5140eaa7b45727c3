"""Parts of the scaling benchmark: measured runs, cost terms, fits and the page."""
