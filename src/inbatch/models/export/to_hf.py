"""Target `hf`: a folder in the layout of the Hugging Face hub, for `transformers` and timm, with a model card."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inbatch.errors import ConfigError, InbatchError, reason
from inbatch.models.encoder import Encoder
from inbatch.models.export import to_timm
from inbatch.models.export.folder import contents
from inbatch.models.export.model_card import model_card
from inbatch.models.export.target import Written


def write(encoder: Encoder, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write the files of `to_timm`, which transformers reads through its wrapper of timm's models, and README.md."""
    written = to_timm.write(encoder, folder, facts, "hf")  # transformers has no other models for most encoders
    facts = dict(facts) | {"weights_sha256": contents(folder)["model.safetensors"]["sha256"]}
    (folder / "README.md").write_text(model_card(encoder, written.more["model"], facts), encoding="utf-8")
    return dataclasses.replace(written, load="transformers.AutoModel.from_pretrained(OUT)")


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the hub, created as a private one if it does not exist; return its address.

    Raises:
        ConfigError: if the name is not a name of a repository.
        InbatchError: if the hub refuses it or cannot be reached; the folder is unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        api = HfApi()
        created = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Upload an encoder of inbatch")
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a name of a repository, such as USER/NAME: {error}") from None
    except Exception as error:  # its client raises any exception of its transport
        raise InbatchError(
            f"{folder} is written, but was not pushed to {repository} ({reason(error)[:300]}): log in with "
            "`hf auth login`, check the name and the network, and repeat the command"
        ) from error
    return str(created)
