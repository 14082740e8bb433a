"""The HTTP server: OpenAI's API in front of an engine. Knows text and sockets, never a device."""
