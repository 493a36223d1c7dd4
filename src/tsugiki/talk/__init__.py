"""Talking to adapters: `tsugiki generate` and `tsugiki chat`, and finding whom to talk to."""

from tsugiki.talk.chat import chat_command
from tsugiki.talk.generate import generate_command
from tsugiki.talk.opening import Opened, Voice, Who, newest_adapter, open_voices

__all__ = [
    "Opened",
    "Voice",
    "Who",
    "chat_command",
    "generate_command",
    "newest_adapter",
    "open_voices",
]
