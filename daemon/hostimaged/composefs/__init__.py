"""Formats and the store: fs-verity digests, dump files, trees, EROFS images, splitstreams, the repository.

Byte-compatible with composefs-rs 0.9. Plain synchronous code, usable without the daemon. OCI is unknown here.
"""
