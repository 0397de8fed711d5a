"""What the sections of the config are made of: the frozen base and the ranges of numbers."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _storage_uri(text: str) -> str:
    """Accept the URI of a folder without credentials: it is kept beside the run and shown in messages."""
    try:
        parts = urlsplit(text)
    except ValueError as err:
        raise ValueError(f"not a URI ({err}); write for example s3://bucket/runs/trial") from err
    if "://" not in text or not parts.scheme or not (parts.netloc + parts.path).strip("/"):
        raise ValueError("not the URI of a folder; write for example s3://bucket/runs/trial")
    if "@" in parts.netloc:
        raise ValueError("credentials do not belong into the URI, which is kept with the run; give them by environment")
    return text.rstrip("/")


StorageURI = Annotated[str, AfterValidator(_storage_uri)]


class Section(BaseModel):
    """A frozen part of the config tree that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
