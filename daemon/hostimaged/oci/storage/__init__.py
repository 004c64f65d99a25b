"""containers-storage, the image store of podman and skopeo, read without either (overlay driver only)."""
