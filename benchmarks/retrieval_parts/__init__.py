"""Parts of the retrieval benchmark: data, views, training, other methods, tables and figures."""
