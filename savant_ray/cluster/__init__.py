"""The connection to Ray: address, session, code on all nodes, and the actor between driver and workers."""
