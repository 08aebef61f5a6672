"""HTTP/1.1 over asyncio, both ends: the listener and the client. Imports nothing of ours."""
