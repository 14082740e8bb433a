"""Models by their hub name, through Hugging Face's own client and cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from engine.errors import ModelError

HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "additional_chat_templates/*.jinja",
                "*_Pooling/config.json")  # fmt: skip


def from_hub(name: str, revision: str | None) -> Path:
    """A hub model's folder in Hugging Face's own cache (HF_HOME and HF_TOKEN count as always)."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except LocalEntryNotFoundError as error:
        raise ModelError(f"cannot fetch {name} from the hub, and it is not in the local cache: the hub cannot be "
                         "reached (no network, or HF_HUB_OFFLINE is set). Copy the model's folder here and give its "
                         "path as the model") from error  # fmt: skip
    except Exception as error:  # besides its own errors, those of its network library, whose name changes
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"cannot fetch {name} from the hub: {reason} (a private or gated model needs a token in "
                         "HF_TOKEN)") from error  # fmt: skip
