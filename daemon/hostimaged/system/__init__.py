"""What touches the operating system: syscalls, durable files, locks, host paths, child processes.

Plain synchronous code without knowledge of images; the only package that uses ``fcntl`` and ``ctypes``.
"""
