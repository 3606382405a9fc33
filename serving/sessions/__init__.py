"""Sessions over HTTP: to manage them, and to go on with one by sending the new part only."""

from lola_vllm.serving.sessions.generate import router as speak_router
from lola_vllm.serving.sessions.management import router as manage_router

routers = (manage_router, speak_router)

__all__ = ["routers"]
