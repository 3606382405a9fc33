"""Commands that talk to a running server: `lola-vllm sessions` and `lola-vllm chat`."""


class ClientError(ValueError):
    """A server that cannot be asked, or that refuses."""
