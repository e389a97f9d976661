"""The archive's `README.md`: what it is, for people who meet it without kdcache."""

from kdcache.archive.manifest import Manifest

__all__ = ["write_card"]


def write_card(manifest: Manifest, reading_lines: str) -> str:
    teacher, source, policy = manifest.teacher, manifest.source, manifest.policy
    title = f"{source.name if source else 'images'} seen by {teacher.name if teacher else 'a teacher'}"
    lines = [
        f"# Teacher logits: {title}",
        "",
        f"Raw logits of {manifest.num_samples:,} samples in {manifest.num_views:,} views each, {manifest.num_classes} classes, "
        f"made with kdcache (archive format {manifest.format_version}).",
        "",
        "| | |",
        "|---|---|",
        f"| digest | `{manifest.digest}` |",
    ]
    if source:
        lines.append(f"| data | {source.name}, {source.split} split, licence {source.licence or 'unknown'} |")
    if teacher:
        lines.append(f"| teacher | `{teacher.name}`, weights sha256 `{teacher.weights_sha256[:16]}...`, {teacher.precision} |")
        if teacher.top1_clean is not None:
            lines.append(f"| teacher's top-1, clean test images | {teacher.top1_clean:.2f} % |")
    if manifest.statistics.top1_views is not None:
        lines.append(f"| teacher's top-1, these views (dominant label) | {manifest.statistics.top1_views:.2f} % |")
    if policy:
        lines.append(f"| view policy | digest `{policy.digest[:16]}...`, {policy.size} px, in full in `kdcache.json` |")
    lines += [
        f"| codec | `{manifest.codec['name']}` |",
        "",
        "## Entropies",
        "",
        "Means over the views; H^(p) = H / log C, H^(p-bar) the same without the top class, over log(C - 1).",
        "",
        "| tau | H^(p) | H^(p-bar) |",
        "|---|---|---|",
        *(f"| {s.tau:g} | {s.entropy_mean:.4f} | {s.entropy_rest_mean:.4f} |" for s in manifest.statistics.per_tau),
        "",
        "## Reading it without kdcache",
        "",
        "```python",
        reading_lines,
        "```",
        "",
        "Row `[v, j]` is the view at position `j` of view `v`; `sample[v, j]` is the number of the sample that sits there, "
        "`label` and `key` are per sample. `kdcache.json` records the sha256 of every file.",
        "",
    ]
    return "\n".join(lines)
