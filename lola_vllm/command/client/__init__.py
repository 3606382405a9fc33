"""Commands that talk to a running server: `lola-vllm sessions`, `library` and `chat`."""

from lola_vllm.command.client.terminal import harmless


class ClientError(ValueError):
    """A server that cannot be asked, or that refuses.

    Attributes:
        status: of HTTP, where a route of the server refuses; None: no route answered.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(harmless(text))  # it may quote what a server says
        self.status = status
