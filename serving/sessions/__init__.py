"""Sessions over HTTP: to manage them, and to go on with one by sending the new part only."""

from lola_vllm.serving.sessions.manage import router as manage_router
from lola_vllm.serving.sessions.speak import router as speak_router

routers = (manage_router, speak_router)

__all__ = ["routers"]
