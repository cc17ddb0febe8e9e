"""Looks at the source of a mount, again and again."""

from __future__ import annotations

import logging

import trio

from diffmergefs.core.errors import DiffMergeError
from diffmergefs.fuse.served import LOOK_SECONDS, Store
from diffmergefs.fuse.threads import in_thread

log = logging.getLogger(__name__)

SLOW_SECONDS = 5.0  # how long a scan may take before the log says so


async def watch_source(store: Store) -> None:
    """Scan the store again and again. A scan that fails or lasts is reported in the log."""
    reported = ""
    while True:
        started = trio.current_time()
        await trio.sleep(LOOK_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report_slow_scan, store)
            reported = await _scan(store, reported)
            nursery.cancel_scope.cancel()
        # Scans of a very large directory must not keep a processor busy.
        await trio.sleep(max(0.0, trio.current_time() - started - 2 * LOOK_SECONDS))


async def _scan(store: Store, reported: str) -> str:
    # Returns the failure, so that the log has it once.
    try:
        await in_thread(store.look)
    except DiffMergeError as error:
        if str(error) != reported:
            effect = "stays as it was" if store.tags() else "shows nothing"
            log.warning("the mount %s until this is fixed: %s", effect, error)
        return str(error)
    except Exception:
        log.exception("scanning the source failed: this is a bug")
        return reported
    return ""


async def _report_slow_scan(store: Store) -> None:
    started = trio.current_time()
    await trio.sleep(SLOW_SECONDS)
    log.warning(
        "%s: scanning it takes longer than %g s; the mount follows changes when the scan is done;"
        " does some storage in it hang?",
        store.root,
        SLOW_SECONDS,
    )
    try:
        await trio.sleep_forever()
    finally:
        log.info("%s: scanning it took %.0f s", store.root, trio.current_time() - started)
