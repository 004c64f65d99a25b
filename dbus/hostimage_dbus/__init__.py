"""The wire contract of hostimaged: what the daemon and every client share.

Holds names, error names, the introspection XML, the transport and the object server. Knows neither the
daemon nor the client.
"""
