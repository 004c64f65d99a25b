"""Deployments: what is installed on a host, and every change of it."""
