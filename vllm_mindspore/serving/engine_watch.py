"""ASGI middleware of `vllm serve`: the server ends when its engine has ended, and its exit code says why.

Without it vLLM 0.32 exits with 0 after its engine died, so that no supervisor starts it again; and on SIGTERM or Ctrl-C
it waits for ever for running requests whose engine it has just stopped.
"""

import asyncio
import json

CANCEL_AFTER = 2.0  # seconds that running requests have to deliver what the engine sent before it stopped


class EngineWatch:
    """Set by `options.add_arguments` as the default of vLLM's `--middleware`; one instance per application."""

    def __init__(self, app):
        self.app = app
        self.requests: set[asyncio.Task] = set()
        self.stop_asked = False
        self.stopped = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    async def _lifespan(self, scope, receive, send) -> None:
        engine = getattr(scope["app"].state, "engine_client", None)
        if engine is None:
            return await self.app(scope, receive, send)
        self._note_stop(engine)
        cancelling = asyncio.create_task(self._cancel_requests_after_stop())
        try:
            await self.app(scope, receive, send)
        finally:
            cancelling.cancel()
            if engine.errored and not self.stop_asked:
                asyncio.get_running_loop().call_soon(_exit_with_error)

    def _note_stop(self, engine) -> None:
        """vLLM calls `engine.shutdown` in a thread when a signal asks it to end, and not when the engine died."""
        shutdown, loop = engine.shutdown, asyncio.get_running_loop()

        def shutdown_and_note(*args, **kwargs) -> None:
            self.stop_asked = True
            shutdown(*args, **kwargs)
            loop.call_soon_threadsafe(self.stopped.set)

        engine.shutdown = shutdown_and_note

    async def _cancel_requests_after_stop(self) -> None:
        await self.stopped.wait()
        await asyncio.sleep(CANCEL_AFTER)
        for request in self.requests:
            request.cancel()

    async def _request(self, scope, receive, send) -> None:
        """A request cancelled before its answer began gets a 503; the connection of a later one is closed."""
        request, began = asyncio.current_task(), False

        async def send_and_note(message) -> None:
            nonlocal began
            began = True
            await send(message)

        self.requests.add(request)
        try:
            await self.app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not self.stopped.is_set():
                raise
            if scope["type"] == "http" and not began:
                await _send_unavailable(send)
        finally:
            self.requests.discard(request)


async def _send_unavailable(send) -> None:
    error = {"message": "The server is shutting down.", "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})


def _exit_with_error() -> None:
    raise SystemExit(1)
