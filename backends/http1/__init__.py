"""HTTP/1.1 over asyncio, both ends: the listener and the client. It imports no other package of this project."""
