"""OCI images in a composefs repository: references, sources, layers, manifests, the pull."""
