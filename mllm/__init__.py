"""Projector and language model around any vision tower, and the chat with what was trained."""

__all__ = ["Answer", "GroundingChat"]


def __getattr__(name: str):
    """The chat is loaded when it is asked for: files of this package import each other without it."""
    if name in __all__:
        from mllm import chat

        return getattr(chat, name)
    raise AttributeError(f"module 'mllm' has no attribute '{name}'")
