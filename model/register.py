"""A family from a user's own package: a row, its layers, its names in Hugging Face's format.

A family of the repository is the same three things in three tables: model/families.py (what it is trained by, and what
it cannot have; torch-free), model/build.py (the class of its chunks) and model/hf/families.py.
"""

from model import build, families
from model.hf import families as hugging_face_families
from model.language_model import LanguageModel


def register_family(
    name: str,
    row: families.Family,
    *,
    chunk: type[LanguageModel] | None = None,
    hugging_face: hugging_face_families.Family | None = None,
) -> None:
    """Makes `model.family=NAME` mean a family of your own.

    Args:
        name: the word in the configuration, and the `model_type` of its config.json.
        row: what it is trained by; `families.CAUSAL`, `ENCODER`, `ENCODER_DECODER`, or a changed copy.
        chunk: a pipeline stage of it; by default that of the row's architecture.
        hugging_face: how it is imported and exported; by default it is not.

    Raises:
        ValueError: the name is taken.
    """
    if name in families.FAMILIES:
        raise ValueError(f"there is a family called {name} already")
    families.FAMILIES[name] = row
    if chunk is not None:
        build.OWN_CHUNKS[name] = chunk
    if hugging_face is not None:
        hugging_face_families.FAMILIES[name] = hugging_face
