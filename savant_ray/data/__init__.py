"""JSONL → sequences: read, tokenise and pack once, then read any position of the one global order."""
