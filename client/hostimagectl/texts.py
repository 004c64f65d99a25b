"""Longer texts of ``--help``."""

from __future__ import annotations

from typing import Final

PATHS: Final = (
    "A relative path in oci:, oci-archive:, docker-archive: and dir: is taken from the current directory."
)
JOB_DESCRIPTION: Final = """\
If an equal job runs already, that one is followed. Ctrl-C asks the daemon to cancel and waits for the end; a
second one leaves at once, and the job goes on.
"""
JOB_JSON: Final = """\
JSON: {"job": JOB, "result": RESULT or null, "error": null or {"name", "message"}}. RESULT has the keys that
org.hostimage1(5) tells for the method, null with --no-wait. JOB is as in 'jobs'.
"""
IMAGES_JSON: Final = """\
JSON: {"images": [{"tag", "manifest-digest", "config-digest", "reference", "source-digest", "pulled" (seconds
since the epoch), "version", "size" (bytes as transferred), "image-ids", "artifact", "deployed",
"problem"}]}, null where unknown.

With --quiet the manifest digests alone are printed, one a line.
"""
STATUS_JSON: Final = """\
JSON: the native status document of the daemon, described by the schema it ships.

With --quiet the state of the daemon alone is printed: idle, pulling, …
"""
SHOW_JSON: Final = """\
JSON: {"deployment": {…}} with the properties that org.hostimage1(5) tells for org.hostimage1.Deployment.

With --quiet the id alone is printed.
"""
JOBS_JSON: Final = """\
JSON: {"jobs": [JOB]}, JOB = {"id", "path", "kind", "target", "state", "phase", "progress" (0 to 1 or null),
"bytesDone", "bytesTotal", "bytesCached", "rate" (bytes per second), "eta" (microseconds), "message",
"cancellable", "holdReasons", "created", "started", "finished" (microseconds since the epoch or 0)}.

With --quiet the ids alone are printed, one a line.
"""
CANCEL_JSON: Final = """\
JSON: {"job": JOB or null with --no-wait, "error": null or {"name", "message"}}; JOB is as in 'jobs'.
"""
MONITOR_JSON: Final = """\
JSON: one document a line: {"time" (microseconds since the epoch), "event", …}. Events: "service" ("running"),
"changed" ("path", "interface", "properties", "invalidated"), "added" ("path", "interfaces"), "removed"
("path", "interfaces"), "job-new" ("id", "path", "kind"), "job-removed" ("id", "path", "kind", "result",
"error": null or {"name", "message"}).
"""
POLICY_JSON: Final = """\
JSON: {"policy": "none", "check", "download" or "stage"}. With --quiet a policy that was set is not printed.
"""
UPDATE_JSON: Final = """\
JSON: that of check, pull or upgrade, as the policy has it; {"policy": "none"} if nothing is to be done.
With --quiet the digest of the manifest is printed, with --no-wait the number of the job.
"""
LOG_JSON: Final = """\
JSON: {"level"}. With --quiet a level that was set is not printed.
"""
SILENT_JSON: Final = """\
JSON: {"error": null or {"name", "message"}}. With --quiet nothing is printed.
"""
EPILOG: Final = """\
With --json every command prints JSON on standard output; one that fails before there is a
result prints {"error": {"name", "message"}}. Progress, notes and messages go to standard error.

Exit code: 0 success, 1 failure, 2 wrong usage, 3 hostimaged or the bus cannot be reached, 128 and the
number of the signal if interrupted, others one per error: see hostimagectl(1).
"""
