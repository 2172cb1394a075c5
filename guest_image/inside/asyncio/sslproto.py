"""No TLS in the guest: vsock carries nothing that anybody else could read."""
