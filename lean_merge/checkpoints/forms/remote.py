"""Read models where they are: hf://org/name@revision, and https:// URLs of safetensors files."""

from __future__ import annotations

import re

from lean_merge.checkpoints.forms import Form, Origin

_SCHEME = re.compile(r"(?P<scheme>hf|https?)://.*", re.IGNORECASE | re.DOTALL)


class FarAddress(Form):
    """The form of addresses with a scheme, of which only headers and small files are fetched."""

    def fetch(self, source: str) -> Origin | None:
        """Return a folder with the small files and with stand-ins of the weights.

        Raises
        ------
        CheckpointError
            The address is malformed, may hold a secret, or its files cannot be read.
        """
        match = _SCHEME.fullmatch(source)
        if match is None:
            return None
        # What speaks HTTP is imported only for names with a scheme.
        from lean_merge.checkpoints.remote import addresses, standins

        of_hub = match["scheme"].lower() == "hf"
        return standins.opened(addresses.of_hub(source) if of_hub else addresses.of_url(source))


FORM = FarAddress()
