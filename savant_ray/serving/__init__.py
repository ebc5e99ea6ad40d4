"""A server with OpenAI's API: Ray Serve deployments around `inference.decoder`."""
