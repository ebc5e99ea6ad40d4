"""The documentation: pages, the generator of their reference tables, and a build hook."""
