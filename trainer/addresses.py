"""Addresses of databases, without their passwords: configurations are written to files and into messages.

A password is parted from its address as soon as that is read, and is known to this process only.
"""

import re

# As SQLAlchemy reads an address: a password reaches to the last @ before the host.
_PASSWORD = re.compile(r"^(?P<before>[\w+]+://[^:/?]*):(?P<password>.*)(?=@)")
_QUERY = re.compile(r"(?P<before>[?&])password=(?P<password>[^&]*)&?")
_OLD_SCHEMES = re.compile(r"^postgres(ql)?(?=://)")

_passwords: dict[str, str] = {}


def without_password(address: str) -> str:
    """The address without its password, which `password_of` tells from now on."""
    address = _OLD_SCHEMES.sub("postgresql+psycopg", address)
    for pattern in (_PASSWORD, _QUERY):
        found = pattern.search(address)
        if found is not None:
            address = (address[: found.start()] + found["before"] + address[found.end() :]).rstrip("?&")
            _passwords[address] = found["password"]
    return address


def password_of(address: str) -> str | None:
    """As it was written, percent signs included; None where there was none."""
    return _passwords.get(address)
