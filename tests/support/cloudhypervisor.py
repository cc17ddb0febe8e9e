"""Cloud Hypervisor's snapshots, made by hand from the format (of its version 40 and later)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.support.images import PAGE, write_layer
from tests.support.stores import SIZE, age, pages

#: A guest of 16 pages: 10 below the hole for devices, 6 above 4 GiB.
TABLE = [(0, 10 * PAGE), (1 << 32, SIZE - 10 * PAGE)]


def state(ranges: Sequence[tuple[int, int]] = TABLE, **manager: Any) -> dict[str, Any]:
    """A `state.json`: a tree of components, each with its own state as JSON in a string."""
    table = {"data": [{"gpa": address, "length": length} for address, length in ranges]}
    memory = {
        "memory_ranges": table,
        "guest_ram_mappings": [
            {
                "slot": n,
                "gpa": a,
                "size": s,
                "zone_id": "mem0",
                "virtio_mem": False,
                "file_offset": 0,
            }
            for n, (a, s) in enumerate(ranges)
        ],
        "start_of_device_area": 1 << 36,
        "boot_ram": sum(length for _, length in ranges),
        "current_ram": sum(length for _, length in ranges),
        "arch_mem_regions": [],
        "hotplug_slots": [],
        "next_memory_slot": len(ranges),
        "selected_slot": 0,
        "next_hotplug_slot": 0,
    } | manager
    vm: dict[str, Any] = {"clock": None, "common_cpuid": []}
    return {
        "snapshots": {
            "cpu-manager": {"snapshots": {"0": component({})}, "snapshot_data": None},
            "device-manager": {"snapshots": {"_disk0": component({})}, "snapshot_data": None},
            "memory-manager": component(memory),
        },
        "snapshot_data": {"state": json.dumps(vm)},
    }


def component(own: Any) -> dict[str, Any]:
    return {"snapshots": {}, "snapshot_data": {"state": json.dumps(own)}}


def write_snapshot(
    store: Path,
    tag: str,
    parent: str | None = None,
    *,
    layer: int = 0,
    numbers: Iterable[int] | None = None,
    ranges: Sequence[tuple[int, int]] = TABLE,
) -> Path:
    """A snapshot's directory with its three files; with a parent, a diff that says so."""
    folder = store / tag
    folder.mkdir(parents=True)
    if numbers is None:
        numbers = range(SIZE // PAGE) if parent is None else [layer]
    write_layer(folder / "memory-ranges", SIZE, pages(layer, numbers))
    (folder / "state.json").write_text(json.dumps(state(ranges)))
    (folder / "config.json").write_text('{"memory": {"size": 65536}}')
    if parent is not None:
        document = {"memory": "memory-ranges", "parent_tag": parent}
        (folder / "snapshot.json").write_text(json.dumps(document))
    age(*folder.iterdir())
    return folder
