"""Many conversations on one model at a time: requests in, pieces of text out; it knows nothing of servers."""
