"""Parts of the resume benchmark: the training that is killed, what two runs must share."""
