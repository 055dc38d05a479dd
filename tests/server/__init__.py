"""The server, through its HTTP interface and vLLM's commands."""
