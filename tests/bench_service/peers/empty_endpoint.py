"""What the server itself costs: an endpoint that answers 200 and nothing else, to whatever is sent."""

from __future__ import annotations


async def app(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})
