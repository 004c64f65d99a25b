"""The object server: objects on the bus as the shipped XML describes them.

It dispatches method calls, answers the interfaces of the D-Bus specification (Peer, Introspectable,
Properties, ObjectManager), keeps the value of every property, and sends exactly the signals that a property's
annotation promises. Values live here, so reading one never computes anything. What a call means is its
handler's matter.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final

from hostimage_dbus.errors import ErrorName
from hostimage_dbus.introspection import DOCTYPE, Emits, Interface, Method
from hostimage_dbus.names import PROPERTIES_INTERFACE
from hostimage_dbus.transport import (
    BUS,
    BUS_PATH,
    BusClosed,
    BusError,
    Connection,
    Encoded,
    MethodCall,
    Variant,
)

__all__ = ["Export", "Handler", "ObjectServer", "Setter"]

PEER: Final = "org.freedesktop.DBus.Peer"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"

UNKNOWN_METHOD: Final = "org.freedesktop.DBus.Error.UnknownMethod"
UNKNOWN_INTERFACE: Final = "org.freedesktop.DBus.Error.UnknownInterface"
UNKNOWN_PROPERTY: Final = "org.freedesktop.DBus.Error.UnknownProperty"
PROPERTY_READ_ONLY: Final = "org.freedesktop.DBus.Error.PropertyReadOnly"

#: Calls of one connection, and of all, whose handlers may be waiting for something at the same time. The
#: second is far more than one user's connections may have waiting once the service knows whose they are.
CALLS_PER_SENDER: Final = 64
CALLS_IN_ALL: Final = 4096
_INTERNAL: Final = "internal error; the journal has the details"
_STOPPING: Final = "the service is stopping"

#: Gets a call whose signature was checked; returns the values of the answer, now or later.
Handler = Callable[[MethodCall], Sequence[Any] | Encoded | Awaitable[Sequence[Any] | Encoded]]
#: Gets the call that sets a property, and the new value, whose type was checked.
Setter = Callable[[MethodCall, Any], Awaitable[None]]

_logger = logging.getLogger("hostimage_dbus")


class Export:
    """An interface of one object: the value of each property, a handler for each method, and a setter for
    each property that can be written, which takes the value over by ``change`` itself.

    Raises ``ValueError`` if any does not cover the interface exactly, so that introspection cannot lie.
    """

    def __init__(
        self,
        interface: Interface,
        properties: Mapping[str, Any],
        methods: Mapping[str, Handler],
        setters: Mapping[str, Setter] = {},
    ) -> None:
        writable = {name: prop for name, prop in interface.properties.items() if prop.writable}
        for what, given, known in (
            ("properties", properties, interface.properties),
            ("methods", methods, interface.methods),
            ("setters", setters, writable),
        ):
            if given.keys() != known.keys():
                odd = ", ".join(sorted(given.keys() ^ known.keys()))
                raise ValueError(f"{interface.name}: {what} do not match the interface: {odd}")
        self.interface = interface
        self.methods = methods
        self.setters = setters
        self.values = {name: self._variant(name, value) for name, value in properties.items()}
        self._unsent: set[str] = set()

    def change(self, changes: Mapping[str, Any]) -> bool:
        """Take new values in; tells whether there is anything to announce."""
        for name, value in changes.items():
            variant = self._variant(name, value)
            if variant == self.values[name]:
                continue
            if self.interface.properties[name].emits is Emits.CONST:
                raise ValueError(f"{self.interface.name}.{name} is constant")
            self.values[name] = variant
            self._unsent.add(name)
        return bool(self._unsent)

    def announcement(self) -> tuple[dict[str, Variant], list[str]]:
        """Changed values and invalidated names since the last announcement."""
        emits = {name: self.interface.properties[name].emits for name in sorted(self._unsent)}
        self._unsent.clear()
        return (
            {name: self.values[name] for name, how in emits.items() if how is Emits.TRUE},
            [name for name, how in emits.items() if how is Emits.INVALIDATES],
        )

    def _variant(self, name: str, value: Any) -> Variant:
        return Variant(self.interface.properties[name].signature, value)


class ObjectServer:
    """The objects of a service; the object at ``root`` is the ObjectManager of all below it.

    ``interfaces`` are the shipped ones, those of the specification included.
    Handlers that wait run as tasks of ``tasks``. ``translate`` turns a handler's exception into the error for
    the caller; for None the caller gets ``Internal``, and the journal the traceback.
    """

    def __init__(
        self,
        connection: Connection,
        root: str,
        tasks: asyncio.TaskGroup,
        interfaces: Mapping[str, Interface],
        translate: Callable[[Exception], BusError | None],
    ) -> None:
        self._connection = connection
        self._root = root
        self._tasks = tasks
        self._translate = translate
        self._objects: dict[str, dict[str, Export]] = {}
        self._waiting: Counter[str] = Counter()
        self.interfaces = interfaces
        self._standard_handlers: dict[str, dict[str, Handler]] = {
            PEER: {"Ping": lambda _: [], "GetMachineId": self._machine_id},
            INTROSPECTABLE: {"Introspect": self._introspect},
            PROPERTIES_INTERFACE: {"Get": self._get, "Set": self._set, "GetAll": self._get_all},
            OBJECT_MANAGER: {"GetManagedObjects": self._managed_objects},
        }

    def start(self) -> None:
        """Answer calls from now on, those included that came before."""
        self._connection.set_handler(self._dispatch)

    # objects

    def export(self, path: str, *exports: Export) -> None:
        """Add the object at ``path``; one below the root is announced."""
        if path in self._objects:
            raise ValueError(f"{path} is exported already")
        self._objects[path] = {export.interface.name: export for export in exports}
        if self._is_managed(path):
            interfaces = {export.interface.name: export.values for export in exports}
            self._connection.emit(
                self._root, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, interfaces]
            )

    def unexport(self, path: str) -> None:
        """Remove the object at ``path``; one below the root is announced."""
        exports = self._objects.pop(path)
        if self._is_managed(path):
            self._connection.emit(
                self._root, OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, list(exports)]
            )

    def change(
        self, path: str, interface: str, changes: Mapping[str, Any], *, droppable: bool = False
    ) -> None:
        """Set properties; one PropertiesChanged tells those that really changed.

        A ``droppable`` change (progress) is announced with the next one while the bus is slow.
        """
        export = self._objects[path][interface]
        if not export.change(changes) or (droppable and self._connection.congested):
            return
        changed, invalidated = export.announcement()
        if changed or invalidated:
            self._connection.emit(
                path, PROPERTIES_INTERFACE, "PropertiesChanged", "sa{sv}as", [interface, changed, invalidated]
            )

    def emit(self, path: str, interface: str, signal: str, *arguments: Any) -> None:
        """Send a signal of an exported interface."""
        signature = self._objects[path][interface].interface.signals[signal]
        self._connection.emit(path, interface, signal, signature, arguments)

    def _is_managed(self, path: str) -> bool:
        return path.startswith(self._root + "/")

    # dispatch

    def _dispatch(self, call: MethodCall) -> None:
        try:
            method, handler = self._find(call)
            if call.signature != method.signature:
                raise BusError(
                    ErrorName.INVALID_ARGS,
                    f"{method.name} takes arguments of type {method.signature!r}, not {call.signature!r}",
                )
            if inspect.iscoroutinefunction(handler):
                self._admit(call)
            result = handler(call)
            if inspect.iscoroutine(result):
                self._later(call, method, result)
                return
            assert not inspect.isawaitable(result)
            self._connection.reply(call, method.out_signature, result)
        except Exception as error:  # noqa: BLE001 (every call gets its answer)
            self._fail(call, error)

    def _later(self, call: MethodCall, method: Method, answer: Coroutine[Any, Any, Any]) -> None:
        """Reply when ``answer`` is there."""
        try:
            self._admit(call)
        except BusError:
            answer.close()
            raise
        waiting = self._wait(call, method, answer)
        try:
            task = self._tasks.create_task(waiting)
        except RuntimeError:
            waiting.close()
            answer.close()
            raise BusError(ErrorName.CANCELLED, _STOPPING) from None
        self._waiting[call.sender] += 1
        task.add_done_callback(partial(self._never_begun, call, answer))

    async def _wait(self, call: MethodCall, method: Method, answer: Coroutine[Any, Any, Any]) -> None:
        try:
            self._connection.reply(call, method.out_signature, await answer)
        except asyncio.CancelledError:
            self._connection.reply_error(call, ErrorName.CANCELLED, _STOPPING)
            raise
        except Exception as error:  # noqa: BLE001 (every call gets its answer)
            self._fail(call, error)
        finally:
            self._free(call)

    def _never_begun(self, call: MethodCall, answer: Coroutine[Any, Any, Any], _: asyncio.Task[None]) -> None:
        """Answer a call whose task was cancelled before its first step."""
        if inspect.getcoroutinestate(answer) == inspect.CORO_CREATED:
            answer.close()
            self._free(call)
            self._connection.reply_error(call, ErrorName.CANCELLED, _STOPPING)

    def _free(self, call: MethodCall) -> None:
        self._waiting[call.sender] -= 1
        if not self._waiting[call.sender]:
            del self._waiting[call.sender]

    def _admit(self, call: MethodCall) -> None:
        if self._waiting[call.sender] >= CALLS_PER_SENDER or self._waiting.total() >= CALLS_IN_ALL:
            raise BusError(ErrorName.LIMITS_EXCEEDED, "too many calls are waiting for their answer")

    def _fail(self, call: MethodCall, error: Exception) -> None:
        known = error if isinstance(error, BusError) else self._translate(error)
        if known is None:
            _logger.error("call of %s failed", call.member, exc_info=error)
            known = BusError(ErrorName.INTERNAL, _INTERNAL)
        if not isinstance(known, BusClosed):
            self._connection.reply_error(call, known.name, known.message)

    def _find(self, call: MethodCall) -> tuple[Method, Handler]:
        if call.oversize:
            raise BusError(ErrorName.LIMITS_EXCEEDED, "the arguments are too long")
        if call.interface is not None:
            interface, handlers = self._interface_at(call.path, call.interface)
            if call.member not in handlers:
                raise BusError(UNKNOWN_METHOD, f"{call.interface} has no method {call.member}")
            return interface.methods[call.member], handlers[call.member]
        for name in (*self._objects.get(call.path, {}), *self._standard_handlers):
            try:
                interface, handlers = self._interface_at(call.path, name)
            except BusError:
                continue
            if call.member in handlers:
                return interface.methods[call.member], handlers[call.member]
        self._check_path(call.path)
        raise BusError(UNKNOWN_METHOD, f"there is no method {call.member} at {call.path}")

    def _interface_at(self, path: str, name: str) -> tuple[Interface, Mapping[str, Handler]]:
        if name == PEER:
            return self.interfaces[name], self._standard_handlers[name]
        self._check_path(path)
        export = self._objects.get(path, {}).get(name)
        if export is not None:
            return export.interface, export.methods
        if name not in self._interfaces_at(path):
            raise BusError(UNKNOWN_INTERFACE, f"there is no interface {name} at {path}")
        return self.interfaces[name], self._standard_handlers[name]

    def _check_path(self, path: str) -> None:
        if path not in self._objects and not self._children(path):
            raise BusError(ErrorName.UNKNOWN_OBJECT, f"there is no object {path}")

    def _interfaces_at(self, path: str) -> list[str]:
        """Names of the standard interfaces at ``path``, which exists."""
        names = [PEER, INTROSPECTABLE]
        if path in self._objects:
            names.append(PROPERTIES_INTERFACE)
        if path == self._root:
            names.append(OBJECT_MANAGER)
        return names

    def _children(self, path: str) -> list[str]:
        """Names of the nodes right below ``path``."""
        prefix = path.rstrip("/") + "/"
        found = {
            other.removeprefix(prefix).partition("/")[0]
            for other in self._objects
            if other.startswith(prefix)
        }
        return sorted(found - {""})

    # the interfaces of the specification

    async def _machine_id(self, _call: MethodCall) -> Sequence[Any]:
        return await self._connection.call(BUS, BUS_PATH, PEER, "GetMachineId", timeout=5.0)

    def _introspect(self, call: MethodCall) -> Sequence[Any]:
        exported = [export.interface.xml for export in self._objects.get(call.path, {}).values()]
        standard = [self.interfaces[name].xml for name in self._interfaces_at(call.path)]
        nodes = [f'  <node name="{name}"/>\n' for name in self._children(call.path)]
        return [f"{DOCTYPE}<node>\n{''.join(exported + standard + nodes)}</node>\n"]

    def _get(self, call: MethodCall) -> Sequence[Any]:
        return [self._value(call.path, *call.body)]

    def _value(self, path: str, interface: str, name: str) -> Variant:
        for export in self._exports(path, interface):
            if name in export.values:
                return export.values[name]
        raise BusError(UNKNOWN_PROPERTY, f"there is no property {name[:64]!a}")

    async def _set(self, call: MethodCall) -> Sequence[Any]:
        interface, name, value = call.body
        self._value(call.path, interface, name)
        export = next(e for e in self._exports(call.path, interface) if name in e.values)
        if name not in export.setters:
            raise BusError(PROPERTY_READ_ONLY, "the property cannot be set")
        if value.signature != (expected := export.interface.properties[name].signature):
            raise BusError(
                ErrorName.INVALID_ARGS, f"{name} is of type {expected!r}, not {value.signature[:64]!a}"
            )
        await export.setters[name](call, value.value)
        return []

    def _get_all(self, call: MethodCall) -> Sequence[Any]:
        (interface,) = call.body
        return [
            {name: v for export in self._exports(call.path, interface) for name, v in export.values.items()}
        ]

    def _exports(self, path: str, interface: str) -> list[Export]:
        """The interfaces with properties that a call means; an empty name means all."""
        exports = self._objects[path]
        if interface == "":
            return list(exports.values())
        if interface in exports:
            return [exports[interface]]
        if interface in self._interfaces_at(path):
            return []
        raise BusError(UNKNOWN_INTERFACE, f"there is no interface {interface[:64]!a} at {path}")

    def _managed_objects(self, _call: MethodCall) -> Sequence[Any]:
        return [
            {
                path: {name: export.values for name, export in exports.items()}
                for path, exports in self._objects.items()
                if self._is_managed(path)
            }
        ]
