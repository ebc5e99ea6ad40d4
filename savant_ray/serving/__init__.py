"""A server with OpenAI's API: replicas of a model on Ray Serve, and an HTTP server."""
