"""`runk`: an OCI runtime's command line over the container engine, for containers on the host itself."""
