"""Deployment objects on the bus: one for each that the last scan found."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hostimage_dbus.names import DEPLOYMENT_INTERFACE, NO_OBJECT, deployment_path
from hostimage_dbus.server import Export, Handler, ObjectServer
from hostimaged.bus.authorization import Member
from hostimaged.errors import NoSuchDeployment

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hostimage_dbus.transport import MethodCall
    from hostimaged.bus.findings import DeploymentRow

_MEMBERS = (Member.SET_PINNED, Member.DELETE, Member.MAKE_DEFAULT, Member.DIFF)


class DeploymentObjects:
    """Exports deployments; ``guarded`` answers their methods (member, call, deployment id)."""

    def __init__(
        self, server: ObjectServer, guarded: Callable[[Member, MethodCall, str], Awaitable[Sequence[Any]]]
    ) -> None:
        self._server = server
        self._guarded = guarded
        self._rows: dict[str, DeploymentRow] = {}

    def update(self, rows: Sequence[DeploymentRow]) -> None:
        """Add, change and remove objects, so that they are ``rows``."""
        wanted = {deployment_path(row.id): row for row in rows}
        for path, known in list(self._rows.items()):
            if path not in wanted or _constant(known) != _constant(wanted[path]):
                del self._rows[path]
                self._server.unexport(path)
        for path, row in wanted.items():
            if path in self._rows:
                self._server.change(path, DEPLOYMENT_INTERFACE, _changing(row))
            else:
                self._server.export(path, self._export(row))
            self._rows[path] = row

    def _export(self, row: DeploymentRow) -> Export:
        methods: dict[str, Handler] = {
            str(member): partial(self._answer, member, row.id) for member in _MEMBERS
        }
        interface = self._server.interfaces[DEPLOYMENT_INTERFACE]
        return Export(interface, _constant(row) | _changing(row), methods)

    async def _answer(self, member: Member, id_: str, call: MethodCall) -> Sequence[Any]:
        return await self._guarded(member, call, id_)

    def id_at(self, path: str) -> str:
        """Id of the deployment at a path, "" if there is none."""
        row = self._rows.get(path)
        return row.id if row is not None else ""

    def which(self, what: str) -> str:
        """Path of the first deployment for which the attribute ``what`` is true, else "/"."""
        return next((path for path, row in self._rows.items() if getattr(row, what)), NO_OBJECT)

    def find(self, name: str) -> str:
        """Path of the deployment with this id, unique prefix of one, or alias.

        Raises ``NoSuchDeployment``.
        """
        aliases = {"booted": "booted", "staged": "staged", "rollback": "is_rollback"}
        if name in aliases:
            path = self.which(aliases[name])
            if path == NO_OBJECT:
                raise NoSuchDeployment(f"there is no {name} deployment")
            return path
        found = [path for path, row in self._rows.items() if name and row.id.startswith(name)]
        if not found:
            raise NoSuchDeployment(f"there is no deployment {name[:64]!a}")
        if len(found) > 1:
            raise NoSuchDeployment(f"{len(found)} deployments begin with {name[:64]!a}")
        return found[0]


def _constant(row: DeploymentRow) -> dict[str, Any]:
    return {
        "Id": row.id,
        "Image": row.image,
        "ImageDigest": row.image_digest,
        "ConfigDigest": row.config_digest,
        "Version": row.version,
        "Timestamp": row.timestamp,
        "BootType": row.boot_type,
        "BootEntries": row.boot_entries,
        "KernelArguments": row.kernel_arguments,
    }


def _changing(row: DeploymentRow) -> dict[str, Any]:
    return {
        "Booted": row.booted,
        "Staged": row.staged,
        "IsRollback": row.is_rollback,
        "Pinned": row.pinned,
        "Locked": row.locked,
        "SoftRebootCapable": row.soft_reboot_capable,
        "Verity": row.verity,
        "Order": row.order,
        "SizeExclusive": row.size_exclusive,
    }
