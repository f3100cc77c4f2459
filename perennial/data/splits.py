"""Train or validation: decided by a hash of each document's own key, so it stays as it is while a corpus grows."""

from __future__ import annotations

import hashlib

TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)


def split_of(key: bytes, validation_share: float) -> str:
    """The split of everything that has this key.

    The key's hash is a fixed number u in [0, 1); validation is u < share. So a document's split depends on no other
    document, and a larger share only moves documents from train to validation.
    """
    digest = hashlib.blake2b(key, digest_size=8, person=b"perennial-split").digest()
    return VALIDATION if int.from_bytes(digest, "little") < validation_share * 2.0**64 else TRAIN
