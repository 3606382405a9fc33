"""All routes of sessions."""

from lola_vllm.serving.sessions.generate import router as speak_router
from lola_vllm.serving.sessions.management import router as manage_router

routers = (manage_router, speak_router)

__all__ = ["routers"]
