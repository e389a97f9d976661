"""What the `fix:` of an error may say: commands and options that there are, and nothing about deleting a user's own files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["costs_data", "not_understood"]

OPTIONS: dict[str, set[str]] = {
    command: {word for option in options for word in option.split() if word.startswith("--")}
    for command, options in json.loads((Path(__file__).parent / "cli_frozen.json").read_text()).items()
}
ALL_OPTIONS = set().union(*OPTIONS.values())

# Options of other programs that a fix may name, by the program.
OTHERS = {"torchrun": {"--nproc-per-node"}, "pip install": {"--upgrade"}, "hf download": {"--revision"}}

_COMMAND = re.compile(r"(?<![\w./'\[-])kdcache (?!from |was |is |that )(?P<rest>[a-z][^;,()&]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_DELETE = re.compile(r"\b(delete|remove|erase|unlink)\b|\brm\b", re.IGNORECASE)


def not_understood(fix: str) -> Iterator[str]:
    """Each command and option in `fix` that does not exist."""
    known = ALL_OPTIONS | {option for program, options in OTHERS.items() if program in fix for option in options}
    for match in _COMMAND.finditer(fix):
        words, options = match["rest"].split(), set(_OPTION.findall(match["rest"]))
        command = next((name for name in (" ".join(words[:2]), words[0]) if name in OPTIONS), None)
        if command is None:
            yield f"there is no command kdcache {words[0]}"
        else:
            yield from (f"kdcache {command} has no option {option}" for option in sorted(options & known - OPTIONS[command]))
    yield from (f"there is no option {option}" for option in sorted(set(_OPTION.findall(fix)) - known))


def costs_data(fix: str) -> bool:
    """Whether `fix` says to delete something."""
    return bool(_DELETE.search(fix))
