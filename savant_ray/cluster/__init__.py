"""The Ray job: driver, worker function, bridge, data for workers. The only part that knows Ray Train."""
