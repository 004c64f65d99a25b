"""Jobs: the queue in the daemon and the worker process that does the work."""
