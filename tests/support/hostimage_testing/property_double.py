"""A double of a service that is known for one property: NetworkManager's Metered, UPower's OnBattery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hostimage_dbus.transport import Connection, MethodCall, Variant
from hostimaged.jobs.conditions import CONDITIONS, Condition

METERED, BATTERY = CONDITIONS
#: For the configuration of a bus: everybody may be them and talk to them.
POLICY = '<policy context="default">' + "".join(
    f'<allow own="{condition.name}"/><allow send_destination="{condition.name}"/>' for condition in CONDITIONS
) + "</policy>"  # fmt: skip
_PROPERTIES = "org.freedesktop.DBus.Properties"


@dataclass(eq=False)
class PropertyDouble:
    """``value`` None: the property is answered with an error."""

    connection: Connection
    condition: Condition
    value: Variant | None
    asked: int = 0
    faults: list[MethodCall] = field(default_factory=list)

    def set(self, value: Variant | None, *, invalidate: bool = False) -> None:
        """The property has another value."""
        self.value = value
        member = self.condition.member
        changed = {} if invalidate or value is None else {member: value}
        body = [self.condition.interface, changed, [member] if not changed else []]
        self.connection.emit(self.condition.path, _PROPERTIES, "PropertiesChanged", "sa{sv}as", body)

    def handle(self, call: MethodCall) -> None:
        self.asked += 1
        wanted = (self.condition.path, _PROPERTIES, "Get", [self.condition.interface, self.condition.member])
        if (call.path, call.interface, call.member, call.body) != wanted:
            self.faults.append(call)
        if self.value is None:
            self.connection.reply_error(call, "org.freedesktop.DBus.Error.Failed", "no")
        else:
            self.connection.reply(call, "v", [self.value])


@asynccontextmanager
async def service(address: str, condition: Condition, value: object) -> AsyncIterator[PropertyDouble]:
    """Be the service on the bus at ``address``."""
    made = PropertyDouble(await Connection.connect(address), condition, Variant(condition.signature, value))
    try:
        made.connection.set_handler(made.handle)
        await made.connection.request_name(condition.name)
        yield made
    finally:
        await made.connection.close()
    assert not made.faults, made.faults
