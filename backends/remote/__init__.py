"""The backend for providers over HTTP: DashScope, or a server with an OpenAI-compatible API."""
