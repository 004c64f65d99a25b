"""A mock of hostimaged for authors of frontends: it plays scenarios on a private bus and changes no host.

``python -m hostimage_dbus.mock --own-bus --scenario update-available``. It serves the shipped interfaces, so
that a frontend that works with it can talk to the real daemon. What it does not do:
authorisation, persistence, anything with an image.
"""
