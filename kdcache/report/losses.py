"""What the losses of the students are, in words: a method's name does not say whether it is multiplied by tau^2."""

from collections.abc import Sequence

from kdcache.report.records import RunRecord

__all__ = ["scaling"]

KNOWN = {
    True: "is multiplied by tau\N{SUPERSCRIPT TWO}, as in published code",
    False: "is not, as in eq. 1 of the temperature study",
}


def scaling(records: Sequence[RunRecord]) -> str:
    """Which methods multiply their loss by tau^2; empty if none of them could."""
    named: dict[bool, list[str]] = {True: [], False: []}
    for run in records:
        squared = run.args.method.get("tau_squared")
        if isinstance(squared, bool) and run.args.method_spec not in named[squared]:
            named[squared].append(run.args.method_spec)
    parts = [f"that of {', '.join(sorted(names))} {KNOWN[squared]}" for squared, names in named.items() if names]
    if parts and not named[True]:
        parts = [parts[0].replace("is not,", "is not multiplied by tau\N{SUPERSCRIPT TWO},")]
    return f"Loss: {'; '.join(parts)}." if parts else ""
