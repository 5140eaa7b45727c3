"""Parts of the resume benchmark: the training that is killed, and the comparison of two runs."""
