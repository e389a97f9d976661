"""Mistakes of a user's program that mypy finds; each line says which error it is."""

import kdcache
from kdcache.methods import METHODS


def mistakes(archive: kdcache.Archive, batch: kdcache.Batch) -> None:
    kdcache.open_archiv("a")  # E: attr-defined
    kdcache.methods.buildd("kd")  # E: attr-defined
    print(kdcache.views.rendered)  # E: attr-defined
    kdcache.datasets.build(3)  # E: arg-type
    kdcache.targets.Targets(batch.images, "4")  # E: arg-type
    kdcache.Workspace(3)  # E: arg-type
    batch.targets()  # E: call-arg
    archive.read(0, "1", 2)  # E: arg-type
    kdcache.stats.relative_entropy([1.0, 2.0], "a")  # E: arg-type
    name: str = archive.num_views  # E: assignment
    print(name, kdcache.methods.build("kd").view_per_step)  # E: attr-defined


@METHODS.register("mine")  # E: arg-type
class NoLoss:
    pass
